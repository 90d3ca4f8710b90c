"""What Python cannot do: code between clone and exec, steps that no signal handler splits, memory.

See _clone.c, _spawn.c and _output.c.
"""

from typing import Any

class Output:
    """All that comes out of a pipe, given out without a copy: see _output.c.

    Where there is no memory for more of it, all of it is lost, until take() has said so.
    """

    def __len__(self) -> int:
        """How many bytes it has."""

    def write(self, data: bytes, /) -> int:
        """Append `data`; how many bytes there are now. MemoryError: it is lost."""

    def read(self, descriptor: int, most: int = ..., /) -> bool:
        """Read 256 KiB of a non-blocking pipe, or what is there, up to `most` bytes in all.

        False if nothing can be read: the pipe has ended, there were `most` bytes, or all is lost.
        A writer that a full pipe had held up is waited for, three times for 30 us at most. OSError:
        as read(), but EAGAIN and EINTR are none.
        """

    def take(self) -> bytes:
        """All of it, which is not here any longer. MemoryError: it is lost."""

def wait_for_writer(descriptor: int, /) -> bool:
    """Wait 30 us at most until there is more in a pipe that a whole chunk was just read from.

    Whether there is. That is not asked, and False, for the first three chunks of a descriptor after
    those of another in this thread, and for 64 after it was waited for in vain.
    """

def take_line(buffer: bytearray, longest: int, /) -> bytes:
    """Cut the first line off, if it has no more bytes than that before its end; else b""."""

class Block:
    """The memory that a child uses until its exec; opaque, given up with its last reference."""

CAN_SHARE_MEMORY: int
STOP_PROGRAM: int
SIGNAL_GROUP: int
PIDFD_INFO_EXIT: int

STEP_START: int
STEP_CGROUP: int
STEP_DESCRIPTORS: int
STEP_CHDIR: int
STEP_SESSION: int
STEP_PROCESS_GROUP: int
STEP_GROUPS: int
STEP_GID: int
STEP_UID: int
STEP_NO_NEW_PRIVS: int
STEP_PARENT_DEATH: int
STEP_USER_NAMESPACE: int
STEP_INIT: int
STEP_EXEC: int

def spawn(
    paths: tuple[bytes, ...],
    argv: tuple[bytes, ...],
    envp: tuple[bytes, ...] | None,
    descriptors: tuple[tuple[int, int], ...],
    clone_flags: int,
    exit_signal: int,
    legacy_clone: bool,
    cwd: bytes | None = ...,
    cwd_descriptor: int = ...,
    close_fds: bool = ...,
    restore_signals: bool = ...,
    new_session: bool = ...,
    process_group: int = ...,
    no_new_privs: bool = ...,
    umask: int = ...,
    uid: int = ...,
    gid: int = ...,
    groups: tuple[int, ...] | None = ...,
    cgroup: int = ...,
    cgroup_procs: int = ...,
    pdeathsig: bool = ...,
    tree: bool = ...,
    status: int = ...,
    parent: int = ...,
    detached: bool = ...,
    /,
) -> tuple[int, int, int, Block]:
    """Clone a child that execs the first of `paths` that can be: pid, pidfd, pipe, block.

    The pipe becomes readable about when the child has exec'ed or died; outcome()
    then tells which. -1 stands for a number that is not set, and for the pidfd without
    CLONE_PIDFD: nothing ends such a child. `detached` says that it is to be init's and not
    ours to reap. OSError: there is no child.

    With `tree` the child is the init of a pid namespace and clones the program. It sends
    the program's wait status to `status`; with `pdeathsig`, `parent` is a pidfd of this process.
    """

def take(block: Block, epoll: int = ..., /) -> None:
    """Own the child's pidfd and pipe from here on; until then the block does, and kills it.

    Both are added to the epoll set `epoll` (-1: none), level-triggered and for their input, with
    their numbers as the data. OSError: as epoll_ctl(); they are the caller's, and neither is in
    the set.
    """

def unwatch(epoll: int, owner: int, descriptor: int, /) -> None:
    """Take a descriptor out of an epoll set, if it is in it and this process is `owner`."""

def close(epoll: int, owner: int, members: dict[int, Any], holder: object, name: str, /) -> None:
    """Close the descriptor that is attribute `name` of `holder`, which becomes -1; not if it is.

    Before that it is deleted from `members` and from the epoll set, as by unwatch().
    """

def outcome(block: Block, exited: bool, /) -> tuple[int, int] | None:
    """The child's last step and errno, or None while it still uses the block.

    `exited` says that its pidfd has become readable. An errno of 0 at a step
    before STEP_EXEC means that it was killed there.
    """

def step(block: Block, /) -> int:
    """The step that a child with shared memory is at now."""

def reap(pidfd: int, /) -> tuple[int, int | None] | None:
    """Reap the child if it has ended: its wait status and the cgroup's id, None if unknown.

    None: nothing yet. Errors are those of waitid().
    """

def exit_info(pidfd: int, /) -> tuple[int, int | None] | None:
    """What PIDFD_GET_INFO says of an end: the wait status and the cgroup's id; None: nothing yet.

    OSError: as that ioctl (ENOTTY or EINVAL before Linux 6.13, ESRCH, EREMOTE).
    """

def probe(clone_flags: int, legacy_clone: bool, /) -> int:
    """The errno of a clone that cannot succeed: EFAULT if the kernel knows the flags."""

def environment() -> tuple[bytes, ...]:
    """The environment that a child inherits, as ``name=value``."""

def inherits(directory: int, stdin: int, stdout: int, stderr: int, /) -> bool:
    """Whether a child would have that working directory and these as its 0, 1 and 2.

    They are copies of descriptors, -1 for one that is not inherited. False too where the kernel
    cannot tell that two descriptors are of one open file (before Linux 6.10).
    """

def set_no_new_privs() -> None:
    """Set no_new_privs for the calling thread, for good."""

def set_pdeathsig(parent: int, /) -> None:
    """Have the end of the thread that made this process kill it: EREMOTE if it is not `parent`."""

def blocks() -> int:
    """How many blocks there are, without those kept for the next spawns."""
