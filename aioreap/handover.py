"""Detached processes for another process: over a Unix socket, or to the program that exec loads.

What a process needs is its descriptors: whoever holds a copy of its pidfd can wait for
it, signal it, and (CLONE_PIDFD_AUTOKILL) keeps it alive. What arrives is as it was sent, with
the output that was read and not taken. attach() makes a Process of it.

Who reaps it does not change:

* one that is auto-reaped (Linux 7.1) is reaped by the kernel, and its exit info read by
  whoever has the pidfd;
* an ordinary child stays the child of the process that made it. After an exec that is the
  same one, and attach() reaps it. Over a socket, the sender goes on reaping it as long as it
  lives, init does after that, and the receiver can read the exit info then (Linux 6.15); before
  that kernel, it gets ExitStatusLost.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Final, Self

from aioreap.attach import GONE, check_pidfd, pid_of
from aioreap.detached import Detached
from aioreap.kernel import SCM_PIDFD
from aioreap.unowned import Heir

__all__ = ["VARIABLE", "across_exec", "from_environment", "receive", "send"]

#: The environment variable that tells a program what was handed over to it.
VARIABLE: Final = "AIOREAP_HANDOVER"

_NAME: Final = "aioreap-handover"
_HEAD: Final = struct.Struct("=8sQ")  # _MAGIC, how many follow
_MAGIC: Final = b"aioreap1"
# pid, started_ns, wait status, whether it is auto-reaped, whether it leads a group, pidfd, stdin,
# stdout, stderr, and how much was read of the last two; it follows.
_BODY: Final = struct.Struct("=qqq??iiiiQQ")
_NONE: Final = -1
_MOST_DESCRIPTORS: Final = 4
_CHUNK: Final = 2**18  # bytes
# For what the kernel adds to each message if the socket's owner has asked for it, in bytes:
# credentials, a security label (a page at most), a pidfd.
_ROOM_FOR_OTHERS: Final = 2**13


def _numbers(detached: Detached) -> tuple[int, int, int, int]:
    stdin, stdout, stderr = (
        _NONE if d is None else d for d in (detached.stdin, detached.stdout, detached.stderr)
    )
    return detached.pidfd, stdin, stdout, stderr


def _body(detached: Detached) -> bytes:
    started_ns = _NONE if detached.started_ns is None else detached.started_ns
    known = None if detached.heir is None else detached.heir.status
    status = _NONE if known is None or known[0] is None else known[0]
    lengths = len(detached.unread_stdout), len(detached.unread_stderr)
    kind = detached.autoreap, detached.leads_group
    return _BODY.pack(detached.pid, started_ns, status, *kind, *_numbers(detached), *lengths)


def _numbers_in(body: bytes) -> tuple[int, ...]:
    """As _numbers(), where they were sent."""
    return _BODY.unpack(body)[5:9]


def _lengths_in(body: bytes) -> tuple[int, int]:
    out, err = _BODY.unpack(body)[9:]
    return out, err


def _made(body: bytes, numbers: list[int | None], unread: list[bytes]) -> Detached:
    """What `body` describes, with the descriptors that it has here."""
    pid, started_ns, status, autoreap, leads_group = _BODY.unpack(body)[:5]
    pidfd, stdin, stdout, stderr = numbers
    if pidfd is None:
        raise ValueError("what was handed over has no pidfd")
    check_pidfd(pidfd)
    known = pid_of(pidfd)  # its number may be another one in this pid namespace
    return Detached(
        pid=pid if known == GONE else known,
        pidfd=pidfd,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        unread_stdout=unread[0],
        unread_stderr=unread[1],
        started_ns=None if started_ns == _NONE else started_ns,
        autoreap=autoreap,
        leads_group=leads_group,
        heir=None if status == _NONE else Heir.of_dead(pid, status, started_ns),
    )


def _count(head: bytes) -> int:
    magic, count = _HEAD.unpack(head)
    if magic != _MAGIC:
        raise ValueError("this is no hand-over of aioreap")
    return int(count)


# Over a socket.


def _set_result(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


class _Channel:
    """A socket that is waited for by a descriptor of its own, and never blocks.

    Attributes:
        received: the descriptors that have come; closed at the end, if an error ends it.
    """

    def __init__(self, sock: socket.socket) -> None:
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
            raise ValueError(f"a stream socket of the family AF_UNIX is needed, not {sock!r}")
        self.received: list[int] = []
        self._socket = sock.dup()
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._socket.close()
        while error is not None and self.received:
            os.close(self.received.pop())

    async def _ready(self, add: Callable[..., object], remove: Callable[[int], object]) -> None:
        ready = self._loop.create_future()
        descriptor = self._socket.fileno()
        add(descriptor, _set_result, ready)
        try:
            await ready
        finally:
            remove(descriptor)

    async def send(self, content: bytes, descriptors: list[int]) -> None:
        rest = memoryview(content)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        while rest:
            try:
                sent = self._socket.sendmsg([rest[:_CHUNK]], rights, socket.MSG_DONTWAIT)
            except BlockingIOError:
                await self._ready(self._loop.add_writer, self._loop.remove_writer)
            else:
                rest, rights = rest[sent:], []

    def _take_descriptors(self, control: list[tuple[int, int, bytes]]) -> None:
        """Take what was sent, and close the pidfd of its sender that SO_PASSPIDFD brings."""
        senders: list[int] = []
        of_kind = {socket.SCM_RIGHTS: self.received, SCM_PIDFD: senders}
        for level, kind, content in control:
            if level == socket.SOL_SOCKET and kind in of_kind:
                numbers = array.array("i")
                numbers.frombytes(content[: len(content) // numbers.itemsize * numbers.itemsize])
                of_kind[kind] += numbers
        for pidfd in senders:
            if pidfd >= 0:  # else an errno: the sender is gone
                os.close(pidfd)

    async def receive(self, size: int) -> bytes:
        content = bytearray()
        room = _ROOM_FOR_OTHERS + socket.CMSG_SPACE(_MOST_DESCRIPTORS * array.array("i").itemsize)
        how = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        while len(content) < size:
            try:
                part, control, flags, _ = self._socket.recvmsg(
                    min(size - len(content), _CHUNK), room, how
                )
            except BlockingIOError:
                await self._ready(self._loop.add_reader, self._loop.remove_reader)
                continue
            self._take_descriptors(control)
            if flags & socket.MSG_CTRUNC:
                raise OSError(errno.EMFILE, "no room for the descriptors that were handed over")
            if not part:
                raise EOFError("the socket was closed before all was handed over")
            content += part
        return bytes(content)


async def send(sock: socket.socket, *detached: Detached) -> None:
    """Hand processes over to whoever calls receive() on the other end of `sock`.

    `sock` is a connected Unix stream socket, blocking or not. When all is sent, which may be
    before it is received, the descriptors are closed here: nothing is left of them. What is in
    the socket counts as held, so an AUTOKILL child lives until the other side closes it.

    If it fails or is cancelled, everything is still the caller's. The socket is of no more use
    then, and to be closed on both ends: it may hold copies.

    Raises:
        ValueError: it is another kind of socket.
        OSError: as for sendmsg(2): BrokenPipeError, ETOOMANYREFS.
    """
    with _Channel(sock) as channel:
        await channel.send(_HEAD.pack(_MAGIC, len(detached)), [])
        for one in detached:
            await channel.send(_body(one), one.descriptors)
            await channel.send(one.unread_stdout + one.unread_stderr, [])
    for one in detached:
        for descriptor in one.descriptors:
            os.close(descriptor)


async def receive(sock: socket.socket) -> list[Detached]:
    """Return what one send() on the other end of `sock` hands over.

    Only from those who may run programs here: what arrives is taken for what it says it is.
    Each ``pid`` is the number that the process has in this pid namespace.

    If it fails or is cancelled, what has come by then is closed (and with it, AUTOKILL
    children end), and the socket is of no more use.

    Raises:
        EOFError: the other end was closed before all had come.
        ValueError: it is another kind of socket, or what comes is no hand-over.
        OSError: EMFILE, and as for recvmsg(2).
    """
    found: list[Detached] = []
    with _Channel(sock) as channel:
        for _ in range(_count(await channel.receive(_HEAD.size))):
            before = len(channel.received)
            body = await channel.receive(_BODY.size)
            arrived = iter(channel.received[before:])
            numbers = [None if n == _NONE else next(arrived, None) for n in _numbers_in(body)]
            if next(arrived, None) is not None:
                raise ValueError("what was handed over has more descriptors than it says")
            unread = [await channel.receive(length) for length in _lengths_in(body)]
            found.append(_made(body, numbers, unread))
    return found


# Across an exec.


@contextlib.contextmanager
def across_exec(*detached: Detached) -> Iterator[dict[str, str]]:
    """Keep processes for the program that an exec in this block loads.

    Yields the variables that it needs in its environment, for from_environment()::

        with handover.across_exec(*detached) as variables:
            os.execve(path, arguments, {**os.environ, **variables})

    Within the block the descriptors are inheritable: a program that another thread starts
    meanwhile without ``close_fds`` gets them too. If the exec fails, they are closed at an exec
    as before, and everything is still the caller's.

    Raises:
        OSError: there are no descriptors left, or one of these is closed.
    """
    description = os.memfd_create(_NAME)
    kept = [d for one in detached for d in one.descriptors]
    try:
        with open(description, "wb", closefd=False) as file:
            file.write(_HEAD.pack(_MAGIC, len(detached)))
            file.writelines(_body(one) + one.unread_stdout + one.unread_stderr for one in detached)
        for descriptor in (description, *kept):
            os.set_inheritable(descriptor, True)
        yield {VARIABLE: str(description)}
    finally:
        for descriptor in kept:
            with contextlib.suppress(OSError):
                os.set_inheritable(descriptor, False)
        os.close(description)


def from_environment() -> list[Detached]:
    """Return what the program that was here before has handed over with across_exec().

    The variable is taken out of ``os.environ``, and the descriptors are inheritable no more:
    what is not attached to is the caller's. Nothing, if nothing was handed over.

    Raises:
        ValueError: the variable does not say what was handed over to this program.
    """
    value = os.environ.pop(VARIABLE, None)
    if value is None:
        return []
    try:
        description = int(value)
        is_ours = os.readlink(f"/proc/self/fd/{description}").startswith(f"/memfd:{_NAME} ")
    except (OSError, ValueError):
        is_ours = False
    if not is_ours:
        raise ValueError(f"{VARIABLE}={value!r} is no hand-over to this program")
    with open(description, "rb") as file:
        file.seek(0)
        found = []
        for _ in range(_count(file.read(_HEAD.size))):
            body = file.read(_BODY.size)
            numbers = [None if n == _NONE else n for n in _numbers_in(body)]
            for number in numbers:
                if number is not None:
                    os.set_inheritable(number, False)
            found.append(_made(body, numbers, [file.read(n) for n in _lengths_in(body)]))
    return found
