"""create_subprocess_exec and create_subprocess_shell, and the Process that they return."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, TypeVar, Unpack, cast

from aioreap.exitinfo import ExitInfo
from aioreap.options import Options, Stdio, StrOrBytesPath
from aioreap.spawn import SpawnPlan
from aioreap.transport import SubprocessTransport

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
_LIMIT: Final = 2**16  # bytes, as asyncio's

_ProtocolT = TypeVar("_ProtocolT", bound=asyncio.BaseProtocol)

# What asyncio's loops refuse unless it is this, and say so.
_BINARY: Final = {
    "universal_newlines": False,
    "text": False,
    "bufsize": 0,
    "encoding": None,
    "errors": None,
}


def _take_binary(options: dict[str, Any], *, shell: bool) -> None:
    """Take the options out that could only ask for text or buffers.

    Raises:
        ValueError: they do.
    """
    if bool(options.pop("shell", shell)) is not shell:
        raise ValueError(f"shell must be {shell}")
    for name, only in _BINARY.items():
        given = options.pop(name, only)
        if given if only is False else given != only:
            raise ValueError(f"{name} must be {only}")


async def _open(
    loop: asyncio.AbstractEventLoop,
    protocol_factory: Callable[[], _ProtocolT],
    command: Sequence[Any],
    *,
    shell: bool,
    stdin: Stdio,
    stdout: Stdio,
    stderr: Stdio,
    options: dict[str, Any],
) -> tuple[SubprocessTransport, _ProtocolT]:
    _take_binary(options, shell=shell)
    protocol = protocol_factory()
    plan = SpawnPlan.of(
        command,
        shell=shell,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        options=cast("Options", options),
    )
    transport = SubprocessTransport(loop, cast("asyncio.SubprocessProtocol", protocol), plan)
    await transport.start()
    return transport, protocol


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
    return await _open(
        loop,
        protocol_factory,
        (program, *args),
        shell=False,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        options=options,
    )


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
    if not isinstance(cmd, (bytes, str)):
        raise ValueError("cmd must be a string")  # noqa: TRY004 - as asyncio
    return await _open(
        loop,
        protocol_factory,
        (cmd,),
        shell=True,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        options=options,
    )


def _take_buffered(reader: asyncio.StreamReader) -> bytes:
    """What has been read already, without waiting; reading goes on if it was paused."""
    read = reader.read(sys.maxsize)
    try:
        read.send(None)
    except StopIteration as stop:
        return cast("bytes", stop.value)
    read.close()
    return b""


class _StreamProtocol(asyncio.subprocess.SubprocessStreamProtocol):
    """asyncio's protocol, and a way to take all of the output past the readers.

    While a stream is collected, its reader is not this protocol's ``stdout`` or
    ``stderr``, so asyncio's part of the class feeds it neither data nor EOF.
    """

    def __init__(self, limit: int, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(limit=limit, loop=loop)
        self._event_loop = loop
        self._collected: dict[int, list[bytes]] = {}
        self._readers: dict[int, asyncio.StreamReader] = {}
        self._ended: dict[int, Exception | None] = {}
        self._waiter: asyncio.Future[None] | None = None
        self._collecting = False

    def pipe_data_received(self, fd: int, data: bytes | str) -> None:
        collected = self._collected.get(fd)
        if collected is None:
            super().pipe_data_received(fd, data)
        else:
            collected.append(cast("bytes", data))

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        self._ended[fd] = exc
        super().pipe_connection_lost(fd, exc)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def collect(
        self, exited: Coroutine[Any, Any, object]
    ) -> tuple[bytes | None, bytes | None]:
        """All that is left of stdout and stderr, when they have ended and `exited` has.

        If it fails or is cancelled, what was read is in the readers again.
        """
        if self._collecting:
            exited.close()
            raise RuntimeError("communicate() called while another coroutine is in it already")
        self._collecting = True
        readers = {1: self.stdout, 2: self.stderr}
        try:
            for fd, reader in readers.items():
                if reader is not None and fd not in self._ended:
                    self._collected[fd] = [_take_buffered(reader)]
                    self._readers[fd] = reader
            self.stdout, self.stderr = (
                reader if fd in self._ended else None for fd, reader in readers.items()
            )
            while not self._readers.keys() <= self._ended.keys():
                self._waiter = self._event_loop.create_future()
                await self._waiter
            await exited
            self._raise_lost()
        except BaseException:
            exited.close()
            for fd, reader in self._readers.items():
                reader.feed_data(b"".join(self._collected[fd]))
            self._give_back()
            raise
        output = {fd: b"".join(chunks) for fd, chunks in self._collected.items()}
        self._give_back()
        for fd, reader in readers.items():
            if reader is not None and fd not in output:
                output[fd] = _take_buffered(reader)
        return output.get(1), output.get(2)

    def _raise_lost(self) -> None:
        for fd in self._readers:
            exc = self._ended[fd]
            if exc is not None:
                raise exc

    def _give_back(self) -> None:
        for fd, reader in self._readers.items():
            exc = self._ended.get(fd)
            if exc is not None:
                reader.set_exception(exc)
            elif fd in self._ended:
                reader.feed_eof()
        self.stdout = self._readers.get(1, self.stdout)
        self.stderr = self._readers.get(2, self.stderr)
        self._readers.clear()
        self._collected.clear()
        self._waiter = None
        self._collecting = False


class Process(asyncio.subprocess.Process):
    """A running child: asyncio.subprocess.Process, and what a pidfd adds to it.

    ``returncode`` raises ExitStatusLost once nobody can know it.
    """

    _transport: SubprocessTransport
    _protocol: asyncio.SubprocessProtocol

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
        return self._transport.child.exit_info

    def poll(self) -> int | None:
        """Ask the kernel now, without a turn of the loop, and return ``returncode``.

        Raises:
            ExitStatusLost: nobody can know it.
        """
        self._transport.child.poll()
        return self.returncode

    async def wait_exit(self) -> ExitInfo:
        """Wait for the child's exit, whoever still holds its pipes.

        Cancelling one call does not disturb another.

        Raises:
            ExitStatusLost: nobody can know how it ended (only before Linux 6.15).
        """
        return await self._transport.wait_exit()

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
        """
        if not isinstance(self._protocol, _StreamProtocol):
            return await super().communicate(input)
        if self.stdin is not None and not self.stdin.is_closing():
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                if input is not None:
                    self.stdin.write(input)
            self.stdin.close()
        output = await self._protocol.collect(self.wait())
        return cast("tuple[bytes, bytes]", output)  # as typeshed has it


async def _create(
    opening: Callable[..., Any], *command: Any, limit: int, **options: Any
) -> Process:
    loop = asyncio.get_running_loop()
    transport, protocol = await opening(
        loop, lambda: _StreamProtocol(limit, loop), *command, **options
    )
    return Process(transport, protocol, loop)


async def create_subprocess_exec(
    program: StrOrBytesPath,
    *args: StrOrBytesPath,
    stdin: Stdio = None,
    stdout: Stdio = None,
    stderr: Stdio = None,
    limit: int = _LIMIT,
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
        ValueError, TypeError, LookupError: as subprocess.Popen.
        subprocess.SubprocessError: something killed the child before its exec.
    """
    return await _create(
        subprocess_exec,
        program,
        *args,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        limit=limit,
        **options,
    )


async def create_subprocess_shell(
    cmd: str | bytes,
    stdin: Stdio = None,
    stdout: Stdio = None,
    stderr: Stdio = None,
    limit: int = _LIMIT,
    **options: Unpack[Options],
) -> Process:
    """Start a command of /bin/sh, otherwise as create_subprocess_exec()."""
    return await _create(
        subprocess_shell,
        cmd,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        limit=limit,
        **options,
    )
