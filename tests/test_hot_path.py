"""One warm spawn does not grow unnoticed: its calls, instructions and memory are counted.

No clock is read, so that a busy machine changes nothing. Whoever makes the way
shorter lowers the numbers here: from more than a tenth below on, they guard nothing.
What C does by itself is not seen; its system calls are what test_syscalls.py counts.
"""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import statistics
import sys
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from types import FrameType
from typing import Any, Final, TypeVar

import pytest

import aioreap
from aioreap import launch
from aioreap.reader import OutputReader

# By Python's version: the calls of a spawn and its communicate(), without and with three pipes ...
_CALLS: Final = {(3, 11): (143, 738), (3, 12): (137, 725), (3, 13): (137, 719)}
# ... its instructions in our own code ...
_INSTRUCTIONS: Final = {(3, 11): (1946, 4975), (3, 12): (1788, 4479), (3, 13): (1791, 4600)}
# ... and the blocks of memory that a child without pipes holds while it lives.
_BLOCKS: Final = {(3, 11): 13, (3, 12): 13, (3, 13): 10}
# The calls for a line that is there already.
_LINE_CALLS: Final = {"readline": 4, "async for": 5, "lines": 4}
_VERSION: Final = sys.version_info[:2]
_SLACK: Final = 0.1
_SPAWNS: Final = 40
_PACKAGE: Final = str(Path(aioreap.__file__).parent)
_T = TypeVar("_T")

pytestmark = [
    pytest.mark.clone_backends,
    pytest.mark.skipif(_VERSION not in _CALLS, reason="nobody has counted on this Python"),
]


@pytest.fixture(autouse=True)
def _pidfd_alone_and_no_clock(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend != "pidfd":
        pytest.skip("every kernel has pidfd, and it makes one call more than autoreap")
    monkeypatch.setattr(launch, "TURN_BUDGET_NS", 10**18)


class Calls:
    """Counts the calls, of Python and of C, that are made in the loop's callbacks.

    What a turn of the loop takes is left out: how many turns there are is up to the kernel.
    """

    start = staticmethod(sys.setprofile)

    def __init__(self) -> None:
        self.count = 0
        self._is_in_callback = True
        self._callback = asyncio.Handle._run.__code__

    def __call__(self, frame: FrameType, event: str, _argument: object) -> None:
        if frame.f_code is self._callback and event in {"call", "return"}:
            self._is_in_callback = event == "call"
        elif self._is_in_callback and event in {"call", "c_call"}:
            self.count += 1


class Instructions:
    """Counts what is executed of our package's code."""

    start = staticmethod(sys.settrace)

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, frame: FrameType, event: str, _argument: object) -> Instructions | None:
        if not frame.f_code.co_filename.startswith(_PACKAGE):
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        self.count += event == "opcode"
        return self


def run(main: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
    with asyncio.Runner(debug=False, loop_factory=asyncio.SelectorEventLoop) as runner:
        return runner.run(main())


def counts(counter: type[Calls | Instructions], kind: int) -> list[int]:
    """What is counted of each of many spawns, without pipes or with three of them."""
    program = shutil.which("cat")
    assert program is not None
    stdio = aioreap.PIPE if kind else None

    async def count_of_one() -> int:
        # It ends when it is told to: in which turns what happens is not up to the machine.
        stdin, release = os.pipe()
        counted = counter()
        counter.start(counted)
        try:
            process = await aioreap.create_subprocess_exec(
                program, stdin=stdio or stdin, stdout=stdio, stderr=stdio
            )
            os.close(release)
            await process.communicate()
        finally:
            counter.start(None)
        os.close(stdin)
        return counted.count

    async def main() -> list[int]:
        return [await count_of_one() for _ in range(_SPAWNS)]

    return run(main)


@pytest.mark.parametrize("kind", [0, 1], ids=["no pipes", "three pipes"])
def test_a_spawn_makes_no_more_calls_than_it_did(kind: int) -> None:
    # The fewest: a child that is late is asked for again.
    assert min(counts(Calls, kind)) == pytest.approx(_CALLS[_VERSION][kind], rel=_SLACK)


@pytest.mark.parametrize("kind", [0, 1], ids=["no pipes", "three pipes"])
def test_a_spawn_executes_no_more_instructions_than_it_did(kind: int) -> None:
    # Not the fewest: of the first ones Python 3.13 does not tell all.
    count = statistics.median_low(counts(Instructions, kind))
    assert count == pytest.approx(_INSTRUCTIONS[_VERSION][kind], rel=_SLACK)


@pytest.mark.parametrize("way", _LINE_CALLS)
def test_a_line_makes_no_more_calls_than_it_did(way: str) -> None:
    async def main() -> float:
        reader = OutputReader()
        reader.feed_data(b"line\n" * _SPAWNS)
        read: dict[str, Callable[[], Awaitable[bytes]]] = {
            "readline": reader.readline,
            "async for": aiter(reader).__anext__,
            "lines": aiter(aioreap.lines(reader)).__anext__,
        }
        calls = Calls()
        calls.start(calls)
        try:
            for _ in range(_SPAWNS):
                await read[way]()
        finally:
            calls.start(None)
        return calls.count / _SPAWNS

    assert run(main) == pytest.approx(_LINE_CALLS[way], rel=_SLACK)


def test_a_live_child_holds_no_more_memory_than_it_did() -> None:
    stdin, release = os.pipe()

    async def main() -> float:
        processes = []

        async def blocks_of_each() -> float:
            gc.collect()
            before = sys.getallocatedblocks()
            started = [
                await aioreap.create_subprocess_exec("cat", stdin=stdin) for _ in range(_SPAWNS)
            ]
            gc.collect()
            blocks = sys.getallocatedblocks() - before
            processes.extend(started)
            return blocks / _SPAWNS

        await blocks_of_each()
        blocks = await blocks_of_each()
        os.close(release)
        for process in processes:
            await process.wait()
        return blocks

    blocks = run(main)
    os.close(stdin)
    assert blocks == pytest.approx(_BLOCKS[_VERSION], rel=_SLACK)
