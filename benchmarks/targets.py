"""What aioreap wants to be beside its peers: the one table of targets."""

from __future__ import annotations

import operator
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from benchmarks.scale import Scale

__all__ = ["Figure", "Rounds", "Target", "targets"]

# By workload, peer and name of the figure: what each round brought.
Rounds = Mapping[str, Mapping[str, Mapping[str, list[float]]]]


@dataclass(frozen=True)
class Figure:
    """One figure of one peer."""

    workload: str
    name: str
    peer: str = "aioreap"

    def of(self, rounds: Rounds) -> list[float]:
        """What each round brought; nothing where it was not measured."""
        return rounds.get(self.workload, {}).get(self.peer, {}).get(self.name, [])


_SIGNS: Final = {"≥": operator.ge, "≤": operator.le}
_RELATIONS: Final = {"×": operator.truediv, "+": operator.sub}


@dataclass(frozen=True)
class Target:
    """`figure`, against another one if there is one, has to be `sign` `bound`.

    Attributes:
        relation: × for a ratio, + for a difference.
        unit: of the bound; a ratio has none.
    """

    item: str
    what: str
    figure: Figure
    sign: str
    bound: float
    against: Figure | None = None
    relation: str = "×"
    unit: str = ""

    def values(self, rounds: Rounds) -> list[float]:
        """The ratio, difference or figure itself, of each round."""
        if self.against is None:
            return self.figure.of(rounds)
        relate = _RELATIONS[self.relation]
        pairs = zip(self.figure.of(rounds), self.against.of(rounds), strict=False)
        return [relate(figure, against) for figure, against in pairs]

    def is_met(self, values: list[float]) -> bool:
        """Whether the median of the rounds keeps the bound."""
        return bool(_SIGNS[self.sign](statistics.median(values), self.bound))


def _rates(workload: str, level: int, bounds: Mapping[str, float], what: str) -> list[Target]:
    item = {"spawn": "a", "capture": "b"}[workload]
    figure = Figure(workload, f"{level}")
    return [
        Target(item, what.format(peer), figure, "≥", bound, Figure(workload, f"{level}", peer))
        for peer, bound in bounds.items()
    ]


def targets(scale: Scale) -> list[Target]:
    """The targets, for the sizes of a run; they are meant for those of the full one."""
    busy, most = 16, max(scale.levels)
    heap = f"{max(scale.heaps):g}"
    low, high = min(scale.live), max(scale.live)
    few, many = min(scale.descriptors), max(scale.descriptors)
    return [
        *_rates(
            "spawn",
            busy,
            {"posix_spawn": 1.1, "asyncio": 1.4, "go": 1.3, "node": 2, "uvloop": 4},
            f"children per second, {busy} at a time: {{}}",
        ),
        Target(
            "a",
            "latency, one at a time: asyncio",
            Figure("spawn", "1", "asyncio"),
            "≤",
            0.85,
            Figure("spawn", "1"),
        ),
        *_rates("capture", busy, {"asyncio": 1.5}, f"stdout captured, {busy} at a time: {{}}"),
        Target(
            "c",
            f"the loop's thread held per child, {busy} at a time: asyncio",
            Figure("thread", f"{busy}"),
            "≤",
            0.35,
            Figure("thread", f"{busy}", "asyncio"),
        ),
        Target(
            "c",
            f"lag p50, {most} at a time: asyncio",
            Figure("lag", "p50"),
            "≤",
            0.1,
            Figure("lag", "p50", "asyncio"),
        ),
        Target(
            "d",
            f"longest hold of the loop, exec of {scale.exec_seconds:g} s",
            Figure("slow_exec", "max"),
            "≤",
            5,
            unit="ms",
        ),
        Target(
            "e",
            f"latency with {heap} GiB of heap: that with none",
            Figure("heap", heap),
            "≤",
            1.15,
            Figure("heap", "0"),
        ),
        Target(
            "e",
            f"latency with {heap} GiB of heap: uvloop",
            Figure("heap", heap),
            "≤",
            1 / 50,
            Figure("heap", heap, "uvloop"),
        ),
        Target(
            "f",
            f"memory per live child, {high:,} of them: asyncio",
            Figure("live", f"memory/{high}"),
            "≤",
            1,
            Figure("live", f"memory/{high}", "asyncio"),
        ),
        Target(
            "f",
            f"exit to task with {high:,} children: with {low}",
            Figure("live", f"exit/{high}"),
            "≤",
            1.5,
            Figure("live", f"exit/{low}"),
        ),
        Target(
            "f",
            f"processor time while {high:,} children are idle: while {low} are",
            Figure("live", f"idle/{high}"),
            "≤",
            0.05,
            Figure("live", f"idle/{low}"),
            relation="+",
            unit="% of one",
        ),
        Target(
            "g",
            f"communicate(), {scale.output} MiB: asyncio",
            Figure("communicate", "rate"),
            "≥",
            3.5,
            Figure("communicate", "rate", "asyncio"),
        ),
        Target(
            "g",
            f"communicate(), {scale.output} MiB: a loop of os.read()",
            Figure("communicate", "rate"),
            "≥",
            0.65,
            Figure("communicate", "rate", "read"),
        ),
        Target(
            "g",
            f"streaming {scale.output} MiB: asyncio",
            Figure("stream", "rate"),
            "≥",
            1,
            Figure("stream", "rate", "asyncio"),
        ),
        Target(
            "g",
            f"{scale.round_trip} MiB through cat: asyncio",
            Figure("round_trip", "rate"),
            "≥",
            2,
            Figure("round_trip", "rate", "asyncio"),
        ),
        Target(
            "h",
            f"time per child with {many:,} open descriptors: with {few}",
            Figure("descriptors", f"{many}"),
            "≤",
            1.5,
            Figure("descriptors", f"{few}"),
        ),
        Target(
            "i",
            "import: asyncio",
            Figure("import", "time"),
            "≤",
            15,
            Figure("import", "time", "asyncio"),
            relation="+",
            unit="ms",
        ),
    ]
