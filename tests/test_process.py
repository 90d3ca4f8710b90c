"""Process as its users know asyncio's, and the rules that asyncio itself keeps only lately."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

import aioreap

PIPES = {"stdin": aioreap.PIPE, "stdout": aioreap.PIPE, "stderr": aioreap.PIPE}


async def shell(script: str, **options: int) -> aioreap.Process:
    return await aioreap.create_subprocess_shell(script, **options)  # type: ignore[arg-type]


async def of_asyncios(script: str, **options: int) -> aioreap.Process:
    aioreap.install()
    theirs = await asyncio.create_subprocess_shell(script, **options)  # type: ignore[arg-type]
    return aioreap.Process.of(theirs)


both = pytest.mark.parametrize("start", [shell, of_asyncios], ids=["ours", "asyncio's"])
Start = Callable[..., Coroutine[Any, Any, aioreap.Process]]


async def test_communicate_sends_reads_and_waits() -> None:
    process = await shell("cat; echo error >&2; exit 3", **PIPES)
    assert await process.communicate(b"input") == (b"input", b"error\n")
    assert process.returncode == 3


async def test_communicate_without_pipes_waits() -> None:
    process = await shell("exit 3")
    assert await process.communicate() == (None, None)
    assert process.returncode == 3


async def test_communicate_without_input_closes_stdin() -> None:
    process = await shell("cat; echo end", stdin=aioreap.PIPE, stdout=aioreap.PIPE)
    assert await process.communicate() == (b"end\n", None)


@pytest.mark.parametrize("size", [1, 65_536, 1_000_000])
async def test_communicate_carries_every_byte(size: int) -> None:
    data = os.urandom(size)
    process = await aioreap.create_subprocess_exec("cat", stdin=-1, stdout=-1)
    assert await process.communicate(data) == (data, None)


async def test_a_child_that_does_not_read_its_input_is_no_error() -> None:
    process = await shell("exec <&-; echo done", **PIPES)
    assert await process.communicate(b"x" * 1_000_000) == (b"done\n", b"")


async def test_communicate_returns_what_the_readers_hold_already() -> None:
    process = await shell("echo one; echo two; read line; echo $line", **PIPES)
    assert process.stdout is not None
    assert await process.stdout.readline() == b"one\n"
    assert await process.communicate(b"three\n") == (b"two\nthree\n", b"")


@both
async def test_a_cancelled_communicate_loses_nothing(start: Start) -> None:
    process = await start(
        "echo one; echo error >&2; read line; echo two", stdout=-1, stderr=-1, stdin=-1
    )
    assert process.stdin is not None
    assert process.stdout is not None
    write = process.stdin.transport.get_extra_info("pipe")
    keep = os.dup(write.fileno())  # communicate() closes stdin; the child goes on reading
    first = asyncio.ensure_future(process.communicate())
    await asyncio.sleep(0)
    collected = process._transport.get_protocol()._output  # type: ignore[attr-defined]
    while not (collected[1] and collected[2]):
        await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert await process.stdout.readline() == b"one\n"
    os.write(keep, b"\n")
    os.close(keep)
    assert await process.communicate() == (b"two\n", b"error\n")
    assert process.returncode == 0


@both
async def test_a_communicate_cancelled_after_the_end_loses_nothing(start: Start) -> None:
    process = await start("echo one; exec >&-; read line; exit 3", stdout=-1, stdin=-1)
    assert process.stdin is not None
    keep = os.dup(process.stdin.transport.get_extra_info("pipe").fileno())
    first = asyncio.ensure_future(process.communicate())
    await asyncio.sleep(0)
    while process._transport.is_pipe_open(1):
        await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    os.close(keep)
    assert await process.communicate() == (b"one\n", None)
    assert process.returncode == 3


async def test_wait_is_the_exit_though_a_grandchild_holds_the_pipe() -> None:
    read_end, write_end = os.pipe()
    process = await aioreap.create_subprocess_shell(
        f"cat /dev/fd/{read_end} & exit 4", stdout=aioreap.PIPE, pass_fds=[read_end]
    )
    os.close(read_end)
    assert await process.wait() == 4
    os.write(write_end, b"later")
    os.close(write_end)
    assert await process.communicate() == (b"later", None)


async def test_output_before_the_exit_can_be_read_after_it() -> None:
    process = await shell("seq 10000", stdout=-1)
    assert await process.wait() == 0
    assert process.stdout is not None
    lines = [line async for line in process.stdout]
    assert [int(line) for line in lines] == list(range(1, 10_001))


async def test_a_line_over_the_limit_is_asyncios_error() -> None:
    process = await aioreap.create_subprocess_shell("seq 10000 | tr -d '\\n'", stdout=-1, limit=100)
    assert process.stdout is not None
    with pytest.raises(ValueError, match="chunk"):
        await process.stdout.readline()
    await process.stdout.read()
    assert await process.wait() == 0


async def test_a_broken_pipe_is_an_error_of_drain_only() -> None:
    process = await shell("exit 0", stdin=-1)
    assert process.stdin is not None
    await process.wait()
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        for _ in range(1000):
            await process.stdin.drain()
            await asyncio.sleep(0)


async def test_of_gives_our_process_for_asyncios() -> None:
    aioreap.install()
    theirs = await asyncio.create_subprocess_exec("cat", stdin=-1, stdout=-1)
    assert type(theirs) is asyncio.subprocess.Process
    ours = aioreap.Process.of(theirs)
    assert ours.pid == theirs.pid
    assert ours.pidfd >= 0
    assert await theirs.communicate(b"x") == (b"x", None)
    assert (await ours.wait_exit()).returncode == theirs.returncode == 0
    assert aioreap.Process.of(ours) is ours


async def test_of_refuses_what_was_not_started_here() -> None:
    with pytest.raises(TypeError, match="was not started through aioreap"):
        aioreap.Process.of(object())  # type: ignore[arg-type]


async def test_a_second_communicate_meanwhile_is_an_error_and_disturbs_nothing() -> None:
    process = await shell("cat", stdin=-1, stdout=-1)
    first = asyncio.ensure_future(process.communicate(b"x"))
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="communicate"):
        await process.communicate()
    assert await first == (b"x", None)


async def test_a_second_communicate_meanwhile_waits_too_where_there_is_no_output() -> None:
    read_end, write_end = os.pipe()
    process = await shell("read line; exit 3", stdin=read_end)
    os.close(read_end)
    calls = [asyncio.ensure_future(process.communicate()) for _ in range(2)]
    await asyncio.sleep(0)
    os.close(write_end)
    assert await asyncio.gather(*calls) == [(None, None), (None, None)]


async def test_communicate_beside_a_reader_is_asyncios_error_and_loses_nothing() -> None:
    process = await shell("echo out; read line", stdin=-1, stdout=-1, stderr=-1)
    assert process.stdout is not None
    assert process.stderr is not None
    reading = asyncio.ensure_future(process.stderr.read())
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="already waiting"):
        await process.communicate()
    assert await process.stdout.read() == b"out\n"
    assert await reading == b""
    assert await process.wait() == 1


async def test_a_cancelled_wait_closed_disturbs_no_other_and_not_the_end_of_the_pipe() -> None:
    said: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: said.append(context))
    process = await aioreap.create_subprocess_exec("cat", stdin=-1)
    assert process.stdin is not None
    first, second = (asyncio.ensure_future(process.stdin.wait_closed()) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    process.stdin.close()
    await second
    assert first.cancelled()
    assert await process.wait() == 0
    assert not said


@pytest.mark.any_backend
async def test_output_that_is_handed_on_at_once_does_not_overtake_what_waits_for_its_turn() -> None:
    process = await aioreap.create_subprocess_exec("cat", stdin=-1, stdout=-1)
    process._transport._pipes[1].untold.append(b"first ")
    process._transport._call("pipe_data_received", 1, b"first ")
    process._transport.pipe_data_received(1, b"second ")
    assert await process.communicate(b"third") == (b"first second third", None)


@both
async def test_a_chunk_for_a_stream_waits_for_no_turn_of_the_loop(start: Start) -> None:
    process = await start("exec cat", stdin=aioreap.PIPE, stdout=aioreap.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    transport = process._transport
    deferred: list[str] = []
    call = transport._call

    def noted(name: str, *arguments: object) -> None:
        deferred.append(name)
        call(name, *arguments)

    transport._call = noted  # type: ignore[method-assign]
    process.stdin.write(b"one\n")
    line = await process.stdout.readline()
    before = list(deferred)
    process.kill()
    await process.wait()
    assert (line, before) == (b"one\n", [])
    assert deferred  # by which it is told of the exit
