"""Event loops whose subprocess_exec and subprocess_shell are aioreap's."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

from aioreap import process, transport

__all__ = ["EventLoop", "UvloopEventLoop", "install"]

_LoopT = TypeVar("_LoopT", bound=asyncio.AbstractEventLoop)
_ProtocolT = TypeVar("_ProtocolT", bound=asyncio.BaseProtocol)


class _Subprocesses:
    """What a loop's class needs for its children to be aioreap's."""

    async def subprocess_exec(
        self, protocol_factory: Callable[[], _ProtocolT], *args: Any, **kwargs: Any
    ) -> tuple[transport.SubprocessTransport, _ProtocolT]:
        loop = cast("asyncio.AbstractEventLoop", self)
        return await process.subprocess_exec(loop, protocol_factory, *args, **kwargs)

    async def subprocess_shell(
        self, protocol_factory: Callable[[], _ProtocolT], *args: Any, **kwargs: Any
    ) -> tuple[transport.SubprocessTransport, _ProtocolT]:
        loop = cast("asyncio.AbstractEventLoop", self)
        return await process.subprocess_shell(loop, protocol_factory, *args, **kwargs)

    def close(self) -> None:
        loop = cast("asyncio.AbstractEventLoop", self)
        try:
            if not loop.is_closed() and not loop.is_running():
                transport.abandon_children(loop)
        finally:  # its warnings may be exceptions
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


@functools.cache
def _class_for(kind: type[asyncio.AbstractEventLoop]) -> type[asyncio.AbstractEventLoop]:
    return type(kind.__name__, (_Subprocesses, kind), {"__module__": kind.__module__})


@overload
def install(loop: None = None) -> asyncio.AbstractEventLoop: ...


@overload
def install(loop: _LoopT) -> _LoopT: ...


def install(loop: asyncio.AbstractEventLoop | None = None) -> asyncio.AbstractEventLoop:
    """Make the children of `loop` aioreap's from here on, and return it.

    For servers that make their loop themselves. None means the running loop.
    Installing twice is installing once. The loop gets a subclass of its class as
    its class, so it has no reference to itself and is freed as before.

    Raises:
        RuntimeError: no loop is given and none runs.
        TypeError: the loop's class does not permit that.
    """
    target = asyncio.get_running_loop() if loop is None else loop
    if not isinstance(target, _Subprocesses):
        target.__class__ = _class_for(type(target))  # type: ignore[arg-type]
    return target
