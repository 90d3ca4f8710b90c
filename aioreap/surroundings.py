"""What a child inherits, kept as it was at one moment for the spawns that wait for their turn."""

from __future__ import annotations

import fcntl
import os
import weakref

from aioreap import _clone

__all__ = ["Surroundings"]

_reference: weakref.ref[Surroundings] | None = None


def _forget() -> None:
    global _reference
    _reference = None


os.register_at_fork(after_in_child=_forget)  # they would tell of the umask of the other process


def _is_inherited(descriptor: int) -> bool:
    try:
        return os.get_inheritable(descriptor)
    except OSError:
        return False


def _open_status() -> int:
    try:
        return os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError):  # there is no /proc
        return -1


class Surroundings:
    """The working directory and the standard streams of one moment, open until the last use.

    Attributes:
        directory: a descriptor of the working directory.
        streams: copies of what a child would have inherited as 0, 1 and 2.
    """

    def __init__(self) -> None:
        self.streams: dict[int, int] = {}
        self._status = -1
        self.directory: int = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        for number in filter(_is_inherited, (0, 1, 2)):
            self.streams[number] = fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 3)
        self._all = (self.directory, *(self.streams.get(number, -1) for number in (0, 1, 2)))
        if self.are_current():  # else this kernel cannot tell, and nobody else will use it
            self._status = _open_status()

    def __del__(self) -> None:
        while self.streams:
            os.close(self.streams.popitem()[1])
        if hasattr(self, "directory"):
            os.close(self.directory)
        if self._status >= 0:
            os.close(self._status)

    def are_current(self) -> bool:
        """Whether they would be the same if they were kept now."""
        return _clone.inherits(*self._all)

    def umask(self) -> int:
        """This process's umask of now, read without setting it (Linux 4.7), or -1."""
        descriptor = self._status if self._status >= 0 else _open_status()
        if descriptor < 0:
            return -1
        try:
            head = os.pread(descriptor, 256, 0)
        finally:
            if descriptor != self._status:
                os.close(descriptor)
        _, found, behind = head.partition(b"\nUmask:\t")
        return int(behind[:4], 8) if found else -1

    @staticmethod
    def now() -> Surroundings:
        """The present ones, shared with others who keep the same."""
        global _reference
        kept = None if _reference is None else _reference()
        if kept is None or not kept.are_current():
            kept = Surroundings()
            _reference = weakref.ref(kept)
        return kept
