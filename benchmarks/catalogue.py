"""Which workloads there are, who runs them, and what their figures mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from benchmarks.scale import Scale

__all__ = ["TITLES", "Table", "Workload", "catalogue"]

TITLES: Final[Mapping[str, str]] = {
    "aioreap": "aioreap",
    "aioreap-uvloop": "aioreap on uvloop",
    "calls": "its system calls alone",
    "asyncio": "asyncio",
    "uvloop": "uvloop",
    "trio": "trio",
    "anyio": "anyio",
    "threads": "Popen in threads",
    "posix_spawn": "C posix_spawn",
    "go": "Go os/exec",
    "node": "node child_process",
    "read": "os.read()",
}
_LOOPS: Final = ("aioreap", "aioreap-uvloop", "asyncio", "uvloop")
_PYTHON: Final = (*_LOOPS, "trio", "anyio", "threads")
_ALL: Final = (*_PYTHON, "posix_spawn", "go", "node")


@dataclass(frozen=True)
class Table:
    """Figures of one unit: a column title for each name of a figure."""

    title: str
    unit: str
    columns: Mapping[str, str]


@dataclass(frozen=True)
class Workload:
    """What one process runs for one peer.

    Attributes:
        item: its letter.
        rounds: how often each peer runs it, in turns.
    """

    name: str
    item: str
    rounds: int
    peers: tuple[str, ...]
    tables: tuple[Table, ...]


def catalogue(scale: Scale) -> tuple[Workload, ...]:
    """All workloads, in their order."""
    most, many, some, few = (11, 5, 3, 2) if scale.name == "full" else (2, 1, 1, 1)
    levels = {f"{level}": f"{level} at a time" for level in scale.levels}
    heaps = {f"{size:g}": f"{size:g} GiB" for size in scale.heaps}
    heaps |= {f"{size:g}/user": f"{size:g} GiB, user=" for size in scale.heaps}
    counts = {count: f"{count:,} live" for count in scale.live}
    rate = {"rate": f"{scale.output} MiB"}
    return (
        Workload(
            "spawn",
            "a",
            many,
            (*_ALL, "calls"),
            (Table("spawn and wait, no pipes", "children/s", levels),),
        ),
        Workload(
            "spawn_libc",
            "a",
            some,
            ("aioreap", "asyncio", "posix_spawn", "go"),
            (Table("the same, of a static child with a C library", "children/s", levels),),
        ),
        Workload(
            "capture", "b", many, _ALL, (Table("stdout captured, 64 bytes", "children/s", levels),)
        ),
        Workload(
            "thread",
            "c",
            most,
            ("aioreap", "asyncio", "anyio", "threads", "calls"),
            (Table("the loop's thread held, per child", "µs", levels),),
        ),
        Workload(
            "lag",
            "c",
            some,
            _PYTHON,
            (
                Table(
                    f"lag of a 1 ms ticker while {max(scale.levels)} children are at work",
                    "ms",
                    {"p50": "p50", "p99": "p99", "max": "max"},
                ),
            ),
        ),
        Workload(
            "slow_exec",
            "d",
            some,
            _PYTHON,
            (
                Table(
                    f"longest hold of the loop by an exec of {scale.exec_seconds:g} s",
                    "ms",
                    {"max": "longest"},
                ),
            ),
        ),
        Workload(
            "heap", "e", few, _LOOPS, (Table("spawn and wait, by the parent's heap", "ms", heaps),)
        ),
        Workload(
            "live",
            "f",
            few,
            _LOOPS,
            (
                Table(
                    "memory in the parent, per live child",
                    "bytes",
                    {f"memory/{count}": title for count, title in list(counts.items())[1:]},
                ),
                Table(
                    "processor time of the idle parent",
                    "% of one",
                    {f"idle/{count}": title for count, title in counts.items()},
                ),
                Table(
                    "from a child's exit to the task that waits",
                    "µs",
                    {f"exit/{count}": title for count, title in counts.items()},
                ),
            ),
        ),
        Workload(
            "communicate",
            "g",
            many,
            (*_PYTHON, "read"),
            (Table("all output captured", "MiB/s", rate),),
        ),
        Workload("stream", "g", some, _PYTHON, (Table("output read in chunks", "MiB/s", rate),)),
        Workload(
            "round_trip",
            "g",
            some,
            _PYTHON,
            (Table("through cat and back", "MiB/s", {"rate": f"{scale.round_trip} MiB"}),),
        ),
        Workload(
            "lines",
            "g",
            some,
            (*_LOOPS, "threads"),
            (Table("lines of 64 bytes", "lines/s", {"rate": f"{scale.lines:,} lines"}),),
        ),
        Workload(
            "descriptors",
            "h",
            some,
            (*_LOOPS, "threads", "posix_spawn", "calls"),
            (
                Table(
                    "spawn and wait, 16 at a time, by the parent's open descriptors",
                    "µs per child",
                    {f"{count}": f"{count:,} open" for count in scale.descriptors},
                ),
            ),
        ),
        Workload(
            "import",
            "i",
            most,
            ("aioreap", "asyncio", "uvloop", "trio", "anyio"),
            (Table("import", "ms", {"time": "time"}),),
        ),
    )
