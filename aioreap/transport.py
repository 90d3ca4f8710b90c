"""asyncio's transport between a protocol and a child, over the loop's own pipe transports."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import errno
import fcntl
import os
import signal
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeVar

from aioreap import _clone
from aioreap.detached import Detached
from aioreap.exitinfo import ExitInfo, ExitStatusLost
from aioreap.killing import raise_again
from aioreap.launch import Launch, Launcher
from aioreap.pipes import PipeEnd, PipeProtocol
from aioreap.popen import Popen
from aioreap.reader import OutputReader, adopt
from aioreap.spawn import SpawnPlan
from aioreap.unowned import Heir
from aioreap.watcher import Child, ChildWatcher, logger
from aioreap.writepipe import WritePipe

if TYPE_CHECKING:
    from aioreap.stopping import Ladder

__all__ = [
    "DEFAULT_LIMIT",
    "SubprocessTransport",
    "abandon_children",
    "take_all_at_once",
    "take_output_at_once",
    "takes_all_at_once",
]

_ProtocolT = TypeVar("_ProtocolT", bound=asyncio.SubprocessProtocol)

# How many turns of the loop its pipe transports get to close a descriptor.
_TURNS_TO_CLOSE: Final = 10
# The longest time that a timer is set to, in seconds: uvloop's cannot take an infinite one.
LONGEST_TIMER: Final = 1e8
_ABOUT_PIPES: Final = frozenset({"pipe_data_received", "pipe_connection_lost"})
_NO_PIPES: Final[dict[int, PipeProtocol]] = {}
DEFAULT_LIMIT: Final = 2**16  # bytes, as asyncio's

# The protocols that may be told in the midst of anything, as nothing but a waiter hears of it: of
# output, and of all. Others, and classes derived from these, have a turn of the loop for each call.
_TAKE_OUTPUT_AT_ONCE: Final[set[type[asyncio.BaseProtocol]]] = {
    asyncio.subprocess.SubprocessStreamProtocol
}
_TAKE_ALL_AT_ONCE: Final = {*_TAKE_OUTPUT_AT_ONCE}


def take_output_at_once(protocol: type[_ProtocolT]) -> type[_ProtocolT]:
    """Have output handed to a class of protocols without a turn of the loop."""
    _TAKE_OUTPUT_AT_ONCE.add(protocol)
    return protocol


def take_all_at_once(protocol: type[_ProtocolT]) -> type[_ProtocolT]:
    """Have all but connection_made() called without a turn of the loop."""
    _TAKE_ALL_AT_ONCE.add(protocol)
    return take_output_at_once(protocol)


def takes_all_at_once(protocol: asyncio.BaseProtocol) -> bool:
    """Whether its class is one of take_all_at_once()."""
    return type(protocol) in _TAKE_ALL_AT_ONCE


def _without(
    waiter: asyncio.Future[None], waiters: tuple[asyncio.Future[None], ...]
) -> tuple[asyncio.Future[None], ...]:
    return tuple(other for other in waiters if other is not waiter)


def _set_result(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


class SubprocessTransport(asyncio.SubprocessTransport):
    """asyncio.SubprocessTransport over a Child and its pipes.

    The protocol's callbacks come in asyncio's order: connection_made first, then
    what the pipes and the exit bring, process_exited once, and connection_lost
    after it and after every pipe_connection_lost.

    get_extra_info() knows ``'pidfd'`` (an int, -1 after the exit), ``'exit_info'``
    (an ExitInfo, None until the exit) and ``'subprocess'`` (a look-alike of
    subprocess.Popen).

    A child without pipes may have no `protocol`: asyncio's is made when somebody asks for it.

    Attributes:
        ladder: what is under way to the child's end, for all who stop it.
    """

    # asyncio's base classes have slots. In a dictionary beside them, each access of an attribute
    # would be slower by far; there is one for what others may set.
    __slots__ = (
        "__dict__",
        "__weakref__",
        "_args",
        "_child",
        "_closed",
        "_context",
        "_early",
        "_exit_waiters",
        "_finished",
        "_is_announced",
        "_launch",
        "_loop",
        "_output_waiters",
        "_owner",
        "_pipes",
        "_plan",
        "_popen",
        "_protocol",
        "_readers",
        "_takes_in",
        "_untold",
        "ladder",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        protocol: asyncio.SubprocessProtocol | None,
        plan: SpawnPlan | None,
        args: Any,
    ) -> None:
        super().__init__()
        self._loop = loop
        self._protocol = protocol
        self._plan: SpawnPlan | None = plan
        self._args = args
        self.ladder: Ladder | None = None
        self._popen: Popen | None = None
        self._launch: Launch | None = None
        self._child: Child | None = None
        # Most of the time there is nothing in these: an empty container for each costs memory.
        self._pipes: dict[int, PipeProtocol] = _NO_PIPES
        self._readers: tuple[OutputReader, ...] = ()
        self._exit_waiters: tuple[asyncio.Future[None], ...] = ()
        self._output_waiters: tuple[asyncio.Future[None], ...] = ()
        self._is_announced = protocol is None
        # What happens before connection_made, to be told after it.
        self._early: tuple[tuple[Any, ...], ...] = ()
        # That of the call which starts the child, for what the protocol is told in turns.
        self._context: contextvars.Context | None = None
        self._untold = 0
        # Whether some output may be read past the protocol.
        self._takes_in = False
        # The process that it is of, where that has to be known before there is a child.
        self._owner: int | None = None
        self._closed = False
        self._finished = False

    def __repr__(self) -> str:
        state = [type(self).__name__]
        if self._closed:
            state.append("closed")
        if self._child is None:
            state.append("not started")
        else:
            state.append(f"pid={self._child.pid}")
            exit_info = self._child.exit_info
            if self._child.is_detached:
                state.append("detached")
            elif exit_info is None:
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
            if plan.wants_pipes:
                self._be_known()
            self._launch = launch = Launcher.of(self._loop).begin(plan)
            if plan.wants_pipes:
                await launch.cloned()
                await self._connect_pipes(plan.pipes)
            self._child = child = await launch.started()
            is_over = child.has_ended
            if not is_over:
                child.add_exit_callback(self._child_exited)
            if not self._is_announced:
                self._announce()
            if is_over:
                self._child_exited(child)
        except BaseException as error:
            plan.close()
            plan.close_pipes()
            await self._undo(error)
            raise
        finally:
            self._launch = None

    async def attach(
        self, pipes: dict[int, int], make_child: Callable[[], Child], before: Callable[[], None]
    ) -> None:
        """Begin with a process that runs: connect `pipes`, watch what make_child() returns.

        Before the protocol is told of anything from the pipes, before() is called. If it
        fails or is cancelled, `pipes` are closed, and nothing was read from them (but by uvloop).
        make_child() may not have been called, and what it has returned is given back.
        """
        try:
            self._be_known()
            await self._connect_pipes(pipes, held=True)
            self._child = make_child()
            ChildWatcher.of(self._loop).watch(self._child)
            for pipe in self._pipes.values():
                pipe.let_read()
            self._announce(before)
            self._child.add_exit_callback(self._child_exited)
        except BaseException as error:
            if self._child is not None:  # first: nothing that follows may end it
                self._child.give_back()
            while pipes:
                os.close(pipes.popitem()[1])
            await self._undo(error)
            raise

    def _be_known(self) -> None:
        """Be ended by the loop's end; without pipes there is only the child, or its launch."""
        self._owner = os.getpid()
        transports = _transports.get(self._loop)
        if transports is None:
            transports = _transports.setdefault(self._loop, weakref.WeakSet())
        transports.add(self)

    async def _undo(self, error: BaseException) -> None:
        """Leave nothing behind of a beginning that has failed."""
        if self._loop.is_closed():
            self.abandon()
        elif isinstance(error, Exception | asyncio.CancelledError):
            raise_again(await self._abort())
        else:  # GeneratorExit and its like
            self.destroy()

    async def _connect_pipes(self, descriptors: dict[int, int], *, held: bool = False) -> None:
        if descriptors:
            self._pipes = {}
        for number in sorted(descriptors):
            pipe = PipeProtocol(self, number, PipeEnd(descriptors.pop(number)))
            pipe.is_held = held and number > 0
            self._pipes[number] = pipe
            connect = self._loop.connect_read_pipe if number else self._loop.connect_write_pipe
            try:
                transport, _ = await connect(lambda pipe=pipe: pipe, pipe.end)  # type: ignore[misc]
            except RuntimeError as error:
                if self._loop.is_closed() and isinstance(error.__context__, GeneratorExit):
                    # asyncio cannot close its transport then. Said here and not by who awaits
                    # this: a collection of garbage may begin with this coroutine.
                    raise error.__context__ from None
                raise
            is_uvloops = number == 0 and not isinstance(transport, asyncio.WriteTransport)
            pipe.transport = WritePipe(transport) if is_uvloops else transport  # type: ignore[assignment]

    def _announce(self, then: Callable[[], None] | None = None) -> None:
        """Call connection_made() as the loop calls it, then tell of what came before it."""
        protocol = self.get_protocol()
        try:
            if type(protocol) in _TAKE_ALL_AT_ONCE:  # and none of them changes a context
                protocol.connection_made(self)
            else:
                self._context = contextvars.copy_context()
                self._context.copy().run(protocol.connection_made, self)
        except Exception as error:  # noqa: BLE001 - for the loop to handle
            self._handle("connection_made", error)
        if self._pipes:
            self._readers = adopt(protocol)
        if then is not None:
            then()
        self._is_announced = True
        if self._early:
            early, self._early = self._early, ()
            for telling in early:
                self._call(*telling)

    async def _abort(self) -> asyncio.CancelledError | None:
        """Leave nothing behind; what it was cancelled with meanwhile."""
        self._closed = True
        self.close_pipes()
        cancelled = None if self._launch is None else await self._launch.abort()
        cancelled = await self._pipes_closed() or cancelled
        for pipe in self._pipes.values():
            if pipe.transport is None:
                pipe.end.close()
        return cancelled

    @property
    def are_pipes_closed(self) -> bool:
        """Whether the loop has closed all of them."""
        for pipe in self._pipes.values():  # noqa: SIM110 - asked three times for each child
            if not pipe.disconnected:
                return False
        return True

    async def let_pipes_close(self) -> None:
        """Give the loop the turns that it takes to close what has ended."""
        raise_again(await self._pipes_closed())

    async def _pipes_closed(self) -> asyncio.CancelledError | None:
        """Wait until the loop has closed the pipes; what it was cancelled with meanwhile."""
        cancelled: asyncio.CancelledError | None = None
        # The loop closes a pipe some turns after it was asked to.
        for _ in range(_TURNS_TO_CLOSE):
            if self.are_pipes_closed:
                break
            try:
                await asyncio.sleep(0)
            except asyncio.CancelledError as error:
                cancelled = error.with_traceback(None)
        return cancelled

    # What happens to the child and its pipes.

    def _handle(self, name: str, error: Exception) -> None:
        """Have the loop handle what a call of the protocol's has raised."""
        self._loop.call_exception_handler(
            {
                "message": f"{self.get_protocol()!r}.{name}() failed",
                "exception": error,
                "protocol": self.get_protocol(),
                "transport": self,
            }
        )

    def _call(self, name: str, *arguments: object) -> None:
        if not self._is_announced:
            self._early += ((name, *arguments),)
        elif self._loop.is_closed():
            return
        elif not self._untold and type(self._protocol) in _TAKE_ALL_AT_ONCE:
            try:
                if name in _ABOUT_PIPES:
                    self._tell(name, *arguments)
                else:
                    getattr(self.get_protocol(), name)(*arguments)
            except Exception as error:  # noqa: BLE001 - for the loop to handle
                self._handle(name, error)
        else:
            self._untold += 1
            context = None if self._context is None else self._context.copy()
            self._loop.call_soon(self._tell_in_turn, name, *arguments, context=context)

    def _tell_in_turn(self, name: str, *arguments: Any) -> None:
        self._untold -= 1
        self._tell(name, *arguments)

    def _tell(self, name: str, *arguments: Any) -> None:
        if name == "pipe_connection_lost":
            self._pipes[arguments[0]].told_of_loss = True
        elif name == "pipe_data_received":
            untold = self._pipes[arguments[0]].untold
            if not untold:  # detach() has it
                return
            untold.popleft()
        getattr(self.get_protocol(), name)(*arguments)
        if self._output_waiters:
            self._wake_if_drained()

    def _wake_if_drained(self) -> None:
        if not self._is_output_due():
            for waiter in self._output_waiters:
                _set_result(waiter)

    def is_pipe_open(self, fd: int) -> bool:
        """Whether there is a pipe whose loss the protocol has not been told of."""
        return fd in self._pipes and not self._pipes[fd].told_of_loss

    def pipe_data_received(self, number: int, data: bytes) -> None:
        protocol = self._protocol
        if self._untold or not self._is_announced or type(protocol) not in _TAKE_OUTPUT_AT_ONCE:
            self._pipes[number].untold.append(data)
            self._call("pipe_data_received", number, data)
            return
        assert protocol is not None
        protocol.pipe_data_received(number, data)
        if self._output_waiters:
            self._wake_if_drained()

    def take_in(self, fd: int, output: _clone.Output, most: int | None = None) -> None:
        """Have what comes next of an output read into `output`: the protocol is not told of it.

        It is told again of what follows when `output` has `most` bytes (None: never) or there is
        no memory for more, of the pipe's end, and of all if another is set. Nothing changes for
        it if there is no descriptor left for this, or if it has not been told of all before.
        """
        self._takes_in = True
        self._pipes[fd].take_in(output, most, self._loop)

    def end_intake(self, fd: int) -> None:
        """Tell the protocol of what comes next."""
        self._pipes[fd].end_intake()

    def pipe_connection_lost(self, number: int, exc: Exception | None) -> None:
        self._call("pipe_connection_lost", number, exc)
        self._try_finish()

    def _child_exited(self, child: Child) -> None:
        if self._loop.get_debug():
            logger.info("%r exited", self)
        for reader in self._readers:
            reader.forget()
        if self._protocol is None and not child.leads_group:
            self._closed = self._finished = True  # as asyncio's protocol would have it
            self._wake_who_waits_for_the_exit()
            return
        try:
            if self._protocol is not None:
                self._call("process_exited")
            elif not self._loop.is_closed():
                self.close()
        finally:
            self._wake_who_waits_for_the_exit()
            self._try_finish()

    def _wake_who_waits_for_the_exit(self) -> None:
        waiters, self._exit_waiters = self._exit_waiters, ()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _try_finish(self) -> None:
        child = self._child
        is_over = child is not None and (child.has_ended or child.is_detached)
        if not is_over or self._finished:
            return
        if not self._pipes or self.are_pipes_closed:
            self._finished = True
            if self._protocol is not None:
                self._call("connection_lost", None)
            self._context = None  # what it holds may hold this

    # What brings it to its end.

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop that the child belongs to."""
        return self._loop

    @property
    def is_copy(self) -> bool:
        """Whether this process is a forked copy of the one that started the child."""
        if self._owner is not None:
            return self._owner != os.getpid()
        return self._child is not None and self._child.is_copy

    def close_pipe(self, number: int) -> bool:
        """Close one of the pipes, stdin when all is written; whether there is one."""
        pipe = self._pipes.get(number)
        if pipe is None or pipe.transport is None:
            return False
        pipe.transport.close()
        return True

    def close_pipes(self) -> None:
        """Close all pipes, stdin when all is written."""
        for number in self._pipes:
            self.close_pipe(number)

    def send(self, data: bytes | bytearray | memoryview | None) -> None:
        """Write `data` to stdin, if that is an open pipe, and close it when all is written."""
        if 0 in self._pipes and self._pipes[0].is_open:
            self._pipes[0].send(data, self._loop)

    def drop_unsent(self) -> None:
        """Have nothing more written to stdin, and that closed, if something is still to be."""
        if 0 in self._pipes:
            self._pipes[0].drop_unsent()

    async def give_up_pipes(self) -> asyncio.CancelledError | None:
        """Close all pipes, whatever has not been written; what it was cancelled with meanwhile."""
        self.drop_unsent()
        self.close_pipes()
        return await self._pipes_closed()

    def _is_output_due(self) -> bool:
        """Whether the end of an output is still to come, and would be seen."""
        return any(
            self.is_pipe_open(number) and not self._pipes[number].is_paused() for number in (1, 2)
        )

    async def drain_output(self, seconds: float) -> None:
        """Wait, for at most `seconds`, for the ends of stdout and stderr.

        Where the reader is full, and so reads no more, there is nothing to wait for.
        """
        if not seconds or not self._is_output_due():
            return
        waiter = self._loop.create_future()
        self._output_waiters = (*self._output_waiters, waiter)
        timer = self._loop.call_later(min(seconds, LONGEST_TIMER), _set_result, waiter)
        try:
            await waiter
        finally:
            timer.cancel()
            self._output_waiters = _without(waiter, self._output_waiters)

    def check_group(self) -> None:
        """Raise ValueError if the child was not started to lead a process group."""
        child = self.child
        if child.leads_group:
            return
        if not child.ends_with_loop:
            raise ValueError(
                f"process {child.pid} was started by others, and it alone can be signalled: "
                "whether it leads a process group is not known"
            )
        if self._args is None:  # it was attached to
            raise ValueError(f"process {child.pid} was not started to lead a process group")
        raise ValueError(
            f"child {child.pid} leads no process group: "
            "start it with start_new_session=True or process_group=0"
        )

    def kill_group(self, signal: int) -> None:
        """Process.kill_group()."""
        self.check_group()
        if not self.child.send_signal_to_group(signal) and self.child.has_ended:
            raise ProcessLookupError

    # What asyncio.SubprocessTransport promises.

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        if self._takes_in:
            self._takes_in = False
            for fd in self._pipes:
                self.end_intake(fd)
        if self._context is None and not self._finished and not takes_all_at_once(protocol):
            self._context = contextvars.copy_context()
        self._protocol = protocol  # type: ignore[assignment]

    def get_protocol(self) -> asyncio.SubprocessProtocol:
        if self._protocol is None:
            self._protocol = self._make_protocol()
        return self._protocol

    def _make_protocol(self) -> asyncio.SubprocessProtocol:
        """asyncio's, that has heard what there was to hear; of an end, while the loop is open."""
        protocol = asyncio.subprocess.SubprocessStreamProtocol(DEFAULT_LIMIT, self._loop)
        protocol.connection_made(self)
        if self._finished and not self._loop.is_closed():
            if self.child.has_ended:  # else it was detached
                protocol.process_exited()
            protocol.connection_lost(None)
        return protocol

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if self._child is not None:
            if name == "pidfd":
                return self._child.pidfd
            if name == "exit_info":
                return self._child.exit_info
            if name == "subprocess":
                return self._popen_of(self._child)
        return super().get_extra_info(name, default)

    def _popen_of(self, child: Child) -> Popen:
        if self._popen is None:
            ends = {number: pipe.end for number, pipe in self._pipes.items()}
            self._popen = Popen(child, self._args, ends)
        return self._popen

    @property
    def child(self) -> Child:
        if self._child is None:
            raise ProcessLookupError
        return self._child

    def get_pid(self) -> int:
        child = self._child
        return self.child.pid if child is None else child.pid

    def get_returncode(self) -> int | None:
        """The exit code, the negated number of a signal, or None while the child runs.

        Raises:
            ExitStatusLost, ValueError: nobody can know it, or the process was detached. (None
                would keep who polls waiting.)
        """
        if self._child is not None:
            self._child.check_kept()
        exit_info = None if self._child is None else self._child.exit_info
        return None if exit_info is None else exit_info.returncode

    def get_pipe_transport(self, fd: int) -> Any:
        pipe = self._pipes.get(fd)
        return None if pipe is None else pipe.transport

    def is_closing(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Close the pipes, and kill the process if it still runs and is not a stranger's."""
        if self._closed:
            return
        self._closed = True
        child = self._child
        is_over = child is not None and child.has_ended
        if is_over and not self._pipes and not self.child.leads_group:  # which may have a pidfd
            return
        if self._loop.is_closed() or self.is_copy:
            self.abandon()
            return
        self.close_pipes()
        if child is None or child.is_detached or not child.ends_with_loop:
            return
        if not child.has_ended:
            with contextlib.suppress(OSError):
                child.ask()
            if child.status is None:
                if self._loop.get_debug():
                    logger.warning("Close running child process: kill %r", self)
                # It runs a set-user-ID program, or somebody's kill() finds nobody.
                with contextlib.suppress(PermissionError, ProcessLookupError):
                    self._popen_of(child).kill()

    def destroy(self) -> None:
        """Kill the child and have the pipes closed, without waiting for the loop."""
        self._closed = True
        if self._launch is not None:
            self._launch.destroy()
        if self._child is not None:
            self._child.destroy()
        self.close_pipes()

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
            is_copy = self.is_copy
            for pipe in self._pipes.values():
                pipe.abandon(self._loop, is_copy=is_copy)

    def send_signal(self, signal: int) -> None:
        """Send a signal through the pidfd.

        Nothing happens if the child has exited and this is not known here yet.

        Raises:
            ProcessLookupError: its exit is known.
            ValueError: it was detached.
        """
        if self.child.has_ended:
            raise ProcessLookupError
        self.child.send_signal(signal)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def detach(self, take_unread: Callable[[], Mapping[int, bytes]]) -> Detached:
        """Give the running child up, as Process.detach().

        take_unread() is called when nothing can fail any more, and returns what the protocol
        has been told of stdout (1) and stderr (2) and nobody has read.

        Raises:
            OSError, ValueError, RuntimeError: as Process.detach().
        """
        child = self.child
        child.check_detachable()
        if self._closed:
            raise RuntimeError(f"the transport of process {child.pid} is closed")
        if 0 in self._pipes and self._pipes[0].unsent:
            raise BlockingIOError(
                errno.EAGAIN,
                f"{self._pipes[0].unsent} bytes written to stdin are not in the pipe yet",
            )
        with contextlib.ExitStack() as failed:
            copies: dict[int, int] = {}
            for number, pipe in self._pipes.items():
                if pipe.is_open:
                    copy = fcntl.fcntl(pipe.end.fileno(), fcntl.F_DUPFD_CLOEXEC, 3)
                    failed.callback(os.close, copy)
                    copies[number] = copy
            heir = Heir.of(child, self._loop) if child.has_to_be_reaped else None
            failed.pop_all()
        unread = dict(take_unread())
        for number, pipe in self._pipes.items():
            unread[number] = unread.get(number, b"") + b"".join(pipe.untold)
            pipe.untold.clear()
            pipe.leave()
        for copy in copies.values():
            os.set_blocking(copy, True)
        self._closed = True
        detached = Detached(
            pid=child.pid,
            pidfd=child.detach(),
            stdin=copies.get(0),
            stdout=copies.get(1),
            stderr=copies.get(2),
            unread_stdout=unread.get(1, b""),
            unread_stderr=unread.get(2, b""),
            started_ns=child.started_ns,
            autoreap=not child.has_to_be_reaped,
            leads_group=child.leads_group,
            heir=heir,
        )
        if self.ladder is not None:
            self.ladder.let_go()
        self._wake_who_waits_for_the_exit()
        self._try_finish()
        return detached

    async def wait_exit(self) -> ExitInfo:
        """As wait(), and how it ended."""
        await self.wait()
        exit_info = self.child.exit_info
        assert exit_info is not None
        return exit_info

    async def wait(self) -> int:
        """Wait for the child's exit, not for the end of its pipes; its wait status.

        Each call has a waiter of its own, and can be cancelled.

        Raises:
            ExitStatusLost: nobody can know how the child ended.
            ValueError: it was detached, perhaps meanwhile.
        """
        child = self._child or self.child
        while not child.has_ended:
            if child.is_detached:
                child.check_kept()
            waiter = self._loop.create_future()
            self._exit_waiters = (*self._exit_waiters, waiter)
            try:
                await waiter
            finally:
                if self._exit_waiters:
                    self._exit_waiters = _without(waiter, self._exit_waiters)
        status = None if child.status is None else child.status[0]
        if status is None:
            raise ExitStatusLost(child.pid)
        return status

    async def _wait(self) -> int:
        """What asyncio.subprocess.Process.wait() calls."""
        return os.waitstatus_to_exitcode(await self.wait())


_transports: weakref.WeakKeyDictionary[
    asyncio.AbstractEventLoop, weakref.WeakSet[SubprocessTransport]
] = weakref.WeakKeyDictionary()


def abandon_children(loop: asyncio.AbstractEventLoop) -> None:
    """Kill the children of a loop that is about to be closed: a ResourceWarning for each."""
    with contextlib.ExitStack() as stack:  # all of them, though a warning may be an exception
        stack.callback(ChildWatcher.of(loop).abandon_children)
        stack.callback(Launcher.of(loop).abandon_launches)
        for transport in list(_transports.get(loop, ())):
            if not transport._finished:
                stack.callback(transport.abandon)
