"""How run_process() ends: with a result, or with an error that has the output."""

from __future__ import annotations

import subprocess
from typing import Any, TypeVar

from aioreap.exitinfo import ExitInfo

__all__ = ["CompletedProcess", "OutputLimitExceeded", "TimeoutExpired"]

_OutputT = TypeVar("_OutputT", str, bytes)


class CompletedProcess(subprocess.CompletedProcess[_OutputT]):
    """What run_process() returns: subprocess.CompletedProcess, and two things more.

    Attributes:
        exit_info: how and when the child ended.
        truncated: whether something held a pipe open for longer than ``drain``,
            so that more could have come.
    """

    def __init__(
        self,
        args: Any,
        returncode: int,
        stdout: Any = None,
        stderr: Any = None,
        *,
        exit_info: ExitInfo,
        truncated: bool = False,
    ) -> None:
        super().__init__(args, returncode, stdout, stderr)
        self.exit_info = exit_info
        self.truncated = truncated


class TimeoutExpired(subprocess.TimeoutExpired, TimeoutError):  # noqa: N818 - as subprocess's
    """The time of run_process() was over; the child was stopped, and has ended.

    ``stdout`` (also called ``output``) and ``stderr`` have all that it wrote, as
    text in text mode, where subprocess has bytes.
    """

    def __init__(self, cmd: Any, timeout: float, output: Any = None, stderr: Any = None) -> None:
        super().__init__(cmd, timeout, output, stderr)
        self.args: tuple[Any, ...] = (cmd, timeout, output, stderr)


class OutputLimitExceeded(subprocess.SubprocessError):
    """The child wrote more than ``output_limit`` to one stream; it was stopped, and has ended.

    Attributes:
        cmd: the command as it was given.
        limit: how many bytes each stream was allowed.
        output: what it wrote to stdout up to there; None if it was not captured.
        stderr: the same of stderr.
    """

    def __init__(self, cmd: Any, limit: int, output: Any = None, stderr: Any = None) -> None:
        super().__init__(cmd, limit, output, stderr)
        self.cmd = cmd
        self.limit = limit
        self.output = output
        self.stderr = stderr

    def __str__(self) -> str:
        return f"Command {self.cmd!r} wrote more than {self.limit} bytes to one stream"

    @property
    def stdout(self) -> Any:
        """Another name of ``output``."""
        return self.output
