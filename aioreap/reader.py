"""The readers of a child's output, from which all can be had that nobody has got yet.

In asyncio, a read() to the end keeps what it has read in a variable of its own until it
returns, and communicate() keeps that until the child has exited: out of reach for detach().
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import Any, Final, cast

from aioreap import _clone

__all__ = ["OutputReader", "adopt", "take_buffered", "take_line", "take_unread"]

# What asyncio's communicate() has each stream read by, in a task of its own.
_READ_STREAM: Final = getattr(asyncio.subprocess.Process, "_read_stream", None)
_CONNECTION_MADE: Final = asyncio.subprocess.SubprocessStreamProtocol.connection_made


def take_buffered(reader: asyncio.StreamReader) -> bytes:
    """What has been read already, without waiting; reading goes on if it was paused."""
    read = reader.read(sys.maxsize)
    try:
        read.send(None)
    except StopIteration as stop:
        return cast("bytes", stop.value)
    read.close()
    return b""


def take_line(reader: Any, longest: int) -> bytes:
    """A line that is there and has no more bytes than that before its end, or b"".

    readline() is two coroutines in asyncio, which for short lines is most of what they cost.
    """
    if reader.exception() is not None:
        return b""
    line = _clone.take_line(reader._buffer, longest)
    if line and reader._paused:
        reader._maybe_resume_transport()
    return line


class OutputReader(asyncio.StreamReader):
    """asyncio.StreamReader, and a list of what its reads to the end have not handed on.

    That is kept until the child's exit, after which it cannot be detached. What asyncio's
    communicate() has read of a stream that has ended is let go if that is cancelled while it
    reads the other one, as what it has of that is lost. While it waits only for the exit, its
    cancellation is not heard of here, and its output kept.
    """

    _kept: list[list[bytes]] | None = None
    # What communicate() has of streams that have ended, shared by the readers of a child.
    _collected: list[list[bytes]]

    async def read(self, n: int = -1) -> bytes:
        """As asyncio.StreamReader.read()."""
        if n >= 0:
            return await super().read(n)
        blocks: list[bytes] = []
        if self._kept is not None:
            self._kept.append(blocks)
        is_handed_on = True
        try:
            while block := await super().read(sys.maxsize):
                blocks.append(block)
            blocks[:] = [b"".join(blocks)]  # not once more for who keeps it
            is_handed_on = not self._is_read_by_communicate()
            if not is_handed_on and self._kept is not None:
                self._collected.append(blocks)
            return blocks[0]
        except asyncio.CancelledError:
            if self._kept is not None:
                for others in self._collected:
                    others.clear()
                self._collected.clear()
            raise
        finally:
            if is_handed_on and self._kept is not None:
                self._kept = [others for others in self._kept if others is not blocks]

    async def readline(self) -> bytes:
        """As asyncio.StreamReader.readline()."""
        limit: int = self._limit  # type: ignore[attr-defined]
        return take_line(self, limit) or await super().readline()

    def _is_read_by_communicate(self) -> bool:
        loop: asyncio.AbstractEventLoop = self._loop  # type: ignore[attr-defined]
        task = asyncio.current_task(loop)
        code = getattr(None if task is None else task.get_coro(), "cr_code", None)
        return code is not None and code is getattr(_READ_STREAM, "__code__", None)

    async def _wait_for_data(self, func_name: str) -> None:
        await super()._wait_for_data(func_name)  # type: ignore[misc]
        # It was told of data, and before it could take it, detach() has: that is no end.
        buffer: bytearray = self._buffer  # type: ignore[attr-defined]
        if (error := self.exception()) is not None and not buffer:
            raise error

    def keep(self, collected: list[list[bytes]]) -> None:
        """Begin to keep what has not been handed on; all readers of a child share `collected`."""
        self._kept = []
        self._collected = collected

    def forget(self) -> None:
        """Keep nothing any more: the child has exited."""
        if self._kept is not None:
            self._kept = None
            self._collected.clear()

    def take_kept(self) -> bytes:
        """What has not been handed on, but is not in the buffer any more."""
        kept = b"".join(block for blocks in self._kept or () for block in blocks)
        self.forget()
        return kept


def _like(reader: Any) -> OutputReader:
    """A reader of the same pipe; for one that has read nothing."""
    other = OutputReader(limit=reader._limit, loop=reader._loop)
    other.set_transport(reader._transport)
    return other


def adopt(protocol: asyncio.BaseProtocol) -> tuple[OutputReader, ...]:
    """Have what is read for `protocol` kept, if it is one with asyncio's readers."""
    if not isinstance(protocol, asyncio.subprocess.SubprocessStreamProtocol):
        return ()
    # Not by __class__ where nobody can have the reader yet: each access of an attribute is slower
    # from then on, and a readline() takes two fifths longer.
    is_asyncios = type(protocol).connection_made is _CONNECTION_MADE
    collected: list[list[bytes]] = []
    readers: list[OutputReader] = []
    for name in ("stdout", "stderr"):
        reader: Any = getattr(protocol, name)
        if type(reader) is not asyncio.StreamReader:
            continue
        if is_asyncios:
            reader = _like(reader)
            setattr(protocol, name, reader)
        else:
            reader.__class__ = OutputReader
        reader.keep(collected)
        readers.append(reader)
    return tuple(readers)


def take_unread(reader: asyncio.StreamReader) -> bytes:
    """All that was read and that nobody has got."""
    kept = reader.take_kept() if isinstance(reader, OutputReader) else b""
    with contextlib.suppress(Exception):  # another call waits: there is nothing in the buffer
        return kept + take_buffered(reader)
    return kept
