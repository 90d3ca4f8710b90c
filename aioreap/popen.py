"""What a transport shows as its ``'subprocess'``: subprocess.Popen's interface to its child."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping
from typing import Any

from aioreap.exitinfo import ExitStatusLost
from aioreap.options import HasFileno
from aioreap.watcher import Child

__all__ = ["Popen"]


class Popen:
    """A look-alike of subprocess.Popen for a child that an event loop watches.

    What it learns of the child's end is not the transport's ``get_returncode()``
    before the loop has learnt it too. The transport's close() calls the ``kill``
    that is set here, if the child still runs.

    Attributes:
        args: the command as asyncio gives it to Popen: a tuple of the program and its
            arguments, or what the shell runs.
        pid: the child's process id.
        stdin, stdout, stderr: the parent's ends of the pipes, which belong to the
            loop's pipe transports; None where there is no pipe.
    """

    def __init__(self, child: Child, args: Any, pipes: Mapping[int, HasFileno]) -> None:
        self.args = args
        self.pid: int = child.pid
        self.stdin: HasFileno | None = pipes.get(0)
        self.stdout: HasFileno | None = pipes.get(1)
        self.stderr: HasFileno | None = pipes.get(2)
        self._child = child

    def __repr__(self) -> str:
        status = self._child.status
        code = "lost" if status is not None and status[0] is None else self.returncode
        return f"<{type(self).__name__}: returncode: {code} args: {self.args!r}>"

    @property
    def returncode(self) -> int | None:
        """The exit code, or the negated number of a signal; None if no end was seen yet.

        Raises:
            ExitStatusLost: nobody can know it any more.
        """
        if self._child.status is None:
            return None
        status, _ = self._child.status
        if status is None:
            raise ExitStatusLost(self.pid)
        return os.waitstatus_to_exitcode(status)

    def poll(self) -> int | None:
        """Ask the kernel now, and return ``returncode``, with its errors."""
        with contextlib.suppress(OSError):
            self._child.ask()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Block this thread until the child has exited, and return ``returncode``.

        In the event loop's thread it blocks the loop. `timeout` is in seconds, None for ever.

        Raises:
            subprocess.TimeoutExpired: it still runs.
            ExitStatusLost: nobody can know how it ended.
        """
        self._child.wait(timeout)
        code = self.returncode
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.args, timeout)
        return code

    def send_signal(self, sig: int) -> None:
        """Send a signal through the pidfd; nothing happens if the child has exited.

        Raises:
            PermissionError: as for kill(2).
        """
        self._child.send_signal(sig)

    def terminate(self) -> None:
        """Send SIGTERM, as send_signal()."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL, as send_signal()."""
        self.send_signal(signal.SIGKILL)
