/* What a child writes to a pipe, read by who does not sleep while the writer is on its way, and
 * cut into lines.
 *
 * All of it is read into the bytes object that it is given out as. Most of what a large output
 * costs is the memory that it comes to lie in: the kernel clears each page and maps it. That is
 * done while the writer writes.
 */
#include "_python.h"

#include "_output.h"

#include <dlfcn.h>
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE /* Linux 5.14 */
#define MADV_POPULATE_WRITE 23
#endif

#define SMALLEST_PAGE 4096
#define CHUNK ((Py_ssize_t)65536) /* what a pipe holds */
#define CHUNKS 4 /* that are read at once: as much as asyncio's transports ask for */

/* From here on malloc() gives a mapping of its own (the largest value that glibc has for
 * M_MMAP_THRESHOLD). If that is whole tables of pages, then mremap() moves tables, not pages. */
#define OWN_MAPPING ((Py_ssize_t)32 << 20)
#define PAGE_TABLE ((Py_ssize_t)2 << 20)
#define HEADERS ((Py_ssize_t)128) /* more than malloc() and Python put before it */

/* How long a writer is waited for that a full pipe had held up, in nanoseconds. It is on its way
 * then; sleeping would cost more, as each side would have to be woken for each chunk. */
#define PATIENCE 30000
#define IMPATIENCE 64 /* for so many chunks it is not waited for after that was in vain */
#define ACQUAINTANCE 2 /* and for so many after the first one, of those that a loop hands on */

struct output {
    PyObject_HEAD
    PyObject *bytes; /* its size is the capacity; NULL: nothing was kept yet */
    Py_ssize_t used;
    int is_shared; /* others have `bytes` too */
    int is_lost;   /* there was no memory for it */
    pid_t busy;    /* who has it in hand: NOBODY, WITH_THE_LOCK, or else the process */
    int impatience;
};

/* --- its memory ---------------------------------------------------------------- */

/* _PyBytes_Resize(), which is not in the stable ABI; without it there are copies. */
static int (*resize_in_place)(PyObject **, Py_ssize_t);

static PyObject *
resized(PyObject *bytes, Py_ssize_t used, Py_ssize_t size, int is_shared)
{
    if (!is_shared && resize_in_place != NULL) {
        resize_in_place(&bytes, size);
        return bytes; /* NULL if it has failed */
    }
    PyObject *copy = PyBytes_FromStringAndSize(NULL, size);
    if (copy != NULL)
        memcpy(PyBytes_AsString(copy), PyBytes_AsString(bytes), (size_t)used);
    Py_DECREF(bytes);
    return copy;
}

/* What is reserved beyond what is needed is not touched, but counts where address space does. */
static Py_ssize_t
roomy(Py_ssize_t needed)
{
    if (needed < OWN_MAPPING)
        return needed + needed / 2;
    Py_ssize_t size = needed + needed / 8;
    return (size + HEADERS + PAGE_TABLE - 1) / PAGE_TABLE * PAGE_TABLE - HEADERS;
}

/* Makes room for `more` bytes, or loses all that is there, for good; whether there is room. */
static int
reserve(struct output *self, Py_ssize_t more)
{
    if (self->is_lost)
        return 0;
    Py_ssize_t capacity = self->bytes == NULL || self->is_shared ? 0 : PyBytes_Size(self->bytes);
    if (self->bytes != NULL && (more == 0 || more <= capacity - self->used))
        return 1;
    PyObject *bytes = self->bytes;
    self->bytes = NULL;
    if (more > PY_SSIZE_T_MAX / 2 - self->used)
        Py_XDECREF(bytes);
    else if (bytes == NULL)
        self->bytes = PyBytes_FromStringAndSize(NULL, roomy(more));
    else
        self->bytes = resized(bytes, self->used, roomy(self->used + more), self->is_shared);
    self->is_shared = 0;
    if (self->bytes != NULL)
        return 1;
    PyErr_Clear();
    self->used = 0;
    self->is_lost = 1;
    return 0;
}

/* Has the pages there before they are read into: a read that faults holds the pipe's lock. */
static void
populate(char *begin, char *end)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t first = ((uintptr_t)begin + page - 1) & ~(page - 1), last = (uintptr_t)end & ~(page - 1);
    if (first >= last || madvise((void *)first, last - first, MADV_POPULATE_WRITE) == 0)
        return;
    for (volatile char *byte = (char *)first; byte < (char *)last; byte += SMALLEST_PAGE)
        *byte = 0;
}

/* --- reading ------------------------------------------------------------------- */

static void
relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t
now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static ssize_t
read_in_patience(int descriptor, char *to, size_t size)
{
    int64_t end = now() + PATIENCE;
    ssize_t got;
    do {
        for (int i = 0; i < 20; i++) /* each read takes the lock that the writer needs */
            relax();
        got = read(descriptor, to, size);
    } while (got < 0 && errno == EAGAIN && now() < end);
    return got;
}

/* Reads at most `size` bytes, for which there is room, in chunks; what the last read() gave. */
static ssize_t
read_chunks(struct output *self, int descriptor, char *to, Py_ssize_t size, char *capacity_end)
{
    ssize_t got = 0;
    for (int i = 0; i < CHUNKS && size > 0; i++) {
        int was_full = got == CHUNK;
        size_t wanted = (size_t)(size < CHUNK ? size : CHUNK);
        got = read(descriptor, to, wanted);
        if (got < 0 && errno == EAGAIN && was_full && self->impatience-- <= 0) {
            got = read_in_patience(descriptor, to, wanted);
            self->impatience = got < 0 ? IMPATIENCE : 0;
        }
        if (got <= 0)
            break;
        self->used += got;
        to += got;
        size -= got;
        if (got == CHUNK)
            populate(to, capacity_end - to < CHUNK ? capacity_end : to + CHUNK);
    }
    return got;
}

/* --- chunks that are read by the loop ------------------------------------------- */

/* The pipe that gave this thread the last whole chunk. Where two take turns neither is waited for:
 * the one has something to read while the writer of the other is on its way. */
static _Thread_local struct {
    int descriptor;
    int impatience;
} stream = {-1, 0};

static int
poll_in_patience(int descriptor)
{
    struct pollfd polled = {.fd = descriptor, .events = POLLIN};
    int64_t end = now() + PATIENCE;
    while (poll(&polled, 1, 0) <= 0) {
        if (now() >= end)
            return 0;
        relax();
    }
    return 1;
}

/* To be called before the loop asks epoll again. Once that has found the pipe empty it hears of it
 * only when the writer has written all, and sleeps until then, though the first page is there.
 * The lock of the interpreter is kept: to have it back can take longer than all this. */
static PyObject *
wait_for_writer(PyObject *Py_UNUSED(module), PyObject *number)
{
    long descriptor = PyLong_AsLong(number);
    if (descriptor == -1 && PyErr_Occurred() != NULL)
        return NULL;
    int is_there = 0;
    if (descriptor != stream.descriptor) {
        stream.descriptor = (int)descriptor;
        stream.impatience = ACQUAINTANCE;
    }
    else if (stream.impatience-- <= 0) {
        is_there = poll_in_patience(stream.descriptor);
        stream.impatience = is_there ? 0 : IMPATIENCE;
    }
    return PyBool_FromLong(is_there);
}

static PyObject *
take_line(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    if (count != 2 || !PyByteArray_Check(arguments[0])) {
        PyErr_SetString(PyExc_TypeError, "take_line() takes a bytearray and a number");
        return NULL;
    }
    /* Of a stream's limit, which can be any number; asyncio compares all but these itself. */
    Py_ssize_t longest = 0, size = 0;
    if (PyLong_Check(arguments[1]))
        longest = PyNumber_AsSsize_t(arguments[1], NULL);
    PyObject *line;
    Py_BEGIN_CRITICAL_SECTION(arguments[0]);
    const char *start = PyByteArray_AsString(arguments[0]);
    if (longest > 0) {
        size = PyByteArray_Size(arguments[0]);
        const char *end = memchr(start, '\n', (size_t)(longest < size ? longest + 1 : size));
        size = end == NULL ? 0 : end + 1 - start;
    }
    line = PyBytes_FromStringAndSize(start, size);
    if (line != NULL && size > 0 && PySequence_DelSlice(arguments[0], 0, size) < 0)
        Py_CLEAR(line);
    Py_END_CRITICAL_SECTION();
    return line;
}

static PyMethodDef functions[] = {
    {"take_line", (PyCFunction)(void *)take_line, METH_FASTCALL, NULL},
    {"wait_for_writer", wait_for_writer, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

/* --- the type ------------------------------------------------------------------ */

#define NOBODY 0
#define WITH_THE_LOCK (-1)

/* Without the lock of the interpreter, or where there is none, another thread could come. In a
 * forked copy of the program the thread that had it in hand without the lock is not there. */
static int
begin(struct output *self, pid_t us)
{
    pid_t found = NOBODY;
    while (!__atomic_compare_exchange_n(&self->busy, &found, us, 0, __ATOMIC_ACQUIRE,
                                        __ATOMIC_RELAXED)) {
        if (found == WITH_THE_LOCK || found == getpid()) {
            PyErr_SetString(PyExc_RuntimeError, "another thread has this output in hand");
            return 0;
        }
    }
    return 1;
}

static void
finish(struct output *self)
{
    __atomic_store_n(&self->busy, NOBODY, __ATOMIC_RELEASE);
}

static PyObject *
output_write(PyObject *object, PyObject *data)
{
    struct output *self = (struct output *)object;
    char *string;
    Py_ssize_t length;
    if (PyBytes_AsStringAndSize(data, &string, &length) < 0
        || !begin(self, WITH_THE_LOCK))
        return NULL;
    if (self->bytes == NULL && !self->is_lost && PyBytes_CheckExact(data)) {
        self->bytes = Py_NewRef(data);
        self->is_shared = 1;
        self->used = length;
    }
    else if (reserve(self, length)) {
        memcpy(PyBytes_AsString(self->bytes) + self->used, string, (size_t)length);
        self->used += length;
    }
    Py_ssize_t used = self->used;
    int is_lost = self->is_lost;
    finish(self);
    return is_lost ? PyErr_NoMemory() : PyLong_FromSsize_t(used);
}

static PyObject *
output_read(PyObject *object, PyObject *arguments)
{
    struct output *self = (struct output *)object;
    int descriptor, error = 0;
    Py_ssize_t most = PY_SSIZE_T_MAX;
    if (!PyArg_ParseTuple(arguments, "i|n:read", &descriptor, &most) || !begin(self, getpid()))
        return NULL;
    Py_ssize_t size = most - self->used < CHUNK * CHUNKS ? most - self->used : CHUNK * CHUNKS;
    ssize_t got = 0;
    if (size > 0 && reserve(self, size)) {
        char *start = PyBytes_AsString(self->bytes), *end = start + PyBytes_Size(self->bytes);
        Py_BEGIN_ALLOW_THREADS
        got = read_chunks(self, descriptor, start + self->used, size, end);
        error = errno;
        Py_END_ALLOW_THREADS
    }
    finish(self);
    if (got < 0 && error != EAGAIN && error != EINTR) {
        errno = error;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    return PyBool_FromLong(got != 0);
}

static PyObject *
output_take(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    struct output *self = (struct output *)object;
    if (!begin(self, WITH_THE_LOCK))
        return NULL;
    PyObject *bytes = self->bytes;
    Py_ssize_t used = self->used;
    int is_lost = self->is_lost, is_shared = self->is_shared;
    self->bytes = NULL;
    self->used = 0;
    self->is_lost = self->is_shared = 0;
    finish(self);
    if (is_lost)
        return PyErr_NoMemory();
    if (bytes == NULL)
        return PyBytes_FromStringAndSize(NULL, 0);
    return PyBytes_Size(bytes) == used ? bytes : resized(bytes, used, used, is_shared);
}

static Py_ssize_t
output_length(PyObject *object)
{
    return ((struct output *)object)->used;
}

static void
output_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    Py_XDECREF(((struct output *)object)->bytes);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

static PyMethodDef methods[] = {
    {"write", output_write, METH_O, NULL},
    {"read", output_read, METH_VARARGS, NULL},
    {"take", output_take, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_dealloc, (void *)output_dealloc},
    {Py_tp_methods, methods},
    {Py_sq_length, (void *)output_length},
    {0, NULL},
};

static PyType_Spec specification = {
    .name = "aioreap._clone.Output",
    .basicsize = sizeof(struct output),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = slots,
};

int
output_add(PyObject *module)
{
    *(void **)&resize_in_place = dlsym(RTLD_DEFAULT, "_PyBytes_Resize");
    PyObject *type = PyType_FromModuleAndSpec(module, &specification, NULL);
    int failed = type == NULL || PyModule_AddType(module, (PyTypeObject *)type) < 0
                 || PyModule_AddFunctions(module, functions) < 0;
    Py_XDECREF(type);
    return failed ? -1 : 0;
}
