"""Process groups: signalled as a whole through their leader's pidfd, or member by member.

Since Linux 6.9 a leader's pidfd reaches its whole group, also when the leader is
gone and others are not, and nobody if there is no such group (yet).

Before that, the members are looked for in /proc, and each is signalled through a
pidfd of its own, after two proofs: that pidfd was open when its group was read
and stands for a living process after it; and the leader has not been reaped
after it, so that the number was the group's. Nothing can prove that of a leader
that has been reaped: an error then.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import signal
from collections.abc import Iterator
from typing import Final

from aioreap import kernel

__all__ = ["Members"]

# How often a group that goes on to fork is looked through for one signal.
_PASSES: Final = 20
# How often /proc is read to find that nobody lives in a group; then it counts as alive.
_READINGS: Final = 4


class Members:
    """The members that were signalled one by one, by pidfds that stay open for as long as this."""

    def __init__(self) -> None:
        self.pidfds: dict[int, int] = {}

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the pidfds."""
        while self.pidfds:
            os.close(self.pidfds.popitem()[1])

    def add(self, pid: int, pidfd: int) -> bool:
        """Take over a pidfd, unless it is -1; whether it is not."""
        if pidfd >= 0:
            earlier, self.pidfds[pid] = self.pidfds.get(pid, -1), pidfd
            if earlier >= 0:
                os.close(earlier)
        return pidfd >= 0

    def are_alive(self) -> bool:
        """Whether any of them is."""
        return not all(map(kernel.is_readable, self.pidfds.values()))

    def kill(self) -> None:
        """SIGKILL for each, whatever has become of the leader."""
        for pidfd in self.pidfds.values():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def _kernel_signals_groups() -> bool:
    return kernel.backend().features["signal_process_group"].available


def has_members(pidfd: int) -> bool:
    """Whether the leader's pidfd reaches anybody, which may be zombies; False if it never could."""
    if not _kernel_signals_groups():
        return False
    try:
        signal.pidfd_send_signal(pidfd, 0, None, kernel.PIDFD_SIGNAL_PROCESS_GROUP)
    except PermissionError:
        return True
    except OSError:
        return False
    return True


def is_alive(pidfd: int, leader: int) -> bool:
    """Whether a member of the group lives that is no zombie, as far as this can be known.

    `pidfd` is the leader's, or -1 if it is gone.
    """
    if _kernel_signals_groups() and (pidfd < 0 or not has_members(pidfd)):
        return False
    try:
        found = _has_living_members(leader)
    except OSError:
        found = True
    # The group's number was its own while /proc was read, if it still has members.
    return found and (not _kernel_signals_groups() or has_members(pidfd))


def _has_living_members(leader: int) -> bool:
    """Whether somebody lives in group `leader`, or may do so.

    /proc is listed first and looked at after that: a member that forks in between and
    ends is dead, or gone, and its child is not in the list. So nobody lives only when a
    later reading finds none dead or gone who was not so in the one before: whoever lived
    when it began was in its list. One reading is enough if it finds none and the kernel
    does not say that there are members.

    Raises:
        OSError: ENOSYS: there is no /proc of this pid namespace.
    """
    before: set[int] | None = None if _kernel_signals_groups() else set()
    for _ in range(_READINGS):
        ended = set()
        for pid in _pids():
            state = _state_in_group(pid, leader)
            if state is _State.LIVING:
                return True
            if state is _State.ENDED:
                ended.add(pid)
        if before is not None and ended <= before:
            return False
        before = ended
    return True


def send_signal(pidfd: int, leader: int, number: int, members: Members) -> bool:
    """Signal the group; whether there was anybody.

    `pidfd` is the leader's, or -1 if it is gone. `members` takes those that the
    kernel had to be asked for one by one.

    Raises:
        PermissionError: nobody in the group may be signalled, as for kill(2).
        OSError: ENOSYS: this needs Linux 6.9.
    """
    if not _kernel_signals_groups():
        return _signal_each(pidfd, leader, number, members)
    if pidfd < 0:
        return False
    try:
        signal.pidfd_send_signal(pidfd, number, None, kernel.PIDFD_SIGNAL_PROCESS_GROUP)
    except ProcessLookupError:
        return False
    return True


def _living_members(leader: int) -> Iterator[int]:
    """The pids of the processes in group `leader` that are no zombies; errors as _pids()."""
    return (pid for pid in _pids() if _state_in_group(pid, leader) is _State.LIVING)


def _pids() -> Iterator[int]:
    """The pids of all processes.

    Raises:
        OSError: ENOSYS: there is no /proc of this pid namespace.
    """
    try:
        is_ours = int(os.readlink("/proc/self")) == os.getpid()
    except OSError:
        is_ours = False
    if not is_ours:
        raise OSError(errno.ENOSYS, "the members of a process group cannot be found without /proc")
    for name in os.listdir("/proc"):
        if name.isdigit():
            yield int(name)


class _State(enum.Enum):
    """What a process is to a group."""

    LIVING = enum.auto()
    ENDED = enum.auto()  # a member that is a zombie, or gone: nobody knows of which group
    STRANGER = enum.auto()


def _state_in_group(pid: int, leader: int) -> _State:
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            stat = file.read(4096)
    except OSError:
        return _State.ENDED
    state, _, group, *rest = stat[stat.rindex(b")") + 1 :].split()
    threads = rest[14]  # the first of several may have ended before the others
    if int(group) != leader:
        return _State.STRANGER
    ended = state in (b"Z", b"X") and int(threads) <= 1
    return _State.ENDED if ended else _State.LIVING


def _exists(pidfd: int) -> bool:
    """Whether its process has not been reaped."""
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except PermissionError:
        return True
    except ProcessLookupError:
        return False
    return True


def _signal_each(leader_pidfd: int, leader: int, number: int, members: Members) -> bool:
    seen: set[int] = set()
    refused: PermissionError | None = None
    was_sent = False
    for _ in range(_PASSES):
        # All are proven before any is signalled: the leader may be reaped as soon as it is dead.
        news = [pid for pid in _living_members(leader) if pid not in seen]
        proven = [pid for pid in news if members.add(pid, _open_member(pid, leader_pidfd, leader))]
        if not proven:
            break
        seen.update(proven)
        for pid in sorted(proven, key=lambda pid: pid != leader):  # it does not see the others die
            try:
                signal.pidfd_send_signal(members.pidfds[pid], number)
                was_sent = True
            except ProcessLookupError:
                pass
            except PermissionError as error:
                refused = error
    if refused is not None and not was_sent:
        raise refused
    return was_sent


def _open_member(pid: int, leader_pidfd: int, leader: int) -> int:
    """A pidfd for `pid` if that is proven to be a living member of the group, or -1.

    Raises:
        OSError: ENOSYS: the leader has been reaped.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return -1
    if _state_in_group(pid, leader) is _State.LIVING and _exists(pidfd):
        if leader_pidfd >= 0 and _exists(leader_pidfd):
            return pidfd
        os.close(pidfd)
        raise OSError(
            errno.ENOSYS,
            f"the leader of process group {leader} is gone, and to signal the group then needs "
            "PIDFD_SIGNAL_PROCESS_GROUP (Linux 6.9)",
        )
    os.close(pidfd)
    return -1
