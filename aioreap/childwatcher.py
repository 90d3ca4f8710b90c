"""asyncio's child watcher on Python 3.11 to 3.13, for programs that keep asyncio's own spawn."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import os
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVarTuple, cast

from aioreap.exitinfo import ExitStatusLost
from aioreap.watcher import Child, ChildWatcher

if sys.version_info >= (3, 14):
    raise ImportError(
        "asyncio has no child watchers since Python 3.14; aioreap.EventLoop or "
        "aioreap.install() make its children aioreap's"
    )

__all__ = ["AsyncioChildWatcher"]

_Ts = TypeVarTuple("_Ts")


class _AsyncioChild(Child):
    """A child that asyncio made: its end is watched, its life is not ours."""

    def destroy(self) -> None:
        """Stop watching."""
        self._callbacks = ()
        if self.pidfd >= 0:
            self._close()

    def abandon(self) -> None:
        """Stop watching: the loop is closed, and asyncio's transport says what it has to say."""
        self.destroy()


class _StatusLost:
    """What the class of asyncio's transport gets in front when nobody can know the status."""

    def get_returncode(self) -> int:
        raise ExitStatusLost(self.get_pid())  # type: ignore[attr-defined]

    async def _wait(self) -> int:
        await super()._wait()  # type: ignore[misc]
        return self.get_returncode()


@functools.cache
def _lost_class(kind: Hashable) -> type[asyncio.SubprocessTransport]:
    assert isinstance(kind, type)
    return type(kind.__name__, (_StatusLost, kind), {"__module__": kind.__module__})


def _lose_status(transport: Any, error: ExitStatusLost) -> None:
    """Have ExitStatusLost raised by who waits now, and by who asks later."""
    waiting, transport._exit_waiters[:] = list(transport._exit_waiters), []
    for waiter in waiting:
        if not waiter.done():
            waiter.set_exception(error)
    transport.__class__ = _lost_class(cast("Hashable", type(transport)))


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 tells who subclasses it

    class AsyncioChildWatcher(asyncio.AbstractChildWatcher):
        """Watches the children of asyncio's own subprocess functions through their pidfds.

        ``asyncio.set_child_watcher(aioreap.AsyncioChildWatcher())`` is all that a
        program needs. There is no thread and no SIGCHLD handler, any thread's loop
        can start children, and a status that another part of the program has reaped
        is still right (Linux 6.15). Where nobody can know it, ``wait()`` and
        ``returncode`` raise ExitStatusLost, and a callback of one's own gets one in
        place of the number.

        Raises:
            OSError: there is no ``pidfd_open`` (Linux 5.3, or a filter).
        """

        def __init__(self) -> None:
            os.close(os.pidfd_open(os.getpid()))
            # By loop and pid, as another thread's child can have the pid by now. Their loop holds
            # them: what a closed one has left is freed.
            self._children: weakref.WeakValueDictionary[tuple[int, int], _AsyncioChild] = (
                weakref.WeakValueDictionary()
            )

        def __enter__(self) -> AsyncioChildWatcher:  # noqa: PYI034 - as typeshed has it
            return self

        def __exit__(self, *exc_info: object) -> None:
            pass

        def add_child_handler(
            self, pid: int, callback: Callable[[int, int, *_Ts], object], *args: *_Ts
        ) -> None:
            """Have ``callback(pid, returncode, *args)`` called from the running loop at the exit.

            Another callback for the same child takes the place of the first.

            Raises:
                RuntimeError: no loop runs in this thread.
                OSError: there is no descriptor for the pidfd.
            """
            loop = asyncio.get_running_loop()
            self.remove_child_handler(pid)
            try:
                pidfd = os.pidfd_open(pid)
            except ProcessLookupError:  # reaped by somebody else before we heard of it
                loop.call_soon(self._tell, None, pid, callback, args)
                return
            child = _AsyncioChild(pid, pidfd, reap=True, started_ns=time.monotonic_ns())
            ChildWatcher.of(loop).watch(child)
            self._children[id(loop), pid] = child
            context = contextvars.copy_context()
            child.add_exit_callback(
                lambda child: context.run(self._tell, child, pid, callback, args)
            )

        def remove_child_handler(self, pid: int) -> bool:
            """Forget the callback for a child of the running loop; False if there is none."""
            child = self._children.pop((id(asyncio.get_running_loop()), pid), None)
            if child is None:
                return False
            child.destroy()
            return True

        def _tell(
            self, child: Child | None, pid: int, callback: Callable[..., object], args: Any
        ) -> None:
            self._children.pop((id(asyncio.get_running_loop()), pid), None)
            callback(pid, _returncode_of(child, pid, args), *args)

        def attach_loop(self, loop: asyncio.AbstractEventLoop | None) -> None:
            """Do nothing: each child is watched by the loop that started it."""

        def close(self) -> None:
            """Do nothing: what is watched goes on being watched."""

        def is_active(self) -> bool:
            """Return True."""
            return True


def _returncode_of(child: Child | None, pid: int, args: Any) -> int | ExitStatusLost:
    """The return code, and if it is lost, what stands in its place."""
    exit_info = None if child is None else child.exit_info
    if exit_info is not None and exit_info.status is not None:
        return exit_info.returncode
    transport = args[0] if args and isinstance(args[0], asyncio.SubprocessTransport) else None
    popen = None if transport is None else transport.get_extra_info("subprocess")
    if popen is not None and popen.returncode is not None:
        # Before Python 3.12 send_signal() asks Popen first, which reaps.
        return int(popen.returncode)
    error = ExitStatusLost(pid)
    if transport is not None:
        _lose_status(transport, error)
    return error
