"""``python -m benchmarks.run``: every peer, in turns, and a report of it."""

from __future__ import annotations

import argparse
import compileall
import dataclasses
import datetime as dt
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import aioreap
from benchmarks.catalogue import TITLES, Workload, catalogue
from benchmarks.programs import PROGRAMS, build, build_peers
from benchmarks.report import report
from benchmarks.scale import SCALES, Scale

_RESULTS: Final = Path(__file__).parent / "results"
_TIME_LIMIT: Final = 120  # seconds, for one process
_IMPORT: Final = """\
import sys, time
begin = time.perf_counter()
__import__(sys.argv[1])
print('{"time": %f}' % ((time.perf_counter() - begin) * 1000))
"""

# By workload, what the peers outside Python do, and their child.
_OUTSIDE: Final = {
    "spawn": ("spawn", PROGRAMS.true),
    "spawn_libc": ("spawn", PROGRAMS.libc_true),
    "capture": ("capture", PROGRAMS.line),
    "descriptors": ("descriptors", PROGRAMS.true),
}
# By workload, peer and name of the figure, what each round brought.
_Rounds = dict[str, dict[str, dict[str, list[float]]]]


class _FailedError(Exception):
    """A peer did not measure, and why."""


class Run:
    """One run: every peer has its turn in each round of each workload.

    Attributes:
        rounds: what came of it.
        unavailable: why something was not measured.
        outside: the commands of the peers that are not in Python.
    """

    def __init__(self, scale: Scale) -> None:
        self.rounds: _Rounds = {}
        self.unavailable: dict[str, str] = {}
        self._scale = scale
        self.outside, absent = build_peers()
        self._absent = set(absent)
        self.unavailable.update({TITLES[peer]: reason for peer, reason in absent.items()})

    def measure(self, workload: Workload) -> None:
        """Run the rounds of one workload."""
        for number in range(workload.rounds):
            _say(f"({workload.item}) {workload.name}, round {number + 1} of {workload.rounds}")
            for peer in workload.peers:
                what = f"({workload.item}) {workload.name}, {TITLES[peer]}"
                if peer in self._absent or what in self.unavailable:
                    continue
                try:
                    figures = _figures(self._command(peer, workload))
                except _FailedError as error:
                    self.unavailable[what] = str(error)
                    continue
                brought = self.rounds.setdefault(workload.name, {}).setdefault(peer, {})
                for name, value in figures.items():
                    brought.setdefault(name, []).append(value)

    def _command(self, peer: str, workload: Workload) -> list[str]:
        if workload.name == "import":
            return [sys.executable, "-c", _IMPORT, peer]
        if peer not in self.outside:
            module = [sys.executable, "-m", "benchmarks.measure"]
            return [*module, peer, workload.name, self._scale.name]
        mode, child = _OUTSIDE[workload.name]
        scale = self._scale
        numbers = scale.descriptors if mode == "descriptors" else scale.levels
        return [*self.outside[peer], mode, f"{scale.seconds}", ",".join(map(str, numbers)), child]


def _figures(command: list[str]) -> dict[str, float]:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIME_LIMIT,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise _FailedError(f"not over after {_TIME_LIMIT} s") from error
    if done.returncode:
        raise _FailedError((done.stderr.splitlines() or [f"exit status {done.returncode}"])[-1])
    figures: dict[str, Any] = json.loads(done.stdout)
    if "unavailable" in figures:
        raise _FailedError(figures["unavailable"])
    return figures


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def _first_line(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]


def _versions(outside: Iterable[str]) -> dict[str, str]:
    found = {"Python": platform.python_version()}
    found |= {name: metadata.version(name) for name in ("aioreap", "uvloop", "trio", "anyio")}
    found["C library"] = " ".join(platform.libc_ver())
    if "go" in outside:
        found["Go"] = _first_line("go", "version").split()[2].removeprefix("go")
    if "node" in outside:
        found["node"] = _first_line("node", "--version").removeprefix("v")
    return found


def _of_proc(file: str, field: str) -> str:
    for line in Path("/proc", file).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return "unknown"


def _load() -> float:
    return round(os.getloadavg()[0], 2)


def _machine() -> dict[str, Any]:
    return {
        "kernel": os.uname().release,
        "architecture": os.uname().machine,
        "processors": len(os.sched_getaffinity(0)),
        "model": _of_proc("cpuinfo", "model name"),
        "memory_gib": round(int(_of_proc("meminfo", "MemTotal").split()[0]) / 2**20),
        "load_before": _load(),
    }


def main() -> None:
    """Run, print the report, and write results/latest.json, or results/quick.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--scale", choices=SCALES, default="full", help="how much of everything")
    parser.add_argument("--json", action="store_true", help="print the results, and write no file")
    parser.add_argument("workload", nargs="*", help="only these, and no file")
    options = parser.parse_args()
    scale = SCALES[options.scale]
    build()
    # As an installer does: where Python may write none, each import would compile ours anew.
    compileall.compile_dir(Path(aioreap.__file__).parent, quiet=1)
    run = Run(scale)
    machine, found = _machine(), aioreap.backend()
    begin = time.monotonic()
    for workload in catalogue(scale):
        if not options.workload or workload.name in options.workload:
            run.measure(workload)
    results = {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "seconds": round(time.monotonic() - begin, 1),
        "scale": dataclasses.asdict(scale),
        "machine": machine | {"load_after": _load()},
        "versions": _versions(run.outside),
        "backend": {"name": found.name, "reason": found.reason},
        "unavailable": run.unavailable,
        "rounds": run.rounds,
    }
    if options.json:
        print(json.dumps(results, indent=1, ensure_ascii=False))
        return
    print(report(results))
    if not options.workload:
        _RESULTS.mkdir(exist_ok=True)
        file = _RESULTS / f"{'latest' if scale.name == 'full' else scale.name}.json"
        file.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        _say(f"written to {file.relative_to(Path.cwd())}")


if __name__ == "__main__":
    main()
