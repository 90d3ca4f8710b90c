"""What a program writes: captured, streamed, sent through, by lines."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Awaitable, Callable
from typing import Final

from benchmarks.peers import CHUNK, Peer
from benchmarks.programs import Programs
from benchmarks.rates import Figures
from benchmarks.scale import Scale

__all__ = ["communicate", "lines", "read", "round_trip", "stream"]

_MIB: Final = 2**20


def _rate(peer: Peer, programs: Programs, amount: int, work: Callable[[], Awaitable[int]]) -> float:
    """How much ``work()`` brings in a second; all of it has to be `amount`."""

    async def main() -> float:
        await peer.spawn(programs.true)
        begin = time.perf_counter()
        got = await work()
        seconds = time.perf_counter() - begin
        if got != amount:
            raise RuntimeError(f"{got} came of {amount}")
        return got / seconds

    return peer.run(main)


def communicate(peer: Peer, programs: Programs, scale: Scale) -> Figures:
    """MiB per second, all of a program's output captured."""
    size = scale.output * _MIB
    rate = _rate(peer, programs, size, lambda: peer.collect(*programs.writer(size)))
    return {"rate": rate / _MIB}


def stream(peer: Peer, programs: Programs, scale: Scale) -> Figures:
    """MiB per second, a program's output read in chunks."""
    size = scale.output * _MIB
    rate = _rate(peer, programs, size, lambda: peer.stream(*programs.writer(size)))
    return {"rate": rate / _MIB}


def round_trip(peer: Peer, programs: Programs, scale: Scale) -> Figures:
    """MiB per second, sent through cat and captured."""
    given = bytes(scale.round_trip * _MIB)
    rate = _rate(peer, programs, len(given), lambda: peer.collect("cat", given=given))
    return {"rate": rate / _MIB}


def lines(peer: Peer, programs: Programs, scale: Scale) -> Figures:
    """Lines per second."""
    count = scale.lines
    return {"rate": _rate(peer, programs, count, lambda: peer.lines(*programs.lines(count)))}


def read(programs: Programs, scale: Scale) -> Figures:
    """MiB per second, read by a loop of os.read() and thrown away: what a pipe can bring."""
    size = 0
    with subprocess.Popen(programs.writer(scale.output * _MIB), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        begin = time.perf_counter()
        while chunk := os.read(process.stdout.fileno(), CHUNK):
            size += len(chunk)
        seconds = time.perf_counter() - begin
    if size != scale.output * _MIB:
        raise RuntimeError(f"{size} bytes came")
    return {"rate": scale.output / seconds}
