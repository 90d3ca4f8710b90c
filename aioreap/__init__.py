"""Child processes for asyncio on Linux, reaped by the kernel and never by a signal handler."""

import sys

if sys.platform != "linux":
    raise ImportError(f"aioreap runs on Linux, not on {sys.platform}")

from typing import TYPE_CHECKING, Any

from aioreap.exitinfo import ExitInfo, ExitStatusLost
from aioreap.kernel import Backend, Feature, backend
from aioreap.loop import EventLoop, install
from aioreap.process import (
    DEVNULL,
    PIPE,
    STDOUT,
    Process,
    create_subprocess_exec,
    create_subprocess_shell,
)
from aioreap.watcher import ChildWatcher

if TYPE_CHECKING:
    from aioreap.loop import UvloopEventLoop

__all__ = [
    "DEVNULL",
    "PIPE",
    "STDOUT",
    "Backend",
    "ChildWatcher",
    "EventLoop",
    "ExitInfo",
    "ExitStatusLost",
    "Feature",
    "Process",
    "UvloopEventLoop",
    "backend",
    "create_subprocess_exec",
    "create_subprocess_shell",
    "install",
]


def __getattr__(name: str) -> Any:
    if name != "UvloopEventLoop":  # it imports uvloop, which is optional
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from aioreap import loop  # noqa: PLC0415

    return loop.UvloopEventLoop
