"""What a child inherits, kept as it was at one moment for the spawns that wait for their turn."""

from __future__ import annotations

import fcntl
import os
import weakref
from typing import Final

F_DUPFD_QUERY: Final = 1027  # Linux 6.10

_reference: weakref.ref[Surroundings] | None = None


def _standard_streams() -> list[tuple[int, int, bool] | None]:
    """What is open as 0, 1 and 2, and whether a child inherits it."""
    found: list[tuple[int, int, bool] | None] = []
    for descriptor in (0, 1, 2):
        try:
            status = os.fstat(descriptor)
        except OSError:
            found.append(None)
        else:
            found.append((status.st_dev, status.st_ino, os.get_inheritable(descriptor)))
    return found


def _same_description(descriptor: int, other: int) -> bool:
    """Whether both are one open file, with one offset; False where the kernel cannot say."""
    try:
        return fcntl.fcntl(descriptor, F_DUPFD_QUERY, other) == 1
    except OSError:
        return False


class Surroundings:
    """The working directory and the standard streams of one moment, open until the last use.

    Attributes:
        directory: a descriptor of the working directory.
        streams: copies of what a child would have inherited as 0, 1 and 2.
    """

    def __init__(self) -> None:
        self.streams: dict[int, int] = {}
        self.directory: int = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._found = _standard_streams()
        for number, stream in enumerate(self._found):
            if stream is not None and stream[2]:
                self.streams[number] = fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 3)

    def __del__(self) -> None:
        while self.streams:
            os.close(self.streams.popitem()[1])
        if hasattr(self, "directory"):
            os.close(self.directory)

    def are_current(self) -> bool:
        """Whether they would be the same if they were kept now."""
        same = os.path.samestat(os.stat("."), os.fstat(self.directory))
        return (
            same
            and self._found == _standard_streams()
            and all(_same_description(number, copy) for number, copy in self.streams.items())
        )

    @staticmethod
    def now() -> Surroundings:
        """The present ones, shared with others who keep the same."""
        global _reference
        kept = None if _reference is None else _reference()
        if kept is None or not kept.are_current():
            kept = Surroundings()
            _reference = weakref.ref(kept)
        return kept


def umask() -> int:
    """This process's umask, read without setting it (Linux 4.7), or -1."""
    try:
        descriptor = os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1
    try:
        head = os.read(descriptor, 256)
    finally:
        os.close(descriptor)
    _, found, behind = head.partition(b"\nUmask:\t")
    return int(behind.split(b"\n", 1)[0], 8) if found else -1
