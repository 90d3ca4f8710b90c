/* Start a program in a child that shares the caller's memory until its exec.
 *
 * Nothing here needs Python.h: _clone.c is the binding, tests/c/standalone.c
 * runs the same code as the init of a bare kernel.
 */
#ifndef AIOREAP_SPAWN_H
#define AIOREAP_SPAWN_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#if __SIZEOF_POINTER__ == 8 && (defined(__x86_64__) || defined(__aarch64__) || defined(__riscv))
#define SPAWN_CAN_SHARE_MEMORY 1
#else
#define SPAWN_CAN_SHARE_MEMORY 0
#endif

/* What the child is about to do. The last one that it wrote says where it died. */
enum spawn_step {
    SPAWN_STEP_START,
    SPAWN_STEP_CGROUP,
    SPAWN_STEP_DESCRIPTORS,
    SPAWN_STEP_CHDIR,
    SPAWN_STEP_SESSION,
    SPAWN_STEP_PROCESS_GROUP,
    SPAWN_STEP_GROUPS,
    SPAWN_STEP_GID,
    SPAWN_STEP_UID,
    SPAWN_STEP_NO_NEW_PRIVS,
    SPAWN_STEP_PARENT_DEATH,
    SPAWN_STEP_USER_NAMESPACE,
    SPAWN_STEP_INIT,
    SPAWN_STEP_EXEC,
};

struct spawn_descriptor {
    int source; /* a descriptor of the parent */
    int target; /* its number in the program */
};

/* One spawn. It lies at the head of a mapping of its own, behind the child's
 * stack; all that it points to lies in the same mapping. */
struct spawn {
    /* CLONE_CHILD_CLEARTID: the kernel zeroes it when the child has left the
     * parent's memory, and only then may the mapping be used again. */
    uint32_t tid;
    uint32_t step;
    int32_t error;
    int left;
    int taken; /* somebody else owns pidfd and pipe, and so the child */

    uint64_t clone_flags;
    int exit_signal;
    int legacy_clone;
    int cgroup;

    const char **paths; /* tried one after the other */
    char **argv;
    char **envp;
    const char *cwd;
    int cwd_descriptor; /* or -1: entered before cwd */
    int cgroup_procs;   /* or -1: the cgroup.procs that the child writes itself to */
    struct spawn_descriptor *descriptors;
    size_t descriptor_count;
    int close_fds;
    int restore_signals;
    int no_new_privs;
    int new_session;
    int umask;           /* or -1 */
    pid_t process_group; /* or -1 */
    int64_t uid, gid;    /* or -1 */
    uint32_t *groups;
    ssize_t group_count; /* or -1 */

    pid_t pid;
    int pidfd;
    int pipe; /* read end: reaches EOF about when the child has exec'ed or died */
    int report;
    uint64_t signal_mask;

    char *mapping;
    size_t mapping_size;
    char *stack;
    size_t stack_size;
    char *free; /* the part of the mapping not handed out yet */
    pid_t owner;
    struct spawn *next_parked;

    int detached; /* the child is to be init's: a process between makes it, and is gone at once */
    int pdeathsig; /* SIGKILL for the child when the thread that makes it ends */

    /* The child is the init of a pid namespace, and the program runs below it. Never with
     * CLONE_VM. */
    int tree;
    int status; /* where the init writes the wait status, and reads signals for the group */
    int parent; /* with pdeathsig: a pidfd of the owner */
    uintptr_t image[2]; /* where this code lies, with all that belongs to it */
    uintptr_t rseq;
    uintptr_t page;
    char uid_map[32], gid_map[32];
    int uid_map_size, gid_map_size;
};

/* Signals that no program is ever sent, as the C libraries have them for themselves. */
#define SPAWN_STOP_PROGRAM 32
#define SPAWN_SIGNAL_GROUP 33

/* How many mappings that no child uses are kept at most for the next spawns. */
#define SPAWN_SPARES 16

/* How many spawns there are that have not been given up for good. */
int spawn_count(void);

/* A zeroed spawn with room for `data` bytes, which are not, or NULL with errno. */
struct spawn *spawn_new(size_t data);

/* `size` bytes of the room asked for, aligned for a pointer. */
void *spawn_allocate(struct spawn *, size_t size);

/* Start the child: 0, or an errno and there is no child. ENOSYS also where a
 * kernel ignores a part of clone_flags: legacy clone has no bits above 31.
 * Without CLONE_PIDFD the pidfd is -1, and the child cannot be abandoned. */
int spawn_start(struct spawn *);

/* Whether the child has left the caller's memory, so that step and error are
 * final. `exited` says that its pidfd has become readable. */
int spawn_has_left(struct spawn *, int exited);

/* Kill the child that spawn_start() made, wait for it, and close its descriptors. */
void spawn_abandon(struct spawn *);

/* Give the spawn up: at once, or when its child has left it. */
void spawn_release(struct spawn *);

/* Give up what spawn_release() had to keep, where the child has left it since.
 * Every spawn_start() begins with it. */
void spawn_sweep(void);

/* The errno of a clone that cannot succeed: EFAULT says that the kernel knows
 * the flags, EINVAL that it does not, ENOSYS or EPERM that a filter hides the call. */
int spawn_probe(uint64_t clone_flags, int legacy_clone);

#endif
