"""What is written to a pipe that is closed: on uvloop, as on asyncio; to one given up, an error."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, NoReturn

__all__ = ["GivenUpWriter", "WritePipe"]


class GivenUpWriter(asyncio.StreamWriter):
    """The stdin of a process that was detached: it can be closed, and that is all."""

    def _refuse(self) -> NoReturn:
        raise ValueError("the process was detached: its stdin is not to be had here")

    def write(self, data: object) -> None:  # noqa: ARG002 - asyncio's
        """Raise a ValueError."""
        self._refuse()

    def writelines(self, data: object) -> None:  # noqa: ARG002
        """Raise a ValueError."""
        self._refuse()

    def write_eof(self) -> None:
        """Raise a ValueError."""
        self._refuse()

    async def drain(self) -> None:
        """Raise a ValueError."""
        self._refuse()


class WritePipe:
    """Stands before uvloop's transport of a pipe, and is in all else that transport.

    libuv closes a pipe as soon as nobody reads it any more, and to write to it is a RuntimeError
    then. Here what is written after that is dropped, and drain() says that it was.
    """

    def __init__(self, transport: Any) -> None:
        self._transport = transport

    def __repr__(self) -> str:
        return repr(self._transport)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write it, or drop it if the pipe is closed."""
        if not self._transport.is_closing():
            self._transport.write(data)

    def writelines(self, lines: Iterable[bytes | bytearray | memoryview]) -> None:
        """Write them, or drop them if the pipe is closed."""
        if not self._transport.is_closing():
            self._transport.writelines(lines)

    def write_eof(self) -> None:
        """Close the pipe when all is written, if it is not closed yet."""
        if not self._transport.is_closing():
            self._transport.write_eof()
