"""Event loops whose subprocess_exec and subprocess_shell are aioreap's."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

from aioreap import process, transport

__all__ = ["EventLoop", "UvloopEventLoop", "install"]

_LoopT = TypeVar("_LoopT", bound=asyncio.AbstractEventLoop)


class _Subprocesses:
    """What a loop's class needs for its children to be aioreap's."""

    async def subprocess_exec(self, protocol_factory: Any, *args: Any, **kwargs: Any) -> Any:
        loop = cast("asyncio.AbstractEventLoop", self)
        return await process.subprocess_exec(loop, protocol_factory, *args, **kwargs)

    async def subprocess_shell(self, protocol_factory: Any, *args: Any, **kwargs: Any) -> Any:
        loop = cast("asyncio.AbstractEventLoop", self)
        return await process.subprocess_shell(loop, protocol_factory, *args, **kwargs)

    def close(self) -> None:
        loop = cast("asyncio.AbstractEventLoop", self)
        if not loop.is_closed() and not loop.is_running():
            transport.abandon_children(loop)
        super().close()  # type: ignore[misc]


class EventLoop(_Subprocesses, asyncio.SelectorEventLoop):
    """asyncio's event loop with aioreap's children, also a factory for asyncio.Runner.

    Closing it kills the children that still run, with a ResourceWarning for each.
    """


if TYPE_CHECKING:
    import uvloop

    class UvloopEventLoop(_Subprocesses, uvloop.Loop):  # type: ignore[misc]
        """uvloop's event loop with aioreap's children; needs the extra ``uvloop``."""

else:

    def __getattr__(name: str) -> Any:
        # Made when it is first asked for, as uvloop is optional.
        if name != "UvloopEventLoop":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import uvloop  # noqa: PLC0415

        doc = "uvloop's event loop with aioreap's children; needs the extra ``uvloop``."
        attributes = {"__module__": __name__, "__doc__": doc}
        made = type(name, (_Subprocesses, uvloop.Loop), attributes)
        return globals().setdefault(name, made)


def _of(reference: Callable[[], asyncio.AbstractEventLoop | None]) -> asyncio.AbstractEventLoop:
    loop = reference()
    if loop is None:
        raise RuntimeError("Event loop is closed")
    return loop


def install(loop: _LoopT | None = None) -> _LoopT:
    """Make the children of `loop` aioreap's from here on, and return it.

    For servers that make their loop themselves. None means the running loop.
    Installing twice is installing once.

    Raises:
        RuntimeError: no loop is given and none runs.
    """
    target = cast("_LoopT", asyncio.get_running_loop()) if loop is None else loop
    if isinstance(target, _Subprocesses) or isinstance(target.close, _Closing):
        return target
    reference = weakref.ref(target)  # no cycle: the loop is freed as before

    async def subprocess_exec(protocol_factory: Any, *args: Any, **kwargs: Any) -> Any:
        return await process.subprocess_exec(_of(reference), protocol_factory, *args, **kwargs)

    async def subprocess_shell(protocol_factory: Any, *args: Any, **kwargs: Any) -> Any:
        return await process.subprocess_shell(_of(reference), protocol_factory, *args, **kwargs)

    for name, replacement in (
        ("subprocess_exec", subprocess_exec),
        ("subprocess_shell", subprocess_shell),
        ("close", _Closing(reference)),
    ):
        setattr(target, name, replacement)
    return target


class _Closing:
    """The close() of a loop that install() has changed."""

    def __init__(self, reference: Callable[[], asyncio.AbstractEventLoop | None]) -> None:
        self._reference = reference

    def __call__(self) -> None:
        loop = _of(self._reference)
        if not loop.is_closed() and not loop.is_running():
            transport.abandon_children(loop)
        type(loop).close(loop)
