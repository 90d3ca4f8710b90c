"""How much of everything is measured: in a full run, a quick one, and on an emulated machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["SCALES", "Scale"]


@dataclass(frozen=True)
class Scale:
    """The sizes of the workloads of one run.

    Attributes:
        seconds: how long one rate is measured.
        lag_seconds: how long the ticker ticks.
        levels: how many children are at work at a time.
        exec_seconds: how long the slow exec takes.
        heaps: of the parent, in GiB.
        live: how many children live.
        exits: how many of these exits are timed at each number of live children.
        output: what is captured and streamed, in MiB.
        round_trip: what is sent through cat, in MiB.
        lines: how many lines of 64 bytes.
        descriptors: how many the parent has open.
    """

    name: str
    seconds: float
    lag_seconds: float
    levels: tuple[int, ...]
    exec_seconds: float
    heaps: tuple[float, ...]
    live: tuple[int, ...]
    exits: int
    output: int
    round_trip: int
    lines: int
    descriptors: tuple[int, ...]


_FULL: Final = Scale(
    name="full",
    seconds=0.25,
    lag_seconds=1.0,
    levels=(1, 16, 64),
    exec_seconds=1.0,
    heaps=(0, 1, 4),
    live=(10, 1_000, 10_000),
    exits=60,
    output=512,
    round_trip=256,
    lines=500_000,
    descriptors=(10, 10_000),
)
_QUICK: Final = Scale(
    name="quick",
    seconds=0.1,
    lag_seconds=0.2,
    levels=(1, 16, 64),
    exec_seconds=0.2,
    heaps=(0, 0.25),
    live=(10, 500),
    exits=20,
    output=32,
    round_trip=16,
    lines=50_000,
    descriptors=(10, 2_000),
)
# Where a child takes 50 to 90 ms.
_EMULATED: Final = Scale(
    name="emulated",
    seconds=3.0,
    lag_seconds=3.0,
    levels=(1, 16, 64),
    exec_seconds=1.0,
    heaps=(0, 0.25),
    live=(10, 200),
    exits=10,
    output=16,
    round_trip=8,
    lines=10_000,
    descriptors=(10, 2_000),
)
SCALES: Final = {scale.name: scale for scale in (_FULL, _QUICK, _EMULATED)}
