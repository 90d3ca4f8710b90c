"""What it takes to start programs and to wait for them, and how it holds the loop."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from benchmarks.held import held
from benchmarks.peers import Peer
from benchmarks.programs import Programs
from benchmarks.rates import Figures, UnavailableError, rate
from benchmarks.scale import Scale

__all__ = ["capture", "lag", "slow_exec", "spawn", "spawn_libc", "thread"]

_TICK: Final = 0.001  # seconds


def _spawn(peer: Peer, program: str, scale: Scale) -> Figures:
    async def main() -> Figures:
        return {
            f"{level}": await rate(peer, level, scale.seconds, lambda: peer.spawn(program))
            for level in scale.levels
        }

    return peer.run(main)


def spawn(peer: Peer, programs: Programs, scale: Scale) -> Figures:
    """Children per second, without pipes."""
    return _spawn(peer, programs.true, scale)


def spawn_libc(peer: Peer, programs: Programs, scale: Scale) -> Figures:
    """The same, of children with a C library."""
    return _spawn(peer, programs.libc_true, scale)


def capture(peer: Peer, programs: Programs, scale: Scale) -> Figures:
    """Children per second, each with a line captured from its stdout."""

    async def main() -> Figures:
        return {
            f"{level}": await rate(peer, level, scale.seconds, lambda: peer.collect(programs.line))
            for level in scale.levels
        }

    return peer.run(main)


def thread(peer: Peer, programs: Programs, scale: Scale) -> Figures:
    """Microseconds that one child's callbacks hold the thread of asyncio's loop."""
    held_ns = 0
    run = asyncio.Handle._run

    def timed(handle: asyncio.Handle) -> None:
        nonlocal held_ns
        begin = time.perf_counter_ns()
        run(handle)
        held_ns += time.perf_counter_ns() - begin

    async def main() -> Figures:
        nonlocal held_ns
        found = {}
        for level in scale.levels:
            count = 0

            async def once() -> None:
                nonlocal count
                await peer.spawn(programs.true)
                count += 1

            await peer.spawn(programs.true)
            held_ns = 0
            await rate(peer, level, scale.seconds, once)
            found[f"{level}"] = held_ns / 1000 / count
        return found

    asyncio.Handle._run = timed  # type: ignore[method-assign, assignment]
    return peer.run(main)


async def _lags(peer: Peer, is_over: Callable[[], bool]) -> list[float]:
    """How late each tick came, in milliseconds."""
    lags = []
    while not is_over():
        begin = time.perf_counter()
        await peer.sleep(_TICK)
        lags.append(max(time.perf_counter() - begin - _TICK, 0) * 1000)
    return lags


def lag(peer: Peer, programs: Programs, scale: Scale) -> Figures:
    """How late a ticker of 1 ms is while children are started and awaited, in milliseconds."""

    async def main() -> Figures:
        await peer.spawn(programs.true)
        end = time.perf_counter() + scale.lag_seconds
        lags: list[float] = []
        roles = itertools.count()

        async def work() -> None:
            if next(roles) == 0:
                lags.extend(await _lags(peer, lambda: time.perf_counter() >= end))
            else:
                while time.perf_counter() < end:
                    await peer.spawn(programs.true)

        await peer.each(1 + max(scale.levels), work)
        *_, p99 = statistics.quantiles(lags, n=100, method="inclusive")
        return {"p50": statistics.median(lags), "p99": p99, "max": max(lags)}

    return peer.run(main)


def slow_exec(peer: Peer, programs: Programs, scale: Scale) -> Figures:
    """The longest time that the loop stands still while an exec takes long, in milliseconds."""

    async def main(program: str) -> Figures:
        await peer.spawn(programs.true)
        lags: list[float] = []
        begin = time.perf_counter()
        ended = 0.0
        roles = itertools.count()

        async def work() -> None:
            nonlocal ended
            if next(roles) == 0:
                lags.extend(await _lags(peer, lambda: ended > 0))
            else:
                await peer.spawn(program)
                ended = time.perf_counter()

        await peer.each(2, work)
        if ended - begin < scale.exec_seconds:
            raise UnavailableError("the exec was not held by the lease on its file")
        return {"max": max(lags)}

    with tempfile.TemporaryDirectory() as folder:
        try:
            slow = held(programs.true, Path(folder), scale.exec_seconds)
            with slow as program:
                return peer.run(lambda: main(program))
        except OSError as error:
            raise UnavailableError(str(error)) from error
