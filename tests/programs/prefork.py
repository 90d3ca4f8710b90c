"""A server that has children, forks workers that end as any program does, and goes on.

    prefork.py LOOP

Each worker inherits the server's loop and its children. It ends through sys.exit(), so that its
interpreter is shut down in full. After each the server has to hear wakeups by another thread, of
a pipe that the child closes and of the child's exit.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from collections.abc import Callable
from typing import Any

from loops import LOOPS

import aioreap

make_loop = LOOPS[sys.argv[1]]


async def start() -> aioreap.Process:
    """A child that closes its stdin when it is told to, and then ends when it is killed."""
    return await aioreap.create_subprocess_exec(
        "sh", "-c", "read line; exec <&-; echo closed; exec sleep 1000", stdin=-1, stdout=-1
    )


async def work() -> None:
    process = await aioreap.create_subprocess_exec("sh", "-c", "cat; exit 3", stdin=-1, stdout=-1)
    assert await process.communicate(b"work") == (b"work", None)
    assert process.returncode == 3


def run_afresh() -> None:
    loop = make_loop()
    asyncio.set_event_loop(loop)
    loop.run_until_complete(work())
    loop.close()
    asyncio.set_event_loop(None)


def just_exit(_server: dict[str, Any]) -> None:
    """The copies of the server's objects go with the interpreter."""


def work_and_exit(_server: dict[str, Any]) -> None:
    run_afresh()


def close_what_is_inherited(server: dict[str, Any]) -> None:
    server["loop"].close()
    run_afresh()


def drop_what_is_inherited(server: dict[str, Any]) -> None:
    asyncio.set_event_loop(None)
    server.clear()
    gc.collect()
    run_afresh()
    gc.collect()


async def hear(process: aioreap.Process) -> None:
    loop = asyncio.get_running_loop()
    assert process.poll() is None, "the worker killed it"
    # At nearly each of these the loop sleeps when the other thread is ready.
    for _ in range(50):
        await loop.run_in_executor(None, os.sched_yield)
    await loop.shutdown_default_executor()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"close it\n")
    assert await process.stdout.readline() == b"closed\n"
    await process.stdin.wait_closed()
    process.kill()
    assert await process.wait() == -9


def serve(worker: Callable[[dict[str, Any]], None]) -> None:
    loop = make_loop()
    asyncio.set_event_loop(loop)
    server: dict[str, Any] = {"loop": loop, "process": loop.run_until_complete(start())}
    del loop
    copy = os.fork()
    if copy == 0:
        worker(server)
        sys.exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1]) == 7, worker
    server["loop"].run_until_complete(hear(server["process"]))
    server["loop"].close()
    print(worker.__name__, flush=True)


for each in (just_exit, work_and_exit, close_what_is_inherited, drop_what_is_inherited):
    serve(each)
