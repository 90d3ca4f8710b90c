"""A large input of a child, written from where it lies: never copied into a buffer."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Callable
from typing import Final

__all__ = ["LARGE", "Feed"]

# From how many bytes on an input is written so; the copy of a shorter one is a small cost.
LARGE: Final = 2**20


class Feed:
    """Writes `data` to a pipe, through a copy of its descriptor that is closed after it.

    The loop keeps it until all is written or nobody can read it; then it calls `at_end`.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        pipe: int,
        data: bytes,
        at_end: Callable[[], object],
    ) -> None:
        self._loop = loop
        self._at_end: Callable[[], object] | None = at_end
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
        self._at_end = None
        self.stop()

    @property
    def unsent(self) -> int:
        """How many bytes are not in the pipe yet."""
        return len(self._rest)

    def _write(self) -> None:
        if self._owner != os.getpid():  # a copy that goes on with the loop, on a set of its own
            self._loop.remove_writer(self._pipe)
            self.stop()
            return
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
        """Write no more, close the pipe, and call `at_end` if this is not a forked copy."""
        pipe, self._pipe = self._pipe, -1
        self._rest = memoryview(b"")
        if pipe < 0:
            return
        at_end, self._at_end = self._at_end, None
        is_copy = self._owner != os.getpid()
        # In a forked copy, which shares the epoll set, it would make the parent deaf.
        if not is_copy and not self._loop.is_closed():
            self._loop.remove_writer(pipe)
        os.close(pipe)
        if not is_copy and at_end is not None:
            at_end()
