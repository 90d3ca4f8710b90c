"""asyncio's transport between a protocol and a child, over the loop's own pipe transports."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import weakref
from collections.abc import Callable
from typing import Any, Final

from aioreap.exitinfo import ExitInfo, ExitStatusLost
from aioreap.launch import Launch, Launcher
from aioreap.spawn import SpawnPlan
from aioreap.watcher import Child, ChildWatcher, logger

__all__ = ["SubprocessTransport", "abandon_children"]

# How many turns of the loop its pipe transports get to close a descriptor.
_TURNS_TO_CLOSE: Final = 10


class _PipeEnd:
    """The parent's end of a pipe, closed once whoever closes it first.

    libuv closes the descriptor by itself before it tells the file object. The
    number may be a stranger's by then, so it is closed only if it still is this pipe.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._identity = self._identify()

    def _identify(self) -> tuple[int, int] | None:
        try:
            status = os.fstat(self._descriptor)
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def fileno(self) -> int:
        return self._descriptor

    def close(self) -> None:
        if self._descriptor >= 0 and self._identify() == self._identity:
            os.close(self._descriptor)
        self._descriptor = -1

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} fd={self._descriptor}>"


class _PipeProtocol(asyncio.Protocol):
    """Hands on what happens on one of the child's pipes."""

    def __init__(self, process: SubprocessTransport, number: int, end: _PipeEnd) -> None:
        self.transport: asyncio.BaseTransport | None = None
        self.end = end
        self.disconnected = False
        self._process = process
        self._number = number

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._process.pipe_data_received(self._number, data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.disconnected = True
        self._process.pipe_connection_lost(self._number, exc)

    def abandon(self, loop: asyncio.AbstractEventLoop, *, is_copy: bool) -> None:
        """Close the pipe although its loop is closed, or about to be, or another process's."""
        if is_copy or self.transport is None or self.disconnected:
            self.end.close()
            return
        if not loop.is_closed():
            self.transport.close()
        # asyncio's transports wait for a callback of the loop before they close
        # the descriptor, and warn if it never came. libuv closes its own.
        finish = getattr(self.transport, "_call_connection_lost", None)
        if finish is not None:
            finish(None)

    def pause_writing(self) -> None:
        self._process.get_protocol().pause_writing()

    def resume_writing(self) -> None:
        self._process.get_protocol().resume_writing()


def _set_result(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


class SubprocessTransport(asyncio.SubprocessTransport):
    """asyncio.SubprocessTransport over a Child and its pipes.

    The protocol's callbacks come in asyncio's order: connection_made first, then
    what the pipes and the exit bring, process_exited once, and connection_lost
    after it and after every pipe_connection_lost.

    get_extra_info() knows ``'pidfd'`` (an int, -1 after the exit) and
    ``'exit_info'`` (an ExitInfo, None until the exit).
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, protocol: asyncio.SubprocessProtocol, plan: SpawnPlan
    ) -> None:
        super().__init__()
        self._loop = loop
        self._protocol = protocol
        self._plan: SpawnPlan | None = plan
        self._launch: Launch | None = None
        self._child: Child | None = None
        self._pipes: dict[int, _PipeProtocol] = {}
        self._exit_waiters: list[asyncio.Future[None]] = []
        # What happens before connection_made, to be told after it.
        self._early: list[tuple[Callable[..., object], tuple[Any, ...]]] | None = []
        self._closed = False
        self._finished = False
        self._owner = os.getpid()
        _transports.setdefault(loop, weakref.WeakSet()).add(self)

    def __repr__(self) -> str:
        state = [type(self).__name__]
        if self._closed:
            state.append("closed")
        if self._child is None:
            state.append("not started")
        else:
            state.append(f"pid={self._child.pid}")
            exit_info = self._child.exit_info
            if exit_info is None:
                state.append("running")
            elif exit_info.status is None:
                state.append("exit status lost")
            else:
                state.append(f"returncode={exit_info.returncode}")
        return f"<{' '.join(state)}>"

    # Its beginning.

    async def start(self) -> None:
        """Make the child, connect its pipes, wait for the exec, and tell the protocol.

        If it fails or is cancelled, then no child and no descriptor is left.
        """
        plan, self._plan = self._plan, None
        assert plan is not None
        try:
            self._launch = Launcher.of(self._loop).begin(plan)
            await self._launch.cloned()
            await self._connect_pipes(plan)
            self._child = await self._launch.started()
            self._child.add_exit_callback(self._child_exited)
            await self._announce()
        except BaseException as error:
            plan.close_pipes()
            if self._loop.is_closed():
                self.abandon()
                if isinstance(error.__context__, GeneratorExit):
                    # asyncio's connect_read_pipe() cannot close its transport then.
                    raise error.__context__ from None
            elif isinstance(error, asyncio.CancelledError):
                await self._abort()
            elif isinstance(error, Exception):
                if await self._abort():
                    raise asyncio.CancelledError from error
            else:  # GeneratorExit and its like
                self.destroy()
            raise
        finally:
            plan.close()
            self._launch = None

    async def _connect_pipes(self, plan: SpawnPlan) -> None:
        for number in sorted(plan.pipes):
            pipe = _PipeProtocol(self, number, _PipeEnd(plan.pipes.pop(number)))
            self._pipes[number] = pipe
            connect = self._loop.connect_read_pipe if number else self._loop.connect_write_pipe
            pipe.transport, _ = await connect(lambda pipe=pipe: pipe, pipe.end)  # type: ignore[misc]

    async def _announce(self) -> None:
        made = self._loop.create_future()
        self._loop.call_soon(self._protocol.connection_made, self)
        for callback, arguments in self._early or ():
            self._loop.call_soon(callback, *arguments)
        self._early = None
        self._loop.call_soon(_set_result, made)
        await made

    async def _abort(self) -> bool:
        """Leave nothing behind; whether it was cancelled meanwhile."""
        cancelled = False
        self._closed = True
        for pipe in self._pipes.values():
            if pipe.transport is not None:
                pipe.transport.close()
        if self._launch is not None:
            cancelled = await self._launch.abort()
        # The loop closes a pipe some turns after it was asked to.
        for _ in range(_TURNS_TO_CLOSE):
            if all(pipe.disconnected for pipe in self._pipes.values()):
                break
            try:
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                cancelled = True
        for pipe in self._pipes.values():
            if pipe.transport is None:
                pipe.end.close()
        return cancelled

    # What happens to the child and its pipes.

    def _call(self, callback: Callable[..., object], *arguments: object) -> None:
        if self._early is not None:
            self._early.append((callback, arguments))
        elif not self._loop.is_closed():
            self._loop.call_soon(callback, *arguments)

    def pipe_data_received(self, number: int, data: bytes) -> None:
        self._call(self._protocol.pipe_data_received, number, data)

    def pipe_connection_lost(self, number: int, exc: Exception | None) -> None:
        self._call(self._protocol.pipe_connection_lost, number, exc)
        self._try_finish()

    def _child_exited(self, _child: Child) -> None:
        if self._loop.get_debug():
            logger.info("%r exited", self)
        self._call(self._protocol.process_exited)
        for waiter in self._exit_waiters:
            _set_result(waiter)
        self._exit_waiters.clear()
        self._try_finish()

    def _try_finish(self) -> None:
        exited = self._child is not None and self._child.exit_info is not None
        if exited and not self._finished and all(p.disconnected for p in self._pipes.values()):
            self._finished = True
            self._call(self._protocol.connection_lost, None)

    # What asyncio.SubprocessTransport promises.

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol  # type: ignore[assignment]

    def get_protocol(self) -> asyncio.SubprocessProtocol:
        return self._protocol

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if self._child is not None:
            if name == "pidfd":
                return self._child.pidfd
            if name == "exit_info":
                return self._child.exit_info
        return super().get_extra_info(name, default)

    @property
    def child(self) -> Child:
        if self._child is None:
            raise ProcessLookupError
        return self._child

    def get_pid(self) -> int:
        return self.child.pid

    def get_returncode(self) -> int | None:
        """The exit code, the negated number of a signal, or None while the child runs.

        Raises:
            ExitStatusLost: nobody can know it. (None would keep who polls waiting.)
        """
        exit_info = None if self._child is None else self._child.exit_info
        return None if exit_info is None else exit_info.returncode

    def get_pipe_transport(self, fd: int) -> Any:
        pipe = self._pipes.get(fd)
        return None if pipe is None else pipe.transport

    def is_closing(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Close the pipes, and kill the child if it still runs."""
        if self._closed:
            return
        self._closed = True
        if self._loop.is_closed() or self._owner != os.getpid():
            self.abandon()
            return
        for pipe in self._pipes.values():
            if pipe.transport is not None:
                pipe.transport.close()
        if self._child is not None and self._child.exit_info is None:
            if self._loop.get_debug():
                logger.warning("Close running child process: kill %r", self)
            with contextlib.suppress(PermissionError):  # it runs a set-user-ID program
                self._child.send_signal(signal.SIGKILL)

    def destroy(self) -> None:
        """Kill the child and have the pipes closed, without waiting for the loop."""
        self._closed = True
        if self._launch is not None:
            self._launch.destroy()
        if self._child is not None:
            self._child.destroy()
        for pipe in self._pipes.values():
            if pipe.transport is not None:
                pipe.transport.close()

    def abandon(self) -> None:
        """Kill the child and close the pipes of a loop that is closed, or about to be.

        In a forked copy of the program only descriptors are closed.
        """
        self._closed = True
        child = self._child if self._launch is None else self._launch.child
        try:
            if child is not None:
                child.abandon()
            if self._launch is not None:
                self._launch.destroy()
        finally:
            for pipe in self._pipes.values():
                pipe.abandon(self._loop, is_copy=self._owner != os.getpid())

    def send_signal(self, signal: int) -> None:
        """Send a signal through the pidfd.

        Nothing happens if the child has exited and this is not known here yet.

        Raises:
            ProcessLookupError: its exit is known.
        """
        if self.child.exit_info is not None:
            raise ProcessLookupError
        self.child.send_signal(signal)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    async def wait_exit(self) -> ExitInfo:
        """Wait for the child's exit, not for the end of its pipes.

        Each call has a waiter of its own, and can be cancelled.

        Raises:
            ExitStatusLost: nobody can know how the child ended.
        """
        while self.child.exit_info is None:
            waiter = self._loop.create_future()
            self._exit_waiters.append(waiter)
            try:
                await waiter
            finally:
                if waiter in self._exit_waiters:
                    self._exit_waiters.remove(waiter)
        exit_info = self.child.exit_info
        if exit_info.status is None:
            raise ExitStatusLost(exit_info.pid)
        return exit_info

    async def _wait(self) -> int:
        """What asyncio.subprocess.Process.wait() calls."""
        return (await self.wait_exit()).returncode


_transports: weakref.WeakKeyDictionary[
    asyncio.AbstractEventLoop, weakref.WeakSet[SubprocessTransport]
] = weakref.WeakKeyDictionary()


def abandon_children(loop: asyncio.AbstractEventLoop) -> None:
    """Kill the children of a loop that is about to be closed: a ResourceWarning for each."""
    with contextlib.ExitStack() as stack:  # all of them, though a warning may be an exception
        stack.callback(ChildWatcher.of(loop).abandon_children)
        for transport in list(_transports.get(loop, ())):
            if not transport._finished:
                stack.callback(transport.abandon)
