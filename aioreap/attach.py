"""attach(): a Process for one that runs already, by its pid, its pidfd, or all that it has."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import select
import signal
import time
from typing import Final, overload

from aioreap.detached import Detached
from aioreap.process import Process, check_limit
from aioreap.transport import DEFAULT_LIMIT, SubprocessTransport
from aioreap.unowned import Heir, Stranger
from aioreap.watcher import Child, ChildWatcher

__all__ = ["GONE", "attach", "check_pidfd", "pid_of"]

_LARGEST_PID: Final = 2**31 - 1
_PIDFD_THREAD: Final = os.O_EXCL  # Linux 6.9
GONE: Final = -1  # what fdinfo has for the pid of a process that was reaped ...
_BEYOND: Final = 0  # ... and of one that has none in this pid namespace


def _no_process(message: str) -> ProcessLookupError:
    return ProcessLookupError(errno.ESRCH, message)


def _open(pid: int) -> int:
    if not isinstance(pid, int):
        raise TypeError(f"attach() takes a pid or a Detached, not {type(pid).__name__}")
    if isinstance(pid, bool) or pid <= 0:
        raise ValueError(f"{pid!r} is no process id")
    if pid > _LARGEST_PID:
        raise _no_process(f"no process {pid}")
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno == errno.ESRCH:
            raise _no_process(f"no process {pid}") from None
        if error.errno in (errno.EINVAL, errno.ENOENT):
            raise _no_process(f"{pid} is a thread, and no process") from None
        raise


def check_pidfd(descriptor: int) -> None:
    """Raise a ValueError if it is not the pidfd of a process, or an OSError if it is closed."""
    if not isinstance(descriptor, int) or isinstance(descriptor, bool) or descriptor < 0:
        raise ValueError(f"{descriptor!r} is no descriptor")
    os.fstat(descriptor)  # EBADF
    try:
        os.waitid(os.P_PIDFD, descriptor, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except (BlockingIOError, ChildProcessError):
        pass
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
        raise ValueError(f"descriptor {descriptor} is no pidfd") from None
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & _PIDFD_THREAD:
        raise ValueError(f"descriptor {descriptor} is the pidfd of a thread")


def pid_of(pidfd: int) -> int:
    """The pid of a pidfd's process in this pid namespace: _BEYOND or GONE if it has none."""
    with open(f"/proc/self/fdinfo/{pidfd}", "rb") as lines:
        for line in lines:
            if line.startswith(b"Pid:"):
                return int(line.split()[1])
    raise ValueError(f"descriptor {pidfd} is no pidfd")


def _known_pid_of(pidfd: int) -> int:
    pid = pid_of(pidfd)
    if pid == _BEYOND:
        raise _no_process(f"the process of descriptor {pidfd} is beyond this pid namespace")
    if pid == GONE:
        raise _no_process(f"the process of descriptor {pidfd} has ended, and was reaped")
    return pid


def _start_time(pid: int) -> int:
    """In clock ticks since the boot.

    Raises:
        ProcessLookupError: there is no such process.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            stat = file.read()
    except (FileNotFoundError, ProcessLookupError):
        raise _no_process(f"no process {pid}") from None
    return int(stat.rpartition(b")")[2].split()[19])


def _started_ns(start_time: int) -> int:
    """`start_time` on the clock of ``time.monotonic_ns()``, to the tick."""
    since_boot = start_time * 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    return since_boot - time.clock_gettime_ns(time.CLOCK_BOOTTIME) + time.monotonic_ns()


def _check_not_reaped(pid: int, pidfd: int) -> None:
    """As long as that is so, no other process has its number."""
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except PermissionError:
        pass
    except ProcessLookupError:
        raise _no_process(f"process {pid} has ended, and was reaped") from None


def _inode_of(pidfd: int) -> int:
    with select.epoll() as anonymous:
        if os.fstat(pidfd).st_dev == os.fstat(anonymous.fileno()).st_dev:
            raise OSError(
                errno.ENOSYS, "inode= needs Linux 6.9, where each process has one of its own"
            )
    return os.fstat(pidfd).st_ino


def _check(pid: int, pidfd: int, start_time: int | None, inode: int | None) -> int:
    """See whether it is the process that is meant, and return when it started, in ns.

    Raises:
        ProcessLookupError: it is another one, or gone.
    """
    started: int | None = None
    with contextlib.suppress(ProcessLookupError):  # it may only be hidden (hidepid=)
        started = _start_time(pid)
    _check_not_reaped(pid, pidfd)
    if start_time is not None and started != start_time:
        raise _no_process(f"process {pid} started at {started}, and not at {start_time}")
    if inode is not None and _inode_of(pidfd) != inode:
        raise _no_process(f"process {pid} has another inode than {inode}")
    return time.monotonic_ns() if started is None else _started_ns(started)


def _stranger(pid: int, pidfd: int, start_time: int | None, inode: int | None) -> Stranger:
    try:
        started_ns = _check(pid, pidfd, start_time, inode)
    except BaseException:
        os.close(pidfd)
        raise
    return Stranger(pid, pidfd, reap=False, started_ns=started_ns)


def _check_detached(detached: Detached) -> None:
    check_pidfd(detached.pidfd)
    pid = pid_of(detached.pidfd)
    if pid == _BEYOND:
        raise _no_process(f"process {detached.pid} is beyond this pid namespace")
    if pid not in (GONE, detached.pid):
        raise ValueError(f"descriptor {detached.pidfd} is of process {pid}, not {detached.pid}")


def _check_not_taken(detached: Detached, loop: asyncio.AbstractEventLoop) -> None:
    if ChildWatcher.of(loop).is_watching(detached.pidfd):
        raise ValueError(f"process {detached.pid} is attached to already")


def _child_of(detached: Detached, loop: asyncio.AbstractEventLoop) -> Child:
    """What was detached, as a child again."""
    _check_not_taken(detached, loop)  # by a call that has overtaken this one
    started_ns = detached.started_ns
    if started_ns is None:
        started_ns = time.monotonic_ns()
    child = Child(
        detached.pid,
        detached.pidfd,
        reap=not detached.autoreap,  # an Heir's copy would keep an AUTOKILL child alive
        started_ns=started_ns,
    )
    child.leads_group = detached.leads_group
    heir = detached.heir
    if heir is None and pid_of(detached.pidfd) == detached.pid:
        heir = Heir.waiting_for(detached.pid)
    if heir is not None and heir.is_here:
        child.heir = heir
    return child


class _Streams:
    """A stream protocol, which gets what was read before it hears of more."""

    def __init__(self, loop: asyncio.AbstractEventLoop, limit: int, detached: Detached) -> None:
        self._loop = loop
        self._limit = limit
        self._unread = {"stdout": detached.unread_stdout, "stderr": detached.unread_stderr}
        self.protocol = asyncio.subprocess.SubprocessStreamProtocol(limit=limit, loop=loop)

    def feed(self) -> None:
        """Put what was read into the readers. The one of a stream that has ended is made here."""
        for name, data in self._unread.items():
            if not data:
                continue
            reader: asyncio.StreamReader | None = getattr(self.protocol, name)
            if reader is None:
                reader = asyncio.StreamReader(limit=self._limit, loop=self._loop)
                setattr(self.protocol, name, reader)
                reader.feed_data(data)
                reader.feed_eof()
            else:
                reader.feed_data(data)


async def _begin(loop: asyncio.AbstractEventLoop, limit: int, detached: Detached) -> Process:
    _check_detached(detached)
    _check_not_taken(detached, loop)
    stdio = {0: detached.stdin, 1: detached.stdout, 2: detached.stderr}
    pipes = {number: d for number, d in stdio.items() if d is not None}
    copies: dict[int, int] = {}
    try:
        for number, descriptor in pipes.items():
            copies[number] = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
    except BaseException:
        while copies:
            os.close(copies.popitem()[1])
        raise
    blocking = [d for d in pipes.values() if os.get_blocking(d)]
    streams = _Streams(loop, limit, detached)
    transport = SubprocessTransport(loop, streams.protocol, None, None)
    try:
        await transport.attach(copies, lambda: _child_of(detached, loop), streams.feed)
    except BaseException:
        if not ChildWatcher.of(loop).is_watching(detached.pidfd):  # by a call that overtook it
            for descriptor in blocking:  # the loop has changed that, for each copy of it
                os.set_blocking(descriptor, True)
        raise
    for descriptor in pipes.values():
        os.close(descriptor)
    return Process(transport, streams.protocol, loop)


@overload
async def attach(
    process: int, /, *, start_time: int | None = None, inode: int | None = None
) -> Process: ...
@overload
async def attach(
    *, pidfd: int, start_time: int | None = None, inode: int | None = None
) -> Process: ...
@overload
async def attach(process: Detached, /, *, limit: int = DEFAULT_LIMIT) -> Process: ...


async def attach(
    process: int | Detached | None = None,
    /,
    *,
    pidfd: int | None = None,
    start_time: int | None = None,
    inode: int | None = None,
    limit: int = DEFAULT_LIMIT,
) -> Process:
    """Return a Process for one that runs already: by its pid, its pidfd, or as it was detached.

    A pid and a pidfd are somebody else's process. It can be waited for and be sent signals,
    and does not end with this loop. A pid may be stale: then it is that of another process by
    now, and only ``start_time`` (field 22 of /proc/pid/stat, in clock ticks since the boot)
    or ``inode`` (``os.fstat(pidfd).st_ino``, Linux 6.9, never used again) tell. Both are
    compared when a pidfd holds on to the process, so that there is no race. Of `pidfd` a
    copy is taken; what it says of CLONE_PIDFD_AUTOKILL holds for the copy too.

    A Detached is taken over, with its descriptors and what was read: the process is a child
    of this loop again, and ends with it. `limit`, in bytes, is its readers' buffer. If the
    call fails or is cancelled, the Detached is as it was, and the caller's; but that uvloop reads
    at once, so that output which comes in the turns of a cancelled call is lost there.

    How a process ends that is not our child is known from Linux 6.15 on, and when its
    parent has reaped it: until then it is waited for, by wait() and by stop(), even if it
    is dead already. On 6.13 and 6.14 it is waited for as long, and before 6.13 until it is dead,
    and ExitStatusLost is raised then. A child of this process that
    something else in it reaps is that one's: it is not reaped here.

    The end of this loop, of an ``async with`` block or of a cancelled wait() does nothing to
    somebody else's process. stop() does: if it is cancelled, it kills that one too, at once.

    Raises:
        ProcessLookupError: there is no such process, it is another one than `start_time`
            or `inode` say, the number is a thread's, or it is beyond this pid namespace.
        ValueError: the number is no pid, the descriptor no pidfd of a process, the Detached was
            taken over already, or `limit` is not positive.
        OSError: EMFILE; ENOSYS for `inode` before Linux 6.9, or without pidfd_open (5.3).
    """
    check_limit(limit)
    loop = asyncio.get_running_loop()
    if isinstance(process, Detached):
        if (pidfd, start_time, inode) != (None, None, None):
            raise TypeError("a Detached says all that there is to say: attach() takes only limit")
        return await _begin(loop, limit, process)
    if (process is None) is (pidfd is None):
        raise TypeError("attach() takes either a pid, or pidfd, or a Detached")
    if process is not None:
        pid, own = process, _open(process)
    else:
        assert pidfd is not None
        check_pidfd(pidfd)
        pid, own = _known_pid_of(pidfd), fcntl.fcntl(pidfd, fcntl.F_DUPFD_CLOEXEC, 3)
    stranger = _stranger(pid, own, start_time, inode)
    streams = _Streams(loop, limit, Detached(pid, own))
    transport = SubprocessTransport(loop, streams.protocol, None, None)
    await transport.attach({}, lambda: stranger, streams.feed)
    return Process(transport, streams.protocol, loop)
