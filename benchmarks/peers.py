"""The peers in Python: how each of them starts a program and takes what it writes."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from subprocess import PIPE
from typing import Any, Final, TypeVar

__all__ = ["LOOPS", "PEERS", "AsyncioPeer", "Peer"]

_T = TypeVar("_T")
CHUNK: Final = 2**16  # bytes; the size of a pipe


def check(status: int | None) -> None:
    """Raise where a child has failed: its time means nothing."""
    if status:
        raise RuntimeError(f"a child ended with {status}")


class Peer(ABC):
    """One library; everything but run() is called inside of run()."""

    @abstractmethod
    def run(self, main: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        """Run ``main()`` on a loop of its own."""

    @abstractmethod
    async def sleep(self, seconds: float) -> None:
        """Let others run."""

    @abstractmethod
    async def each(self, count: int, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run `count` of ``work()`` at a time, to their ends."""

    @abstractmethod
    async def spawn(self, *command: str) -> None:
        """Run a program to its end, without pipes."""

    @abstractmethod
    async def collect(self, *command: str, given: bytes | None = None) -> int:
        """Run a program to its end, and return the size of what it wrote, held in one piece.

        `given` is for its stdin, which is a pipe only then.
        """

    @abstractmethod
    async def stream(self, *command: str) -> int:
        """Read a program's output in chunks, and return its size."""

    async def lines(self, *command: str) -> int:
        """Read a program's output line by line, and return how many there were."""
        raise NotImplementedError


class AsyncioPeer(Peer):
    """What has asyncio's API, over one of the loops that have asyncio's API."""

    def __init__(self, *, package: str, loop: str) -> None:
        self._package = package
        self._loop = loop
        self.create: Any = None

    def run(self, main: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        self.create = importlib.import_module(self._package).create_subprocess_exec
        with asyncio.Runner(loop_factory=LOOPS[self._loop]) as runner:
            return runner.run(main())

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def each(self, count: int, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        await asyncio.gather(*(work() for _ in range(count)))

    async def spawn(self, *command: str) -> None:
        process = await self.create(*command)
        check(await process.wait())

    async def collect(self, *command: str, given: bytes | None = None) -> int:
        stdin = None if given is None else PIPE
        process = await self.create(*command, stdin=stdin, stdout=PIPE)
        output, _ = await process.communicate(given)
        check(process.returncode)
        return len(output)

    async def stream(self, *command: str) -> int:
        process = await self.create(*command, stdout=PIPE)
        size = 0
        while chunk := await process.stdout.read(CHUNK):
            size += len(chunk)
        check(await process.wait())
        return size

    async def lines(self, *command: str) -> int:
        process = await self.create(*command, stdout=PIPE)
        count = 0
        async for _ in process.stdout:
            count += 1
        check(await process.wait())
        return count


class TrioPeer(Peer):
    """trio."""

    def run(self, main: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        import trio

        self._trio = trio
        return trio.run(main)

    async def sleep(self, seconds: float) -> None:
        await self._trio.sleep(seconds)

    async def each(self, count: int, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        async with self._trio.open_nursery() as nursery:
            for _ in range(count):
                nursery.start_soon(work)

    async def spawn(self, *command: str) -> None:
        process = await self._trio.lowlevel.open_process(command)
        check(await process.wait())

    async def collect(self, *command: str, given: bytes | None = None) -> int:
        done = await self._trio.run_process(command, stdin=given, capture_stdout=True)
        return len(done.stdout)

    async def stream(self, *command: str) -> int:
        process = await self._trio.lowlevel.open_process(command, stdout=PIPE)
        assert process.stdout is not None
        size = 0
        while chunk := await process.stdout.receive_some(CHUNK):
            size += len(chunk)
        check(await process.wait())
        return size


class AnyioPeer(Peer):
    """anyio, on asyncio."""

    def run(self, main: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        import anyio

        self._anyio = anyio
        return anyio.run(main, backend="asyncio")

    async def sleep(self, seconds: float) -> None:
        await self._anyio.sleep(seconds)

    async def each(self, count: int, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        async with self._anyio.create_task_group() as group:
            for _ in range(count):
                group.start_soon(work)

    async def spawn(self, *command: str) -> None:
        process = await self._anyio.open_process(command, stdin=None, stdout=None, stderr=None)
        check(await process.wait())

    async def collect(self, *command: str, given: bytes | None = None) -> int:
        done = await self._anyio.run_process(command, input=given, stderr=None)
        return len(done.stdout)

    async def stream(self, *command: str) -> int:
        process = await self._anyio.open_process(command, stdin=None, stderr=None)
        assert process.stdout is not None
        size = 0
        with contextlib.suppress(self._anyio.EndOfStream):
            while True:
                size += len(await process.stdout.receive(CHUNK))
        check(await process.wait())
        await process.aclose()
        return size


class ThreadsPeer(Peer):
    """subprocess.Popen in the threads of a pool, awaited on asyncio's loop."""

    def run(self, main: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        with (
            ThreadPoolExecutor(64) as self._pool,
            asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner,
        ):
            return runner.run(main())

    async def _in_thread(self, call: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def each(self, count: int, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        await asyncio.gather(*(work() for _ in range(count)))

    async def spawn(self, *command: str) -> None:
        check(await self._in_thread(functools.partial(subprocess.call, command)))

    async def collect(self, *command: str, given: bytes | None = None) -> int:
        call = functools.partial(subprocess.run, command, input=given, stdout=PIPE, check=True)
        return len((await self._in_thread(call)).stdout)

    async def stream(self, *command: str) -> int:
        def read() -> int:
            with subprocess.Popen(command, stdout=PIPE) as process:
                assert process.stdout is not None
                size = 0
                while chunk := process.stdout.read(CHUNK):
                    size += len(chunk)
            check(process.returncode)
            return size

        return await self._in_thread(read)

    async def lines(self, *command: str) -> int:
        def read() -> int:
            with subprocess.Popen(command, stdout=PIPE) as process:
                assert process.stdout is not None
                count = sum(1 for _ in process.stdout)
            check(process.returncode)
            return count

        return await self._in_thread(read)


def _uvloop() -> asyncio.AbstractEventLoop:
    import uvloop

    return uvloop.new_event_loop()


LOOPS: Final[dict[str, Callable[[], asyncio.AbstractEventLoop]]] = {
    "asyncio": asyncio.SelectorEventLoop,
    "uvloop": _uvloop,
}
PEERS: Final[dict[str, Callable[[], Peer]]] = {
    "aioreap": lambda: AsyncioPeer(package="aioreap", loop="asyncio"),
    "aioreap-uvloop": lambda: AsyncioPeer(package="aioreap", loop="uvloop"),
    "asyncio": lambda: AsyncioPeer(package="asyncio", loop="asyncio"),
    "uvloop": lambda: AsyncioPeer(package="asyncio", loop="uvloop"),
    "trio": TrioPeer,
    "anyio": AnyioPeer,
    "threads": ThreadsPeer,
}
