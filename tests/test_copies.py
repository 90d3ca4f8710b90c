"""A forked copy of the program closes its own descriptors, and disturbs nobody else's children."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Callable

import pytest
from program import run_program
from raw import wait_readable
from test_launch import turns
from test_loops import FACTORIES

import aioreap
from aioreap import transport
from aioreap.watcher import ChildWatcher

Factory = Callable[[], asyncio.AbstractEventLoop]


def in_a_copy(act: Callable[[], object]) -> int:
    """Do `act` in a forked copy, wait for its end, and return its exit status."""
    copy = os.fork()
    if copy == 0:
        try:
            act()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1])


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
def test_a_copy_that_closes_its_loop_kills_nobody(factory: Factory) -> None:
    async def main() -> None:
        process = await aioreap.create_subprocess_exec("cat", stdin=-1, stdout=-1)
        loop = asyncio.get_running_loop()

        def close() -> None:
            asyncio._set_running_loop(None)
            transport.abandon_children(loop)  # what close() begins with

        in_a_copy(close)
        assert process.poll() is None
        assert await process.communicate(b"heard") == (b"heard", None)
        assert process.returncode == 0

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())


async def test_a_copy_that_closes_a_transport_kills_nobody_and_the_parent_hears() -> None:
    process = await aioreap.create_subprocess_exec("cat", stdin=-1, stdout=-1)
    in_a_copy(process._transport.close)
    assert process.poll() is None
    assert await process.communicate(b"heard") == (b"heard", None)
    assert process.returncode == 0


async def test_a_copy_hears_no_more_of_a_child_that_it_has_let_go() -> None:
    def let_go() -> None:
        pidfd = os.dup(process.pidfd)
        process._transport.close()
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        wait_readable(pidfd)
        os._exit(5 if epoll_set._epoll.poll(0) == [] else 6)

    process = await aioreap.create_subprocess_exec("sleep", "1000")
    epoll_set = ChildWatcher.of(asyncio.get_running_loop()).open_set()
    assert in_a_copy(let_go) == 5
    assert await process.wait() == -signal.SIGKILL


async def test_a_copy_can_spawn_children_of_its_own() -> None:
    async def main() -> int:
        process = await aioreap.create_subprocess_exec("sh", "-c", "exit 3")
        return await process.wait()

    def afresh() -> None:
        asyncio._set_running_loop(None)
        os._exit(asyncio.run(main()))

    process = await aioreap.create_subprocess_exec("cat", stdin=-1)
    assert in_a_copy(afresh) == 3
    assert process.poll() is None
    await process.communicate()
    assert process.returncode == 0


def in_a_copy_by_c(act: Callable[[], object]) -> None:
    """Do `act` in a copy that Python does not know of."""
    copy = ctypes.PyDLL(None).fork()
    if copy == 0:
        try:
            act()
        finally:
            os._exit(0)
    os.waitpid(copy, 0)


async def test_a_copy_that_python_does_not_know_of_leaves_the_parents_children() -> None:
    process = await aioreap.create_subprocess_exec("cat", stdin=-1)
    in_a_copy_by_c(process._transport.close)
    assert process.poll() is None
    await process.communicate()
    assert process.returncode == 0


@pytest.mark.parametrize("count", range(1, 4))
async def test_such_a_copy_leaves_the_pipes_of_an_attach_under_way_to_the_parent(
    count: int,
) -> None:
    script = "read line; exec <&-; exec sleep 1000"
    process = await aioreap.create_subprocess_exec("sh", "-c", script, stdin=-1, stdout=-1)
    attaching = asyncio.ensure_future(aioreap.attach(process.detach()))
    await turns(count)
    loop = asyncio.get_running_loop()
    in_a_copy_by_c(lambda: transport.abandon_children(loop))  # what close() begins with
    attached = await attaching
    assert attached.stdin is not None
    attached.stdin.write(b"\n")
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        await attached.stdin.wait_closed()
    attached.kill()
    assert await attached.wait() == -signal.SIGKILL


async def test_such_a_copy_that_asks_how_a_stranger_ended_leaves_that_to_the_parent() -> None:
    stranger = subprocess.Popen(["sleep", "1000"])
    attached = await aioreap.attach(stranger.pid)
    stranger.kill()
    stranger.wait()
    in_a_copy_by_c(attached.poll)
    with contextlib.suppress(aioreap.ExitStatusLost):  # before Linux 6.15
        assert await attached.wait() == -signal.SIGKILL


WORKERS = "just_exit\nwork_and_exit\nclose_what_is_inherited\ndrop_what_is_inherited\n"


@pytest.mark.own_backend
@pytest.mark.parametrize(
    "loop",
    [
        "UvloopEventLoop",
        pytest.param("EventLoop", marks=pytest.mark.slow),
        pytest.param("asyncio", marks=pytest.mark.slow),
        pytest.param("installed", marks=pytest.mark.slow),
        pytest.param("installed-uvloop", marks=pytest.mark.slow),
    ],
)
def test_a_pre_fork_servers_workers_end_as_programs_do_and_the_server_still_hears(
    loop: str,
) -> None:
    done = run_program("prefork", loop)
    done.expect(WORKERS)
    assert done.warnings_of_ours() == 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "forkserver"])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "EventLoop", "UvloopEventLoop"])
def test_workers_of_multiprocessing_have_children_and_leave_the_servers_alone(
    loop: str, method: str
) -> None:
    done = run_program("workers", loop, method)
    done.expect("served\n")
    assert done.warnings_of_ours() == 0


def test_a_copy_can_go_on_with_the_asyncio_loop_that_it_inherits() -> None:
    """As a program does that becomes a daemon when it has a loop, and children."""
    read_end, write_end = os.pipe()
    loop = asyncio.SelectorEventLoop()
    heard = loop.create_future()
    process = loop.run_until_complete(aioreap.create_subprocess_exec("cat", stdin=-1))
    loop.add_reader(read_end, lambda: heard.set_result(os.read(read_end, 5)))

    def go_on() -> None:
        os.write(write_end, b"ready")
        if loop.run_until_complete(heard) == b"ready":
            os._exit(5)

    assert in_a_copy(go_on) == 5
    loop.remove_reader(read_end)
    loop.run_until_complete(process.communicate())
    loop.close()
    os.close(read_end)
    os.close(write_end)
