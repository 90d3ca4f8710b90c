"""What a child of run_process() writes, kept or handed on: past the stream readers."""

from __future__ import annotations

import asyncio
import fcntl
import os
import select
import struct
import termios
from collections import deque
from collections.abc import Callable, Collection
from typing import cast

from aioreap import _clone
from aioreap.bulk import LARGE
from aioreap.transport import SubprocessTransport

__all__ = ["Capture"]


def _count_readable(descriptor: int) -> int:
    """How many bytes are in a pipe now."""
    answer = fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4))
    return cast("int", struct.unpack("i", answer)[0])


def _has_ended(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return any(events == select.POLLHUP for _, events in poll.poll(0))


class Capture(asyncio.SubprocessProtocol):
    """The protocol of a child whose output is kept, or handed on in chunks.

    A stream that is handed on is not read while a chunk of it is, so that a slow
    consumer slows the child down.

    Attributes:
        stopping: whether it was stopped by stop().
        exceeded: whether a stream had more than `limit` bytes.
        truncated: whether a pipe was still open when it was given up.
        finished: whether the child and its pipes have ended.
    """

    _transport: SubprocessTransport

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        kept: Collection[int],
        handed_on: Collection[int],
        limit: int | None,
        drain: float | None,
        stop: Callable[[], object],
    ) -> None:
        self.stopping: bool = False
        self.exceeded: bool = False
        self.truncated: bool = False
        self.finished: bool = False
        self._loop = loop
        self._kept = {fd: _clone.Output() for fd in kept}
        self._handed_on = set(handed_on)
        self._sizes = dict.fromkeys([*kept, *handed_on], 0)
        self._limit = limit
        self._drain = drain
        self._stop: Callable[[], object] | None = stop
        self._stopped = False
        self._lost = False
        self._error: Exception | None = None
        self._drain_timer: asyncio.TimerHandle | None = None
        self._chunks: deque[tuple[int, bytes]] = deque()
        self._waiter: asyncio.Future[None] | None = None

    # For who runs the child.

    def send(self, data: bytes | memoryview | None) -> None:
        """Write `data` to stdin, if that is a pipe, and close it when all is written."""
        self._transport.send(data)

    async def next_chunk(self) -> tuple[int, bytes] | None:
        """What came next on which stream, empty for its end; None when all of it is over.

        Raises:
            OSError: a pipe could not be read.
            MemoryError: there is no memory for what is kept.
        """
        while not self._chunks:
            if self.finished:
                error, self._error = self._error, None
                try:
                    if error is not None:
                        raise error
                finally:
                    del error  # which refers to this call by now
                return None
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._chunks.popleft()

    def resume(self, fd: int) -> None:
        """Read on, after a chunk of this stream."""
        if self._is_open(fd):
            self._transport.get_pipe_transport(fd).resume_reading()

    def take_output(self, fd: int) -> bytes | None:
        """What was kept of a stream, which is not kept here any longer."""
        kept = self._kept.pop(fd, None)
        return None if kept is None else kept.take()

    def stop(self) -> None:
        """Have the child stopped; stopped() must follow."""
        stop, self._stop = self._stop, None
        if stop is not None:
            self.stopping = True
            stop()

    def stopped(self) -> None:
        """The child has ended, and its group, which can be after the pipes."""
        self._stopped = True
        if self._lost:
            self._finish()
        else:
            self.cut_off()

    def cut_off(self) -> None:
        """Take what has been written by now, and close the pipes that others still hold."""
        for fd in self._sizes:
            if self._is_open(fd):
                self._transport.get_pipe_transport(fd).pause_reading()
        self._loop.call_soon(self._take_rest)  # when what was read before has come

    def fail(self, error: Exception) -> None:
        """Have next_chunk() raise this, whatever goes on."""
        self._error = self._error or error
        self.finished = True
        self._wake()

    def drop(self) -> None:
        """Hand nothing on any more: throw it away."""
        dropped, self._handed_on = self._handed_on, set()
        self._chunks.clear()
        for fd in dropped:
            self.resume(fd)

    def release(self) -> None:
        """Hear of nothing any more, so that nothing refers to what it refers to."""
        self._stop = None
        self._transport.set_protocol(asyncio.SubprocessProtocol())
        if self._drain_timer is not None:
            self._drain_timer.cancel()

    # The end of the pipes.

    def _is_open(self, fd: int) -> bool:
        pipe = self._transport.get_pipe_transport(fd)
        return pipe is not None and not pipe.is_closing()

    def _take_rest(self) -> None:
        popen = self._transport.get_extra_info("subprocess")
        for fd, end in ((1, popen.stdout), (2, popen.stderr)):
            if fd not in self._sizes or not self._is_open(fd):
                continue
            size = _count_readable(end.fileno())
            if size:
                self.pipe_data_received(fd, os.read(end.fileno(), size))
            if self._is_open(fd):
                self.truncated = self.truncated or not _has_ended(end.fileno())
                self._transport.get_pipe_transport(fd).close()
        self._transport.drop_unsent()  # nobody takes what is left

    # asyncio.SubprocessProtocol.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("SubprocessTransport", transport)

    def pipe_data_received(self, fd: int, data: bytes | str) -> None:
        chunk = cast("bytes", data)
        kept = self._kept.get(fd)
        before = self._sizes[fd] if kept is None else len(kept)
        self._sizes[fd] = before + len(chunk)
        if self._limit is not None and self._sizes[fd] > self._limit:
            chunk = chunk[: max(self._limit - before, 0)]
            self._exceed(fd)
        if kept is not None:
            self._keep(fd, kept, chunk)
        elif fd in self._handed_on and chunk:
            self._chunks.append((fd, chunk))
            if self._is_open(fd):
                self._transport.get_pipe_transport(fd).pause_reading()
            self._wake()

    def _keep(self, fd: int, kept: _clone.Output, chunk: bytes) -> None:
        try:
            size = kept.write(chunk)
        except MemoryError as error:
            self._error = self._error or error.with_traceback(None)
            self._end(fd)
            return
        if size >= LARGE:
            self._transport.take_in(fd, kept, self._limit)

    def _exceed(self, fd: int) -> None:
        self.exceeded = True
        self._end(fd)

    def _end(self, fd: int) -> None:
        """Read no more of a stream, and have the child stopped."""
        self.stop()
        if self._is_open(fd):
            self._transport.get_pipe_transport(fd).close()

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        if fd == 0:
            return
        self._error = self._error or exc
        if fd in self._handed_on:
            self._chunks.append((fd, b""))
            self._wake()

    def process_exited(self) -> None:
        if self._drain is not None and not self.stopping:
            self._drain_timer = self._loop.call_later(self._drain, self.cut_off)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - as told before
        self._lost = True
        if self._stopped or not self.stopping:
            self._finish()

    def _finish(self) -> None:
        self.finished = True
        if self._drain_timer is not None:
            self._drain_timer.cancel()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
