"""Event loops by name, for the programs that tests run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import aioreap


def _uvloop() -> asyncio.AbstractEventLoop:
    import uvloop  # noqa: PLC0415 - not every interpreter here can have it

    return uvloop.new_event_loop()


LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.SelectorEventLoop,
    "uvloop": _uvloop,
    "EventLoop": aioreap.EventLoop,
    "UvloopEventLoop": lambda: aioreap.UvloopEventLoop(),  # noqa: PLW0108 - imports uvloop
    "installed": lambda: aioreap.install(asyncio.SelectorEventLoop()),
    "installed-uvloop": lambda: aioreap.install(_uvloop()),
}
