"""A large input of a child, written from where it lies: never copied into a buffer."""

from __future__ import annotations

import asyncio
import fcntl
import os
from typing import Final

__all__ = ["LARGE", "Feed"]

# How long an input is, in bytes, for which its copy costs more than this does.
LARGE: Final = 2**20


class Feed:
    """Writes `data` to a pipe, through a copy of its descriptor that is closed after it.

    Nobody has to wait for it: the loop keeps it until all is written or nobody can read it.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, pipe: int, data: bytes) -> None:
        self._loop = loop
        self._rest = memoryview(data)
        self._owner = os.getpid()
        self._pipe: int = -1  # for __del__(), should this fail
        self._pipe = fcntl.fcntl(pipe, fcntl.F_DUPFD_CLOEXEC, 3)
        try:
            loop.add_writer(self._pipe, self._write)
        except BaseException:
            os.close(self._pipe)
            self._pipe = -1
            raise

    def __del__(self) -> None:
        self.stop()

    @property
    def unsent(self) -> int:
        """How many bytes are not in the pipe yet."""
        return len(self._rest)

    def _write(self) -> None:
        try:
            written = os.write(self._pipe, self._rest)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:  # nobody reads it any more
            written = len(self._rest)
        self._rest = self._rest[written:]
        if not self._rest:
            self.stop()

    def stop(self) -> None:
        """Write no more, and close the pipe."""
        pipe, self._pipe = self._pipe, -1
        self._rest = memoryview(b"")
        if pipe < 0:
            return
        # In a forked copy, which shares the epoll set, it would make the parent deaf.
        if not self._loop.is_closed() and self._owner == os.getpid():
            self._loop.remove_writer(pipe)
        os.close(pipe)
