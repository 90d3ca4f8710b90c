"""A program that ends while its children live: their pids are what it writes.

shutdown.py LOOP HOW
"""

from __future__ import annotations

import asyncio
import sys
import threading
import tracemalloc  # noqa: F401 - a warning in the midst of its import by another one fails in Python
from collections.abc import Callable
from typing import Any

from loops import LOOPS

import aioreap

# What the end of the interpreter finds in a module.
kept: list[Any] = []


async def start(**pipes: int) -> aioreap.Process:
    process = await aioreap.create_subprocess_exec("sleep", "1000", **pipes)  # type: ignore[arg-type]
    print(process.pid, flush=True)
    return process


async def start_two() -> list[aioreap.Process]:
    return [await start(stdin=-1, stdout=-1, stderr=-1), await start()]


async def wait_for_one() -> None:
    process = await start(stdin=-1, stdout=-1)
    waiting = asyncio.ensure_future(process.wait())
    # asyncio says of each task that it is destroyed; here that is meant.
    waiting._log_destroy_pending = False  # type: ignore[attr-defined]
    await asyncio.sleep(0)
    kept.extend((process, waiting))


async def wait_and_exit() -> None:
    await wait_for_one()
    sys.exit(0)


def held(loop: asyncio.AbstractEventLoop) -> None:
    kept.append(loop.run_until_complete(start_two()))


def dropped(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_until_complete(start_two())


def awaited(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_until_complete(wait_for_one())


def exits(loop: asyncio.AbstractEventLoop) -> None:
    """SystemExit comes out of the loop, which ends in the middle of its work."""
    loop.run_until_complete(wait_and_exit())


def in_a_thread(loop: asyncio.AbstractEventLoop) -> None:
    """A daemon thread's loop still runs when the interpreter is shut down."""
    ready = threading.Event()

    async def main() -> None:
        await wait_for_one()
        ready.set()
        await asyncio.Event().wait()

    threading.Thread(target=loop.run_until_complete, args=[main()], daemon=True).start()
    ready.wait()


HOW: dict[str, Callable[[asyncio.AbstractEventLoop], None]] = {
    "held": held,
    "dropped": dropped,
    "awaited": awaited,
    "exits": exits,
    "in-a-thread": in_a_thread,
}
how, _, end = sys.argv[2].partition(",")
loop = LOOPS[sys.argv[1]]()
asyncio.set_event_loop(loop)
try:
    HOW[how](loop)
finally:
    if end == "closed":
        loop.close()
    elif end == "unknown":  # nobody but this module holds it
        asyncio.set_event_loop(None)
