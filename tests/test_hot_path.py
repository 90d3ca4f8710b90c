"""The way of one warm spawn does not grow unnoticed: its calls and its memory are counted.

No clock is read, so that a busy machine changes nothing. Whoever makes the way
shorter lowers the numbers here: from more than a tenth below on, they guard nothing.
"""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import sys
from collections.abc import Awaitable, Callable, Coroutine
from types import FrameType
from typing import Any, Final

import pytest

import aioreap
from aioreap import launch
from aioreap.reader import OutputReader

# By Python's version: the calls of a spawn and its communicate(), without and with three pipes ...
_CALLS: Final = {(3, 11): (143, 738), (3, 12): (137, 725), (3, 13): (137, 719)}
# ... and the blocks of memory that a child without pipes holds while it lives.
_BLOCKS: Final = {(3, 11): 13, (3, 12): 13, (3, 13): 10}
# The calls for a line that is there already.
_LINE_CALLS: Final = {"readline": 4, "async for": 5, "lines": 4}
_VERSION: Final = sys.version_info[:2]
_SLACK: Final = 0.1
_SPAWNS: Final = 40

pytestmark = [
    pytest.mark.clone_backends,
    pytest.mark.skipif(_VERSION not in _CALLS, reason="nobody has counted on this Python"),
]


@pytest.fixture(autouse=True)
def _pidfd_alone_and_no_clock(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend != "pidfd":
        pytest.skip("every kernel has pidfd, and it makes one call more than autoreap")
    monkeypatch.setattr(launch, "TURN_BUDGET_NS", 10**18)


class Profile:
    """Counts the calls, of Python and of C, that are made in the loop's callbacks.

    What a turn of the loop takes is left out: how many turns there are is up to the kernel.
    """

    def __init__(self) -> None:
        self.calls = 0
        self._is_in_callback = True
        self._callback = asyncio.Handle._run.__code__

    def __call__(self, frame: FrameType, event: str, _argument: object) -> None:
        if frame.f_code is self._callback and event in {"call", "return"}:
            self._is_in_callback = event == "call"
        elif self._is_in_callback and event in {"call", "c_call"}:
            self.calls += 1


def run(main: Callable[[], Coroutine[Any, Any, float]]) -> float:
    with asyncio.Runner(debug=False, loop_factory=asyncio.SelectorEventLoop) as runner:
        return runner.run(main())


@pytest.mark.parametrize("kind", [0, 1], ids=["no pipes", "three pipes"])
def test_a_spawn_makes_no_more_calls_than_it_did(kind: int) -> None:
    program = shutil.which("cat")
    assert program is not None
    stdio = aioreap.PIPE if kind else None

    async def calls_of_one() -> int:
        # It ends when it is told to: in which turns what happens is not up to the machine.
        stdin, release = os.pipe()
        profile = Profile()
        sys.setprofile(profile)
        try:
            process = await aioreap.create_subprocess_exec(
                program, stdin=stdio or stdin, stdout=stdio, stderr=stdio
            )
            os.close(release)
            await process.communicate()
        finally:
            sys.setprofile(None)
        os.close(stdin)
        return profile.calls

    async def main() -> float:
        # The fewest: a child that is late is asked for again.
        return min([await calls_of_one() for _ in range(_SPAWNS)])

    assert run(main) == pytest.approx(_CALLS[_VERSION][kind], rel=_SLACK)


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
        profile = Profile()
        sys.setprofile(profile)
        try:
            for _ in range(_SPAWNS):
                await read[way]()
        finally:
            sys.setprofile(None)
        return profile.calls / _SPAWNS

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
