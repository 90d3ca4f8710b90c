"""From a pidfd to exit info: readiness is a hint, and what nobody knows is said."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import select
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from apart import Factory, on_both_loops
from conftest import children

import aioreap
from aioreap import _clone, kernel, watcher
from aioreap.epollset import EpollSet, Member
from aioreap.unowned import Stranger
from aioreap.watcher import Child, ChildWatcher


async def create(script: str) -> aioreap.Process:
    return await aioreap.create_subprocess_exec("sh", "-c", script, stdin=-1)


async def exit_of(process: aioreap.Process) -> aioreap.ExitInfo:
    assert process.stdin is not None
    process.stdin.close()
    return await process.wait_exit()


async def test_exit_info_says_how_and_when_a_child_ended() -> None:
    before = time.monotonic_ns()
    process = await create("read line; exit 3")
    assert process.exit_info is None
    assert process.returncode is None
    info = await exit_of(process)
    assert info is process.exit_info
    assert (info.pid, info.status, info.returncode, info.signal) == (process.pid, 768, 3, None)
    assert not info.core_dumped
    assert before < info.started_ns < info.finished_ns < time.monotonic_ns()
    assert process.returncode == 3


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGRTMIN + 3])
async def test_a_death_by_signal_has_its_name(number: int) -> None:
    process = await create("read line")
    process.send_signal(number)
    info = await process.wait_exit()
    assert info.returncode == -number
    assert info.signal == number
    assert isinstance(info.signal, signal.Signals) is (number < signal.SIGRTMIN)


async def test_a_core_dump_is_seen(tmp_path: os.PathLike[str]) -> None:
    process = await aioreap.create_subprocess_exec(
        "/bin/sh", "-c", "ulimit -c 1024 && kill -ABRT $$", cwd=tmp_path
    )
    info = await process.wait_exit()
    assert info.signal == signal.SIGABRT
    with open("/proc/sys/kernel/core_pattern", encoding="ascii") as pattern:
        assert info.core_dumped or pattern.read().startswith("|")


async def test_poll_needs_no_turn_of_the_loop() -> None:
    process = await create("read line; exit 3")
    assert process.poll() is None
    process.kill()
    while process.poll() is None:
        pass
    assert process.poll() == -signal.SIGKILL
    assert await process.wait() == -signal.SIGKILL


async def test_each_wait_has_a_waiter_of_its_own() -> None:
    process = await create("read line; exit 3")
    first, second, third = (asyncio.ensure_future(process.wait()) for _ in range(3))
    await asyncio.sleep(0)
    second.cancel()
    await exit_of(process)
    assert (await first, await third) == (3, 3)
    assert second.cancelled()


async def test_no_task_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, here = asyncio.get_running_loop(), asyncio.current_task()
    made: list[object] = []
    loop.set_task_factory(lambda *a, **k: made.append(a) or asyncio.Task(a[1], loop=a[0], **k))  # type: ignore[func-returns-value]
    process = await aioreap.create_subprocess_exec("cat", stdin=-1, stdout=-1, stderr=-1)
    assert asyncio.all_tasks() == {here}
    assert await process.communicate(b"x") == (b"x", b"")
    assert not made


async def test_signals_are_silent_until_the_exit_is_known_and_an_error_afterwards() -> None:
    read_end, write_end = os.pipe()
    process = await aioreap.create_subprocess_exec("sh", "-c", "read line; exit 3", stdin=read_end)
    os.close(read_end)
    os.close(write_end)
    while not kernel.is_readable(process.pidfd):
        pass
    process.send_signal(signal.SIGTERM)
    process.terminate()
    process.kill()
    assert process.returncode is None
    assert await process.wait() == 3
    for send in (process.terminate, process.kill, lambda: process.send_signal(0)):
        with pytest.raises(ProcessLookupError):
            send()


@pytest.fixture
def late_exit_info(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Answer "not yet" to the first question, as the kernel may; the pidfds asked for."""
    real, asked = kernel.exit_status, []

    def late(pidfd: int, *, reap: bool) -> kernel.ExitStatus | None:
        asked.append(pidfd)
        return None if len(asked) == 1 else real(pidfd, reap=reap)

    monkeypatch.setattr(kernel, "exit_status", late)
    return asked


async def test_readable_is_not_exit_info_ready(late_exit_info: list[int]) -> None:
    """The kernel wakes the pollers of a pidfd before it stores the exit info."""
    process = await create("read line; exit 3")
    assert (await exit_of(process)).returncode == 3
    assert len(late_exit_info) >= 2  # the kernel may be late itself, before the fixture or after it


async def test_no_room_to_be_told_of_edges_loses_no_exit(
    monkeypatch: pytest.MonkeyPatch, late_exit_info: list[int]
) -> None:
    refused: list[int] = []

    def tell_of_edges(self: EpollSet, descriptor: int) -> None:
        refused.append(descriptor)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(EpollSet, "tell_of_edges", tell_of_edges)
    process = await create("read line; exit 3")
    assert (await exit_of(process)).returncode == 3
    assert refused


@pytest.mark.parametrize("times", [1, 3])
async def test_esrch_is_asked_again(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    real, asked = kernel.exit_status, 0

    def gone(pidfd: int, *, reap: bool) -> kernel.ExitStatus | None:
        nonlocal asked
        asked += 1
        if asked <= times:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        return real(pidfd, reap=reap)

    monkeypatch.setattr(kernel, "exit_status", gone)
    process = await create("read line; exit 3")
    assert (await exit_of(process)).returncode == 3


def _lose_statuses(monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """As before Linux 6.15, when somebody else has reaped the child."""

    def lost(pidfd: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(kernel, "_exit_info", lost)


@pytest.mark.parametrize("error", [errno.ENOTTY, errno.ESRCH, errno.EREMOTE])
async def test_a_status_that_nobody_knows_is_an_error_everywhere(
    monkeypatch: pytest.MonkeyPatch, error: int, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[str] = []

    class Protocol(asyncio.SubprocessProtocol):
        def process_exited(self) -> None:
            calls.append("process_exited")

        def connection_lost(self, exc: Exception | None) -> None:
            calls.append(f"connection_lost({exc})")

    process = await create("read line; exit 3")
    loop: Any = aioreap.install(asyncio.get_running_loop())
    transport, _ = await loop.subprocess_exec(Protocol, "cat", stdout=None, stderr=None)
    _lose_statuses(monkeypatch, error)
    for child in (process._transport.child, transport.child):
        monkeypatch.setattr(child, "_reap", True)
    monkeypatch.setattr(kernel, "_reap", _no_child)
    waiting = asyncio.ensure_future(process.wait())
    communicating = asyncio.ensure_future(process.communicate())
    transport.get_pipe_transport(0).close()
    for call in (waiting, communicating, process.wait_exit(), transport._wait()):
        with pytest.raises(aioreap.ExitStatusLost):
            await call
    for poll in (lambda: process.returncode, process.poll, transport.get_returncode):
        with pytest.raises(aioreap.ExitStatusLost, match=r"exit status of child \d+ is lost"):
            poll()
    assert process.exit_info is not None
    assert process.exit_info.status is None
    await asyncio.sleep(0)
    assert calls == ["process_exited", "connection_lost(None)"]
    assert "lost" in repr(transport)
    assert caplog.text.count("is lost") == 2
    monkeypatch.undo()
    for pid in (process.pid, transport.get_pid()):
        try:
            os.waitpid(pid, 0)
        except ChildProcessError:  # auto-reaped
            continue


def _no_child(*arguments: object) -> None:
    raise ChildProcessError(errno.ECHILD, os.strerror(errno.ECHILD))


async def test_echild_alone_does_not_prove_an_exit() -> None:
    """A forked copy of the program gets ECHILD while the child runs."""
    process = await create("read line; exit 3")
    read_end, write_end = os.pipe()
    copy = os.fork()
    if copy == 0:
        with open(write_end, "w", encoding="ascii") as report:
            report.write(repr(process.poll()))
        os._exit(0)
    os.close(write_end)
    with open(read_end, encoding="ascii") as report:
        assert report.read() == "None"
    os.waitpid(copy, 0)
    assert (await exit_of(process)).returncode == 3


async def test_a_forked_copy_can_drop_a_process_and_the_parent_still_hears() -> None:
    process = await create("read line; exit 3")
    transport = process._transport
    copy = os.fork()
    if copy == 0:
        transport.child.__del__()
        transport._child = None
        del process, transport
        os._exit(0)
    assert os.waitpid(copy, 0)[1] == 0
    assert process.poll() is None, "the copy killed it"
    assert (await exit_of(process)).returncode == 3


async def test_a_loop_that_is_closed_cannot_watch() -> None:
    closed = asyncio.new_event_loop()
    closed.close()
    process = await create("read line")
    stranger = Child(process.pid, os.dup(process.pidfd), reap=False, started_ns=0)
    with pytest.raises(RuntimeError, match="closed"):
        ChildWatcher.of(closed).watch(stranger)
    os.close(stranger.pidfd)
    stranger.pidfd = -1
    process.kill()
    await process.wait()


@on_both_loops
def test_a_child_detached_from_a_closed_loop_is_reaped_at_the_next_spawn(
    monkeypatch: pytest.MonkeyPatch, backend: str, make_loop: Factory
) -> None:
    """One that does not die at once, when the closed loop cannot watch it any more."""
    loop = make_loop()
    process = loop.run_until_complete(aioreap.create_subprocess_exec("sleep", "1000"))
    pid, pidfd = process.pid, os.dup(process.pidfd)
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        patch.setattr(watcher, "_DEATH_PATIENCE_MS", 0)
        patch.setattr(signal, "pidfd_send_signal", lambda *_: None)  # as in uninterruptible sleep
        loop.close()
        del loop, process
        gc.collect()
    assert pid in children()
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    poll = select.poll()
    # An auto-reaped child is gone when its pidfd hangs up, a little after it is readable.
    poll.register(pidfd, select.POLLHUP if backend == "autoreap" else select.POLLIN)
    poll.poll()
    assert (pid in children()) is (backend != "autoreap")
    with asyncio.Runner(loop_factory=make_loop) as runner:
        process = runner.run(aioreap.create_subprocess_exec("true"))
        assert pid not in children()
        assert runner.run(process.wait()) == 0
    os.close(pidfd)


TRACER = """
import ctypes, os, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
pid = int(sys.argv[1])
assert libc.ptrace(0x4206, pid, None, None) == 0, ctypes.get_errno()  # PTRACE_SEIZE
print("seized", flush=True)
# Waits until the child is dead, without reaping: it stays a zombie of this tracer's.
os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | 0x40000000)
print("dead", flush=True)
sys.stdin.readline()
os.waitpid(pid, 0x40000000)
"""


async def test_a_tracer_that_holds_the_dead_child_costs_no_processor_time() -> None:
    process = await create("read line; exit 3")
    with subprocess.Popen(  # its end lets go of the child
        [sys.executable, "-c", TRACER, str(process.pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as tracer:
        assert tracer.stdin is not None
        assert tracer.stdout is not None
        assert tracer.stdout.readline() == "seized\n"
        waiting = asyncio.ensure_future(exit_of(process))
        assert await asyncio.to_thread(tracer.stdout.readline) == "dead\n"
        before = time.thread_time()
        await asyncio.sleep(2)  # the time that the tracer holds the child, and the loop has
        used = time.thread_time() - before
        assert not waiting.done()
    assert (await waiting).returncode == 3
    assert tracer.returncode == 0
    assert used < 0.05


@pytest.mark.any_backend
async def test_who_is_interrupted_while_a_child_is_watched_can_still_give_it_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(self: EpollSet, descriptor: int, member: Member) -> None:
        real(self, descriptor, member)
        raise KeyboardInterrupt

    real = EpollSet.add
    monkeypatch.setattr(EpollSet, "add", interrupted)
    home = ChildWatcher.of(asyncio.get_running_loop())
    stranger = Stranger(os.getpid(), os.pidfd_open(os.getpid()), reap=False, started_ns=0)
    with pytest.raises(KeyboardInterrupt):
        home.watch(stranger)
    stranger.give_back()
    assert home.open_set().members == {}


@pytest.mark.any_backend
@pytest.mark.parametrize("ask", [_clone.reap, _clone.exit_info])
def test_no_number_is_taken_for_a_descriptor_that_it_is_not(
    ask: Callable[[int], object],
) -> None:
    pidfd = os.pidfd_open(os.getpid())
    try:
        with pytest.raises(OverflowError):
            ask(2**32 + pidfd)
    finally:
        os.close(pidfd)
