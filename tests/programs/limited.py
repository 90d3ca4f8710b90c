"""Reads from `yes` up to a limit, and prints by how many MiB the peak of memory has grown."""

import asyncio
import re
import sys
from pathlib import Path

import uvloop

import aioreap

LIMIT = 10_000_000


def peak() -> int:
    """The most memory that this process has had so far, in KiB."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


async def main() -> None:
    await aioreap.run_process(["true"], capture_output=True)
    before = peak()
    try:
        await aioreap.run_process(["yes"], capture_output=True, output_limit=LIMIT)
    except aioreap.OutputLimitExceeded as error:
        grown = (peak() - before) // 1024
        print(grown, error.stdout == b"y\n" * (LIMIT // 2))


factory = uvloop.new_event_loop if sys.argv[1] == "uvloop" else asyncio.SelectorEventLoop
with asyncio.Runner(loop_factory=factory) as runner:
    runner.run(main())
