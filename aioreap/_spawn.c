#define _GNU_SOURCE
#include "_spawn.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* Numbers that the headers of older systems lack; the same on every architecture. */
#ifndef SYS_clone3
#define SYS_clone3 435
#endif
#ifndef SYS_close_range
#define SYS_close_range 436
#endif
#ifndef CLONE_PIDFD
#define CLONE_PIDFD 0x00001000
#endif
#ifndef SYS_pidfd_send_signal
#define SYS_pidfd_send_signal 424
#endif
#define WAIT_PIDFD ((idtype_t)3)          /* P_PIDFD */
#define CLEAR_SIGHAND (UINT64_C(1) << 32) /* CLONE_CLEAR_SIGHAND, Linux 5.5 */
#define INTO_CGROUP (UINT64_C(1) << 33)   /* CLONE_INTO_CGROUP, Linux 5.7 */

#define STACK_SIZE (32 * 1024)
#define MIDDLE_STACK_SIZE (STACK_SIZE / 2)
#define SIGNAL_COUNT 64
#define SIGNAL_SET_SIZE (SIGNAL_COUNT / 8)

static const unsigned char CORE_DUMPING_SIGNALS[] = {
    SIGQUIT, SIGILL, SIGTRAP, SIGABRT, SIGBUS, SIGFPE, SIGSEGV, SIGXCPU, SIGXFSZ, SIGSYS,
};

/* struct clone_args up to CLONE_ARGS_SIZE_VER2. */
struct clone3_arguments {
    uint64_t flags, pidfd, child_tid, parent_tid, exit_signal;
    uint64_t stack; /* the lowest address */
    uint64_t stack_size, tls, set_tid, set_tid_size, cgroup;
};

/* What marks a function that runs in the child. It shares the parent's thread
 * control block: a libc call that fails would write the parent's errno, a stack
 * protector or a sanitizer would read and write state that is the parent's. */
#if __has_attribute(no_stack_protector)
#define NO_STACK_PROTECTOR __attribute__((no_stack_protector))
#else /* gcc before 11 */
#define NO_STACK_PROTECTOR __attribute__((optimize("no-stack-protector")))
#endif
#if __has_attribute(disable_sanitizer_instrumentation) /* of clang, whose other one is not enough */
#define NO_SANITIZER                             \
    __attribute__((disable_sanitizer_instrumentation, \
                   no_sanitize("address", "hwaddress", "thread", "undefined")))
#else
#define NO_SANITIZER __attribute__((no_sanitize("address", "thread", "undefined")))
#endif
#define IN_CHILD                       \
    NO_STACK_PROTECTOR NO_SANITIZER    \
    __attribute__((no_instrument_function, section(".text.aioreap_child")))
#if __has_attribute(uninitialized) /* else -ftrivial-auto-var-init calls memset() */
#define UNINITIALIZED __attribute__((uninitialized))
#else
#define UNINITIALIZED
#endif

/* Where the generic path would go wrong: 128 signals, or a raw clone that
 * returns otherwise in the child. There subprocess.Popen makes the children. */
#if defined(__mips__) || defined(__sparc__) || defined(__alpha__)
#define CAN_CLONE 0
#else
#define CAN_CLONE 1
#endif

/* --- system calls that touch no errno: the result, or -errno ------------------- */

#if SPAWN_CAN_SHARE_MEMORY && defined(__x86_64__)

IN_CHILD __attribute__((always_inline)) static inline long
system_call(long number, long a, long b, long c, long d, long e)
{
    long result;
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "0"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8)
                     : "rcx", "r11", "memory");
    return result;
}

/* Makes a system call that may return twice: in the child, on a stack of its
 * own, it calls child(argument), which never returns. */
IN_CHILD static inline long
system_call_on_new_stack(long number, long a, long b, long c, long d, long e,
                         void (*child)(void *), void *argument)
{
    long result;
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register void (*r9)(void *) __asm__("r9") = child;
    register void *r12 __asm__("r12") = argument;
    __asm__ volatile("syscall\n\t"
                     "testq %%rax, %%rax\n\t"
                     "jnz 1f\n\t"
                     "xorl %%ebp, %%ebp\n\t"
                     "movq %%r12, %%rdi\n\t"
                     "callq *%%r9\n\t"
                     "hlt\n"
                     "1:"
                     : "=a"(result)
                     : "0"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9), "r"(r12)
                     : "rcx", "r11", "cc", "memory");
    return result;
}

#elif SPAWN_CAN_SHARE_MEMORY && defined(__aarch64__)

IN_CHILD __attribute__((always_inline)) static inline long
system_call(long number, long a, long b, long c, long d, long e)
{
    register long x8 __asm__("x8") = number;
    register long x0 __asm__("x0") = a;
    register long x1 __asm__("x1") = b;
    register long x2 __asm__("x2") = c;
    register long x3 __asm__("x3") = d;
    register long x4 __asm__("x4") = e;
    __asm__ volatile("svc #0"
                     : "+r"(x0)
                     : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4)
                     : "cc", "memory");
    return x0;
}

IN_CHILD static inline long
system_call_on_new_stack(long number, long a, long b, long c, long d, long e,
                         void (*child)(void *), void *argument)
{
    register long x8 __asm__("x8") = number;
    register long x0 __asm__("x0") = a;
    register long x1 __asm__("x1") = b;
    register long x2 __asm__("x2") = c;
    register long x3 __asm__("x3") = d;
    register long x4 __asm__("x4") = e;
    register void (*x10)(void *) __asm__("x10") = child;
    register void *x11 __asm__("x11") = argument;
    __asm__ volatile("svc #0\n\t"
                     "cbnz x0, 1f\n\t"
                     "mov x29, xzr\n\t"
                     "mov x0, x11\n\t"
                     "blr x10\n\t"
                     "brk #1\n"
                     "1:"
                     : "+r"(x0)
                     : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x10), "r"(x11)
                     : "cc", "memory");
    return x0;
}

#elif SPAWN_CAN_SHARE_MEMORY

/* System calls do not keep the vector registers. */
#if defined(__riscv_vector)
#define VECTOR_CLOBBERS                                                                      \
    , "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10", "v11", "v12", "v13", \
        "v14", "v15", "v16", "v17", "v18", "v19", "v20", "v21", "v22", "v23", "v24", "v25",  \
        "v26", "v27", "v28", "v29", "v30", "v31"
#else
#define VECTOR_CLOBBERS
#endif

IN_CHILD __attribute__((always_inline)) static inline long
system_call(long number, long a, long b, long c, long d, long e)
{
    register long a7 __asm__("a7") = number;
    register long a0 __asm__("a0") = a;
    register long a1 __asm__("a1") = b;
    register long a2 __asm__("a2") = c;
    register long a3 __asm__("a3") = d;
    register long a4 __asm__("a4") = e;
    __asm__ volatile("ecall"
                     : "+r"(a0)
                     : "r"(a7), "r"(a1), "r"(a2), "r"(a3), "r"(a4)
                     : "memory" VECTOR_CLOBBERS);
    return a0;
}

IN_CHILD static inline long
system_call_on_new_stack(long number, long a, long b, long c, long d, long e,
                         void (*child)(void *), void *argument)
{
    register long a7 __asm__("a7") = number;
    register long a0 __asm__("a0") = a;
    register long a1 __asm__("a1") = b;
    register long a2 __asm__("a2") = c;
    register long a3 __asm__("a3") = d;
    register long a4 __asm__("a4") = e;
    register void (*t3)(void *) __asm__("t3") = child;
    register void *t4 __asm__("t4") = argument;
    __asm__ volatile("ecall\n\t"
                     "bnez a0, 1f\n\t"
                     "mv fp, zero\n\t"
                     "mv a0, t4\n\t"
                     "jalr t3\n\t"
                     "ebreak\n"
                     "1:"
                     : "+r"(a0)
                     : "r"(a7), "r"(a1), "r"(a2), "r"(a3), "r"(a4), "r"(t3), "r"(t4)
                     : "memory" VECTOR_CLOBBERS);
    return a0;
}

#else

/* Elsewhere the child never shares memory, so its errno is its own. */
static long
system_call(long number, long a, long b, long c, long d, long e)
{
    long result = syscall(number, a, b, c, d, e);
    return result < 0 ? -errno : result;
}

#endif

#define CALL0(number) system_call(number, 0, 0, 0, 0, 0)
#define CALL1(number, a) system_call(number, (long)(a), 0, 0, 0, 0)
#define CALL2(number, a, b) system_call(number, (long)(a), (long)(b), 0, 0, 0)
#define CALL3(number, a, b, c) system_call(number, (long)(a), (long)(b), (long)(c), 0, 0)
#define CALL4(number, a, b, c, d) \
    system_call(number, (long)(a), (long)(b), (long)(c), (long)(d), 0)

/* i386, arm and others kept 16-bit ids under the plain names. */
#ifdef SYS_setreuid32
#define CALL_SETREUID SYS_setreuid32
#define CALL_SETREGID SYS_setregid32
#define CALL_SETGROUPS SYS_setgroups32
#else
#define CALL_SETREUID SYS_setreuid
#define CALL_SETREGID SYS_setregid
#define CALL_SETGROUPS SYS_setgroups
#endif
#ifdef SYS_fcntl64
#define CALL_FCNTL SYS_fcntl64
#else
#define CALL_FCNTL SYS_fcntl
#endif

/* --- the child, from the clone to the exec ------------------------------------- */

struct report {
    uint32_t step;
    int32_t error;
};

IN_CHILD static inline int
shares_memory(const struct spawn *s)
{
    return (s->clone_flags & CLONE_VM) != 0;
}

IN_CHILD static void
child_reports(struct spawn *s)
{
    struct report report = {s->step, s->error};
    CALL3(SYS_write, s->report, &report, sizeof report);
}

IN_CHILD __attribute__((noreturn)) static void
child_fails(struct spawn *s, long error)
{
    s->error = (int32_t)-error;
    if (!shares_memory(s))
        child_reports(s);
    for (;;)
        CALL1(SYS_exit_group, 127);
}

IN_CHILD static inline void
child_enters(struct spawn *s, enum spawn_step step)
{
    __atomic_store_n(&s->step, step, __ATOMIC_RELEASE);
}

IN_CHILD static int
is_target(const struct spawn *s, int descriptor)
{
    for (size_t i = 0; i < s->descriptor_count; i++)
        if (s->descriptors[i].target == descriptor)
            return 1;
    return 0;
}

/* A copy of `descriptor` where no target will overwrite it. */
IN_CHILD static int
child_moves_away(struct spawn *s, int descriptor)
{
    long moved = 2;
    do {
        moved = CALL3(CALL_FCNTL, descriptor, F_DUPFD_CLOEXEC, moved + 1);
        if (moved < 0)
            child_fails(s, moved);
    } while (is_target(s, (int)moved));
    return (int)moved;
}

/* The lowest descriptor from `from` on that stays open, or -1. */
IN_CHILD static int
next_kept(const struct spawn *s, int from)
{
    int next = -1;
    for (size_t i = 0; i < s->descriptor_count; i++) {
        int target = s->descriptors[i].target;
        if (target >= from && (next < 0 || target < next))
            next = target;
    }
    if (s->report >= from && (next < 0 || s->report < next))
        next = s->report;
    if (s->cwd_descriptor >= from && (next < 0 || s->cwd_descriptor < next))
        next = s->cwd_descriptor;
    return next;
}

struct directory_entry { /* struct linux_dirent64 */
    uint64_t inode;
    int64_t offset;
    uint16_t length;
    uint8_t type;
    char name[];
};

IN_CHILD static int
number_from(const char *name)
{
    int number = 0;
    if (*name < '0' || *name > '9')
        return -1;
    for (; *name >= '0' && *name <= '9'; name++)
        number = number * 10 + (*name - '0');
    return number;
}

/* Close as before Linux 5.9: what /proc lists, else every number there may be. */
IN_CHILD static void
child_closes_one_by_one(struct spawn *s)
{
    char buffer[1024] __attribute__((aligned(8))) UNINITIALIZED;
    long directory = CALL4(SYS_openat, AT_FDCWD, "/proc/self/fd",
                           O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
    if (directory >= 0) {
        long count;
        while ((count = CALL3(SYS_getdents64, directory, buffer, sizeof buffer)) > 0) {
            for (long at = 0; at < count;) {
                struct directory_entry *entry = (struct directory_entry *)(buffer + at);
                int descriptor = number_from(entry->name);
                if (descriptor > 2 && descriptor != directory &&
                    next_kept(s, descriptor) != descriptor)
                    CALL1(SYS_close, descriptor);
                at += entry->length;
            }
        }
        CALL1(SYS_close, directory);
        return;
    }
    uint64_t limit[2] = {256, 256}; /* struct rlimit64: current, maximum */
    CALL4(SYS_prlimit64, 0, RLIMIT_NOFILE, NULL, limit);
    for (int descriptor = 3; descriptor < INT_MAX && (uint64_t)descriptor < limit[0]; descriptor++)
        if (next_kept(s, descriptor) != descriptor)
            CALL1(SYS_close, descriptor);
}

IN_CHILD static void
child_closes_the_rest(struct spawn *s)
{
    for (int from = 3; from >= 0;) {
        int kept = next_kept(s, from);
        if (kept != from) {
            unsigned last = kept < 0 ? ~0U : (unsigned)kept - 1;
            if (CALL3(SYS_close_range, from, last, 0) < 0) {
                child_closes_one_by_one(s);
                return;
            }
        }
        from = kept < 0 ? -1 : kept + 1;
    }
}

IN_CHILD static void
child_arranges_descriptors(struct spawn *s)
{
    if (is_target(s, s->report))
        s->report = child_moves_away(s, s->report);
    if (s->cwd_descriptor >= 0 && is_target(s, s->cwd_descriptor))
        s->cwd_descriptor = child_moves_away(s, s->cwd_descriptor);
    for (size_t i = 0; i < s->descriptor_count; i++) {
        struct spawn_descriptor *d = &s->descriptors[i];
        if (d->source != d->target && is_target(s, d->source))
            d->source = child_moves_away(s, d->source);
    }
    for (size_t i = 0; i < s->descriptor_count; i++) {
        struct spawn_descriptor *d = &s->descriptors[i];
        long result = d->source == d->target ? CALL3(CALL_FCNTL, d->target, F_SETFD, 0)
                                             : CALL3(SYS_dup3, d->source, d->target, 0);
        if (result < 0)
            child_fails(s, result);
    }
    if (s->close_fds)
        child_closes_the_rest(s);
}

typedef void signal_handler(int);

#if SPAWN_CAN_SHARE_MEMORY

struct kernel_sigaction { /* large enough for each of the three architectures */
    signal_handler *handler;
    unsigned long flags;
    signal_handler *restorer; /* x86-64 refuses to call a handler without one */
    uint64_t mask;
};

#if defined(__x86_64__)
#define HANDLER_FLAGS 0x04000000 /* SA_RESTORER */
#else
#define HANDLER_FLAGS 0
#endif

IN_CHILD static void
child_handles_by(int number, signal_handler *handler)
{
    struct kernel_sigaction action;
    action.handler = handler;
    action.flags = HANDLER_FLAGS;
    action.restorer = handler;
    action.mask = 0;
    CALL4(SYS_rt_sigaction, number, &action, NULL, SIGNAL_SET_SIZE);
}

IN_CHILD static signal_handler *
child_handler_of(int number)
{
    struct kernel_sigaction action;
    return CALL4(SYS_rt_sigaction, number, NULL, &action, SIGNAL_SET_SIZE) == 0 ? action.handler
                                                                               : SIG_IGN;
}

#else

static void
child_handles_by(int number, signal_handler *handler)
{
    signal(number, handler);
}

static signal_handler *
child_handler_of(int number)
{
    struct sigaction action;
    return sigaction(number, NULL, &action) == 0 ? action.sa_handler : SIG_IGN;
}

#endif

IN_CHILD static void
child_dies(int number)
{
    (void)number;
    for (;;)
        CALL2(SYS_kill, CALL0(SYS_getpid), SIGKILL);
}

IN_CHILD static void
child_resets_signals(struct spawn *s)
{
    if (!(s->clone_flags & CLEAR_SIGHAND))
        for (int number = 1; number <= SIGNAL_COUNT; number++) {
            signal_handler *handler = child_handler_of(number);
            if (handler != SIG_DFL && handler != SIG_IGN)
                child_handles_by(number, SIG_DFL);
        }
    if (s->restore_signals) {
        child_handles_by(SIGPIPE, SIG_DFL);
        child_handles_by(SIGXFSZ, SIG_DFL);
    }
}

/* All signals were blocked until here. One that dumps core would write out the
 * parent's memory, and before Linux 5.16 kill all that share it: until the exec,
 * which sets handlers back to the default, it is a SIGKILL. */
IN_CHILD static void
child_unblocks_signals(struct spawn *s)
{
    for (size_t i = 0; i < sizeof CORE_DUMPING_SIGNALS; i++)
        if (child_handler_of(CORE_DUMPING_SIGNALS[i]) == SIG_DFL)
            child_handles_by(CORE_DUMPING_SIGNALS[i], child_dies);
    CALL4(SYS_rt_sigprocmask, SIG_SETMASK, &s->signal_mask, NULL, SIGNAL_SET_SIZE);
}

/* The first error that says more than "not here" wins, as in os.execvpe(). */
IN_CHILD static long
child_execs(struct spawn *s)
{
    long error = -ENOENT, telling = 0;
    for (const char **path = s->paths; *path != NULL; path++) {
        error = CALL3(SYS_execve, *path, s->argv, s->envp);
        if (error != -ENOENT && error != -ENOTDIR && telling == 0)
            telling = error;
    }
    return telling ? telling : error;
}

/* A parent that ended before the prctl sends nothing: the child has another by now. A parent
 * in an outer pid namespace is 0 here, dead or alive. */
IN_CHILD static long
child_dies_with_parent(struct spawn *s)
{
    long result = system_call(SYS_prctl, PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
    return result == 0 && CALL0(SYS_getppid) != s->owner ? -EREMOTE : result;
}

#define TRY(step, call)                \
    do {                               \
        child_enters(s, step);         \
        long result = (call);          \
        if (result < 0)                \
            child_fails(s, result);    \
    } while (0)

IN_CHILD __attribute__((noreturn)) static void
child_runs(void *argument)
{
    struct spawn *s = argument;

    if (s->cgroup_procs >= 0)
        TRY(SPAWN_STEP_CGROUP, CALL3(SYS_write, s->cgroup_procs, "0", 1));
    child_enters(s, SPAWN_STEP_DESCRIPTORS);
    child_arranges_descriptors(s);
    if (s->cwd_descriptor >= 0)
        TRY(SPAWN_STEP_CHDIR, CALL1(SYS_fchdir, s->cwd_descriptor));
    if (s->cwd != NULL)
        TRY(SPAWN_STEP_CHDIR, CALL1(SYS_chdir, s->cwd));
    if (s->umask >= 0)
        CALL1(SYS_umask, s->umask);
    child_resets_signals(s);
    if (s->new_session)
        TRY(SPAWN_STEP_SESSION, CALL0(SYS_setsid));
    if (s->process_group >= 0)
        TRY(SPAWN_STEP_PROCESS_GROUP, CALL2(SYS_setpgid, 0, s->process_group));
    if (s->group_count >= 0)
        TRY(SPAWN_STEP_GROUPS, CALL2(CALL_SETGROUPS, s->group_count, s->groups));
    if (s->gid >= 0)
        TRY(SPAWN_STEP_GID, CALL2(CALL_SETREGID, s->gid, s->gid));
    if (s->uid >= 0)
        TRY(SPAWN_STEP_UID, CALL2(CALL_SETREUID, s->uid, s->uid));
    if (s->no_new_privs)
        TRY(SPAWN_STEP_NO_NEW_PRIVS,
            system_call(SYS_prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    if (s->pdeathsig) /* a change of uid or gid clears it */
        TRY(SPAWN_STEP_PARENT_DEATH, child_dies_with_parent(s));
    child_unblocks_signals(s); /* first: what kills it here kills it before its exec */
    child_enters(s, SPAWN_STEP_EXEC);
    if (!shares_memory(s))
        child_reports(s);
    child_fails(s, child_execs(s));
}

/* --- the init of a tree ---------------------------------------------------------
 *
 * Process 1 of a pid namespace: the kernel kills all that is in it when it ends. It
 * never execs, and so would hold a copy of the server's memory for as long as its
 * program runs. It unmaps all but this object's image and the mapping of the spawn, in
 * which its stack lies, before it does anything else. From there on nothing of the C
 * library is there, in the program's process neither until its exec: not a call may go
 * out of this file. tests/test_tree.py
 */

#if SPAWN_CAN_SHARE_MEMORY

extern const char __ehdr_start[] __attribute__((visibility("hidden"))); /* the linker's */
extern const char _end[] __attribute__((visibility("hidden")));
extern const ptrdiff_t __rseq_offset __attribute__((weak)); /* glibc 2.35 */

#ifndef SYS_rseq
#if defined(__x86_64__)
#define SYS_rseq 334
#else
#define SYS_rseq 293
#endif
#endif
#define RSEQ_UNREGISTER 1
#define RSEQ_SIZE_UNIT 32
#define RSEQ_SIZE_LIMIT 512
#define SHADOW_STACK_STATUS 75 /* PR_SET_SHADOW_STACK_STATUS, Linux 6.13 */
#if defined(__x86_64__)
#define RSEQ_SIGNATURE 0x53053053
#define SHADOW_STACK_DISABLE 0x5002 /* ARCH_SHSTK_DISABLE, Linux 6.6 */
#elif defined(__aarch64__)
#define RSEQ_SIGNATURE 0xd428bc00
#else
#define RSEQ_SIGNATURE 0xf1401073
#endif

static uintptr_t
thread_pointer(void)
{
    uintptr_t pointer;
#if defined(__x86_64__)
    __asm__("movq %%fs:0, %0" : "=r"(pointer));
#elif defined(__aarch64__)
    __asm__("mrs %0, tpidr_el0" : "=r"(pointer));
#else
    __asm__("mv %0, tp" : "=r"(pointer));
#endif
    return pointer;
}

/* In the parent. */
static void
prepare_tree(struct spawn *s)
{
    s->page = (uintptr_t)sysconf(_SC_PAGESIZE);
    s->image[0] = (uintptr_t)__ehdr_start & ~(s->page - 1);
    s->image[1] = ((uintptr_t)_end + s->page - 1) & ~(s->page - 1);
    s->rseq = &__rseq_offset == NULL ? 0 : thread_pointer() + (uintptr_t)__rseq_offset;
    s->uid_map_size = snprintf(s->uid_map, sizeof s->uid_map, "%u %u 1", geteuid(), geteuid());
    s->gid_map_size = snprintf(s->gid_map, sizeof s->gid_map, "%u %u 1", getegid(), getegid());
}

IN_CHILD static long
init_dies_with_parent(struct spawn *s)
{
    /* Not getppid(): the parent is beyond the namespace, and so always 0. */
    struct pollfd end = {.fd = s->parent, .events = POLLIN};
    uint64_t now[2]; /* a struct timespec, without the memset() that its zeroes would be */
    now[0] = now[1] = 0;
    long result = system_call(SYS_prctl, PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
    if (result == 0)
        result = system_call(SYS_ppoll, (long)&end, 1, (long)now, 0, SIGNAL_SET_SIZE);
    return result > 0 ? -ESRCH : result;
}

/* The kernel writes to the area that the C library has registered for the thread that
 * cloned, and kills where it cannot. Whether none is registered (any more). */
IN_CHILD static int
init_leaves_rseq(struct spawn *s)
{
    uint64_t area[RSEQ_SIZE_UNIT / 8] __attribute__((aligned(RSEQ_SIZE_UNIT)));
    area[0] = area[1] = area[2] = area[3] = 0;
    long found = CALL4(SYS_rseq, area, sizeof area, 0, RSEQ_SIGNATURE);
    if (found == 0)
        found = CALL4(SYS_rseq, area, sizeof area, RSEQ_UNREGISTER, RSEQ_SIGNATURE);
    if (found == 0 || found == -ENOSYS)
        return 1;
    for (long size = RSEQ_SIZE_UNIT; s->rseq != 0 && size <= RSEQ_SIZE_LIMIT; size += RSEQ_SIZE_UNIT)
        if (CALL4(SYS_rseq, s->rseq, size, RSEQ_UNREGISTER, RSEQ_SIGNATURE) == 0)
            return 1;
    return 0;
}

/* Whether no call needs one (any more). */
IN_CHILD static int
init_leaves_shadow_stack(void)
{
#if defined(__x86_64__)
    long result = CALL2(SYS_arch_prctl, SHADOW_STACK_DISABLE, 1);
#else
    long result = system_call(SYS_prctl, SHADOW_STACK_STATUS, 0, 0, 0, 0);
#endif
    return result != -EPERM && result != -EBUSY; /* locked */
}

/* A part that is sealed, or whose mapping cannot be split, stays: EPERM, ENOMEM. */
IN_CHILD static long
init_unmaps(struct spawn *s, uintptr_t from, uintptr_t to)
{
    long result = from < to ? CALL2(SYS_munmap, from, to - from) : 0;
    if (result == 0 || result == -EINVAL || to - from <= s->page)
        return result;
    uintptr_t middle = from + (((to - from) / 2) & ~(s->page - 1));
    init_unmaps(s, from, middle);
    init_unmaps(s, middle, to);
    return 0;
}

IN_CHILD static void
init_unmaps_the_rest(struct spawn *s)
{
    uintptr_t block[2] = {(uintptr_t)s->mapping, (uintptr_t)s->mapping + s->mapping_size};
    uintptr_t *low = s->image, *high = block;
    if (block[0] < s->image[0]) {
        low = block;
        high = s->image;
    }
    init_unmaps(s, 0, low[0]);
    init_unmaps(s, low[1], high[0]);
    for (int bits = 57; bits >= 38; bits--) /* EINVAL: beyond the end of what a program can map */
        if (init_unmaps(s, high[1], (UINT64_C(1) << bits) - s->page) != -EINVAL)
            break;
}

IN_CHILD static long
init_writes(const char *path, const char *text, int size)
{
    long descriptor = CALL4(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CLOEXEC, 0);
    if (descriptor < 0)
        return descriptor;
    long result = CALL3(SYS_write, descriptor, text, size);
    CALL1(SYS_close, descriptor);
    return result;
}

IN_CHILD static long
init_maps_ids(struct spawn *s)
{
    long result = init_writes("/proc/self/setgroups", "deny", 4);
    if (result >= 0)
        result = init_writes("/proc/self/uid_map", s->uid_map, s->uid_map_size);
    if (result >= 0)
        result = init_writes("/proc/self/gid_map", s->gid_map, s->gid_map_size);
    return result;
}

/* The report last: where it ends, nothing else is held. */
IN_CHILD static void
init_closes_the_rest(struct spawn *s)
{
    for (int descriptor = 0; descriptor < 3; descriptor++)
        if (descriptor != s->status && descriptor != s->report)
            CALL1(SYS_close, descriptor);
    s->descriptor_count = 0;
    s->cwd_descriptor = s->status; /* one of those that stay */
    child_closes_the_rest(s);
    CALL1(SYS_close, s->report);
}

IN_CHILD static void
init_reaps(struct spawn *s, long program)
{
    int status;
    long pid;
    while ((pid = CALL4(SYS_wait4, -1, &status, WNOHANG | __WALL, NULL)) > 0) {
        if (pid != program)
            continue;
        CALL3(SYS_write, s->status, &status, sizeof status);
        for (;;)
            CALL1(SYS_exit_group, WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status));
    }
}

/* It leads the group, or will: before its setsid there is nobody of that number. */
IN_CHILD static void
init_signals_group(struct spawn *s, long program)
{
    int number UNINITIALIZED;
    while (CALL4(SYS_recvfrom, s->status, &number, sizeof number, MSG_DONTWAIT) > 0)
        CALL2(SYS_kill, -program, number);
}

/* What somebody outside sends is for the program. All signals are blocked, so that the
 * kernel keeps for an init what it would else ignore; SIGSTOP, which it would not keep,
 * comes as SPAWN_STOP_PROGRAM. SPAWN_SIGNAL_GROUP says that there are numbers in the socket:
 * the init's own group is another one. A terminal has told the program itself. */
IN_CHILD __attribute__((noreturn)) static void
init_waits(struct spawn *s, long program)
{
    static const uint64_t all_signals = ~UINT64_C(0);
    siginfo_t info UNINITIALIZED;
    for (;;) {
        long number = CALL4(SYS_rt_sigtimedwait, &all_signals, &info, NULL, SIGNAL_SET_SIZE);
        if (number == SIGCHLD) /* another one may have been dropped for this one, whoever sent it */
            init_reaps(s, program);
        if (number <= 0 || info.si_code > 0 || info.si_pid != 0)
            continue;
        if (number == SPAWN_SIGNAL_GROUP)
            init_signals_group(s, program);
        else
            CALL2(SYS_kill, program, number == SPAWN_STOP_PROGRAM ? SIGSTOP : number);
    }
}

IN_CHILD __attribute__((noreturn)) static void
init_runs(void *argument)
{
    struct spawn *s = argument;

    if (s->pdeathsig)
        TRY(SPAWN_STEP_PARENT_DEATH, init_dies_with_parent(s));
    s->pdeathsig = 0; /* the program's parent is the init */
    if (init_leaves_rseq(s) && init_leaves_shadow_stack()) {
        init_unmaps_the_rest(s);
        /* Else /proc/self is root's, for a server that has changed its user. Nothing of the
         * server's memory can be read any more. */
        system_call(SYS_prctl, PR_SET_DUMPABLE, 1, 0, 0, 0);
    }
    if (s->clone_flags & CLONE_NEWUSER)
        TRY(SPAWN_STEP_USER_NAMESPACE, init_maps_ids(s));
    if (s->cgroup_procs >= 0)
        TRY(SPAWN_STEP_CGROUP, CALL3(SYS_write, s->cgroup_procs, "0", 1));
    s->cgroup_procs = -1;

    int ignores_children = child_handler_of(SIGCHLD) == SIG_IGN; /* a program's end, too */
    child_handles_by(SIGCHLD, SIG_DFL);
    child_enters(s, SPAWN_STEP_INIT);
    long program = system_call(SYS_clone, SIGCHLD, 0, 0, 0, 0);
    if (program < 0)
        child_fails(s, program);
    if (program == 0) {
        if (ignores_children)
            child_handles_by(SIGCHLD, SIG_IGN);
        child_runs(s);
    }
    system_call(SYS_prctl, PR_SET_NAME, (long)"aioreap-init", 0, 0, 0);
    CALL0(SYS_setsid); /* else the signals of a terminal and of groups reach the program twice */
    CALL1(SYS_chdir, "/");
    init_closes_the_rest(s);
    init_waits(s, program);
}

#endif

/* --- the parent ---------------------------------------------------------------- */

/* These two also run in the process between: see clone_through_middle(). */
IN_CHILD static long
clone_on_own_stack(struct spawn *s, struct clone3_arguments *arguments)
{
#if SPAWN_CAN_SHARE_MEMORY
    void (*child)(void *) = s->tree ? init_runs : child_runs;
    if (!s->legacy_clone) {
        arguments->stack = (uint64_t)(uintptr_t)s->stack;
        arguments->stack_size = s->stack_size;
        return system_call_on_new_stack(SYS_clone3, (long)arguments, sizeof *arguments, 0, 0, 0,
                                        child, s);
    }
    long flags = (long)((uint32_t)s->clone_flags | (uint32_t)s->exit_signal);
    long top = (long)(s->stack + s->stack_size);
#if defined(__x86_64__)
    return system_call_on_new_stack(SYS_clone, flags, top, (long)&s->pidfd, (long)&s->tid, 0,
                                    child, s);
#else /* arm64 and riscv take tls before child_tid */
    return system_call_on_new_stack(SYS_clone, flags, top, (long)&s->pidfd, 0, (long)&s->tid,
                                    child, s);
#endif
#else
    (void)s;
    (void)arguments;
    return -ENOSYS;
#endif
}

/* As fork(): the child goes on with a copy of the caller's memory and stack. */
IN_CHILD static long
clone_copying_memory(struct spawn *s, struct clone3_arguments *arguments)
{
    long pid;
    if (!s->legacy_clone) {
        pid = CALL2(SYS_clone3, arguments, sizeof *arguments);
    } else {
        long flags = (long)((uint32_t)s->clone_flags | (uint32_t)s->exit_signal);
#if defined(__s390__)
        pid = system_call(SYS_clone, 0, flags, (long)&s->pidfd, 0, 0);
#else
        pid = system_call(SYS_clone, flags, 0, (long)&s->pidfd, 0, 0);
#endif
    }
    if (pid == 0)
        child_runs(s);
    return pid;
}

static struct clone3_arguments
prepare_clone(struct spawn *s)
{
    if (shares_memory(s))
        s->clone_flags |= CLONE_CHILD_CLEARTID;
    return (struct clone3_arguments){
        .flags = s->clone_flags,
        .pidfd = (uint64_t)(uintptr_t)&s->pidfd,
        .child_tid = shares_memory(s) ? (uint64_t)(uintptr_t)&s->tid : 0,
        .exit_signal = (uint64_t)s->exit_signal,
        .cgroup = s->clone_flags & INTO_CGROUP ? (uint64_t)s->cgroup : 0,
    };
}

IN_CHILD static long
clone_child(struct spawn *s, struct clone3_arguments *arguments)
{
    return shares_memory(s) || s->tree ? clone_on_own_stack(s, arguments)
                                       : clone_copying_memory(s, arguments);
}

#if SPAWN_CAN_SHARE_MEMORY

struct middle {
    struct spawn *spawn;
    struct clone3_arguments *arguments;
    long result; /* of its clone; 0 if it was killed before it could say */
};

IN_CHILD __attribute__((noreturn)) static void
middle_runs(void *argument)
{
    struct middle *middle = argument;
    middle->result = clone_child(middle->spawn, middle->arguments);
    for (;;)
        CALL1(SYS_exit_group, 0);
}

static long
clone_middle(struct middle *middle)
{
    char *stack = middle->spawn->stack + middle->spawn->stack_size;
    struct clone3_arguments arguments = {
        .flags = CLONE_VM | CLONE_VFORK | CLONE_FILES,
        .stack = (uint64_t)(uintptr_t)stack,
        .stack_size = MIDDLE_STACK_SIZE,
    };
    if (middle->spawn->legacy_clone)
        return system_call_on_new_stack(SYS_clone, (long)arguments.flags,
                                        (long)(stack + MIDDLE_STACK_SIZE), 0, 0, 0, middle_runs,
                                        middle);
    return system_call_on_new_stack(SYS_clone3, (long)&arguments, sizeof arguments, 0, 0, 0,
                                    middle_runs, middle);
}

/* The child of a process that is gone at the return: init's, or the next subreaper's. That
 * process shares our descriptors (CLONE_FILES), so the pidfd of its clone is ours, and our
 * memory, so its stack and what it says lie here. CLONE_VFORK holds this thread until
 * it has exited, and not until the exec of its child. It has no exit signal: nobody
 * hears of it, and no wait() but one with __WALL takes it. */
static long
clone_through_middle(struct spawn *s, struct clone3_arguments *arguments)
{
    struct middle middle = {s, arguments, 0};
    s->stack_size -= MIDDLE_STACK_SIZE;
    long pid = clone_middle(&middle);
    if (pid < 0)
        return pid;
    while (waitpid((pid_t)pid, NULL, __WALL) < 0 && errno == EINTR)
        ;
    long result = __atomic_load_n(&middle.result, __ATOMIC_ACQUIRE);
    if (result != 0)
        return result;
    if (s->pidfd >= 0) { /* somebody killed it between its clone and its last word */
        struct pollfd exit_event = {.fd = s->pidfd, .events = POLLIN};
        CALL4(SYS_pidfd_send_signal, s->pidfd, SIGKILL, NULL, 0);
        while (poll(&exit_event, 1, -1) < 0 && errno == EINTR)
            ;
        close(s->pidfd);
    }
    return -EAGAIN;
}

#else

static long
clone_through_middle(struct spawn *s, struct clone3_arguments *arguments)
{
    (void)s;
    (void)arguments;
    return -ENOSYS;
}

#endif

int
spawn_start(struct spawn *s)
{
    static const uint64_t all_signals = ~UINT64_C(0);
    int ends[2];

    spawn_sweep();
    if (!CAN_CLONE || (s->legacy_clone && s->clone_flags >> 32))
        return ENOSYS;
    if (pipe2(ends, O_CLOEXEC | O_NONBLOCK) < 0)
        return errno;
#if SPAWN_CAN_SHARE_MEMORY
    if (s->tree)
        prepare_tree(s);
#endif
    s->tid = 1;
    s->pidfd = -1;
    s->pipe = ends[0];
    s->report = ends[1];
    s->owner = getpid();
    s->left = 0;

    /* The raw call: the libc's keeps the signals that it uses itself open. */
    struct clone3_arguments arguments = prepare_clone(s);
    CALL4(SYS_rt_sigprocmask, SIG_SETMASK, &all_signals, &s->signal_mask, SIGNAL_SET_SIZE);
    long pid = s->detached ? clone_through_middle(s, &arguments) : clone_child(s, &arguments);
    CALL4(SYS_rt_sigprocmask, SIG_SETMASK, &s->signal_mask, NULL, SIGNAL_SET_SIZE);

    close(ends[1]);
    if (pid < 0) {
        close(ends[0]);
        s->left = 1;
        return (int)-pid;
    }
    s->pid = (pid_t)pid;
    if (s->pidfd < 0 && (s->clone_flags & CLONE_PIDFD)) { /* before Linux 5.2 */
        CALL2(SYS_kill, pid, SIGKILL);
        waitpid(s->pid, NULL, __WALL);
        close(ends[0]);
        s->left = 1;
        s->pid = 0;
        return ENOSYS;
    }
    return 0;
}

void
spawn_abandon(struct spawn *s)
{
    struct pollfd exit_event = {.fd = s->pidfd, .events = POLLIN};
    if (s->pidfd < 0) { /* without CLONE_PIDFD: nobody owns the child */
        close(s->pipe);
        return;
    }
    CALL4(SYS_pidfd_send_signal, s->pidfd, SIGKILL, NULL, 0);
    int events;
    while ((events = poll(&exit_event, 1, 200)) < 0 && errno == EINTR)
        ;
    if (events == 1) /* else it sleeps uninterruptibly */
        s->left = 1;
    if (s->detached) /* by its number it could be another process, if init has it */
        waitid(WAIT_PIDFD, (id_t)s->pidfd, NULL, WEXITED | WNOHANG);
    else if (s->left && s->exit_signal != 0)
        waitpid(s->pid, NULL, __WALL);
    close(s->pidfd);
    close(s->pipe);
}

/* Whether the pipe has ended. It is read only while the child has not left. */
static int
read_reports(struct spawn *s)
{
    struct report report;
    ssize_t count;
    while ((count = read(s->pipe, &report, sizeof report)) == (ssize_t)sizeof report) {
        s->step = report.step;
        s->error = report.error;
    }
    return count == 0;
}

int
spawn_has_left(struct spawn *s, int exited)
{
    if (s->left)
        return 1;
    if (shares_memory(s))
        s->left = __atomic_load_n(&s->tid, __ATOMIC_ACQUIRE) == 0 || exited;
    else
        s->left = read_reports(s) || exited;
    return s->left;
}

/* --- the mapping --------------------------------------------------------------- */

static _Atomic(struct spawn *) parked = NULL;

/* Mappings that no child uses, for the next spawns: to map one, to fault it in and
 * to unmap it takes almost as long as the clone. */
static _Atomic(struct spawn *) spares[SPAWN_SPARES];
#define SPARE_SIZE_LIMIT (256 * 1024)

static _Atomic(int) mapped = 0;

static void
unmap(struct spawn *s)
{
    munmap(s->mapping, s->mapping_size);
    atomic_fetch_sub(&mapped, 1);
}

static size_t
align(size_t size, size_t to)
{
    return (size + to - 1) / to * to;
}

static void
unmap_or_keep(struct spawn *s)
{
    if (s->mapping_size <= SPARE_SIZE_LIMIT)
        for (int i = 0; i < SPAWN_SPARES; i++) {
            struct spawn *none = NULL;
            if (atomic_compare_exchange_strong(&spares[i], &none, s))
                return;
        }
    unmap(s);
}

/* A spare of `size` bytes or more, zeroed as far as the spawn itself goes, or NULL. */
static struct spawn *
take_spare(size_t size)
{
    for (int i = 0; i < SPAWN_SPARES; i++) {
        struct spawn *s = atomic_load(&spares[i]) == NULL ? NULL : atomic_exchange(&spares[i], NULL);
        if (s == NULL)
            continue;
        if (s->mapping_size >= size) {
            size = s->mapping_size;
            memset(s, 0, sizeof *s);
            s->mapping_size = size;
            return s;
        }
        unmap(s);
    }
    return NULL;
}

int
spawn_count(void)
{
    int count = atomic_load(&mapped);
    for (int i = 0; i < SPAWN_SPARES; i++)
        count -= atomic_load(&spares[i]) != NULL;
    return count;
}

struct spawn *
spawn_new(size_t data)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size_t stack = align(STACK_SIZE, page);
    size_t head = align(sizeof(struct spawn), 64);
    size_t size = page + stack + align(head + data, page);
    struct spawn *s = take_spare(size);
    if (s == NULL) {
        char *mapping = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mapping == MAP_FAILED)
            return NULL;
        if (mprotect(mapping, page, PROT_NONE) < 0) {
            int error = errno;
            munmap(mapping, size);
            errno = error;
            return NULL;
        }
        s = (struct spawn *)(mapping + page + stack);
        s->mapping_size = size;
        atomic_fetch_add(&mapped, 1);
    }
    s->stack = (char *)s - stack;
    s->stack_size = stack;
    s->mapping = s->stack - page;
    s->free = (char *)s + head;
    s->left = 1; /* until there is a child */
    return s;
}

void *
spawn_allocate(struct spawn *s, size_t size)
{
    char *start = s->free;
    s->free += align(size, sizeof(void *));
    return start;
}

/* A forked copy of the program has a copy of the mapping, in which no child is. */
static int
is_unused(struct spawn *s)
{
    return !shares_memory(s) || s->owner != getpid() || spawn_has_left(s, 0);
}

static void
park(struct spawn *s)
{
    s->next_parked = atomic_load(&parked);
    while (!atomic_compare_exchange_weak(&parked, &s->next_parked, s))
        ;
}

void
spawn_release(struct spawn *s)
{
    if (s->left || is_unused(s))
        unmap_or_keep(s);
    else
        park(s);
}

void
spawn_sweep(void)
{
    if (atomic_load(&parked) == NULL)
        return;
    struct spawn *next, *s = atomic_exchange(&parked, NULL);
    for (; s != NULL; s = next) {
        next = s->next_parked;
        spawn_release(s);
    }
}

/* --- probing ------------------------------------------------------------------- */

/* No address, as the last page of all is never mapped. */
#define NOWHERE ((long)-8)

/* Without side effects: the kernel checks the flags first, and then fails to
 * store the pidfd. CLONE_VM keeps it from copying page tables before that. An
 * emulator might succeed all the same: its child ends at once, and touches nothing
 * of this stack, as the system calls are inlined where memory is shared. */
int
spawn_probe(uint64_t clone_flags, int legacy_clone)
{
    uint64_t flags = clone_flags | CLONE_PIDFD | (SPAWN_CAN_SHARE_MEMORY ? CLONE_VM | CLONE_VFORK : 0);
    struct clone3_arguments arguments = {.flags = flags, .pidfd = (uint64_t)NOWHERE};
    long result;
    if (!CAN_CLONE || (legacy_clone && clone_flags >> 32))
        return ENOSYS;
    if (!legacy_clone)
        result = CALL2(SYS_clone3, &arguments, sizeof arguments);
#if defined(__s390__)
    else
        result = system_call(SYS_clone, 0, (long)(uint32_t)flags, NOWHERE, 0, 0);
#else
    else
        result = system_call(SYS_clone, (long)(uint32_t)flags, 0, NOWHERE, 0, 0);
#endif
    if (result == 0)
        for (;;)
            CALL1(SYS_exit_group, 0);
    if (result > 0) {
        waitpid((pid_t)result, NULL, __WALL);
        return 0;
    }
    return (int)-result;
}
