"""get_extra_info('subprocess'): what programs expect of the Popen behind asyncio's transports."""

from __future__ import annotations

import asyncio
import math
import select
import signal
import subprocess
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import pytest
from test_loops import FACTORIES

import aioreap
from aioreap import kernel, watcher
from aioreap.exitinfo import ExitStatusLost
from aioreap.popen import Popen


def popen_of(process: aioreap.Process) -> Popen:
    popen = process._transport.get_extra_info("subprocess")
    assert popen is process._transport.get_extra_info("subprocess")
    return cast("Popen", popen)


async def test_it_tells_what_was_started() -> None:
    process = await aioreap.create_subprocess_exec("sh", "-c", "read line; exit 3", stdin=-1)
    popen = popen_of(process)
    assert (popen.pid, popen.args) == (process.pid, ("sh", "-c", "read line; exit 3"))
    assert popen.stdin is not None
    assert popen.stdin.fileno() >= 0
    assert (popen.stdout, popen.stderr, popen.returncode) == (None, None, None)
    assert repr(popen) == "<Popen: returncode: None args: ('sh', '-c', 'read line; exit 3')>"
    await process.communicate()
    assert (popen.returncode, popen.poll(), popen.wait()) == (3, 3, 3)


async def test_the_command_of_a_shell_is_what_it_runs() -> None:
    process = await aioreap.create_subprocess_shell("exit 3")
    assert popen_of(process).args == "exit 3"
    assert await process.wait() == 3


@pytest.mark.parametrize("method", ["kill", "terminate"])
async def test_its_signals_reach_the_child(method: str) -> None:
    process = await aioreap.create_subprocess_exec("cat", stdin=-1)
    getattr(popen_of(process), method)()
    number = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM}[method]
    assert await process.wait() == -number
    popen_of(process).send_signal(signal.SIGTERM)  # nothing happens


async def test_a_blocking_wait_and_poll_tell_nobody_else() -> None:
    process = await aioreap.create_subprocess_exec("cat", stdin=-1)
    popen = popen_of(process)
    assert popen.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        popen.wait(0.001)
    popen.kill()
    assert popen.wait() == popen.poll() == popen.returncode == -signal.SIGKILL
    assert process.returncode is None
    assert process.exit_info is None
    assert await process.wait() == process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("timeout", [-1, -math.inf, math.nan])
async def test_a_time_that_is_none_is_over_as_for_popen_or_an_error(timeout: float) -> None:
    process = await aioreap.create_subprocess_exec("cat", stdin=-1)
    error = ValueError if math.isnan(timeout) else subprocess.TimeoutExpired
    with pytest.raises(error, match="NaN" if math.isnan(timeout) else "timed out"):
        popen_of(process).wait(timeout)
    assert await process.communicate() == (None, None)
    assert process.returncode == 0


async def test_a_wait_in_another_thread_and_the_loops_both_have_the_status() -> None:
    for _ in range(20):
        process = await aioreap.create_subprocess_exec("sh", "-c", "read line; exit 3", stdin=-1)
        waiting = threading.Event()
        popen = popen_of(process)

        def wait(popen: Popen = popen, waiting: threading.Event = waiting) -> int:
            waiting.set()
            return popen.wait()

        blocked = asyncio.get_running_loop().run_in_executor(None, wait)
        waiting.wait()
        assert process.stdin is not None
        process.stdin.close()
        assert await asyncio.gather(process.wait(), blocked) == [3, 3]


async def test_closing_the_transport_calls_the_kill_that_is_set() -> None:
    process = await aioreap.create_subprocess_exec("cat", stdin=-1)
    popen, called = popen_of(process), 0
    real: Callable[[], None] = popen.kill

    def kill() -> None:
        nonlocal called
        called += 1
        real()

    popen.kill = kill  # type: ignore[method-assign]
    process._transport.close()
    assert await process.wait() == -signal.SIGKILL
    assert called == 1


async def test_closing_the_transport_bears_with_a_kill_that_finds_nobody() -> None:
    def kill() -> None:
        raise ProcessLookupError

    process = await aioreap.create_subprocess_exec("cat", stdin=-1)
    popen_of(process).kill = kill  # type: ignore[method-assign]
    process._transport.close()
    assert await process.wait() == 0  # its stdin is closed


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
def test_a_child_of_a_closed_loop_has_ended_for_who_waits_in_a_thread_and_for_who_asks(
    factory: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def main() -> Popen:
        return popen_of(await aioreap.create_subprocess_exec("sleep", "1000"))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        with asyncio.Runner(loop_factory=factory) as runner, ThreadPoolExecutor(1) as executor:
            popen = runner.run(main())
            waiting = executor.submit(popen.wait)
            while not waiting.running():
                pass
            runner.close()
            assert waiting.result() == -signal.SIGKILL
        assert popen.poll() == popen.wait() == popen.wait(1) == popen.returncode == -signal.SIGKILL


async def test_no_thread_can_close_the_pidfd_of_a_signal_on_its_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, free = signal.pidfd_send_signal, []

    def try_to_close() -> bool:
        could = watcher._reaping.acquire(blocking=False)
        if could:
            watcher._reaping.release()
        return could

    def pidfd_send_signal(pidfd: int, number: int) -> None:
        free.append(executor.submit(try_to_close).result())
        real(pidfd, number)

    process = await aioreap.create_subprocess_exec("cat", stdin=-1)
    with ThreadPoolExecutor(1) as executor:
        monkeypatch.setattr(signal, "pidfd_send_signal", pidfd_send_signal)
        popen_of(process).terminate()
    assert free == [False]
    assert await process.wait() == -signal.SIGTERM


async def test_closing_the_transport_does_not_kill_what_has_exited_unheard() -> None:
    process = await aioreap.create_subprocess_exec("cat", stdin=-1)
    popen = popen_of(process)
    popen.terminate()
    gone = select.poll()
    gone.register(
        process.pidfd, select.POLLIN if process._transport.child._reap else select.POLLHUP
    )
    gone.poll()
    popen.kill = lambda: pytest.fail("killed")  # type: ignore[method-assign]
    assert process.returncode is None
    process._transport.close()
    assert await process.wait() == -signal.SIGTERM


async def test_a_lost_status_is_an_error_here_too(monkeypatch: pytest.MonkeyPatch) -> None:
    process = await aioreap.create_subprocess_exec("cat", stdin=-1)
    popen = popen_of(process)
    process.kill()
    popen.wait()
    real = process._transport.child.status
    monkeypatch.setattr(process._transport.child, "status", kernel.LOST)
    for ask in (popen.poll, popen.wait, lambda: popen.returncode):
        with pytest.raises(ExitStatusLost):
            ask()
    assert "returncode: lost" in repr(popen)
    monkeypatch.setattr(process._transport.child, "status", real)
    await process.wait()


async def test_a_wait_bears_with_a_kernel_that_says_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    process = await aioreap.create_subprocess_exec("cat", stdin=-1)
    popen, real, asked = popen_of(process), kernel.exit_status, 0

    def gone(pidfd: int, *, reap: bool) -> kernel.ExitStatus | None:
        nonlocal asked
        asked += 1
        if asked <= 2:
            raise ProcessLookupError
        return real(pidfd, reap=reap)

    monkeypatch.setattr(kernel, "exit_status", gone)
    popen.kill()
    assert popen.wait() == -signal.SIGKILL
    assert asked > 2
    assert await process.wait() == -signal.SIGKILL
