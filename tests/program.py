"""Runs the programs of tests/programs, for what only the end of an interpreter shows."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

_PROGRAMS = Path(__file__).parent / "programs"


class Done(NamedTuple):
    """How a program ended, and what it wrote."""

    status: int
    stdout: str
    stderr: str

    def expect(self, stdout: str) -> None:
        """It ended well, wrote this, and no error appeared, not even an ignored one."""
        assert (self.status, self.stdout) == (0, stdout), self.stderr
        self.expect_no_error()

    def expect_no_error(self) -> None:
        for word in ("Traceback", "Exception ignored", "never retrieved", "Error"):
            assert word not in self.stderr, self.stderr

    def warnings_of_ours(self) -> int:
        """How many children it says it has killed with their loop."""
        return self.stderr.count("still ran when its event loop was closed")


def run_program(
    name: str, *arguments: str, development_mode: bool = True, environment: Mapping[str, str] = {}
) -> Done:
    """Run one with every warning shown.

    Its output goes to files: a child that outlives it by mistake would keep pipes open.
    """
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        status = subprocess.run(
            [sys.executable, "-W", "always", _PROGRAMS / f"{name}.py", *arguments],
            env={**os.environ, "PYTHONDEVMODE": "1" if development_mode else "", **environment},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            check=False,
        ).returncode
        stdout.seek(0)
        stderr.seek(0)
        return Done(status, stdout.read(), stderr.read())
