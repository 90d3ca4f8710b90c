/* The child's way from clone to exec, with no Python around it.
 *
 * It spawns itself in every way that the machine offers, one line for each
 * check. As the init of a bare kernel it does so without /proc, then with it,
 * and powers off.
 */
#define _GNU_SOURCE
#include "../../aioreap/_spawn.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#ifndef SYS_close_range
#define SYS_close_range 436
#endif
#ifndef CLONE_PIDFD
#define CLONE_PIDFD 0x00001000
#endif
#define CLEAR_SIGHAND (UINT64_C(1) << 32)
#define AUTOREAP (UINT64_C(1) << 34)
#define PIDFD_PROCESS 3 /* P_PIDFD */
#define GET_INFO 0xC040FF0BUL /* PIDFD_GET_INFO with PIDFD_INFO_SIZE_VER0 */
#define INFO_EXIT (UINT64_C(1) << 3)

#define HIGHEST 1024 /* no descriptor here has this number or a higher one */

struct info { /* struct pidfd_info */
    uint64_t mask, cgroup;
    uint32_t ids[11];
    int32_t status;
};

struct mode {
    const char *name;
    uint64_t flags;
    int legacy;
};

static const struct mode modes[] = {
    {"clone3, shared memory", CLONE_VM | CLEAR_SIGHAND, 0},
    {"clone3, shared memory, no CLEAR_SIGHAND", CLONE_VM, 0},
    {"clone, shared memory", CLONE_VM, 1},
    {"clone3, copied memory", CLEAR_SIGHAND, 0},
    {"clone, copied memory", 0, 1},
    {"clone3, shared memory, AUTOREAP", CLONE_VM | CLEAR_SIGHAND | AUTOREAP, 0},
    {"clone3, copied memory, AUTOREAP", CLEAR_SIGHAND | AUTOREAP, 0},
};

static char self[4096];
static int passed, failed;
static const char *round_name = "";
static const struct mode *mode;

static void
check(int good, const char *what)
{
    good ? passed++ : failed++;
    printf("%-6s %s%s: %s\n", good ? "ok" : "FAILED", mode ? mode->name : "all", round_name, what);
    fflush(stdout);
}

/* --- what a child does --------------------------------------------------------- */

static uint64_t
signal_mask(void)
{
    uint64_t mask = 0;
    syscall(SYS_rt_sigprocmask, SIG_BLOCK, NULL, &mask, sizeof mask);
    return mask;
}

static int
is_default(int number)
{
    struct sigaction action;
    sigaction(number, NULL, &action);
    return action.sa_handler == SIG_DFL;
}

static unsigned long long
inode(int descriptor)
{
    struct stat status;
    return fstat(descriptor, &status) < 0 ? 0 : (unsigned long long)status.st_ino;
}

/* Pairs of a descriptor and its inode; no other from 3 on may be open. */
static int
sees_descriptors(char **pair)
{
    char expected[HIGHEST] = {0};
    for (; pair[0] != NULL; pair += 2) {
        int descriptor = atoi(pair[0]);
        if (inode(descriptor) != strtoull(pair[1], NULL, 10))
            return 1;
        expected[descriptor] = 1;
    }
    for (int descriptor = 3; descriptor < HIGHEST; descriptor++)
        if (!expected[descriptor] && fcntl(descriptor, F_GETFD) >= 0)
            return 2;
    return 0;
}

static int
plays(const char *role, char **arguments)
{
    char directory[4096];
    if (strcmp(role, "exit") == 0)
        return atoi(arguments[0]);
    if (strcmp(role, "input") == 0)
        return read(0, directory, 1) != 0;
    if (strcmp(role, "descriptors") == 0)
        return sees_descriptors(arguments);
    if (strcmp(role, "directory") == 0)
        return getcwd(directory, sizeof directory) == NULL || strcmp(directory, arguments[0]) != 0;
    if (strcmp(role, "environment") == 0)
        return getenv("STANDALONE") == NULL || strcmp(getenv("STANDALONE"), "yes") != 0;
    if (strcmp(role, "signals") == 0) /* SIGUSR1 was handled, SIGUSR2 and SIGPIPE ignored */
        return signal_mask() != strtoull(arguments[0], NULL, 16) || !is_default(SIGUSR1) ||
               is_default(SIGUSR2) || !is_default(SIGPIPE);
    if (strcmp(role, "session") == 0)
        return getsid(0) != getpid() || getpgid(0) != getpid() || umask(0) != 027;
    return 99;
}

/* --- one spawn ----------------------------------------------------------------- */

struct end {
    int started; /* the errno of spawn_start() */
    uint32_t step;
    int32_t error;
    int status; /* a wait status */
};

static char *
keep(struct spawn *s, const char *string)
{
    return strcpy(spawn_allocate(s, strlen(string) + 1), string);
}

/* A spawn of this program: its arguments end with NULL. */
static struct spawn *
prepare(const char *const *arguments)
{
    size_t count = 0, size = 4096;
    while (arguments[count] != NULL)
        size += strlen(arguments[count++]) + 32;
    struct spawn *s = spawn_new(size);
    if (s == NULL)
        abort();
    s->argv = spawn_allocate(s, (count + 2) * sizeof *s->argv);
    s->argv[0] = keep(s, self);
    for (size_t i = 0; i < count; i++)
        s->argv[i + 1] = keep(s, arguments[i]);
    s->argv[count + 1] = NULL;
    s->paths = spawn_allocate(s, 2 * sizeof *s->paths);
    s->paths[0] = s->argv[0];
    s->paths[1] = NULL;
    s->envp = environ;
    s->cwd_descriptor = s->cgroup_procs = s->umask = s->process_group = -1;
    s->uid = s->gid = s->group_count = -1;
    s->close_fds = s->restore_signals = 1;
    s->clone_flags = mode->flags | CLONE_PIDFD;
    s->legacy_clone = mode->legacy;
    s->exit_signal = mode->flags & AUTOREAP ? 0 : SIGCHLD;
    return s;
}

static int
exit_status(int pidfd)
{
    struct pollfd readable = {pidfd, POLLIN, 0};
    poll(&readable, 1, -1);
    if (!(mode->flags & AUTOREAP)) {
        siginfo_t death = {0};
        if (waitid((idtype_t)PIDFD_PROCESS, (id_t)pidfd, &death, WEXITED) < 0)
            return -1;
        return death.si_code == CLD_EXITED ? death.si_status << 8
                                           : death.si_status | (death.si_code == CLD_DUMPED) << 7;
    }
    for (;;) { /* readable is not yet "exit info ready" */
        struct info info = {.mask = INFO_EXIT};
        if (ioctl(pidfd, GET_INFO, &info) == 0 && info.mask & INFO_EXIT)
            return info.status;
        sched_yield();
    }
}

static struct end
finish(struct spawn *s)
{
    struct pollfd events[] = {{s->pipe, POLLIN, 0}, {s->pidfd, POLLIN, 0}};
    while (!spawn_has_left(s, events[1].revents & POLLIN)) {
        poll(events, 2, 100);
        sched_yield();
    }
    struct end end = {0, s->step, s->error, exit_status(s->pidfd)};
    close(s->pipe);
    close(s->pidfd);
    spawn_release(s);
    return end;
}

static struct end
run(struct spawn *s)
{
    int error = spawn_start(s);
    if (error == 0)
        return finish(s);
    spawn_release(s);
    return (struct end){error, 0, 0, 0};
}

static int
exited(struct end end, int status)
{
    return end.started == 0 && end.step == SPAWN_STEP_EXEC && end.error == 0 &&
           end.status == status << 8;
}

static int
could_not(struct end end, enum spawn_step step, int error)
{
    return end.started == 0 && end.step == step && end.error == error && end.status == 127 << 8;
}

#define PREPARE(...) prepare((const char *const[]){__VA_ARGS__, NULL})

/* --- the checks ---------------------------------------------------------------- */

static void
check_statuses(void)
{
    enum { COUNT = 40 };
    char number[COUNT][12];
    struct spawn *together[COUNT];
    int right = 0, started = 0;
    for (int i = 0; i < COUNT; i++) {
        snprintf(number[i], sizeof number[i], "%d", i);
        right += exited(run(PREPARE("exit", number[i])), i);
    }
    check(right == COUNT, "each status is right, one after the other");
    right = 0;
    for (int i = 0; i < COUNT; i++)
        started += spawn_start(together[i] = PREPARE("exit", number[i])) == 0;
    for (int i = 0; i < COUNT && started == COUNT; i++)
        right += exited(finish(together[i]), i);
    check(right == COUNT, "each status is right, all together");
}

/* Its end would tell it too: the program runs until its input ends. */
static void
check_leaving(void)
{
    enum { PATIENCE = 10000 }; /* milliseconds */
    int input[2], left = 0;
    if (pipe2(input, O_CLOEXEC) < 0)
        abort();
    struct spawn_descriptor descriptor = {input[0], 0};
    struct spawn *s = PREPARE("input");
    s->descriptors = &descriptor;
    s->descriptor_count = 1;
    int error = spawn_start(s);
    for (int i = 0; error == 0 && i < PATIENCE && !(left = spawn_has_left(s, 0)); i++)
        poll(NULL, 0, 1);
    check(left, "it is seen to have left the memory while its program runs");
    close(input[0]);
    close(input[1]);
    if (error)
        spawn_release(s);
    else
        check(exited(finish(s), 0), "its program ran until then");
}

static void
check_exec(void)
{
    char below[sizeof self + 2];
    snprintf(below, sizeof below, "%s/x", self);
    const char *missing[] = {"/nonexistent/program", NULL};
    const char *directory[] = {"/", NULL};
    const char *telling[] = {"/nonexistent/program", "/", below, NULL};
    const char *second[] = {"/nonexistent/program", below, self, NULL};
    struct {
        const char **paths;
        int error;
        const char *what;
    } cases[] = {
        {missing, ENOENT, "a missing program is ENOENT"},
        {directory, EACCES, "a directory is EACCES"},
        {telling, EACCES, "the error that says most wins"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct spawn *s = PREPARE("exit", "0");
        s->paths = cases[i].paths;
        check(could_not(run(s), SPAWN_STEP_EXEC, cases[i].error), cases[i].what);
    }
    struct spawn *s = PREPARE("exit", "5");
    s->paths = second;
    check(exited(run(s), 5), "the first path that can be executed is");
    s = PREPARE("environment");
    s->envp = (char *[]){"STANDALONE=yes", NULL};
    check(exited(run(s), 0), "the environment is the one given");
}

static void
check_directory(void)
{
    struct spawn *s = PREPARE("exit", "0");
    s->cwd = "/nonexistent";
    check(could_not(run(s), SPAWN_STEP_CHDIR, ENOENT), "a missing directory is ENOENT");
    s = PREPARE("directory", "/");
    s->cwd = "/";
    check(exited(run(s), 0), "the directory is entered by its name");
    s = PREPARE("directory", "/");
    int root = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    s->cwd_descriptor = root;
    check(exited(run(s), 0), "the directory is entered by a descriptor");
    close(root);
    s = PREPARE("session");
    s->new_session = 1;
    s->umask = 027;
    check(exited(run(s), 0), "the session is new and the umask set");
}

/* Whether a child sees at each target what is at its source here. */
static int
maps(const struct spawn_descriptor *descriptors, size_t count)
{
    enum { LIMIT = 256 };
    static char strings[2 * LIMIT][24];
    const char *arguments[2 * LIMIT + 2] = {"descriptors"};
    for (size_t i = 0; i < count; i++) {
        snprintf(strings[2 * i], sizeof *strings, "%d", descriptors[i].target);
        snprintf(strings[2 * i + 1], sizeof *strings, "%llu", inode(descriptors[i].source));
        arguments[2 * i + 1] = strings[2 * i];
        arguments[2 * i + 2] = strings[2 * i + 1];
    }
    arguments[2 * count + 1] = NULL;
    struct spawn *s = prepare(arguments);
    s->descriptors = spawn_allocate(s, count * sizeof *descriptors);
    memcpy(s->descriptors, descriptors, count * sizeof *descriptors);
    s->descriptor_count = count;
    return exited(run(s), 0);
}

/* A pipe's end at `number`, which nothing else has the inode of. */
static void
open_at(int number)
{
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) < 0)
        abort();
    dup3(ends[0], number, O_CLOEXEC);
    close(ends[0]);
    close(ends[1]);
}

static void
check_descriptors(void)
{
    enum { FIRST = 100, MANY = 200, EARLY = 30 };
    struct spawn_descriptor descriptors[MANY];
    for (int i = 0; i < 2 * MANY; i++)
        open_at(FIRST + i);

    int right = 0;
    for (int map = 0; map < 27; map++) {
        int digit = map;
        for (int i = 0; i < 3; i++, digit /= 3)
            descriptors[i] = (struct spawn_descriptor){FIRST + digit % 3, FIRST + i};
        right += maps(descriptors, 3);
    }
    check(right == 27, "three descriptors are mapped onto each other in every way");

    for (int i = 0; i < MANY; i++)
        descriptors[i].source = descriptors[i].target = FIRST + 2 * i;
    check(maps(descriptors, MANY), "every second of 400 descriptors stays open");
    for (int i = 0; i < MANY; i++)
        descriptors[i].source = FIRST + (i + 1) % MANY, descriptors[i].target = FIRST + i;
    check(maps(descriptors, MANY), "200 descriptors are rotated");

    /* Since Linux 7.3 the report's pipe ends before the child has left the memory:
     * here by the time that it takes to close the descriptors above it. */
    right = 0;
    for (int i = 0; i < EARLY; i++) {
        struct spawn *s = PREPARE("exit", "6");
        s->close_fds = 0;
        right += exited(run(s), 6);
    }
    check(right == EARLY, "an early end of the report's pipe misleads nobody");

    int input = fcntl(0, F_DUPFD_CLOEXEC, 600);
    close(0); /* the report's pipe gets the number */
    descriptors[0] = (struct spawn_descriptor){FIRST, 0};
    check(maps(descriptors, 1), "a target takes the number of the report's pipe");
    if (input >= 0)
        dup2(input, 0);
    close(input);

    struct rlimit before, limit;
    getrlimit(RLIMIT_NOFILE, &before);
    limit = before;
    limit.rlim_cur = FIRST + 2 * MANY;
    setrlimit(RLIMIT_NOFILE, &limit);
    descriptors[0] = (struct spawn_descriptor){FIRST, FIRST + 1};
    descriptors[1] = (struct spawn_descriptor){FIRST + 1, FIRST};
    descriptors[2].source = descriptors[2].target = FIRST + 2 * MANY - 1;
    for (int i = 3; i < 20; i++) /* room for what the child moves */
        close(FIRST + i);
    check(maps(descriptors, 3), "a target may be the last number that the limit allows");
    setrlimit(RLIMIT_NOFILE, &before);

    for (int i = 0; i < 2 * MANY; i++)
        close(FIRST + i);
    struct spawn *s = PREPARE("exit", "0");
    descriptors[0] = (struct spawn_descriptor){FIRST, 1};
    s->descriptors = descriptors;
    s->descriptor_count = 1;
    check(could_not(run(s), SPAWN_STEP_DESCRIPTORS, EBADF), "a closed source is EBADF");
}

/* What the init tells of its program's end is in `told`. It has nothing but the mapping. */
static struct end
run_tree(struct spawn *s, int number, int *told)
{
    int ends[2];
    if (pipe2(ends, O_CLOEXEC | O_NONBLOCK) < 0)
        abort();
    s->tree = 1;
    s->status = ends[1];
    s->clone_flags |= CLONE_NEWPID;
    s->envp = spawn_allocate(s, sizeof *s->envp);
    s->envp[0] = NULL;
    int error = spawn_start(s);
    if (error == 0 && number != 0)
        kill(s->pid, number);
    struct end end = {error, 0, 0, 0};
    if (error)
        spawn_release(s);
    else
        end = finish(s);
    *told = -1;
    if (read(ends[0], told, sizeof *told) < 0)
        *told = -1;
    close(ends[0]);
    close(ends[1]);
    return end;
}

static void
check_tree(void)
{
    int told, input[2];
    if (mode->flags & CLONE_VM || !SPAWN_CAN_SHARE_MEMORY)
        return;
    if (spawn_probe(CLONE_NEWPID, mode->legacy) != EFAULT) {
        printf("-      %s: no pid namespace is offered here\n", mode->name);
        return;
    }
    struct end end = run_tree(PREPARE("exit", "3"), 0, &told);
    check(exited(end, 3) && told == 3 << 8, "a tree's program runs below an init, and its status is told");
    struct spawn *s = PREPARE("exit", "3");
    s->paths[0] = keep(s, "/nonexistent/program");
    end = run_tree(s, 0, &told);
    check(could_not(end, SPAWN_STEP_EXEC, ENOENT), "its error is as any");
    if (pipe2(input, O_CLOEXEC) < 0)
        abort();
    s = PREPARE("input");
    s->descriptors = spawn_allocate(s, sizeof *s->descriptors);
    s->descriptors[0] = (struct spawn_descriptor){input[0], 0};
    s->descriptor_count = 1;
    end = run_tree(s, SIGTERM, &told);
    check(told == SIGTERM && end.status == (128 + SIGTERM) << 8, "a signal is for its program");
    close(input[0]);
    close(input[1]);
}

static void
on_signal(int number)
{
    (void)number;
}

/* The end of a child that got the signal after its clone and before its exec:
 * a full pipe in the place of cgroup.procs holds it there. */
static struct end
signalled(int number, const char **paths)
{
    char buffer[4096] = {0};
    int gate[2];
    if (pipe2(gate, O_CLOEXEC | O_NONBLOCK) < 0)
        abort();
    while (write(gate[1], buffer, sizeof buffer) > 0)
        ;
    fcntl(gate[1], F_SETFL, 0);
    struct spawn *s = PREPARE("exit", "3");
    s->cgroup_procs = gate[1];
    if (paths != NULL)
        s->paths = paths;
    int error = spawn_start(s);
    if (error == 0 && paths == NULL)
        kill(s->pid, number);
    close(gate[1]);
    while (read(gate[0], buffer, sizeof buffer) > 0)
        ;
    if (error == 0 && paths != NULL) {
        while (__atomic_load_n(&s->step, __ATOMIC_ACQUIRE) < SPAWN_STEP_EXEC)
            sched_yield();
        kill(s->pid, number);
    }
    close(gate[0]);
    return error == 0 ? finish(s) : (struct end){error, 0, 0, 0};
}

static void
check_signals(void)
{
    char hexadecimal[20];
    sigset_t blocked, before;
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGUSR1);
    sigprocmask(SIG_BLOCK, &blocked, &before);
    snprintf(hexadecimal, sizeof hexadecimal, "%llx", (unsigned long long)signal_mask());
    check(exited(run(PREPARE("signals", hexadecimal)), 0), "the mask is the parent's");
    sigprocmask(SIG_SETMASK, &before, NULL);
    snprintf(hexadecimal, sizeof hexadecimal, "%llx", (unsigned long long)signal_mask());
    check(exited(run(PREPARE("signals", hexadecimal)), 0), "the empty mask is passed on");

    struct end end = signalled(SIGKILL, NULL);
    check(end.status == SIGKILL && end.step < SPAWN_STEP_EXEC, "SIGKILL before the exec is told");
    end = signalled(SIGINT, NULL);
    check(end.status == SIGINT && end.step < SPAWN_STEP_EXEC, "Ctrl-C before the exec is told");
    end = signalled(SIGQUIT, NULL);
    check(end.status == SIGKILL && end.step < SPAWN_STEP_EXEC, "SIGQUIT before it dumps no core");
    signal(SIGQUIT, SIG_IGN);
    check(exited(signalled(SIGQUIT, NULL), 3), "SIGQUIT that the parent ignores harms no child");
    signal(SIGQUIT, SIG_DFL);

    if (mode->flags & CLONE_VM) {
        enum { PATHS = 100000 };
        const char **paths = calloc(PATHS + 1, sizeof *paths);
        for (int i = 0; i < PATHS; i++)
            paths[i] = "/nonexistent/program";
        end = signalled(SIGQUIT, paths);
        check(end.status == SIGKILL, "SIGQUIT between two paths dumps no core");
        free(paths);
    }
}

/* --- the whole ----------------------------------------------------------------- */

/* Each spawn has one page that nobody may touch, below its stack. */
static int
guards_mapped(void)
{
    char line[4096], access[5];
    unsigned long begin, end;
    int count = 0;
    FILE *maps = fopen("/proc/self/maps", "re");
    if (maps == NULL)
        return 0;
    while (fgets(line, sizeof line, maps) != NULL)
        count += sscanf(line, "%lx-%lx %4s", &begin, &end, access) == 3 &&
                 strcmp(access, "---p") == 0 && end - begin == (unsigned long)getpagesize();
    fclose(maps);
    return count;
}

static int
descriptors_open(void)
{
    int count = 0;
    for (int descriptor = 0; descriptor < HIGHEST; descriptor++)
        count += fcntl(descriptor, F_GETFD) >= 0;
    return count;
}

static int
is_offered(const struct mode *candidate)
{
    if (candidate->flags & CLONE_VM && !SPAWN_CAN_SHARE_MEMORY)
        return 0;
    return spawn_probe(candidate->flags & ~(uint64_t)CLONE_VM, candidate->legacy) == EFAULT;
}

static void
check_all(const char *name)
{
    int offered = 0;
    round_name = name;
    for (size_t i = 0; i < sizeof modes / sizeof *modes; i++) {
        if (!is_offered(&modes[i])) {
            printf("-      %s: not offered here\n", modes[i].name);
            continue;
        }
        mode = &modes[i];
        offered++;
        int descriptors = descriptors_open();
        check_statuses();
        check_leaving();
        check_exec();
        check_directory();
        check_descriptors();
        check_signals();
        check_tree();
        spawn_sweep();
        check(descriptors_open() == descriptors, "no descriptor is left");
        check(spawn_count() == 0, "no mapping is left but the spares");
        check(guards_mapped() <= SPAWN_SPARES, "there are no more of those than said");
    }
    mode = NULL;
    check(offered > 0, "a child can be cloned with its pidfd");
}

static int
hide_close_range(void)
{
    struct sock_filter program[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0), /* seccomp_data.nr */
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_close_range, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog filter = {sizeof program / sizeof *program, program};
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
           prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) == 0;
}

int
main(int argc, char **argv)
{
    int is_init = getpid() == 1;
    if (argc > 1 && !is_init)
        return plays(argv[1], argv + 2);
    if (is_init) {
        mkdir("/dev", 0755);
        mkdir("/proc", 0755);
        if (fcntl(1, F_GETFD) < 0) {
            mount("none", "/dev", "devtmpfs", 0, NULL);
            for (int descriptor = 0; descriptor < 3; descriptor++)
                open("/dev/console", O_RDWR);
        }
    }
    if (realpath(argv[0], self) == NULL) {
        perror(argv[0]);
        return 1;
    }
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = HIGHEST; /* the limit of the fallback's loop, too */
    setrlimit(RLIMIT_NOFILE, &limit);
    for (int descriptor = 3; descriptor < HIGHEST; descriptor++)
        close(descriptor);
    signal(SIGUSR1, on_signal);
    signal(SIGUSR2, SIG_IGN);
    signal(SIGPIPE, SIG_IGN);
    if (is_init) {
        check_all(", without /proc");
        mount("none", "/proc", "proc", 0, NULL);
    }
    check_all("");
    int hidden = hide_close_range();
    if (is_init)
        check(hidden, "hide close_range");
    if (hidden) {
        check_all(", without close_range");
        if (is_init) {
            umount("/proc");
            check_all(", without close_range and /proc");
        }
    }
    printf("%d passed, %d failed\n", passed, failed);
    fflush(stdout);
    if (is_init) {
        tcdrain(1); /* else what the console has not sent is lost */
        reboot(RB_POWER_OFF);
    }
    return failed != 0;
}
