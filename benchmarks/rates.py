"""How fast something goes, so many at a time."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from benchmarks.peers import Peer

__all__ = ["Figures", "UnavailableError", "rate"]

Figures = dict[str, float]


class UnavailableError(Exception):
    """This machine cannot run the workload, and why."""


async def rate(
    peer: Peer, level: int, seconds: float, once: Callable[[], Awaitable[object]]
) -> float:
    """How many of ``once()`` come to their end in a second, so many at a time."""

    async def measure(length: float) -> float:
        done = 0
        begin = time.perf_counter()

        async def work() -> None:
            nonlocal done
            while True:
                await once()
                done += 1
                if time.perf_counter() - begin >= length:
                    return

        await peer.each(level, work)
        return done / (time.perf_counter() - begin)

    await measure(seconds / 10)
    return await measure(seconds)
