"""A program whose children live while multiprocessing starts workers that have children too.

workers.py LOOP fork|forkserver
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import sys
from typing import TYPE_CHECKING, Any

from loops import LOOPS

import aioreap

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

# What a worker gets by fork, and holds copies of.
inherited: list[aioreap.Process] = []


async def answer(text: bytes) -> bytes:
    process = await aioreap.create_subprocess_exec("cat", stdin=-1, stdout=-1)
    output, _ = await process.communicate(text)
    assert process.returncode == 0
    return output


def work(loop_name: str, results: Connection) -> None:
    inherited.clear()
    gc.collect()
    with asyncio.Runner(loop_factory=LOOPS[loop_name]) as runner:
        results.send_bytes(runner.run(answer(b"from a worker")))
    gc.collect()


async def serve(loop_name: str, context: Any) -> None:
    inherited.append(await aioreap.create_subprocess_exec("cat", stdin=-1, stdout=-1))
    waiting = asyncio.ensure_future(inherited[0].wait())
    ours, theirs = context.Pipe()
    workers = [context.Process(target=work, args=(loop_name, theirs)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        assert ours.recv_bytes() == b"from a worker"
        worker.join()
        assert worker.exitcode == 0
    assert inherited[0].poll() is None, "a worker killed it"
    assert await inherited[0].communicate(b"still heard") == (b"still heard", None)
    assert await waiting == 0
    assert await answer(b"another one") == b"another one"
    print("served")


if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[2])
    if sys.argv[2] == "forkserver":
        context.set_forkserver_preload(["aioreap"])
    with asyncio.Runner(loop_factory=LOOPS[sys.argv[1]]) as runner:
        runner.run(serve(sys.argv[1], context))
