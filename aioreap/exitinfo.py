"""What is known of a child that has exited."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import Final

__all__ = ["ExitInfo", "ExitStatusLost"]


class ExitStatusLost(ChildProcessError):  # noqa: N818 - a state more than an error
    """Nobody can know any more how the child ended.

    Another part of the program reaped it (``waitpid(-1)``, or SIGCHLD set to
    SIG_IGN), or it is no child of this process, on a kernel before Linux 6.15,
    which keeps no exit info for a pidfd. Raised by ``wait()``, ``wait_exit()``,
    ``communicate()`` and ``returncode`` in place of a made-up number.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(
            f"the exit status of child {pid} is lost: something else reaped it, "
            "and this kernel keeps no exit info for a pidfd (Linux 6.15 does)"
        )
        self.pid = pid

    def __reduce__(self) -> tuple[type[ExitStatusLost], tuple[int]]:
        return type(self), (self.pid,)


# What dataclass() would look up for each field of each child.
_set: Final = object.__setattr__


@dataclass(frozen=True, slots=True, init=False)
class ExitInfo:
    """How and when a child ended.

    Attributes:
        pid: its process id; another process may have that number by now.
        status: the wait status, as ``os.waitpid`` gives it, or None if it is lost;
            ``returncode``, ``signal`` and ``core_dumped`` raise ExitStatusLost then.
        cgroup_id: the id of the cgroup v2 that it ended in, or None where the
            kernel does not say (before Linux 6.15).
        started_ns: ``time.monotonic_ns()`` when it was cloned.
        finished_ns: ``time.monotonic_ns()`` when this process learnt of its end.
    """

    pid: int
    status: int | None
    cgroup_id: int | None
    started_ns: int
    finished_ns: int

    def __init__(
        self,
        pid: int,
        status: int | None,
        cgroup_id: int | None,
        started_ns: int,
        finished_ns: int,
    ) -> None:
        _set(self, "pid", pid)
        _set(self, "status", status)
        _set(self, "cgroup_id", cgroup_id)
        _set(self, "started_ns", started_ns)
        _set(self, "finished_ns", finished_ns)

    def _known_status(self) -> int:
        if self.status is None:
            raise ExitStatusLost(self.pid)
        return self.status

    @property
    def returncode(self) -> int:
        """The exit code, or the negated number of the signal that killed the child."""
        return os.waitstatus_to_exitcode(self._known_status())

    @property
    def signal(self) -> signal.Signals | int | None:
        """The signal that killed the child, as an int if it is a real-time one, or None."""
        status = self._known_status()
        if not os.WIFSIGNALED(status):
            return None
        number = os.WTERMSIG(status)
        try:
            return signal.Signals(number)
        except ValueError:
            return number

    @property
    def core_dumped(self) -> bool:
        """Whether the kernel dumped the child's core."""
        return os.WCOREDUMP(self._known_status())
