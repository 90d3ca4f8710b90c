"""All that a child writes, for communicate(): past the stream readers, and never lost."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Coroutine, Iterator
from typing import Any, cast

from aioreap import _clone
from aioreap.bulk import LARGE
from aioreap.reader import take_buffered
from aioreap.transport import (
    SubprocessTransport,
    take_all_at_once,
    take_output_at_once,
    takes_all_at_once,
)

__all__ = ["Collector"]


@take_output_at_once
class Collector(asyncio.SubprocessProtocol):
    """Stands before a stream protocol while all output is collected.

    The protocol does not hear of the output, nor of a stream's end, until that is
    over: what was collected can be given to a reader as long as it has no EOF.

    Raises:
        RuntimeError: there is one already that collects.
    """

    def __init__(
        self,
        transport: SubprocessTransport,
        protocol: asyncio.subprocess.SubprocessStreamProtocol,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        if isinstance(transport.get_protocol(), Collector):
            message = "communicate() called while another coroutine is in it already"
            raise RuntimeError(message)  # noqa: TRY004 - as asyncio's readers
        self._transport = transport
        self._protocol = protocol
        self._loop = loop
        readers = {1: protocol.stdout, 2: protocol.stderr}
        self._readers = {fd: reader for fd, reader in readers.items() if reader is not None}
        # Unlike a list to be joined, it never holds the output twice.
        self._output: dict[int, _clone.Output] = {}
        self._ended: dict[int, Exception | None] = {}
        self._waiter: asyncio.Future[None] | None = None
        self._lost: tuple[contextvars.Context, Exception | None] | None = None

    @staticmethod
    def over(
        transport: SubprocessTransport,
        protocol: asyncio.subprocess.SubprocessStreamProtocol,
        loop: asyncio.AbstractEventLoop,
    ) -> Collector:
        """One that takes at once what its protocol would, with the same errors."""
        kind = _QuickCollector if takes_all_at_once(protocol) else Collector
        return kind(transport, protocol, loop)

    async def collect(
        self, exited: Coroutine[Any, Any, object]
    ) -> tuple[bytes | None, bytes | None]:
        """All that is left of stdout and stderr, when they have ended and `exited` has.

        If it fails or is cancelled, what was read is in the readers again.

        Raises:
            MemoryError: there is no memory for one of them. What had come of it is lost, and its
                reader raises that, too.
        """
        open_pipes = [fd for fd in self._readers if self._transport.is_pipe_open(fd)]
        if open_pipes:
            self._transport.set_protocol(self)
        try:
            for fd in open_pipes:
                self._output[fd] = _clone.Output()
                self._output[fd].write(take_buffered(self._readers[fd]))
            while not self._output.keys() <= self._ended.keys():
                self._waiter = self._loop.create_future()
                await self._waiter
            await exited
            if not self._transport.are_pipes_closed:  # stdin
                await self._transport.let_pipes_close()
            self._raise_lost()
        except BaseException:
            exited.close()
            for fd, output in self._output.items():
                self._transport.end_intake(fd)
                self._give_back(self._readers[fd], output)
            self._give_way()
            raise
        self._give_way()
        found = {
            fd: self._output[fd].take() if fd in self._output else take_buffered(reader)
            for fd, reader in self._readers.items()
        }
        return found.get(1), found.get(2)

    @staticmethod
    def _give_back(reader: asyncio.StreamReader, output: _clone.Output) -> None:
        try:
            reader.feed_data(output.take())
        except MemoryError:  # what follows is not to be taken for what comes next
            reader.set_exception(MemoryError())  # one that refers to nothing

    def _raise_lost(self) -> None:
        for fd, reader in self._readers.items():
            exc = self._ended.get(fd) or reader.exception()
            if exc is not None:
                raise exc
            if fd in self._output:
                self._output[fd].write(b"")  # MemoryError, if it is lost

    def _give_way(self) -> None:
        if self._transport.get_protocol() is self:
            self._transport.set_protocol(self._protocol)
        self._tell_of(iter(self._ended.items()))

    def _tell_of(self, ended: Iterator[tuple[int, Exception | None]]) -> None:
        for fd, exc in ended:
            try:
                self._protocol.pipe_connection_lost(fd, exc)
            except BaseException:
                self._tell_of(ended)  # all of it, though one of them raises
                raise
        if self._lost is not None and not self._loop.is_closed():
            context, lost = self._lost
            self._loop.call_soon(self._protocol.connection_lost, lost, context=context)

    def pipe_data_received(self, fd: int, data: bytes | str) -> None:
        output = self._output.get(fd)
        if output is None:
            self._protocol.pipe_data_received(fd, data)
            return
        try:
            size = output.write(cast("bytes", data))
        except MemoryError as error:
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_exception(error.with_traceback(None))
                self._waiter = None  # it refers to who waits, once that is told
            return
        if size >= LARGE:
            self._transport.take_in(fd, output)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        if fd not in self._output:
            self._protocol.pipe_connection_lost(fd, exc)
            return
        self._ended[fd] = exc
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def process_exited(self) -> None:
        self._protocol.process_exited()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = contextvars.copy_context(), exc  # it comes after the streams' ends

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()


@take_all_at_once
class _QuickCollector(Collector):
    """For a protocol of which nothing but a waiter hears anything."""
