"""Lines of any length: from a stream reader, and from chunks as they come."""

from __future__ import annotations

import asyncio
import operator
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Final, Literal

from aioreap.reader import take_line
from aioreap.text import TextCodec

__all__ = ["LineCutter", "lines"]

_NEWLINE: Final = b"\n"


class _Lines(AsyncIterator[bytes]):
    """The iterator that lines() returns. What it has not returned is in the stream's buffer."""

    def __init__(self, stream: asyncio.StreamReader, max_line: int, *, in_parts: bool) -> None:
        self._stream = stream
        self._max_line = max_line
        self._in_parts = in_parts

    async def __anext__(self) -> bytes:
        line = take_line(self._stream, self._max_line)
        if line:
            return line
        size = await self._find_end()
        if not size:
            raise StopAsyncIteration
        return await self._stream.readexactly(size)  # it is there, so nothing is awaited

    async def _find_end(self) -> int:
        """Wait for a line, or a part that is as long as can be; its size, 0 at the end."""
        stream, seen = self._stream, 0
        # StreamReader has nothing public that looks into the buffer and leaves it as it is,
        # or that waits for more than its own limit.
        buffer: bytearray = stream._buffer  # type: ignore[attr-defined]
        while True:
            error = stream.exception()
            if error is not None:
                raise error
            end = buffer.find(_NEWLINE, seen, self._max_line + 1)
            if end >= 0:
                return end + 1
            if len(buffer) > self._max_line:
                if self._in_parts:
                    return self._max_line
                raise asyncio.LimitOverrunError(
                    f"a line is longer than {self._max_line} bytes", self._max_line
                )
            if stream._eof:  # type: ignore[attr-defined]
                return len(buffer)
            seen = len(buffer)
            await stream._wait_for_data("lines")  # type: ignore[attr-defined]


def lines(
    stream: asyncio.StreamReader,
    max_line: int = 2**24,
    *,
    longer: Literal["error", "parts"] = "error",
) -> AsyncIterator[bytes]:
    r"""Iterate over the lines of a stream, such as ``process.stdout``, whatever its own limit.

    Each line has its end, ``b"\n"``, which the last can lack. `max_line` is how many
    bytes a line may have before its end: of a `longer` one the parts are returned, none
    longer than that and only the last with the line's end, or it is an error.

    Nothing is lost: what has not been returned can be read from the stream, after
    an error, a cancellation, or when the iterator is given up. After an error the
    iterator goes on with what the stream then has.

    Raises:
        asyncio.LimitOverrunError: a line is longer, and no parts are wanted.
        ValueError, TypeError: `max_line` is not a number of bytes over 0, or `longer`
            is neither of the two.
        RuntimeError: something else is reading from the stream.
    """
    if operator.index(max_line) <= 0:
        raise ValueError(f"max_line must be a number of bytes over 0, got {max_line}")
    if longer not in ("error", "parts"):
        raise ValueError(f"longer must be 'error' or 'parts', got {longer!r}")
    return _Lines(stream, max_line, in_parts=longer == "parts")


class LineCutter:
    """Cuts the chunks of one stream into lines for its consumer."""

    def __init__(self, consumer: Callable[[Any], object], codec: TextCodec | None) -> None:
        self.consumer = consumer
        self._decoder = None if codec is None else codec.decoder()
        self._begun: list[Any] = []

    def cut(self, chunk: bytes) -> Iterator[Any]:
        """The lines that end in `chunk`; an empty one is the end of the last."""
        text: Any = chunk if self._decoder is None else self._decoder.decode(chunk, not chunk)
        empty: Any = b"" if self._decoder is None else ""
        newline: Any = b"\n" if self._decoder is None else "\n"
        *ended, rest = text.split(newline)
        for line in ended:
            self._begun.append(line + newline)
            whole, self._begun = empty.join(self._begun), []
            yield whole
        if rest:
            self._begun.append(rest)
        if not chunk and self._begun:
            whole, self._begun = empty.join(self._begun), []
            yield whole
