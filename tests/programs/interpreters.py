"""Two interpreters with a GIL of their own, each in a thread, spawn while the main one does.

    interpreters.py LOOP

The loop is the main one's: uvloop can be imported in no other. Needs Python 3.13.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
import threading
from typing import Any

from loops import LOOPS

import aioreap

# The private module, which 3.13 and 3.14 have; only the latter has one that is public.
interpreters: Any = importlib.import_module("_interpreters")

SCRIPT = """
import asyncio, gc, os, warnings, aioreap

async def answer(number):
    script = f"cat; exit {number}"
    process = await aioreap.create_subprocess_exec("sh", "-c", script, stdin=-1, stdout=-1)
    output = await process.communicate(b"in")
    assert output == (b"in", None), output
    assert process.returncode == number, process.returncode

async def main():
    await asyncio.gather(*(answer(number) for number in range(20)))
    return await aioreap.create_subprocess_exec("sleep", "1000")

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with asyncio.Runner(loop_factory=aioreap.EventLoop) as runner:
        pidfd = os.dup(runner.run(main()).pidfd)
    gc.collect()
assert ["still ran" in str(each.message) for each in caught] == [True], caught
os.close(pidfd)
"""


def run_in_an_interpreter(failures: list[str]) -> None:
    interpreter = interpreters.create("isolated")
    failure = interpreters.exec(interpreter, SCRIPT)
    if failure is not None:
        failures.append(failure.formatted)
    interpreters.destroy(interpreter)


async def main() -> None:
    failures: list[str] = []
    others = [threading.Thread(target=run_in_an_interpreter, args=[failures]) for _ in range(2)]
    for other in others:
        other.start()
    # A fork while other interpreters run hangs or crashes in Python itself.
    while aioreap.backend().name != "popen" and any(other.is_alive() for other in others):
        process = await aioreap.create_subprocess_exec("sh", "-c", "exit 3")
        assert await process.wait() == 3
    for other in others:
        other.join()
    for failure in failures:
        print(failure)
    print("both have ended")


with asyncio.Runner(loop_factory=LOOPS[sys.argv[1]]) as runner:
    runner.run(main())
