"""create_subprocess_exec and create_subprocess_shell, and the Process that they return."""

from __future__ import annotations

import asyncio
import os
import signal as signals
import subprocess
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self, TypeVar, Unpack, cast

from aioreap.collector import Collector
from aioreap.detached import Detached
from aioreap.exitinfo import ExitInfo
from aioreap.options import Options, Stdio, StrOrBytesPath, take_binary
from aioreap.reader import take_unread
from aioreap.spawn import SpawnPlan
from aioreap.stopping import DEFAULT_GRACE, leave, stop
from aioreap.transport import DEFAULT_LIMIT, SubprocessTransport, take_all_at_once
from aioreap.writepipe import GivenUpWriter

__all__ = [
    "DEVNULL",
    "PIPE",
    "STDOUT",
    "Process",
    "create_subprocess_exec",
    "create_subprocess_shell",
    "subprocess_exec",
    "subprocess_shell",
]

PIPE: Final = subprocess.PIPE
STDOUT: Final = subprocess.STDOUT
DEVNULL: Final = subprocess.DEVNULL

_ProtocolT = TypeVar("_ProtocolT", bound=asyncio.BaseProtocol)


def _prepare(
    loop: asyncio.AbstractEventLoop,
    protocol: asyncio.BaseProtocol | None,
    command: tuple[Any, ...],
    stdio: tuple[Stdio, Stdio, Stdio],
    options: Any,
    *,
    shell: bool,
) -> SubprocessTransport:
    """The transport of a child that start() starts."""
    plan = SpawnPlan.of(command, stdio, options, shell=shell)
    args = command[0] if shell else command
    return SubprocessTransport(loop, protocol, plan, args)  # type: ignore[arg-type]


async def subprocess_exec(
    loop: asyncio.AbstractEventLoop,
    protocol_factory: Callable[[], _ProtocolT],
    program: Any,
    *args: Any,
    stdin: Stdio = PIPE,
    stdout: Stdio = PIPE,
    stderr: Stdio = PIPE,
    **options: Any,
) -> tuple[SubprocessTransport, _ProtocolT]:
    """``loop.subprocess_exec()`` for any loop with ``add_reader``; `options` as in Options."""
    take_binary(options, shell=False)
    protocol = protocol_factory()
    stdio = stdin, stdout, stderr
    transport = _prepare(loop, protocol, (program, *args), stdio, options, shell=False)
    await transport.start()
    return transport, protocol


async def subprocess_shell(
    loop: asyncio.AbstractEventLoop,
    protocol_factory: Callable[[], _ProtocolT],
    cmd: str | bytes,
    *,
    stdin: Stdio = PIPE,
    stdout: Stdio = PIPE,
    stderr: Stdio = PIPE,
    **options: Any,
) -> tuple[SubprocessTransport, _ProtocolT]:
    """``loop.subprocess_shell()`` for any loop with ``add_reader``; `options` as in Options."""
    _check_command(cmd)
    take_binary(options, shell=True)
    protocol = protocol_factory()
    stdio = stdin, stdout, stderr
    transport = _prepare(loop, protocol, (cmd,), stdio, options, shell=True)
    await transport.start()
    return transport, protocol


class Process(asyncio.subprocess.Process):
    """A running child: asyncio.subprocess.Process, and what a pidfd adds to it.

    ``pid``, ``stdin``, ``stdout`` and ``stderr`` are as there, and so are ``wait()``,
    ``send_signal()``, ``terminate()`` and ``kill()``, but that wait() is for the exit
    alone and signals go through the pidfd. ``returncode`` and ``wait()`` raise
    ExitStatusLost once nobody can know how the child ended.

    ``async with await create_subprocess_exec(...) as process:`` leaves no child behind.
    At the block's end the pipes are closed, as subprocess.Popen does, and the exit
    is waited for. If it ends with an exception, the child is stopped as by stop(); if
    with a cancellation, also of that waiting, it is killed at once, its exit awaited
    and the cancellation raised again: with its group, in both cases, if it leads one.
    Nothing is done to what was detached meanwhile, nor to a process that others have
    started, whose exit is waited for if there is no exception.
    """

    _transport: SubprocessTransport
    _protocol: asyncio.SubprocessProtocol | None
    _loop: asyncio.AbstractEventLoop

    def __init__(
        self,
        transport: SubprocessTransport,
        protocol: asyncio.subprocess.SubprocessStreamProtocol | None,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        if protocol is not None:
            super().__init__(transport, protocol, loop)
            return
        self._transport = transport
        self._protocol = None
        self._loop = loop
        self.stdin: asyncio.StreamWriter | None = None
        self.stdout: asyncio.StreamReader | None = None
        self.stderr: asyncio.StreamReader | None = None
        self.pid: int = transport.get_pid()

    @classmethod
    def of(cls, process: asyncio.subprocess.Process) -> Process:
        """The same process as ours, for one that asyncio's functions returned.

        Raises:
            TypeError: its loop's ``subprocess_exec`` is not aioreap's.
        """
        if isinstance(process, cls):
            return process
        transport = getattr(process, "_transport", None)
        if not isinstance(transport, SubprocessTransport):
            raise TypeError(f"{process!r} was not started through aioreap")
        return cls(transport, process._protocol, process._loop)  # type: ignore[attr-defined]

    @property
    def pidfd(self) -> int:
        """The pidfd that came from the child's clone, -1 after its exit. Not to be closed."""
        return cast("int", self._transport.get_extra_info("pidfd"))

    @property
    def exit_info(self) -> ExitInfo | None:
        """How the child ended; None while it runs, with a status of None if that is lost."""
        self._transport.child.check_kept()
        return self._transport.child.exit_info

    def poll(self) -> int | None:
        """Ask the kernel now, without a turn of the loop, and return ``returncode``.

        Raises:
            ExitStatusLost: nobody can know it.
        """
        self._transport.child.poll()
        return self.returncode

    async def wait(self) -> int:
        """Wait for the child's exit and return ``returncode``, with the errors of wait_exit()."""
        return os.waitstatus_to_exitcode(await self._transport.wait())

    async def wait_exit(self) -> ExitInfo:
        """Wait for the child's exit, whoever still holds its pipes.

        Cancelling one call does not disturb another.

        Raises:
            ExitStatusLost: nobody can know how it ended (only before Linux 6.15).
        """
        return await self._transport.wait_exit()

    def detach(self) -> Detached:
        """Give the running process up whole, as ``socket.detach()`` does, and kill nothing.

        Returns what it has: pid, pidfd, the pipes as descriptors in blocking mode, and
        the bytes that were read of them and that nobody has taken. All of it is the caller's:
        to keep, to close, for attach(), or for another process (``aioreap.handover``).

        This Process is done with: all but ``pid`` raises ValueError, and so do calls of
        wait() and of the streams that wait now; ``pidfd`` is -1, and ``stdin.close()``
        does nothing. What such a call has read
        and not returned is among these bytes, also what asyncio's own communicate() has.

        Without CLONE_AUTOREAP (before Linux 7.1) somebody has to reap the process when it
        ends: this loop goes on to do that, and when it is closed, the next spawn of any
        loop does.

        Raises:
            BlockingIOError: some of what was written to stdin is not in the pipe yet; nothing
                is lost. After ``stdin.transport.set_write_buffer_limits(0)`` and ``await
                stdin.drain()`` all of it is; what communicate() was given is after ``await
                stdin.wait_closed()``.
            ProcessLookupError: its exit is known.
            ValueError: it was detached already, or is held by this process's life
                (PR_SET_PDEATHSIG).
            RuntimeError: this class's communicate() is waiting, the transport is closed, or this
                is a forked copy of the process that the child is one of.
            OSError: there are no descriptors left (EMFILE).
        """
        if self._protocol is not None and isinstance(self._transport.get_protocol(), Collector):
            raise RuntimeError("detach() called while communicate() is waiting")
        return self._transport.detach(self._take_unread)

    def _take_unread(self) -> dict[int, bytes]:
        if type(self.stdin) is asyncio.StreamWriter:
            self.stdin.__class__ = GivenUpWriter
        unread: dict[int, bytes] = {}
        for number, reader in ((1, self.stdout), (2, self.stderr)):
            if reader is None:
                continue
            unread[number] = take_unread(reader)
            reader.set_exception(ValueError(f"process {self.pid} was detached"))
        return unread

    async def stop(
        self,
        *,
        signal: int = signals.SIGTERM,
        grace: float = DEFAULT_GRACE,
        group: bool = False,
        close_stdin: bool = False,
        drain: float = 1.0,
    ) -> ExitInfo:
        """Bring the child to its end: `signal`, `grace` seconds, SIGKILL.

        With `close_stdin`, what reads it gets its end of file first, and `grace` seconds
        before the signal. With ``grace=0`` it is SIGKILL at once. With `group`, all of
        that is for the process group that the child leads, and goes on until nobody
        lives in it. After the exit, `drain` is how many seconds to wait for the ends of
        stdout and stderr, which another process may hold; they can be read as before.
        Where a reader is full, its end is not waited for.

        Can be called again, by many tasks and after the exit. They all share one course
        of events: who comes later can make it faster and widen it to the group, but
        sends no other signal.

        If a call is cancelled, also in its drain, then the child, and the group that it
        leads, is killed at once, for the other callers too; its exit is awaited, and the
        cancellation raised. Those who are left of a group when its leader has exited are
        killed too since Linux 6.9, with or without `group`.

        All of that holds for a process that others have started (attach()): it too is killed
        if a call is cancelled. Its exit is known when its parent has reaped it (before Linux
        6.15 with ExitStatusLost, and before 6.13 as soon as it is dead). Until then a call waits,
        also for one that was dead before, and a cancelled call for one second at most.

        Returns how it ended.

        Raises:
            ValueError: a time is negative or not a number, `signal` is no signal, or
                `group` is asked for and the child was not started to lead one.
            PermissionError: as for kill(2).
            ExitStatusLost: as wait_exit().
            OSError: ENOSYS: as kill_group().
            RuntimeError: this is another event loop than the child's, or a forked copy of
                the program.
        """
        return await stop(
            self._transport, signal, grace, group=group, close_stdin=close_stdin, drain=drain
        )

    def kill_group(self, signal: int = signals.SIGKILL) -> None:
        """Send a signal to the process group that the child leads, also after its own exit.

        For a child started with ``start_new_session=True`` or ``process_group=0``. It goes
        through the pidfd and can reach no other group. Before Linux 6.9 the members are found
        in /proc and signalled one by one, and only as long as the leader has not been reaped.

        Nothing happens if nobody is left in it and this child's exit is not known here yet.

        Raises:
            ValueError: the child was not started to lead a group, or others have started it.
            ProcessLookupError: nobody is left in it.
            PermissionError: as for kill(2).
            OSError: ENOSYS: the leader is gone, and this kernel cannot reach the others.
        """
        self._transport.kill_group(signal)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await leave(self._transport, exc_value)

    async def communicate(
        self,
        input: bytes | bytearray | memoryview | None = None,  # noqa: A002 - asyncio's name
    ) -> tuple[bytes, bytes]:
        """Send `input` to stdin, close it, read stdout and stderr to their ends, and wait.

        Returns what was read, None for a stream that is no pipe. A child that
        closes its stdin early is no error. If the call is cancelled, nothing that
        was read is lost: it is in ``stdout`` and ``stderr``, and communicate() can
        be called again (what was given as `input` stays sent).

        Raises:
            ExitStatusLost: as wait_exit().
            MemoryError: there is no memory for the output. What had come of that stream is lost,
                and it raises that from then on; the child goes on.
        """
        if self._protocol is None:
            await self._transport.wait()
            return cast("tuple[bytes, bytes]", (None, None))
        if not isinstance(self._protocol, asyncio.subprocess.SubprocessStreamProtocol):
            return await super().communicate(input)
        collector = Collector.over(self._transport, self._protocol, self._loop)
        self._transport.send(input)
        output = await collector.collect(self.wait())
        return cast("tuple[bytes, bytes]", output)  # as typeshed has it


@take_all_at_once
class _StreamProtocol(asyncio.subprocess.SubprocessStreamProtocol):
    """asyncio's, with a waiter for each ``stdin.wait_closed()``.

    There they share one: a call that is cancelled cancels the others, and at the
    pipe's end the loop's exception handler is told of an InvalidStateError.
    """

    def _get_close_waiter(self, stream: asyncio.StreamWriter) -> asyncio.Future[None]:
        waiter: asyncio.Future[None] = super()._get_close_waiter(stream)  # type: ignore[misc]
        return asyncio.shield(waiter)


def _check_command(cmd: object) -> None:
    if not isinstance(cmd, (bytes, str)):
        raise ValueError("cmd must be a string")  # noqa: TRY004 - as asyncio


def check_limit(limit: int) -> None:
    """Raise what asyncio.StreamReader would, in the midst of a beginning, where nobody hears it."""
    if limit <= 0:
        raise ValueError("Limit cannot be <= 0")


def _prepare_process(
    command: tuple[Any, ...],
    stdio: tuple[Stdio, Stdio, Stdio],
    options: Any,
    limit: int,
    *,
    shell: bool,
) -> tuple[SubprocessTransport, _StreamProtocol | None, asyncio.AbstractEventLoop]:
    if PIPE in stdio[1:]:  # as in asyncio: else there is no reader
        check_limit(limit)
    if options:
        take_binary(options, shell=shell)
    loop = asyncio.get_running_loop()
    protocol = _StreamProtocol(limit=limit, loop=loop) if PIPE in stdio else None
    transport = _prepare(loop, protocol, command, stdio, options, shell=shell)
    return transport, protocol, loop


async def create_subprocess_exec(
    program: StrOrBytesPath,
    *args: StrOrBytesPath,
    stdin: Stdio = None,
    stdout: Stdio = None,
    stderr: Stdio = None,
    limit: int = DEFAULT_LIMIT,
    **options: Unpack[Options],
) -> Process:
    """Start a program: asyncio.create_subprocess_exec, with the same arguments and more.

    The event loop is not held while the program is loaded. `limit`, in bytes, is
    the readers' buffer; for `options` see Options.

    Cancelled, it kills the child, waits until that is gone and raises
    CancelledError: there is a Process, or nothing is left behind.

    Raises:
        OSError: as subprocess.Popen: FileNotFoundError or PermissionError with the
            name of the program or of cwd, BlockingIOError where there may be no
            more processes; ENOSYS for what this kernel or backend cannot do.
        ValueError, TypeError, LookupError: as subprocess.Popen; ValueError too for a `limit` of
            zero or less with a pipe to read.
        subprocess.SubprocessError: something killed the child before its exec.
    """
    stdio = stdin, stdout, stderr
    transport, protocol, loop = _prepare_process(
        (program, *args), stdio, options, limit, shell=False
    )
    await transport.start()
    return Process(transport, protocol, loop)


async def create_subprocess_shell(
    cmd: str | bytes,
    stdin: Stdio = None,
    stdout: Stdio = None,
    stderr: Stdio = None,
    limit: int = DEFAULT_LIMIT,
    **options: Unpack[Options],
) -> Process:
    """Start a command of /bin/sh, otherwise as create_subprocess_exec()."""
    _check_command(cmd)
    stdio = stdin, stdout, stderr
    transport, protocol, loop = _prepare_process((cmd,), stdio, options, limit, shell=True)
    await transport.start()
    return Process(transport, protocol, loop)
