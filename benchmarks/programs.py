"""The programs beside Python: the children, and the peers in other languages."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["LINE", "PROGRAMS", "Programs", "build", "build_peers"]

LINE: Final = 64  # bytes

_SOURCES: Final = Path(__file__).parent
_BUILD: Final = _SOURCES.parent / "build" / "bench"
_CHUNK: Final = 2**16  # bytes that a child writes at a time


@dataclass(frozen=True)
class Programs:
    """The children, as command lines.

    Attributes:
        true: ends at once.
        line: writes LINE bytes and ends; neither has a C library.
        libc_true: ends at once, with the C library's start before it.
        child: all others.
    """

    true: str
    line: str
    libc_true: str
    child: str

    def writer(self, size: int) -> list[str]:
        """Writes `size` bytes."""
        return [self.child, "write", str(size), str(min(size, _CHUNK))]

    def lines(self, count: int) -> list[str]:
        """Writes `count` lines."""
        return [self.child, "lines", str(count)]

    @property
    def sleeper(self) -> list[str]:
        """Lives until it is killed."""
        return [self.child, "pause"]

    @property
    def reporter(self) -> list[str]:
        """Says at SIGUSR1 what time it is, and exits."""
        return [self.child, "report"]


PROGRAMS: Final = Programs(*(str(_BUILD / name) for name in ("true", "line", "libc_true", "child")))


def _compile(*arguments: str | Path) -> None:
    compiler = os.environ.get("CC", "gcc")
    subprocess.run([*compiler.split(), "-std=gnu11", "-O2", *arguments], check=True)


def build() -> None:
    """Compile the children, each static: a dynamic linker would be half of what is measured."""
    _BUILD.mkdir(parents=True, exist_ok=True)
    for name, size in (("true", 0), ("line", LINE)):
        bare = ["-static", "-nostdlib", "-ffreestanding", f"-DBYTES={size}"]
        _compile(*bare, _SOURCES / "bare.c", "-o", _BUILD / name)
    for name in ("libc_true", "child"):
        _compile("-static", _SOURCES / f"{name}.c", "-o", _BUILD / name)


def _go() -> list[str]:
    go = shutil.which("go")
    if go is None:
        raise FileNotFoundError("no go on PATH (Debian: apt-get install golang-go)")
    program = _BUILD / "spawn-go"
    subprocess.run([go, "build", "-o", program, _SOURCES / "spawn.go"], check=True)
    return [str(program)]


def _node() -> list[str]:
    node = shutil.which("node")
    if node is None:
        raise FileNotFoundError("no node on PATH (Debian: apt-get install nodejs)")
    return [node, str(_SOURCES / "spawn.mjs")]


def _posix_spawn() -> list[str]:
    _compile(_SOURCES / "posix_spawn.c", "-o", _BUILD / "posix_spawn")
    return [str(_BUILD / "posix_spawn")]


def build_peers() -> tuple[dict[str, list[str]], dict[str, str]]:
    """The commands of the peers outside Python; and why some are not there."""
    found, absent = {}, {}
    for name, get in {"posix_spawn": _posix_spawn, "go": _go, "node": _node}.items():
        try:
            found[name] = get()
        except OSError as error:
            absent[name] = str(error)
        except subprocess.CalledProcessError as error:
            absent[name] = f"it does not compile: exit status {error.returncode}"
    return found, absent
