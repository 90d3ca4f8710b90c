"""What communicate() and run_process() send a child that is too long to be copied."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import signal
import tracemalloc
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import uvloop
from test_copies import in_a_copy

import aioreap
from aioreap import bulk

pytestmark = pytest.mark.own_backend

DATA = bytes(range(256)) * 2**14  # 4 MiB


def test_it_is_long_enough() -> None:
    assert len(DATA) >= bulk.LARGE


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
async def test_every_byte_comes_back(kind: Callable[[bytes], Any]) -> None:
    process = await aioreap.create_subprocess_exec("cat", stdin=-1, stdout=-1)
    assert await process.communicate(kind(DATA)) == (DATA, None)
    result = await aioreap.run_process(["cat"], input=kind(DATA), stdout=-1)
    assert result.stdout == DATA


async def test_it_is_not_copied() -> None:
    process = await aioreap.create_subprocess_exec("cat", stdin=-1, stdout=aioreap.DEVNULL)
    tracemalloc.start()
    try:
        await process.communicate(DATA)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < len(DATA) // 4


async def test_it_follows_what_was_written_before() -> None:
    before = b"x" * 300_000
    process = await aioreap.create_subprocess_exec("cat", stdin=-1, stdout=-1)
    assert process.stdin is not None
    process.stdin.write(before)
    assert await process.communicate(DATA) == (before + DATA, None)


async def test_a_child_that_reads_only_some_is_no_error() -> None:
    command = ["head", "-c", "3"]
    process = await aioreap.create_subprocess_exec(*command, stdin=-1, stdout=-1)
    assert await process.communicate(DATA) == (DATA[:3], None)
    assert (await aioreap.run_process(command, input=DATA, stdout=-1)).stdout == DATA[:3]


async def test_without_a_descriptor_for_it_it_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    process = await aioreap.create_subprocess_exec("cat", stdin=-1, stdout=-1)
    asked = []

    def none_left(*arguments: object) -> int:
        asked.append(arguments)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "fcntl", none_left)
        call = asyncio.ensure_future(process.communicate(DATA))
        await asyncio.sleep(0)
    assert await call == (DATA, None)
    assert asked


# Its shell reads nothing before the gate is opened, then all; it says how much.
COUNTER = "read line </dev/fd/$0; wc -c"


@contextlib.asynccontextmanager
async def cancelled_communicate() -> AsyncIterator[tuple[aioreap.Process, int]]:
    """A process that has read nothing yet, and the descriptor that lets it."""
    gate, opener = os.pipe()
    try:
        process = await aioreap.create_subprocess_exec(
            *("sh", "-c", COUNTER, str(gate)), stdin=-1, stdout=-1, pass_fds=[gate]
        )
        call = asyncio.ensure_future(process.communicate(DATA))
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        yield process, opener
    finally:
        os.close(gate)
        os.close(opener)


async def test_it_stays_sent_when_the_call_is_cancelled() -> None:
    async with cancelled_communicate() as (process, opener):
        assert process.stdin is not None
        assert process.stdin.is_closing()
        os.write(opener, b"\n")
        assert await process.communicate(b"of no use") == (b"%d\n" % len(DATA), None)


async def test_a_process_is_not_detached_with_some_of_it_unsent() -> None:
    async with cancelled_communicate() as (process, opener):
        with pytest.raises(BlockingIOError, match=r"\d+ bytes written to stdin are not"):
            process.detach()
        os.write(opener, b"\n")
        assert await process.communicate() == (b"%d\n" % len(DATA), None)


async def test_wait_closed_is_for_the_last_of_it() -> None:
    async with cancelled_communicate() as (process, opener):
        assert process.stdin is not None
        closed = asyncio.ensure_future(process.stdin.wait_closed())
        for _ in range(20):
            await asyncio.sleep(0)
        assert not closed.done()
        os.write(opener, b"\n")
        await closed
        assert await process.communicate() == (b"%d\n" % len(DATA), None)


async def test_a_stop_leaves_nothing_of_it() -> None:
    async with cancelled_communicate() as (process, _):
        assert (await process.stop()).returncode == -signal.SIGTERM


async def test_a_forked_copy_can_drop_it_and_the_rest_is_sent() -> None:
    async with cancelled_communicate() as (process, opener):
        pid = os.fork()
        if not pid:
            with contextlib.suppress(BaseException):
                process._transport.abandon()
                os._exit(0)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        os.write(opener, b"\n")
        assert await process.communicate() == (b"%d\n" % len(DATA), None)


def test_a_copy_that_goes_on_with_the_loop_writes_nothing_of_it() -> None:
    loop = asyncio.SelectorEventLoop()
    context = cancelled_communicate()
    process, opener = loop.run_until_complete(context.__aenter__())
    pipe = process._transport._pipes[0]

    async def until_it_is_given_up() -> None:
        while pipe.unsent:
            await asyncio.sleep(0)

    def go_on() -> None:
        os.write(opener, b"\n")
        loop.run_until_complete(until_it_is_given_up())
        os._exit(5)

    assert in_a_copy(go_on) == 5
    assert loop.run_until_complete(process.communicate()) == (b"%d\n" % len(DATA), None)
    loop.run_until_complete(context.__aexit__(None, None, None))
    loop.close()


# Another process has stdin, and never reads it.
HOLDER = "exec 3<&0; sleep 1000 <&3 >/dev/null 2>&1 & echo $!"


async def communicate_with_holder() -> tuple[aioreap.Process, int]:
    process = await aioreap.create_subprocess_shell(HOLDER, stdin=-1, stdout=-1)
    output, _ = await process.communicate(DATA)
    return process, int(output)


async def test_communicate_does_not_wait_for_who_takes_nothing() -> None:
    _, holder = await communicate_with_holder()
    os.kill(holder, signal.SIGKILL)


async def test_run_process_waits_until_all_of_it_is_taken() -> None:
    read_end, write_end = os.pipe()
    try:
        script = f"exec 3<&0; wc -c <&3 >/dev/fd/{write_end} &"
        await aioreap.run_process(script, shell=True, input=DATA, pass_fds=[write_end])
        assert int(os.read(read_end, 100)) == len(DATA)
    finally:
        os.close(read_end)
        os.close(write_end)


@pytest.mark.parametrize(
    "make_loop",
    [
        asyncio.SelectorEventLoop,
        uvloop.new_event_loop,
        aioreap.EventLoop,
        aioreap.UvloopEventLoop,
    ],
)
def test_a_closed_loop_gives_it_up(make_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    with asyncio.Runner(loop_factory=make_loop) as runner:
        process, holder = runner.run(communicate_with_holder())
    if make_loop in (aioreap.EventLoop, aioreap.UvloopEventLoop):
        assert not process._transport._pipes[0].unsent
    os.kill(holder, signal.SIGKILL)
