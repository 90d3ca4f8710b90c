"""The parent's ends of a child's pipes, between the loop's pipe transports and the child's own."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections import deque
from typing import TYPE_CHECKING, Final, cast

from aioreap import _clone
from aioreap.bulk import LARGE, Feed, Intake

if TYPE_CHECKING:
    from aioreap.transport import SubprocessTransport

__all__ = ["PipeEnd", "PipeProtocol"]

_LARGEST_STANDARD: Final = 2
# How much asyncio's transports read at once, in bytes: what a pipe holds. They ask for four times
# that, for which malloc() takes new pages each time; to have these costs more than to copy.
_READ_SIZE: Final = 65536


class PipeEnd:
    """The parent's end of a pipe, closed once whoever closes it first.

    libuv closes the descriptor by itself before it tells the file object. The
    number may be a stranger's by then, so it is closed only if it still is this pipe.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._identity = self._identify()

    def _identify(self) -> tuple[int, int] | None:
        try:
            status = os.fstat(self._descriptor)
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def fileno(self) -> int:
        return self._descriptor

    def give_up(self) -> None:
        """Leave the descriptor to libuv, which closes it, but for those of standard streams."""
        if self._descriptor > _LARGEST_STANDARD:
            self._descriptor = -1

    def close(self) -> None:
        if self._descriptor >= 0 and self._identify() == self._identity:
            os.close(self._descriptor)
        self._descriptor = -1

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} fd={self._descriptor}>"


class PipeProtocol(asyncio.Protocol):
    """Hands on what happens on one of the child's pipes."""

    def __init__(self, process: SubprocessTransport, number: int, end: PipeEnd) -> None:
        self.transport: asyncio.BaseTransport | None = None
        self.end = end
        self.disconnected: bool = False
        self.told_of_loss: bool = False
        # Whether it begins paused: then nothing is read before there is somebody to have it.
        self.is_held: bool = False
        # What the protocol has not been told of yet.
        self.untold: deque[bytes] = deque()
        # What writes a large input; the transport is closed by then, and the pipe lost after both.
        self.feed: Feed | None = None
        # What reads a large output; the transport is paused meanwhile.
        self._intake: Intake | None = None
        self._loss: tuple[Exception | None] | None = None
        self._process: SubprocessTransport | None = process
        self._number = number

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        if hasattr(transport, "max_size"):
            transport.max_size = _READ_SIZE
        if self.is_held:
            cast("asyncio.ReadTransport", transport).pause_reading()

    def let_read(self) -> None:
        """Begin to read what begins paused."""
        if self.is_held:
            self.is_held = False
            transport = cast("asyncio.ReadTransport", self.transport)
            if not transport.is_closing():  # uvloop has not heard of the pause, and reads already
                transport.resume_reading()

    def is_paused(self) -> bool:
        """Whether nothing is read from the pipe until its reader has room again."""
        if self._intake is not None:
            return False
        transport = cast("asyncio.ReadTransport", self.transport)
        return not (transport.is_reading() or transport.is_closing())

    def take_in(
        self, output: _clone.Output, most: int | None, loop: asyncio.AbstractEventLoop
    ) -> None:
        """Have what comes next read into `output`, as SubprocessTransport.take_in()."""
        if self._intake is not None or self.untold or self.is_paused() or not self.is_open:
            return
        with contextlib.suppress(OSError):  # there is no descriptor for it
            self._intake = Intake(loop, self.end.fileno(), output, most, self.end_intake)
            cast("asyncio.ReadTransport", self.transport).pause_reading()

    def end_intake(self) -> None:
        """Hand on what comes next, as before take_in()."""
        if self._intake is None:
            return
        if self.is_open:  # first: who is interrupted before the next line has both read
            cast("asyncio.ReadTransport", self.transport).resume_reading()
        self._stop_intake()

    def _stop_intake(self) -> None:
        if self._intake is not None:
            self._intake.stop()
            self._intake = None

    def data_received(self, data: bytes) -> None:
        assert self._process is not None
        self._process.pipe_data_received(self._number, data)
        # The pipe was full, its writer is on its way, and nobody has asked to be told of no more.
        if len(data) >= _READ_SIZE and cast("asyncio.ReadTransport", self.transport).is_reading():
            _clone.wait_for_writer(self.end.fileno())

    def connection_lost(self, exc: Exception | None) -> None:
        if self.feed is not None and self.feed.unsent:
            self._loss = (exc,)
            return
        self._stop_intake()
        self.disconnected = True
        # libuv's write_eof() is for sockets: it fails when all is written, and closes the pipe.
        if isinstance(exc, OSError) and exc.errno == errno.ENOTSOCK:
            exc = None
        # The two hold each other until here: what is forgotten is freed without a collection.
        process, self._process = self._process, None
        assert process is not None
        process.pipe_connection_lost(self._number, exc)

    def abandon(self, loop: asyncio.AbstractEventLoop, *, is_copy: bool) -> None:
        """Close the pipe although its loop is closed, or about to be, or another process's."""
        if self.feed is not None:
            self.feed.stop()
        self._stop_intake()
        if is_copy or self.transport is None or self.disconnected:
            self.end.close()
            return
        if not loop.is_closed():
            self.transport.close()
        # asyncio's transports wait for a callback of the loop before they close
        # the descriptor, and warn if it never came. libuv closes its own.
        finish = getattr(self.transport, "_call_connection_lost", None)
        if finish is not None:
            finish(None)

    @property
    def is_open(self) -> bool:
        """Whether it has neither ended nor been closed."""
        transport = self.transport
        return not self.disconnected and transport is not None and not transport.is_closing()

    @property
    def unsent(self) -> int:
        """How many bytes have been written that are not in the pipe yet; for that of stdin."""
        if self.feed is not None and self.feed.unsent:
            return self.feed.unsent
        if self.disconnected or self.transport is None:
            return 0
        return cast("asyncio.WriteTransport", self.transport).get_write_buffer_size()

    def send(
        self, data: bytes | bytearray | memoryview | None, loop: asyncio.AbstractEventLoop
    ) -> None:
        """Write the last that is written, and close the pipe after it; for that of stdin."""
        transport = cast("asyncio.WriteTransport", self.transport)
        # Of all that can be given, only bytes cannot change before they are written.
        if type(data) is bytes and len(data) >= LARGE and not self.unsent:
            with contextlib.suppress(OSError):  # there is no descriptor for it
                self.feed = Feed(loop, self.end.fileno(), data, self._fed)
        if data and self.feed is None:
            transport.write(data)
        transport.close()

    def _fed(self) -> None:
        loss, self._loss = self._loss, None
        if loss is not None:
            self.connection_lost(*loss)

    def drop_unsent(self) -> None:
        """Have nothing more written, and the pipe closed; for that of stdin."""
        if self.feed is not None:
            self.feed.stop()
            return
        # One that has nothing to write and closes would be closed twice by asyncio.
        if self.unsent:
            cast("asyncio.WriteTransport", self.transport).abort()

    def leave(self) -> None:
        """Close the descriptor, of which there is a copy, and read nothing from now on.

        The number may be used for the same pipe again, which PipeEnd.close() could not tell.
        """
        if not self.is_open:
            return
        assert self.transport is not None
        self.transport.close()
        if hasattr(self.transport, "_call_connection_lost"):  # see abandon()
            self.end.close()
        else:
            self.end.give_up()

    def pause_writing(self) -> None:
        assert self._process is not None
        self._process.get_protocol().pause_writing()

    def resume_writing(self) -> None:
        assert self._process is not None
        self._process.get_protocol().resume_writing()
