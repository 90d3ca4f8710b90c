"""A server that replaces itself by exec while its children run: nothing of them is lost.

Each generation starts children, talks to those that it has, and hands all of them over to
the next: with what they have written and nobody has read, and with their exit statuses, though
some end while nobody watches. Ends with 1 if anything is wrong.

Run it with ``python examples/handover.py``: on both loops, one after the other.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import sys
from typing import Final, NoReturn

import aioreap
from aioreap import handover

GENERATIONS: Final = 4
LINES: Final = 10  # that each generation writes to each echo
UNREAD: Final = 5  # of these, are left to the next generation
COUNTED: Final = 100_000  # lines of a child that writes while it can
# Says every line again, and ends with the number that it is told.
ECHO: Final = """while read -r word number; do
    case $word in exit) exit $number;; esac
    echo "$word $number"
done"""
STATUS_OF_ECHO: Final = 30
STATUS_OF_LATE: Final = 40

wrong: list[str] = []


def expect(what: str, found: object, expected: object) -> None:
    """Note what is not as it should be."""
    if found != expected:
        wrong.append(f"{what}: {found!r}, not {expected!r}")


async def start() -> list[aioreap.Process]:
    """The children of the first generation; the last one ends while nobody watches."""
    pipe = aioreap.PIPE
    create = aioreap.create_subprocess_exec
    return [
        await create("sh", "-c", ECHO, stdin=pipe, stdout=pipe, stderr=pipe),
        await create("seq", str(COUNTED), stdout=pipe),
        await create("cat", stdin=pipe),
        await create("sh", "-c", ECHO, stdin=pipe, stdout=pipe),
    ]


def line(generation: int, number: int) -> bytes:
    return b"generation-%d %d\n" % (generation, number)


async def talk(echo: aioreap.Process, counter: aioreap.Process, generation: int) -> None:
    """Read what was left, say more, and leave some of the answers."""
    assert echo.stdin is not None
    assert echo.stdout is not None
    assert counter.stdout is not None
    if generation:
        for number in range(LINES - UNREAD, LINES):
            answer = await echo.stdout.readline()
            expect("what was left by the last", answer, line(generation - 1, number))
    for number in range(LINES):
        echo.stdin.write(line(generation, number))
    await echo.stdin.drain()
    for number in range(LINES - UNREAD):
        expect("an answer", await echo.stdout.readline(), line(generation, number))
    for number in range(100):
        expected = b"%d\n" % (100 * generation + number + 1)
        expect("a number", await counter.stdout.readline(), expected)


async def look_after(late: aioreap.Process) -> None:
    """See that the one which has ended between two generations is whole."""
    expect("what was said meanwhile", await late.communicate(), (b"last 1\n", None))
    expect("how it ended meanwhile", (await late.wait_exit()).returncode, STATUS_OF_LATE)


async def finish(echo: aioreap.Process, counter: aioreap.Process, cat: aioreap.Process) -> None:
    """Have all others end, and look whether they are whole."""
    expected = b"".join(line(GENERATIONS - 1, number) for number in range(LINES - UNREAD, LINES))
    output = await echo.communicate(b"exit %d\n" % STATUS_OF_ECHO)
    expect("the last answers", output, (expected, b""))
    expect("how the echo ended", echo.returncode, STATUS_OF_ECHO)
    rest, _ = await counter.communicate()
    numbers = range(100 * GENERATIONS + 1, COUNTED + 1)
    expect("all other numbers", rest == b"".join(b"%d\n" % n for n in numbers), True)
    expect("how the counter ended", counter.returncode, 0)
    cat.terminate()
    expect("the signal that ends it", (await cat.wait_exit()).signal, signal.SIGTERM)


async def serve(generation: int) -> tuple[list[aioreap.Detached], str]:
    """One generation: what it leaves to the next."""
    processes = [await aioreap.attach(detached) for detached in handover.from_environment()]
    if generation == 0:
        processes = await start()
    if generation == 1:
        await look_after(processes.pop())
    expect("how many there are", len(processes), 3 + (generation == 0))
    await talk(processes[0], processes[1], generation)
    if generation == GENERATIONS - 1:
        await finish(*processes)
        return [], "all have ended"
    all_detached = [process.detach() for process in processes]
    if generation == 0:
        late = all_detached[-1].stdin
        assert late is not None
        os.write(late, b"last 1\nexit %d\n" % STATUS_OF_LATE)
    running = ", ".join(str(detached.pid) for detached in all_detached)
    return all_detached, f"hands over {running}"


def run(loop_name: str, generation: int) -> NoReturn:
    """One generation, from its loop to its exec."""
    factory = aioreap.UvloopEventLoop if loop_name == "uvloop" else aioreap.EventLoop
    with asyncio.Runner(loop_factory=factory) as runner:
        detached, said = runner.run(serve(generation))
    print(f"    process {os.getpid()}, generation {generation}: {said}", flush=True)
    if wrong:
        sys.exit(f"WRONG: {'; '.join(wrong)}")
    if not detached:
        sys.exit(0)
    arguments = [sys.executable, __file__, loop_name, str(generation + 1)]
    with handover.across_exec(*detached) as variables:
        os.execve(sys.executable, arguments, {**os.environ, **variables})  # replaces this program


async def run_on(loop_name: str) -> int:
    print(f"\n  {loop_name}, backend {aioreap.backend().name}", flush=True)
    server = await aioreap.create_subprocess_exec(sys.executable, __file__, loop_name, "0")
    return await server.wait()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run(sys.argv[1], int(sys.argv[2]))
    loops = ["asyncio", "uvloop"] if importlib.util.find_spec("uvloop") else ["asyncio"]
    statuses = [asyncio.run(run_on(name)) for name in loops]
    print(f"\n{'WRONG' if any(statuses) else 'All of it is right.'}")
    sys.exit(1 if any(statuses) else 0)
