"""``python -m benchmarks.measure PEER WORKLOAD SCALE``: one line of JSON, from a fresh process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, Final

from benchmarks import output, parents, spawning
from benchmarks.calls import CallsPeer
from benchmarks.peers import PEERS, Peer
from benchmarks.programs import PROGRAMS, Programs
from benchmarks.rates import Figures, UnavailableError
from benchmarks.scale import SCALES, Scale

_WORKLOADS: Final[dict[str, Callable[[Any, Programs, Scale], Figures]]] = {
    "spawn": spawning.spawn,
    "spawn_libc": spawning.spawn_libc,
    "capture": spawning.capture,
    "thread": spawning.thread,
    "lag": spawning.lag,
    "slow_exec": spawning.slow_exec,
    "heap": parents.heap,
    "live": parents.live,
    "communicate": output.communicate,
    "stream": output.stream,
    "round_trip": output.round_trip,
    "lines": output.lines,
    "descriptors": parents.descriptors,
}
_PEERS: Final[dict[str, Callable[[], Peer]]] = {**PEERS, "calls": CallsPeer}


def main(peer: str, workload: str, scale: str) -> None:
    """Measure, and print the figures by name, or why there are none."""
    try:
        if peer == "read":
            found = output.read(PROGRAMS, SCALES[scale])
        else:
            found = _WORKLOADS[workload](_PEERS[peer](), PROGRAMS, SCALES[scale])
    except UnavailableError as error:
        print(json.dumps({"unavailable": str(error)}))
    else:
        print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
