"""Which Pythons this machine has: those on PATH and pyenv's, each tried by running it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

OLDEST: Final = (3, 11)

_NAME: Final = re.compile(r"python3(\.\d+)?")
# A free-threaded Python loads no extension for the stable ABI.
_PROBE: Final = """\
import sys, sysconfig
if not sysconfig.get_config_var("Py_GIL_DISABLED"):
    print(sys.implementation.name, *sys.version_info[:2], sys.executable)
"""


def _candidates() -> Iterator[Path]:
    # Without those that are the same by another name, as where /bin is /usr/bin.
    for directory in dict.fromkeys(map(os.path.realpath, os.get_exec_path())):
        names = sorted(Path(directory).glob("python3*"))
        yield from (path for path in names if _NAME.fullmatch(path.name))
    if shutil.which("pyenv"):
        root = subprocess.run(["pyenv", "root"], capture_output=True, text=True, check=True).stdout
        releases = (Path(root.strip()) / "versions").glob("3.*/bin/python3")
        yield from sorted(releases, key=_release, reverse=True)


def _release(executable: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", executable.parents[1].name)]


def _probe(candidate: Path) -> tuple[tuple[int, int], Path] | None:
    """The version and the executable itself; None for a shim that leads nowhere, and others."""
    try:
        result = subprocess.run(
            [candidate, "-c", _PROBE], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    match result.stdout.rstrip("\n").split(" ", 3):
        case ["cpython", major, minor, executable]:
            return (int(major), int(minor)), Path(executable)
    return None


def installed() -> dict[str, Path]:
    """The executable of each CPython from 3.11 on, the oldest first; the first on PATH wins."""
    found: dict[tuple[int, int], Path] = {}
    for candidate in _candidates():
        answer = _probe(candidate)
        if answer is not None and answer[0] >= OLDEST:
            found.setdefault(*answer)
    return {f"{major}.{minor}": found[major, minor] for major, minor in sorted(found)}


if __name__ == "__main__":
    for version, executable in installed().items():
        print(version, executable)
