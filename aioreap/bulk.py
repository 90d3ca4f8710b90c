"""Large inputs and outputs of a child: written from where they lie, read to where they stay."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import sys
from collections.abc import Callable
from typing import Final

from aioreap import _clone

__all__ = ["LARGE", "Feed", "Intake"]

# From how many bytes on one is written or read so; the copy of a shorter one is a small cost.
LARGE: Final = 2**20


class _Bulk:
    """What is done at a pipe through a copy of its descriptor, until stop().

    The loop keeps it so long.
    """

    _pipe: int = -1  # for __del__(), should there be none

    def __init__(self, loop: asyncio.AbstractEventLoop, pipe: int) -> None:
        self._loop = loop
        self._owner = os.getpid()
        self._pipe = fcntl.fcntl(pipe, fcntl.F_DUPFD_CLOEXEC, 3)
        try:
            self._watch()
        except BaseException:
            _Bulk.stop(self)  # an interrupt may come after it is watched
            raise

    def __del__(self) -> None:
        self.stop()

    def _watch(self) -> None:
        raise NotImplementedError

    def _unwatch(self) -> None:
        raise NotImplementedError

    def _go_on(self) -> None:
        """Do the next part of it."""
        raise NotImplementedError

    def _is_ready(self) -> None:
        if self._owner != os.getpid():  # a copy that goes on with the loop, on a set of its own
            self._unwatch()
            self.stop()
            return
        self._go_on()

    def stop(self) -> None:
        """Do no more, and close the descriptor."""
        pipe = self._pipe
        if pipe < 0:
            return
        # In a forked copy, which shares the epoll set, it would make the parent deaf.
        if self._owner == os.getpid() and not self._loop.is_closed():
            self._unwatch()
        self._pipe = -1
        os.close(pipe)


class Feed(_Bulk):
    """Writes `data` to a pipe.

    When all is written or nobody can read it, or at stop(), it calls `at_end`; not in a forked
    copy of the program.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        pipe: int,
        data: bytes,
        at_end: Callable[[], object],
    ) -> None:
        self._rest = memoryview(data)
        self._at_end: Callable[[], object] | None = at_end
        super().__init__(loop, pipe)

    def __del__(self) -> None:
        self._at_end = None
        super().__del__()

    def _watch(self) -> None:
        self._loop.add_writer(self._pipe, self._is_ready)

    def _unwatch(self) -> None:
        self._loop.remove_writer(self._pipe)

    @property
    def unsent(self) -> int:
        """How many bytes are not in the pipe yet."""
        return len(self._rest)

    def _go_on(self) -> None:
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
        """Write no more, close the descriptor, and call `at_end`."""
        self._rest = memoryview(b"")
        at_end, self._at_end = self._at_end, None
        super().stop()
        if at_end is not None and self._owner == os.getpid():
            at_end()


class Intake(_Bulk):
    """Reads a pipe into `output`, until that has `most` bytes, or is lost, or the pipe has ended.

    Then it calls `at_end`. Whoever reads on finds what there is: an end, an error, or more.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        pipe: int,
        output: _clone.Output,
        most: int | None,
        at_end: Callable[[], object],
    ) -> None:
        self._output = output
        self._most = sys.maxsize if most is None else min(most, sys.maxsize)
        self._at_end = at_end
        super().__init__(loop, pipe)

    def _watch(self) -> None:
        self._loop.add_reader(self._pipe, self._is_ready)

    def _unwatch(self) -> None:
        self._loop.remove_reader(self._pipe)

    def _go_on(self) -> None:
        can_go_on = False
        try:
            with contextlib.suppress(OSError):
                can_go_on = self._output.read(self._pipe, self._most)
        finally:  # else it would be told of the same again and again
            if not can_go_on:
                try:
                    self._at_end()
                finally:
                    self.stop()
