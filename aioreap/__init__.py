"""Child processes for asyncio on Linux, reaped by the kernel and never by a signal handler."""

import sys

if sys.platform != "linux":
    raise ImportError(f"aioreap runs on Linux, not on {sys.platform}")

from typing import TYPE_CHECKING, Any

from aioreap.attach import attach
from aioreap.completed import CompletedProcess, OutputLimitExceeded, TimeoutExpired
from aioreap.detached import Detached, spawn_detached
from aioreap.exitinfo import ExitInfo, ExitStatusLost
from aioreap.kernel import Backend, Feature, backend
from aioreap.lines import lines
from aioreap.loop import EventLoop, install
from aioreap.process import (
    DEVNULL,
    PIPE,
    STDOUT,
    Process,
    create_subprocess_exec,
    create_subprocess_shell,
)
from aioreap.run import run_process
from aioreap.watcher import ChildWatcher

if TYPE_CHECKING:
    from aioreap.loop import UvloopEventLoop

    if sys.version_info < (3, 14):
        from aioreap.childwatcher import AsyncioChildWatcher as AsyncioChildWatcher

__all__ = [
    "DEVNULL",
    "PIPE",
    "STDOUT",
    "Backend",
    "ChildWatcher",
    "CompletedProcess",
    "Detached",
    "EventLoop",
    "ExitInfo",
    "ExitStatusLost",
    "Feature",
    "OutputLimitExceeded",
    "Process",
    "TimeoutExpired",
    "UvloopEventLoop",
    "attach",
    "backend",
    "create_subprocess_exec",
    "create_subprocess_shell",
    "install",
    "lines",
    "run_process",
    "spawn_detached",
]


def __getattr__(name: str) -> Any:
    # One imports uvloop, which is optional, and the other what Python 3.14 has no more.
    if name == "UvloopEventLoop":
        from aioreap import loop  # noqa: PLC0415

        return loop.UvloopEventLoop
    if name == "AsyncioChildWatcher" and sys.version_info < (3, 14):
        from aioreap import childwatcher  # noqa: PLC0415

        return childwatcher.AsyncioChildWatcher
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
