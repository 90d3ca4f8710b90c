"""What it costs a parent to be big: its heap, its live children, its open descriptors."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import mmap
import os
import resource
import signal
import statistics
import struct
import time
from pathlib import Path
from typing import Any, Final

from benchmarks.peers import AsyncioPeer, Peer, check
from benchmarks.programs import Programs
from benchmarks.rates import Figures, UnavailableError, rate
from benchmarks.scale import Scale

__all__ = ["descriptors", "heap", "live"]

_GIB: Final = 2**30
_PAGE: Final = 4096
_AT_ONCE: Final = 16
# Of children that stay: how many are started at once, how many tell how long all of them will
# take, and how many seconds that may be.
_STARTS_AT_ONCE: Final = 64
_STARTS_THAT_TELL: Final = 256
_START_PATIENCE: Final = 25
_PATIENCE: Final = 0.005  # seconds in which a task comes to wait
_TIMESPEC: Final = struct.Struct("@ll")


def _grow_heap(gibibytes: float) -> mmap.mmap | None:
    size = int(gibibytes * _GIB)
    if not size:
        return None
    memory = dict(line.split()[:2] for line in Path("/proc/meminfo").read_text().splitlines())
    if int(memory["MemAvailable:"]) * 1024 < 1.5 * size:
        raise UnavailableError(f"{gibibytes:g} GiB of heap: there is not enough memory free")
    heap = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    heap.madvise(mmap.MADV_NOHUGEPAGE)
    heap[::_PAGE] = bytes([1]) * (size // _PAGE)
    return heap


def heap(peer: AsyncioPeer, programs: Programs, scale: Scale) -> Figures:
    """Milliseconds per child, one at a time, by the size of the parent's heap."""

    async def milliseconds(**options: Any) -> float:
        async def once() -> None:
            process = await peer.create(programs.true, **options)
            check(await process.wait())

        return 1000 / await rate(peer, 1, scale.seconds, once)

    async def main() -> Figures:
        found = {}
        kept = []
        before = 0.0
        for size in scale.heaps:
            kept.append(_grow_heap(size - before))
            before = size
            found[f"{size:g}"] = await milliseconds()
            with contextlib.suppress(ValueError):  # uvloop has no user=
                found[f"{size:g}/user"] = await milliseconds(user=os.geteuid())
        return found

    return peer.run(main)


def _private_bytes() -> int:
    gc.collect()
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    kibibytes = [int(line.split()[1]) for line in lines if line.startswith("Private_")]
    return sum(kibibytes) * 1024


def _allow_descriptors(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 1000
    if soft >= wanted:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, max(hard, wanted)))
    except ValueError as error:
        raise UnavailableError(f"{wanted} descriptors: the hard limit is {hard}") from error


class _Children:
    """Children that live, of one peer, until they are killed."""

    def __init__(self, peer: AsyncioPeer, programs: Programs) -> None:
        self._peer = peer
        self._programs = programs
        self._processes: list[Any] = []
        self._reports, self._stdout = os.pipe()

    async def grow(self, count: int) -> bool:
        """Have `count` of them; False if that would take too long."""
        begin, before = time.perf_counter(), len(self._processes)
        await self._start(min(count, before + _STARTS_THAT_TELL))
        pace = (time.perf_counter() - begin) / (len(self._processes) - before)
        if pace * (count - len(self._processes)) > _START_PATIENCE:
            return False
        await self._start(count)
        return True

    async def _start(self, count: int) -> None:
        while (missing := count - len(self._processes)) > 0:
            starting = (
                self._peer.create(*self._programs.sleeper)
                for _ in range(min(_STARTS_AT_ONCE, missing))
            )
            self._processes += await asyncio.gather(*starting)

    async def exit_to_task(self) -> float:
        """Microseconds from the exit of one more child to the task that waits for it."""
        process = await self._peer.create(*self._programs.reporter, stdout=self._stdout)
        os.read(self._reports, 1)
        waiting = asyncio.ensure_future(process.wait())
        await asyncio.sleep(_PATIENCE)
        process.send_signal(signal.SIGUSR1)
        check(await waiting)
        end = time.monotonic_ns()
        seconds, nanoseconds = _TIMESPEC.unpack(os.read(self._reports, _TIMESPEC.size))
        return float(end - seconds * 10**9 - nanoseconds) / 1000

    async def end(self) -> None:
        """Kill them and wait for each."""
        for process in self._processes:
            process.kill()
        await asyncio.gather(*(process.wait() for process in self._processes))


async def _idle_percent(seconds: float) -> float:
    await asyncio.sleep(seconds / 10)
    begin, wall = time.process_time(), time.perf_counter()
    await asyncio.sleep(seconds)
    return 100 * (time.process_time() - begin) / (time.perf_counter() - wall)


def live(peer: AsyncioPeer, programs: Programs, scale: Scale) -> Figures:
    """What children cost that live; the higher numbers are left out where starting takes too long.

    Bytes of the parent for each, its processor time while idle, in percent of one processor, and
    the microseconds from one child's exit to the task that waits for it.
    """
    _allow_descriptors(max(scale.live))

    async def main() -> Figures:
        found: Figures = {}
        children = _Children(peer, programs)
        least = scale.live[0]
        first = 0
        try:
            for count in scale.live:
                if not await children.grow(count):
                    break
                private = _private_bytes()
                if count == least:
                    first = private
                else:
                    found[f"memory/{count}"] = (private - first) / (count - least)
                found[f"idle/{count}"] = await _idle_percent(scale.lag_seconds)
                latencies = [await children.exit_to_task() for _ in range(scale.exits)]
                found[f"exit/{count}"] = statistics.median(latencies)
        finally:
            await children.end()
        return found

    try:
        return peer.run(main)
    except BlockingIOError as error:
        raise UnavailableError(f"{max(scale.live)} children: {error}") from error


def descriptors(peer: Peer, programs: Programs, scale: Scale) -> Figures:
    """Microseconds per child, 16 at a time, by the number of descriptors the parent has open."""
    _allow_descriptors(max(scale.descriptors))

    async def main() -> Figures:
        found = {}
        for count in scale.descriptors:
            while len(os.listdir("/proc/self/fd")) - 1 < count:
                for _ in range(count - len(os.listdir("/proc/self/fd")) + 1):
                    os.open("/dev/null", os.O_RDONLY)
            once = functools.partial(peer.spawn, programs.true)
            found[f"{count}"] = 1e6 / await rate(peer, _AT_ONCE, scale.seconds, once)
        return found

    return peer.run(main)
