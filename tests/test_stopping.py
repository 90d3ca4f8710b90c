"""stop() and async with: how a child is brought to its end, on each path."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio
from apart import on_both_loops
from conftest import EMULATED, open_descriptors
from test_copies import in_a_copy
from test_launch import turns, until

import aioreap
from aioreap import killing
from aioreap.watcher import Child

pytestmark = pytest.mark.own_backend

FOREVER = 10_000.0  # seconds that no test lasts
CPU = 0.05 * (20 if EMULATED else 1)  # seconds that a clean-up may take of the processor


class Hold:
    """What a process waits for that reads `path`: release(). At its end all output has ended."""

    def __init__(self) -> None:
        self.started: list[aioreap.Process] = []
        self.read_end, self._write_end = os.pipe()
        self.path = f"/dev/fd/{self.read_end}"

    def release(self) -> None:
        for descriptor in (self.read_end, self._write_end):
            if descriptor >= 0:
                os.close(descriptor)
        self.read_end = self._write_end = -1

    async def end(self) -> None:
        self.release()
        while self.started:
            transport = self.started.pop()._transport
            transport.close()
            await transport._pipes_closed()


@pytest_asyncio.fixture
async def hold() -> AsyncIterator[Hold]:
    hold = Hold()
    yield hold
    await hold.end()


async def start(script: str, hold: Hold, **options: Any) -> aioreap.Process:
    """Run a shell whose first line of output is waited for, HOLD being the hold's path."""
    options = {"stdout": aioreap.PIPE, **options}
    process = await aioreap.create_subprocess_shell(
        script.replace("HOLD", hold.path), pass_fds=[hold.read_end], **options
    )
    hold.started.append(process)
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    return process


STUBBORN = "trap '' TERM; echo ready; exec cat HOLD"
OBEDIENT = "cat HOLD & trap 'kill $!; exit 5' TERM; echo ready; wait"


async def test_stop_sends_sigterm_and_returns_how_it_ended() -> None:
    process = await aioreap.create_subprocess_exec("cat", stdin=aioreap.PIPE)
    ended = await process.stop()
    assert ended.signal is signal.SIGTERM
    assert ended is process.exit_info


async def test_stop_leaves_a_child_that_obeys_its_own_exit_code(hold: Hold) -> None:
    process = await start(OBEDIENT, hold)
    assert (await process.stop(grace=FOREVER)).returncode == 5


async def test_stop_sends_the_signal_asked_for(hold: Hold) -> None:
    process = await start("cat HOLD & trap 'kill $!; exit 6' INT; echo ready; wait", hold)
    assert (await process.stop(signal=signal.SIGINT, grace=FOREVER, drain=0)).returncode == 6


async def test_a_child_that_ignores_the_signal_is_killed_after_the_grace(hold: Hold) -> None:
    process = await start(STUBBORN, hold)
    assert (await process.stop(grace=0.05)).signal is signal.SIGKILL


async def test_no_grace_is_sigkill_at_once(hold: Hold) -> None:
    process = await start(OBEDIENT, hold)
    assert (await process.stop(grace=0)).signal is signal.SIGKILL


async def test_endless_times_are_times(hold: Hold) -> None:
    process = await start("echo ready; exec cat HOLD", hold)
    ended = await process.stop(grace=math.inf, drain=math.inf)
    assert ended.signal is signal.SIGTERM


async def test_what_ends_with_its_input_gets_no_signal() -> None:
    process = await aioreap.create_subprocess_exec("cat", stdin=-1, stdout=-1)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"all of it")
    assert (await process.stop(close_stdin=True, grace=FOREVER)).returncode == 0
    assert await process.stdout.read() == b"all of it"


@pytest.mark.any_backend
async def test_what_does_not_end_with_its_input_gets_the_signal(hold: Hold) -> None:
    process = await start(OBEDIENT, hold, stdin=-1)
    assert (await process.stop(close_stdin=True, grace=1)).returncode == 5


async def test_what_ends_with_neither_input_nor_signal_is_killed(hold: Hold) -> None:
    process = await start(STUBBORN, hold, stdin=-1)
    assert (await process.stop(close_stdin=True, grace=0.05)).signal is signal.SIGKILL


async def test_without_a_pipe_to_close_the_signal_comes_at_once(hold: Hold) -> None:
    process = await start("echo ready; exec cat HOLD", hold, stdin=aioreap.DEVNULL)
    assert (await process.stop(close_stdin=True, grace=FOREVER)).signal is signal.SIGTERM


COUNTING = "trap 'echo term' TERM; echo ready; cat HOLD & while :; do wait; done"


async def test_many_callers_share_one_ladder(hold: Hold) -> None:
    process = await start(COUNTING, hold)
    assert process.stdout is not None
    calls = [asyncio.ensure_future(process.stop(grace=FOREVER, drain=0)) for _ in range(5)]
    assert await process.stdout.readline() == b"term\n"
    assert len(asyncio.all_tasks()) == 1 + len(calls)
    calls.append(asyncio.ensure_future(process.stop(grace=0.05, drain=0)))
    ended = await asyncio.gather(*calls)
    assert all(exit_info is process.exit_info for exit_info in ended)
    assert process.exit_info is not None
    assert process.exit_info.signal is signal.SIGKILL
    hold.release()
    assert await process.stdout.read() == b""  # no other signal came


async def test_a_caller_without_close_stdin_does_not_wait_for_those_with_it(hold: Hold) -> None:
    process = await start("echo ready; exec cat HOLD", hold, stdin=-1)
    patient = asyncio.ensure_future(process.stop(close_stdin=True, grace=FOREVER))
    await turns(3)
    assert process.exit_info is None
    assert (await process.stop(grace=FOREVER)).signal is signal.SIGTERM
    assert await patient is process.exit_info


async def test_a_cancelled_caller_kills_at_once_for_all(hold: Hold) -> None:
    process = await start(STUBBORN, hold)
    calls = [asyncio.ensure_future(process.stop(grace=FOREVER)) for _ in range(3)]
    await turns(3)
    calls[1].cancel()
    ended = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(ended[1], asyncio.CancelledError)
    assert ended[0] is ended[2] is process.exit_info
    assert process.exit_info is not None
    assert process.exit_info.signal is signal.SIGKILL


async def test_a_stop_that_times_out_has_killed(hold: Hold) -> None:
    process = await start(STUBBORN, hold)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await process.stop(grace=FOREVER)
    assert process.returncode == -signal.SIGKILL


async def cancel_at_each_turn(call: asyncio.Task[Any]) -> float:
    """Cancel it until it is over, and return the CPU time of this thread meanwhile."""
    begin = time.thread_time()
    while not call.done():
        call.cancel()
        await asyncio.sleep(0)
    assert call.cancelled()
    return time.thread_time() - begin


async def test_cancelled_at_each_turn_stop_is_over_soon(hold: Hold) -> None:
    process = await start(STUBBORN, hold)
    stopping = asyncio.ensure_future(process.stop(grace=FOREVER))
    await turns(2)
    assert await cancel_at_each_turn(stopping) < CPU
    assert await process.wait() == -signal.SIGKILL


async def test_cancelled_at_each_turn_it_gives_up_a_child_that_does_not_die(
    hold: Hold, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    process = await start(STUBBORN, hold)
    stopping = asyncio.ensure_future(process.stop(grace=FOREVER))
    await turns(2)
    with monkeypatch.context() as patch:
        patch.setattr(Child, "send_signal", lambda *_: None)
        assert await cancel_at_each_turn(stopping) < CPU
    assert "does not die yet" in caplog.text
    process.kill()
    assert (await process.stop(grace=FOREVER)).signal is signal.SIGKILL


async def test_after_the_exit_stop_returns_the_same() -> None:
    process = await aioreap.create_subprocess_exec("sh", "-c", "exit 3", stdout=-1)
    await process.wait()
    ended = [await process.stop(), await process.stop(grace=0, close_stdin=True, drain=0)]
    assert ended == [process.exit_info] * 2
    assert ended[0].returncode == 3


async def test_the_drain_ends_though_another_process_holds_the_output(hold: Hold) -> None:
    process = await start("(cat HOLD; echo late) & printf 'ready\\nmore\\n'; exec cat HOLD", hold)
    assert process.stdout is not None
    assert (await process.stop(drain=0.05)).signal is signal.SIGTERM
    assert not process.stdout.at_eof()
    hold.release()
    assert await process.stdout.read() == b"more\nlate\n"


async def test_the_drain_ends_with_the_output(hold: Hold) -> None:
    process = await start("(cat HOLD; echo late) & echo ready; exec sleep 1000", hold)
    assert process.stdout is not None
    stopping = asyncio.ensure_future(process.stop(drain=FOREVER))
    await process.wait()
    await turns(3)
    assert not stopping.done()
    hold.release()
    assert (await stopping).signal is signal.SIGTERM
    assert process.stdout._buffer == b"late\n"  # type: ignore[attr-defined]
    assert await process.stdout.read() == b"late\n"


async def test_a_full_reader_is_not_drained_and_loses_nothing() -> None:
    process = await aioreap.create_subprocess_exec(
        "head", "-c", "30000", "/dev/zero", stdout=-1, limit=100
    )
    await process.wait()
    assert (await process.stop(drain=FOREVER)).returncode == 0
    assert process.stdout is not None
    assert len(await process.stdout.read()) == 30_000


@pytest.mark.parametrize("name", ["grace", "drain"])
@pytest.mark.parametrize("value", [-1, -0.001, math.nan, -math.inf])
@pytest.mark.any_backend
async def test_a_time_that_is_none_is_an_error(name: str, value: float) -> None:
    process = await aioreap.create_subprocess_exec("cat", stdin=-1)
    with pytest.raises(ValueError, match=f"{name} must be zero seconds or more"):
        await process.stop(**{name: value})  # type: ignore[arg-type]
    assert process.poll() is None
    await process.stop(close_stdin=True)


@pytest.mark.parametrize("number", [0, -1, 65, 15.0])
@pytest.mark.any_backend
async def test_a_signal_that_is_none_is_an_error(number: Any) -> None:
    process = await aioreap.create_subprocess_exec("cat", stdin=-1)
    with pytest.raises(ValueError, match="no signal"):
        await process.stop(signal=number)
    assert process.poll() is None
    await process.stop()


async def test_a_refused_signal_is_an_error_for_each_caller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process = await aioreap.create_subprocess_exec("cat", stdin=-1)

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(Child, "send_signal", refuse)
        calls = [asyncio.ensure_future(process.stop(close_stdin=False)) for _ in range(2)]
        ended = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(error) for error in ended] == [PermissionError] * 2
    assert (await process.stop()).signal is signal.SIGTERM


@pytest.mark.any_backend
async def test_a_forked_copy_cannot_stop_its_parents_child() -> None:
    process = await aioreap.create_subprocess_exec("cat", stdin=-1)

    def stop() -> None:
        with pytest.raises(RuntimeError, match="forked copy"):
            process.stop().send(None)
        os._exit(3)

    assert in_a_copy(stop) == 3
    assert (await process.stop(close_stdin=True)).returncode == 0


@on_both_loops
@pytest.mark.any_backend
def test_stop_is_for_the_loop_of_the_child(
    make_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    with asyncio.Runner(loop_factory=make_loop) as runner:
        process = runner.run(aioreap.create_subprocess_exec("cat", stdin=-1))

        async def stop() -> None:
            await process.stop()

        with (
            asyncio.Runner(loop_factory=make_loop) as other,
            pytest.raises(RuntimeError, match="another event loop"),
        ):
            other.run(stop())
        runner.run(stop())
    with (
        asyncio.Runner(loop_factory=make_loop) as other,
        pytest.raises(RuntimeError, match="Event loop is closed"),
    ):
        other.run(stop())


# async with


async def test_a_block_that_ends_closes_the_pipes_and_waits() -> None:
    before: set[int] = set()
    for _ in range(2):  # libuv opens /dev/null at a loop's first stream, and keeps it
        before = set(open_descriptors())
        async with await aioreap.create_subprocess_exec("cat", stdin=-1, stderr=-1) as process:
            assert process.pidfd >= 0
        assert process.returncode == 0
    assert set(open_descriptors()) <= before


async def test_what_was_read_in_the_block_can_be_had_after_it() -> None:
    async with await aioreap.create_subprocess_shell("echo one; read x", stdin=-1, stdout=-1) as p:
        assert p.stdout is not None
        await until(lambda: p.stdout._buffer)  # type: ignore[union-attr]
    assert p.stdout is not None
    assert await p.stdout.read() == b"one\n"


async def test_a_block_ends_with_the_child_though_another_process_holds_its_pipes(
    hold: Hold,
) -> None:
    before: set[int] = set()
    for _ in range(2):
        before = set(open_descriptors())
        script = "exec 3<&0; cat HOLD <&3 & echo ready; exit 4"
        async with await start(script, hold, stdin=-1) as process:
            assert process.stdin is not None
            process.stdin.write(b"x" * 1_000_000)
        assert process.returncode == 4
    assert set(open_descriptors()) <= before


async def test_a_child_that_writes_on_does_not_hold_the_block() -> None:
    async with await aioreap.create_subprocess_exec("yes", stdout=-1) as process:
        pass
    assert process.returncode in (1, -signal.SIGPIPE)


class OopsError(Exception):
    """What a block fails with."""


async def test_a_block_that_fails_stops_the_child_with_its_group(hold: Hold) -> None:
    script = "echo ready; cat HOLD & cat HOLD"
    with pytest.raises(OopsError):
        async with await start(script, hold, start_new_session=True) as process:
            output = os.dup(process.stdout._transport.get_extra_info("pipe").fileno())  # type: ignore[union-attr]
            raise OopsError
    assert process.returncode == -signal.SIGTERM
    assert nobody_holds(output)


def nobody_holds(output: int) -> bool:
    """Wait for the end of a pipe, and close it."""
    os.set_blocking(output, True)
    with open(output, "rb") as file:
        return file.read() == b""


@pytest.mark.parametrize("leads_group", [False, True])
async def test_a_block_that_is_cancelled_kills_at_once(hold: Hold, leads_group: bool) -> None:
    script = "trap '' TERM; echo ready; cat HOLD & exec cat HOLD"
    process = await start(script, hold, start_new_session=leads_group)
    output = os.dup(process.stdout._transport.get_extra_info("pipe").fileno())  # type: ignore[union-attr]

    async def block() -> None:
        async with process:
            await asyncio.get_running_loop().create_future()

    running = asyncio.ensure_future(block())
    await turns(2)
    assert await cancel_at_each_turn(running) < CPU
    assert await process.wait() == -signal.SIGKILL
    if not leads_group:
        hold.release()
    assert nobody_holds(output)


async def test_a_block_that_is_cancelled_while_it_waits_at_its_end_kills(hold: Hold) -> None:
    # Not cat: busybox's begins with a sendfile(), which on 6.1 is a SIGPIPE once stdout is closed.
    process = await start("trap '' TERM; echo ready; read -r _ <HOLD", hold, stdin=-1)

    async def block() -> None:
        async with process:
            pass

    running = asyncio.ensure_future(block())
    await turns(5)
    assert process.exit_info is None
    assert await cancel_at_each_turn(running) < CPU
    assert await process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
async def test_a_block_that_is_interrupted_kills(hold: Hold, error: type[BaseException]) -> None:
    process = await start(STUBBORN, hold)
    assert await process.__aexit__(error, error(), None) is None  # type: ignore[func-returns-value]
    assert process.returncode == -signal.SIGKILL


async def test_a_block_whose_coroutine_is_closed_kills(hold: Hold) -> None:
    process = await start(STUBBORN, hold)

    async def block() -> None:
        async with process:
            await asyncio.sleep(0)

    coroutine = block()
    coroutine.send(None)
    coroutine.close()
    assert process.pidfd == -1
    assert process._transport.child.status is not None
    assert process._transport.child.status[0] == signal.SIGKILL


async def test_a_block_that_ends_in_a_forked_copy_kills_nobody() -> None:
    process = await aioreap.create_subprocess_exec("cat", stdin=-1, stdout=-1)

    def leave() -> None:
        with pytest.raises(StopIteration):
            process.__aexit__(SystemExit, SystemExit(), None).send(None)
        os._exit(3)

    assert in_a_copy(leave) == 3
    assert await process.communicate(b"heard") == (b"heard", None)


async def test_the_block_of_a_child_that_has_been_stopped_is_over(hold: Hold) -> None:
    async with await start(STUBBORN, hold) as process:
        await process.stop(grace=0)
    assert process.returncode == -signal.SIGKILL


async def test_a_killed_child_is_waited_for_a_second_at_most(
    hold: Hold, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    process = await start(STUBBORN, hold)
    monkeypatch.setattr(killing, "_PATIENCE", 0.01)
    with monkeypatch.context() as patch:
        patch.setattr(Child, "send_signal", lambda *_: None)
        assert not await killing.kill_and_wait(process._transport.child, asyncio.get_running_loop())
    assert "does not die yet" in caplog.text
    await process.stop(grace=0)
