/* The binding of _spawn.c: Python objects are turned into plain memory before
 * the clone, and nothing of Python is touched by the child. */
#include "_python.h"

#include "_output.h"
#include "_spawn.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

/* Module slots by their numbers: the headers of the limited API of 3.11 do not
 * name them, and an interpreter refuses a slot that it does not know. */
#define SLOT_MULTIPLE_INTERPRETERS 3 /* Py_mod_multiple_interpreters, 3.12 */
#define PER_INTERPRETER_GIL_SUPPORTED ((void *)2)
#define SLOT_GIL 4 /* Py_mod_gil, 3.13 */
#define GIL_NOT_USED ((void *)1)

#ifndef F_DUPFD_QUERY /* Linux 6.10 */
#define F_DUPFD_QUERY 1027
#endif

#define WAIT_FOR_PIDFD 3 /* P_PIDFD, which older C libraries do not name */
#define PIDFD_GET_INFO 0xC040FF0BUL /* _IOWR(0xFF, 11, struct pidfd_info), Linux 6.13 */
#define PIDFD_INFO_CGROUPID (UINT64_C(1) << 2)
#define PIDFD_INFO_EXIT (UINT64_C(1) << 3) /* Linux 6.15 */

struct pidfd_info { /* PIDFD_INFO_SIZE_VER0 */
    uint64_t mask, cgroupid;
    uint32_t ids[11];
    int32_t exit_code;
};
_Static_assert(sizeof(struct pidfd_info) == 64, "what PIDFD_GET_INFO says");

static const char BLOCK_NAME[] = "aioreap._clone.block";

extern char **environ;

/* --- from Python objects to the block ------------------------------------------ */

/* The bytes that `tuple` of bytes needs as a NULL-terminated array of strings, or -1. */
static Py_ssize_t
strings_size(PyObject *tuple)
{
    Py_ssize_t count = PyTuple_Size(tuple);
    if (count < 0)
        return -1;
    Py_ssize_t size = (count + 1) * (Py_ssize_t)sizeof(char *);
    for (Py_ssize_t i = 0; i < count; i++) {
        char *string;
        Py_ssize_t length;
        if (PyBytes_AsStringAndSize(PyTuple_GetItem(tuple, i), &string, &length) < 0)
            return -1;
        if (memchr(string, '\0', (size_t)length) != NULL) {
            PyErr_SetString(PyExc_ValueError, "embedded null byte");
            return -1;
        }
        size += length + (Py_ssize_t)sizeof(char *);
    }
    return size;
}

static char *
copy_string(struct spawn *s, const char *string, size_t length)
{
    char *copy = spawn_allocate(s, length + 1);
    memcpy(copy, string, length);
    copy[length] = '\0';
    return copy;
}

static char **
copy_strings(struct spawn *s, PyObject *tuple)
{
    Py_ssize_t count = PyTuple_Size(tuple);
    char **array = spawn_allocate(s, (size_t)(count + 1) * sizeof(char *));
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *item = PyTuple_GetItem(tuple, i);
        array[i] = copy_string(s, PyBytes_AsString(item), (size_t)PyBytes_Size(item));
    }
    array[count] = NULL;
    return array;
}

static Py_ssize_t
environ_size(void)
{
    size_t size = sizeof(char *);
    for (char **variable = environ; variable != NULL && *variable != NULL; variable++)
        size += strlen(*variable) + 2 * sizeof(char *);
    return (Py_ssize_t)size;
}

/* Copies what fits into the `room` that environ_size() found to be needed: a
 * thread outside the interpreter may call setenv() between the two. */
static char **
copy_environ(struct spawn *s, size_t room)
{
    size_t count = 0, copied = 0;
    while (environ != NULL && environ[count] != NULL && (count + 2) * sizeof(char *) <= room)
        count++;
    char **array = spawn_allocate(s, (count + 1) * sizeof(char *));
    room -= (count + 1) * sizeof(char *);
    for (size_t i = 0; i < count; i++) {
        size_t length = strlen(environ[i]);
        if (length + sizeof(char *) > room)
            break;
        room -= length + sizeof(char *);
        array[copied++] = copy_string(s, environ[i], length);
    }
    array[copied] = NULL;
    return array;
}

static int
copy_descriptors(struct spawn *s, PyObject *tuple)
{
    Py_ssize_t count = PyTuple_Size(tuple);
    s->descriptors = spawn_allocate(s, (size_t)count * sizeof *s->descriptors);
    s->descriptor_count = (size_t)count;
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *pair = PyTuple_GetItem(tuple, i);
        if (!PyArg_ParseTuple(pair, "ii", &s->descriptors[i].source, &s->descriptors[i].target))
            return -1;
    }
    return 0;
}

static int
copy_groups(struct spawn *s, PyObject *groups)
{
    if (groups == Py_None) {
        s->group_count = -1;
        return 0;
    }
    s->group_count = PyTuple_Size(groups);
    s->groups = spawn_allocate(s, (size_t)s->group_count * sizeof *s->groups);
    for (Py_ssize_t i = 0; i < s->group_count; i++) {
        unsigned long group = PyLong_AsUnsignedLong(PyTuple_GetItem(groups, i));
        if (PyErr_Occurred())
            return -1;
        s->groups[i] = (uint32_t)group;
    }
    return 0;
}

/* --- the functions ------------------------------------------------------------- */

static void
release_block(PyObject *capsule)
{
    struct spawn *s = PyCapsule_GetPointer(capsule, BLOCK_NAME);
    if (s->pid > 0 && !s->taken && s->owner == getpid())
        spawn_abandon(s);
    spawn_release(s);
}

static PyObject *
none(void)
{
    return Py_NewRef(Py_None);
}

static PyObject *
raise_errno(int error)
{
    errno = error;
    return PyErr_SetFromErrno(PyExc_OSError);
}

static PyObject *
clone_spawn(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    PyObject *paths, *argv, *envp, *descriptors, *cwd = Py_None, *groups = Py_None;
    unsigned long long clone_flags;
    int exit_signal, legacy_clone;
    /* What is not set, and what is for most children. */
    int cwd_descriptor = -1, process_group = -1, umask = -1, cgroup = -1, cgroup_procs = -1;
    int status = -1, parent = -1, close_fds = 1, restore_signals = 1, new_session = 0;
    int no_new_privs = 0, pdeathsig = 0, tree = 0, detached = 0;
    long long uid = -1, gid = -1;
    if (!PyArg_ParseTuple(arguments, "O!O!OO!Kip|OipppipiLLOiippiip:spawn", &PyTuple_Type, &paths,
                          &PyTuple_Type, &argv, &envp, &PyTuple_Type, &descriptors, &clone_flags,
                          &exit_signal, &legacy_clone, &cwd, &cwd_descriptor, &close_fds,
                          &restore_signals, &new_session, &process_group, &no_new_privs, &umask,
                          &uid, &gid, &groups, &cgroup, &cgroup_procs, &pdeathsig, &tree, &status,
                          &parent, &detached))
        return NULL;

    Py_ssize_t size = 0, part;
    char *cwd_string = NULL;
    Py_ssize_t cwd_length = 0;
    if ((part = strings_size(paths)) < 0)
        return NULL;
    size += part;
    if ((part = strings_size(argv)) < 0)
        return NULL;
    size += part;
    Py_ssize_t environment_size = envp == Py_None ? environ_size() : strings_size(envp);
    if (environment_size < 0)
        return NULL;
    size += environment_size;
    if (cwd != Py_None) {
        if (PyBytes_AsStringAndSize(cwd, &cwd_string, &cwd_length) < 0)
            return NULL;
        if (memchr(cwd_string, '\0', (size_t)cwd_length) != NULL) {
            PyErr_SetString(PyExc_ValueError, "embedded null byte");
            return NULL;
        }
    }
    size += cwd_length + 2 * (Py_ssize_t)sizeof(char *);
    size += (PyTuple_Size(descriptors) + 1) * (Py_ssize_t)sizeof(struct spawn_descriptor);
    if (groups != Py_None) {
        if ((part = PyTuple_Size(groups)) < 0)
            return NULL;
        size += (part + 2) * (Py_ssize_t)sizeof(uint32_t);
    }

    struct spawn *s = spawn_new((size_t)size);
    if (s == NULL)
        return PyErr_SetFromErrno(PyExc_OSError);
    PyObject *block = PyCapsule_New(s, BLOCK_NAME, release_block);
    if (block == NULL) {
        spawn_release(s);
        return NULL;
    }
    s->paths = (const char **)copy_strings(s, paths);
    s->argv = copy_strings(s, argv);
    s->envp = envp == Py_None ? copy_environ(s, (size_t)environment_size)
                               : copy_strings(s, envp);
    s->cwd = cwd_string == NULL ? NULL : copy_string(s, cwd_string, (size_t)cwd_length);
    s->cwd_descriptor = cwd_descriptor;
    s->cgroup_procs = cgroup_procs;
    s->close_fds = close_fds;
    s->restore_signals = restore_signals;
    s->new_session = new_session;
    s->process_group = process_group;
    s->no_new_privs = no_new_privs;
    s->umask = umask;
    s->uid = uid;
    s->gid = gid;
    s->clone_flags = clone_flags;
    s->exit_signal = exit_signal;
    s->legacy_clone = legacy_clone;
    s->cgroup = cgroup;
    s->detached = detached;
    s->pdeathsig = pdeathsig;
    s->tree = tree;
    s->status = status;
    s->parent = parent;
    if (copy_descriptors(s, descriptors) < 0 || copy_groups(s, groups) < 0) {
        Py_DECREF(block);
        return NULL;
    }

    int error;
    Py_BEGIN_ALLOW_THREADS
    error = spawn_start(s);
    Py_END_ALLOW_THREADS
    if (error != 0) {
        Py_DECREF(block);
        return raise_errno(error);
    }
    PyObject *result = Py_BuildValue("iiiO", (int)s->pid, s->pidfd, s->pipe, block);
    Py_DECREF(block);
    return result;
}

static PyObject *
clone_outcome(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    PyObject *block;
    int exited;
    if (!PyArg_ParseTuple(arguments, "Op:outcome", &block, &exited))
        return NULL;
    struct spawn *s = PyCapsule_GetPointer(block, BLOCK_NAME);
    if (s == NULL)
        return NULL;
    if (!spawn_has_left(s, exited))
        return none();
    return Py_BuildValue("ii", (int)s->step, (int)s->error);
}

static PyObject *
clone_step(PyObject *Py_UNUSED(module), PyObject *block)
{
    struct spawn *s = PyCapsule_GetPointer(block, BLOCK_NAME);
    if (s == NULL)
        return NULL;
    return PyLong_FromLong((long)__atomic_load_n(&s->step, __ATOMIC_ACQUIRE));
}

static int
watch(int epoll, int descriptor)
{
    struct epoll_event event = {.events = EPOLLIN, .data.fd = descriptor};
    return epoll_ctl(epoll, EPOLL_CTL_ADD, descriptor, &event);
}

static PyObject *
clone_take(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    PyObject *block;
    int epoll = -1;
    if (!PyArg_ParseTuple(arguments, "O|i:take", &block, &epoll))
        return NULL;
    struct spawn *s = PyCapsule_GetPointer(block, BLOCK_NAME);
    if (s == NULL)
        return NULL;
    s->taken = 1;
    if (epoll < 0)
        return none();
    if (watch(epoll, s->pipe) < 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    if (watch(epoll, s->pidfd) < 0) {
        int error = errno;
        epoll_ctl(epoll, EPOLL_CTL_DEL, s->pipe, NULL);
        return raise_errno(error);
    }
    return none();
}

static void
unwatch(int epoll, int owner, int descriptor)
{
    if (getpid() == owner)
        epoll_ctl(epoll, EPOLL_CTL_DEL, descriptor, NULL);
}

static PyObject *
clone_unwatch(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    int epoll, owner, descriptor;
    if (!PyArg_ParseTuple(arguments, "iii:unwatch", &epoll, &owner, &descriptor))
        return NULL;
    unwatch(epoll, owner, descriptor);
    return none();
}

/* In one step for Python: no signal handler comes between the number given up and the close. */
static PyObject *
clone_close(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    int epoll, owner;
    PyObject *members, *holder, *name;
    if (!PyArg_ParseTuple(arguments, "iiO!OU:close", &epoll, &owner, &PyDict_Type, &members, &holder,
                          &name))
        return NULL;
    PyObject *none_left = PyLong_FromLong(-1);
    PyObject *number = none_left == NULL ? NULL : PyObject_GetAttr(holder, name);
    long descriptor = number == NULL ? -1 : PyLong_AsLong(number);
    if (descriptor >= 0 && PyObject_SetAttr(holder, name, none_left) == 0) {
        if (PyDict_DelItem(members, number) < 0)
            PyErr_Clear();
        unwatch(epoll, owner, (int)descriptor);
        close((int)descriptor);
    }
    Py_XDECREF(number);
    Py_XDECREF(none_left);
    return PyErr_Occurred() ? NULL : none();
}

static int
ask_for_exit_info(int pidfd, struct pidfd_info *info)
{
    /* An empty mask says that the task vanished while the kernel was looking: the next answer is
     * a whole one. */
    for (int attempt = 0; attempt < 8; attempt++) {
        memset(info, 0, sizeof *info);
        info->mask = PIDFD_INFO_EXIT | PIDFD_INFO_CGROUPID;
        if (ioctl(pidfd, PIDFD_GET_INFO, info) < 0)
            return -1;
        if (info->mask != 0)
            break;
    }
    return 0;
}

static PyObject *
exit_status(int status, const struct pidfd_info *info)
{
    if (info->mask & PIDFD_INFO_EXIT && info->mask & PIDFD_INFO_CGROUPID)
        return Py_BuildValue("iK", status, (unsigned long long)info->cgroupid);
    return Py_BuildValue("iO", status, Py_None);
}

static PyObject *
clone_reap(PyObject *Py_UNUSED(module), PyObject *argument)
{
    int pidfd = PyObject_AsFileDescriptor(argument);
    if (pidfd < 0)
        return NULL;
    siginfo_t found = {.si_pid = 0};
    int result = waitid((idtype_t)WAIT_FOR_PIDFD, (id_t)pidfd, &found, WEXITED | WNOHANG);
    if (result < 0 && errno != EAGAIN) /* that of a pidfd which libuv has made non-blocking */
        return PyErr_SetFromErrno(PyExc_OSError);
    if (result < 0 || found.si_pid == 0)
        return none();
    struct pidfd_info info;
    if (ask_for_exit_info(pidfd, &info) < 0)
        info.mask = 0;
    if (found.si_code == CLD_EXITED)
        return exit_status((found.si_status & 0xff) << 8, &info);
    return exit_status(found.si_status | (found.si_code == CLD_DUMPED ? 0x80 : 0), &info);
}

static PyObject *
clone_exit_info(PyObject *Py_UNUSED(module), PyObject *argument)
{
    int pidfd = PyObject_AsFileDescriptor(argument);
    if (pidfd < 0)
        return NULL;
    struct pidfd_info info;
    if (ask_for_exit_info(pidfd, &info) < 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    return info.mask & PIDFD_INFO_EXIT ? exit_status((int)info.exit_code, &info) : none();
}

static PyObject *
clone_probe(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    unsigned long long flags;
    int legacy_clone;
    if (!PyArg_ParseTuple(arguments, "Kp:probe", &flags, &legacy_clone))
        return NULL;
    return PyLong_FromLong(spawn_probe(flags, legacy_clone));
}

static PyObject *
clone_environment(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    PyObject *list = PyList_New(0);
    for (char **variable = environ; list != NULL && variable != NULL && *variable != NULL;
         variable++) {
        PyObject *bytes = PyBytes_FromString(*variable);
        if (bytes == NULL || PyList_Append(list, bytes) < 0)
            Py_CLEAR(list);
        Py_XDECREF(bytes);
    }
    if (list == NULL)
        return NULL;
    PyObject *tuple = PyList_AsTuple(list);
    Py_DECREF(list);
    return tuple;
}

static int
is_working_directory(int descriptor)
{
    struct stat now, then;
    return stat(".", &now) == 0 && fstat(descriptor, &then) == 0 && now.st_dev == then.st_dev
        && now.st_ino == then.st_ino;
}

/* Whether a child gets as `target` the open file that `copy` is of, or nothing if that is -1. */
static int
is_inherited(int target, int copy)
{
    int flags = fcntl(target, F_GETFD);
    int inheritable = flags >= 0 && !(flags & FD_CLOEXEC);
    if (copy < 0 || !inheritable)
        return copy < 0 && !inheritable;
    return fcntl(target, F_DUPFD_QUERY, copy) == 1;
}

static PyObject *
clone_inherits(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    int directory, copies[3];
    if (!PyArg_ParseTuple(arguments, "iiii:inherits", &directory, &copies[0], &copies[1],
                          &copies[2]))
        return NULL;
    int same;
    Py_BEGIN_ALLOW_THREADS /* the directory's file system may be one that takes its time */
    same = is_working_directory(directory);
    for (int target = 0; same && target < 3; target++)
        same = is_inherited(target, copies[target]);
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(same);
}

static PyObject *
clone_set_no_new_privs(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    return none();
}

static PyObject *
clone_set_pdeathsig(PyObject *Py_UNUSED(module), PyObject *parent)
{
    long pid = PyLong_AsLong(parent);
    if (pid == -1 && PyErr_Occurred())
        return NULL;
    if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) < 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    if (getppid() != pid)
        return raise_errno(EREMOTE);
    return none();
}

static PyObject *
clone_blocks(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    return PyLong_FromLong(spawn_count());
}

/* --- the module ---------------------------------------------------------------- */

static PyMethodDef methods[] = {
    {"spawn", clone_spawn, METH_VARARGS, NULL},
    {"outcome", clone_outcome, METH_VARARGS, NULL},
    {"step", clone_step, METH_O, NULL},
    {"take", clone_take, METH_VARARGS, NULL},
    {"unwatch", clone_unwatch, METH_VARARGS, NULL},
    {"close", clone_close, METH_VARARGS, NULL},
    {"reap", clone_reap, METH_O, NULL},
    {"exit_info", clone_exit_info, METH_O, NULL},
    {"probe", clone_probe, METH_VARARGS, NULL},
    {"environment", clone_environment, METH_NOARGS, NULL},
    {"inherits", clone_inherits, METH_VARARGS, NULL},
    {"set_no_new_privs", clone_set_no_new_privs, METH_NOARGS, NULL},
    {"set_pdeathsig", clone_set_pdeathsig, METH_O, NULL},
    {"blocks", clone_blocks, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static int
add_names(PyObject *module)
{
#define ADD(name)                                                          \
    if (PyModule_AddIntConstant(module, #name, (long)SPAWN_##name) < 0) \
        return -1
    ADD(STEP_START);
    ADD(STEP_CGROUP);
    ADD(STEP_DESCRIPTORS);
    ADD(STEP_CHDIR);
    ADD(STEP_SESSION);
    ADD(STEP_PROCESS_GROUP);
    ADD(STEP_GROUPS);
    ADD(STEP_GID);
    ADD(STEP_UID);
    ADD(STEP_NO_NEW_PRIVS);
    ADD(STEP_PARENT_DEATH);
    ADD(STEP_USER_NAMESPACE);
    ADD(STEP_INIT);
    ADD(STEP_EXEC);
    ADD(CAN_SHARE_MEMORY);
    ADD(STOP_PROGRAM);
    ADD(SIGNAL_GROUP);
#undef ADD
    if (PyModule_AddIntConstant(module, "PIDFD_INFO_EXIT", (long)PIDFD_INFO_EXIT) < 0)
        return -1;
    return output_add(module);
}

#define EXEC_SLOT {Py_mod_exec, (void *)add_names}

static PyModuleDef_Slot slots_of_311[] = {EXEC_SLOT, {0, NULL}};
static PyModuleDef_Slot slots_of_312[] = {
    EXEC_SLOT,
    {SLOT_MULTIPLE_INTERPRETERS, PER_INTERPRETER_GIL_SUPPORTED},
    {0, NULL},
};
static PyModuleDef_Slot slots_since_313[] = {
    EXEC_SLOT,
    {SLOT_MULTIPLE_INTERPRETERS, PER_INTERPRETER_GIL_SUPPORTED},
    {SLOT_GIL, GIL_NOT_USED},
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "aioreap._clone",
    .m_size = 0,
    .m_methods = methods,
};

PyMODINIT_FUNC
PyInit__clone(void)
{
    if (Py_Version >= 0x030D0000)
        definition.m_slots = slots_since_313;
    else if (Py_Version >= 0x030C0000)
        definition.m_slots = slots_of_312;
    else
        definition.m_slots = slots_of_311;
    return PyModuleDef_Init(&definition);
}
