"""kill_group() and stop(group=True): whole trees, their leader alive or gone, and no strangers."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from conftest import open_descriptors
from test_copies import in_a_copy
from test_launch import HeldProgram, turns, until
from test_stopping import FOREVER, Hold, start

import aioreap
from aioreap import groups, kernel

pytestmark = pytest.mark.own_backend

KERNEL_SIGNALS_GROUPS = kernel._probe()["signal_process_group"].available


@pytest.fixture(params=["whole", "each"], autouse=True)
def way(request: pytest.FixtureRequest, backend: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """How groups are signalled: by the kernel, where it can, or member by member."""
    if request.param == "each":
        found = kernel.backend()
        features = {**found.features, "signal_process_group": kernel.Feature(False, "no")}
        monkeypatch.setattr(kernel, "_backend", replace(found, features=features))
    elif not KERNEL_SIGNALS_GROUPS:
        pytest.skip("this kernel signals no groups through a pidfd (Linux 6.9 does)")
    return str(request.param)


whole = pytest.mark.parametrize("way", ["whole"], indirect=True)
each = pytest.mark.parametrize("way", ["each"], indirect=True)


@pytest_asyncio.fixture
async def hold() -> AsyncIterator[Hold]:
    hold = Hold()
    yield hold
    await hold.end()


async def leader(script: str, hold: Hold, **options: int) -> aioreap.Process:
    return await start(script, hold, process_group=0, **options)


async def member(of: aioreap.Process, *command: str) -> aioreap.Process:
    """Another child of ours, in the group that `of` leads."""
    return await aioreap.create_subprocess_exec(
        *(command or ("cat",)), stdin=-1, stdout=-1, process_group=of.pid
    )


async def until_empty(process: aioreap.Process) -> None:
    """Wait until nobody is in its group, zombies included."""

    def is_empty() -> bool:
        try:
            process.kill_group(0)
        except ProcessLookupError:
            return True
        return False

    await until(is_empty)


TREE = "cat HOLD & cat HOLD & echo ready; cat HOLD"


@pytest.mark.parametrize("option", ["start_new_session", "process_group"])
async def test_a_group_is_killed_with_its_grandchildren(hold: Hold, option: str) -> None:
    process = await start(TREE, hold, **{option: option == "start_new_session"})
    process.kill_group()
    assert await process.wait() == -signal.SIGKILL
    assert process.stdout is not None
    assert await process.stdout.read() == b""


async def test_any_signal_can_be_sent_to_a_group(hold: Hold) -> None:
    process = await leader("cat HOLD & trap 'kill $!; exit 6' INT; echo ready; wait", hold)
    other = await member(process)
    process.kill_group(signal.SIGINT)
    assert await process.wait() == 6
    assert await other.wait() == -signal.SIGINT


async def test_no_other_group_is_reached(hold: Hold) -> None:
    stranger = await aioreap.create_subprocess_exec("cat", stdin=-1, stdout=-1, process_group=0)
    process = await leader("echo ready; exec cat HOLD", hold)
    process.kill_group()
    await process.wait()
    assert await stranger.communicate(b"alive") == (b"alive", None)


@pytest.mark.parametrize("option", [{}, {"process_group": os.getpgid(0)}])
async def test_a_child_that_leads_no_group_is_an_error(option: dict[str, int]) -> None:
    process = await aioreap.create_subprocess_exec("cat", stdin=-1, stdout=-1, **option)  # type: ignore[arg-type]
    said = rf"^child {process.pid} leads no process group: start it with start_new_session=True or"
    with pytest.raises(ValueError, match=said):
        process.kill_group()
    with pytest.raises(ValueError, match=said):
        await process.stop(group=True)
    assert await process.communicate(b"alive") == (b"alive", None)
    with pytest.raises(ValueError, match=said):
        await process.stop(group=True)


@whole
async def test_a_group_is_reached_after_its_leaders_death(hold: Hold) -> None:
    process = await leader("echo ready; read x <HOLD; exit 3", hold)
    other = await member(process)
    hold.release()
    assert await process.wait() == 3
    assert process.pidfd == -1
    process.kill_group(0)
    process.kill_group()
    assert await other.wait() == -signal.SIGKILL
    await until_empty(process)


@whole
async def test_grandchildren_are_reached_after_their_leaders_death(hold: Hold) -> None:
    process = await start("cat HOLD & echo ready; exit 4", hold, start_new_session=True)
    assert await process.wait() == 4
    process.kill_group()
    assert process.stdout is not None
    assert await process.stdout.read() == b""


async def test_an_empty_group_is_a_missing_process_once_the_exit_is_known() -> None:
    process = await aioreap.create_subprocess_exec("cat", stdin=-1, process_group=0)
    process.kill()
    while not kernel.is_readable(process.pidfd):
        pass
    process.kill_group()  # as send_signal() of a child that has exited
    assert process.exit_info is None
    await process.wait()
    await until_empty(process)


async def test_a_leader_that_leaves_nobody_keeps_no_descriptor() -> None:
    await (await aioreap.create_subprocess_exec("true")).wait()  # the loop's own comes with it
    before = open_descriptors().keys()
    process = await aioreap.create_subprocess_exec("true", start_new_session=True)
    await process.wait()
    await until_empty(process)
    assert not process._transport.child.is_group_alive()
    assert open_descriptors().keys() <= before


@whole
async def test_a_forgotten_leader_gives_its_descriptor_back_without_a_collection(
    hold: Hold,
) -> None:
    process = await start("cat HOLD & echo ready; exit 4", hold, start_new_session=True, stderr=-1)
    gc.disable()
    try:
        before = open_descriptors()
        await process.wait()
        assert "anon_inode:[pidfd]" in "".join(open_descriptors().values()) or len(
            open_descriptors()
        ) == len(before)
        hold.release()
        assert process.stdout is not None
        await process.communicate()
        await turns(5)
        hold.started.clear()
        del process
        left = open_descriptors()
    finally:
        gc.enable()
    assert len(left) == len(before) - 5  # two pipes, the pidfd, and the hold


@whole
async def test_a_copy_gives_up_what_reaches_the_group_of_a_leader_that_has_exited(
    hold: Hold,
) -> None:
    class Protocol(asyncio.SubprocessProtocol):
        def process_exited(self) -> None:
            exited.set()

    def pidfds() -> int:
        return [*open_descriptors().values()].count("anon_inode:[pidfd]")

    def close() -> None:
        before = pidfds()
        transport.close()
        os._exit(before - pidfds())

    exited = asyncio.Event()
    loop: Any = aioreap.install(asyncio.get_running_loop())
    transport, _ = await loop.subprocess_exec(
        Protocol,
        *("sh", "-c", f"cat {hold.path} & exit 4"),
        stdin=None,
        stdout=None,
        stderr=None,
        pass_fds=[hold.read_end],
        start_new_session=True,
    )
    await exited.wait()
    assert in_a_copy(close) == 1
    hold.release()


@pytest.mark.clone_backends
async def test_a_cancelled_spawn_of_a_leader_leaves_nothing_and_hits_nobody(
    tmp_path: Path,
) -> None:
    held = HeldProgram(tmp_path / "held")
    creating = asyncio.ensure_future(
        aioreap.create_subprocess_exec(held.path, start_new_session=True)
    )
    await turns(10)
    creating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await creating
    held.close()


# Stopped as a group.


async def test_a_stopped_group_gets_the_signal_and_then_sigkill(hold: Hold) -> None:
    script = "(trap '' TERM; echo ready; exec cat HOLD) & exec cat HOLD"
    process = await start(script, hold, start_new_session=True)
    stopping = asyncio.ensure_future(process.stop(group=True, grace=FOREVER))
    assert await process.wait() == -signal.SIGTERM
    await turns(10)
    assert not stopping.done()
    await process.stop(group=True, grace=0.01)
    assert await stopping is process.exit_info
    assert process.stdout is not None
    assert await process.stdout.read() == b""


async def test_a_member_that_outlives_the_leader_has_its_grace(hold: Hold) -> None:
    process = await leader("echo ready; exec cat HOLD", hold)
    other = await member(process, "sh", "-c", "trap '' TERM; echo; read x; exit 5")
    assert other.stdin is not None
    assert other.stdout is not None
    await other.stdout.readline()
    stopping = asyncio.ensure_future(process.stop(group=True, grace=FOREVER))
    await process.wait()
    await turns(10)
    assert not stopping.done()
    other.stdin.write(b"\n")
    assert (await stopping).signal is signal.SIGTERM
    assert await other.wait() == 5


async def test_no_grace_kills_the_group_at_once(hold: Hold) -> None:
    process = await start("trap '' TERM; " + TREE, hold, start_new_session=True)
    assert (await process.stop(group=True, grace=0, drain=FOREVER)).signal is signal.SIGKILL
    assert process.stdout is not None
    assert await process.stdout.read() == b""


async def test_a_later_caller_widens_a_stop_to_the_group(hold: Hold) -> None:
    process = await leader("trap '' TERM; echo ready; exec cat HOLD", hold)
    other = await member(process)
    alone = asyncio.ensure_future(process.stop(grace=FOREVER))
    await turns(3)
    whole = asyncio.ensure_future(process.stop(group=True, grace=FOREVER))
    assert await other.wait() == -signal.SIGTERM
    process.kill()
    assert await alone is await whole


@pytest.mark.parametrize("group", [False, True])
async def test_a_cancelled_stop_kills_the_group_at_once(hold: Hold, group: bool) -> None:
    process = await start("trap '' TERM; " + TREE, hold, start_new_session=True)
    stopping = asyncio.ensure_future(process.stop(group=group, grace=FOREVER))
    await turns(3)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert process.returncode == -signal.SIGKILL
    assert process.stdout is not None
    assert await process.stdout.read() == b""


async def test_a_stop_cancelled_after_the_leaders_death_kills_the_others(hold: Hold) -> None:
    script = "(trap '' TERM; echo ready; exec cat HOLD) & exec cat HOLD"
    process = await start(script, hold, start_new_session=True)
    stopping = asyncio.ensure_future(process.stop(group=True, grace=FOREVER))
    await process.wait()
    await turns(3)
    assert not stopping.done()
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert process.stdout is not None
    assert await process.stdout.read() == b""


DRAINED = "(cat HOLD; echo late) & echo ready; exec cat HOLD"


async def cancel_stop_in_its_drain(process: aioreap.Process) -> None:
    """The leader alone was stopped, and another holds the output."""
    stopping = asyncio.ensure_future(process.stop(grace=FOREVER, drain=FOREVER))
    assert await process.wait() == -signal.SIGTERM
    await turns(3)
    assert not stopping.done()
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping


async def test_a_stop_cancelled_in_its_drain_kills_the_others_where_the_kernel_can(
    hold: Hold, way: str
) -> None:
    process = await start(DRAINED, hold, start_new_session=True)
    await cancel_stop_in_its_drain(process)
    hold.release()
    assert process.stdout is not None
    assert await process.stdout.read() == (b"" if way == "whole" else b"late\n")


@pytest.mark.parametrize("moment", ["grace", "drain"])
async def test_a_cancelled_stop_of_a_child_not_started_as_a_leader_kills_it_alone(
    hold: Hold, moment: str
) -> None:
    """Though it has come to lead a group."""
    script = f"exec setsid sh -c '{DRAINED}'"
    if moment == "grace":
        script = f"trap '' TERM; {script}"
    process = await start(script, hold)
    assert os.getpgid(process.pid) == process.pid
    if moment == "drain":
        await cancel_stop_in_its_drain(process)
    else:
        stopping = asyncio.ensure_future(process.stop(grace=FOREVER))
        await turns(3)
        stopping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopping
        assert process.returncode == -signal.SIGKILL
    hold.release()
    assert process.stdout is not None
    assert await process.stdout.read() == b"late\n"


@whole
async def test_after_the_leaders_death_stop_is_for_the_others(hold: Hold) -> None:
    process = await leader("echo ready; read x <HOLD; exit 3", hold)
    other = await member(process)
    hold.release()
    await process.wait()
    assert (await process.stop()).returncode == 3
    assert other.poll() is None
    assert (await process.stop(group=True, grace=FOREVER)).returncode == 3
    assert await other.wait() == -signal.SIGTERM
    assert (await process.stop(group=True)).returncode == 3


async def test_zombies_do_not_keep_a_stop_waiting(hold: Hold) -> None:
    process = await leader("echo ready; exec cat HOLD", hold)
    # It never reaps what it has started in the leader's group, and leaves that itself.
    script = (
        "import os, sys\n"
        "if os.fork() == 0: os.execvp('cat', ['cat', sys.argv[1]])\n"
        "os.setpgid(0, 0)\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    parent = await aioreap.create_subprocess_exec(
        sys.executable,
        "-c",
        script,
        hold.path,
        stdin=-1,
        stdout=-1,
        process_group=process.pid,
        pass_fds=[hold.read_end],
    )
    assert parent.stdout is not None
    await parent.stdout.readline()
    assert (await process.stop(group=True, grace=FOREVER, drain=0)).signal is signal.SIGTERM
    assert await parent.communicate() == (b"", None)


@pytest.mark.parametrize("readings", [1, 2, 100])
async def test_a_member_that_a_reading_of_proc_has_missed_is_not_forgotten(
    hold: Hold, monkeypatch: pytest.MonkeyPatch, way: str, readings: int
) -> None:
    """As a member's child is, if that was made after the list and its parent is gone since."""
    process = await leader("echo ready; read x <HOLD; exit 3", hold)
    other = await member(process)
    hold.release()
    await process.wait()
    missed: list[str] = []
    listdir = os.listdir

    def list_all_but(path: str) -> list[str]:
        names = listdir(path)
        if path == "/proc" and len(missed) < readings:
            missed.append(str(2**22 + len(missed)))  # above all pids
            names = [name for name in names if name != str(other.pid)] + missed[-1:]
        return names

    with monkeypatch.context() as patch:
        patch.setattr(groups.os, "listdir", list_all_but)
        assert process._transport.child.is_group_alive()
    assert missed
    if way == "whole":
        process.kill_group(0)
    assert await other.communicate(b"alive") == (b"alive", None)
    await until_empty(process)


# Where the kernel cannot.


@each
async def test_the_others_of_a_leader_that_is_gone_are_an_error_that_names_the_kernel(
    hold: Hold,
) -> None:
    process = await leader("echo ready; read x <HOLD; exit 3", hold)
    other = await member(process)
    hold.release()
    await process.wait()
    with pytest.raises(OSError, match=r"Linux 6\.9") as caught:
        process.kill_group()
    assert caught.value.errno == errno.ENOSYS
    with pytest.raises(OSError, match=r"Linux 6\.9"):
        await process.stop(group=True, grace=0.01)
    assert await other.communicate(b"alive") == (b"alive", None)
    assert (await process.stop(group=True)).returncode == 3
    with pytest.raises(ProcessLookupError):
        process.kill_group()


@each
async def test_nobody_is_signalled_once_something_else_has_reaped_the_leader(
    hold: Hold, backend: str
) -> None:
    if backend == "autoreap":
        pytest.skip("nothing can reap it")
    process = await leader("echo ready; exec cat HOLD", hold)
    other = await member(process)
    process.kill()
    os.waitpid(process.pid, 0)
    with pytest.raises(OSError, match=r"Linux 6\.9"):
        process.kill_group()
    assert await other.communicate(b"alive") == (b"alive", None)
    if kernel.backend().features["exit_info"].available:
        assert await process.wait() == -signal.SIGKILL
    else:
        with pytest.raises(aioreap.ExitStatusLost):
            await process.wait()


@each
async def test_a_stop_that_could_not_see_all_of_the_group_says_so(
    hold: Hold, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aioreap.stopping._GROUP_PATIENCE", 0.01)
    process = await leader("echo ready; exec cat HOLD", hold)
    other = await member(process)
    with monkeypatch.context() as patch:  # as if that had come a little later
        patch.setattr(groups, "_living_members", lambda leader: iter([leader]))
        first = asyncio.ensure_future(process.stop(group=True, grace=FOREVER))
        await turns(1)
    assert await process.wait() == -signal.SIGTERM
    for stopping in (process.stop(group=True, grace=0.01), first):
        with pytest.raises(OSError, match=r"Linux 6\.9"):
            await stopping
    assert await other.communicate(b"alive") == (b"alive", None)


@each
async def test_without_proc_it_is_an_error(hold: Hold, monkeypatch: pytest.MonkeyPatch) -> None:
    process = await leader("echo ready; exec cat HOLD", hold)
    monkeypatch.setattr(groups.os, "readlink", lambda _: "1")
    with pytest.raises(OSError, match="without /proc"):
        process.kill_group()
    monkeypatch.undo()
    process.kill()
    await process.wait()


@whole
@pytest.mark.parametrize("asks", [False, True])
def test_a_group_is_within_reach_when_the_end_of_its_leader_is_seen_after_the_loops(
    asks: bool,
) -> None:
    stdin, release = os.pipe()
    held, stdout = os.pipe()

    async def main() -> aioreap.Process:
        return await aioreap.create_subprocess_exec(
            "sh", "-c", "sleep 1000 & read line", stdin=stdin, stdout=stdout, start_new_session=True
        )

    loop = asyncio.SelectorEventLoop()
    process = loop.run_until_complete(main())
    loop.close()
    for descriptor in (stdin, release, stdout):
        os.close(descriptor)
    assert process._transport.get_extra_info("subprocess").wait() == process.poll() == 1
    if asks:
        process._transport.get_protocol()
    process.kill_group()
    assert os.read(held, 1) == b""  # nobody is left who could write
    os.close(held)
    process._transport.child.forget_group()
