"""Hard times: whatever fails, at whatever step, is an error that leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import gc
import itertools
import os
import re
import resource
import select
import shutil
import signal
import socket
import subprocess
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from apart import NOBODY, Factory, as_root, become_an_ordinary_user, on_both_loops, run_apart
from conftest import _LOOPS, children, open_descriptors
from test_launch import HeldProgram, one_clone_a_turn, turns, until
from test_loops import FACTORIES

import aioreap
from aioreap import _clone, kernel, spawn
from aioreap.epollset import EpollSet
from aioreap.options import Options
from aioreap.watcher import Child, ChildWatcher

pytestmark = pytest.mark.own_backend


@pytest.fixture
def held(tmp_path: Path) -> Iterator[HeldProgram]:
    program = HeldProgram(tmp_path / "held")
    yield program
    program.close()


PIPES: dict[str, int] = {"stdin": -1, "stdout": -1, "stderr": -1}


async def expect_that_a_spawn_works() -> None:
    process = await aioreap.create_subprocess_exec("/bin/sh", "-c", "cat; exit 3", **PIPES)  # type: ignore[arg-type]
    assert await process.communicate(b"in") == (b"in", b"")
    assert process.returncode == 3


async def error_of(*command: Any, **options: Any) -> OSError:
    """The error of a spawn that fails at once, and leaves no child."""
    with pytest.raises(OSError, match=r".") as caught:
        await aioreap.create_subprocess_exec(*command, **options)
    assert children() == []
    return caught.value


@contextlib.contextmanager
def limited(name: int, soft: int) -> Iterator[None]:
    """This process's limit lowered for a while."""
    before = resource.getrlimit(name)
    resource.setrlimit(name, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(name, before)


def next_descriptor() -> int:
    descriptor = os.dup(0)
    os.close(descriptor)
    return descriptor


# No more descriptors, no more processes.


async def test_emfile_at_each_descriptor_of_a_spawn_leaves_nothing() -> None:
    """A limit of so many descriptors that the spawn fails at its first one, its second, ..."""
    await expect_that_a_spawn_works()  # libuv has the descriptor now that it keeps
    before = open_descriptors()
    lowest = next_descriptor()
    for limit in itertools.count(lowest):
        process = error = None
        with limited(resource.RLIMIT_NOFILE, limit):
            try:
                process = await aioreap.create_subprocess_exec("cat", **PIPES)  # type: ignore[arg-type]
            except OSError as caught:
                error = caught.errno
        if process is not None:
            assert await process.communicate(b"in") == (b"in", b"")
            break
        assert error == errno.EMFILE
        assert children() == []
        assert open_descriptors() == before
    # Three pipes, the exec pipe or what Popen has in its place, and a pidfd.
    assert limit - lowest >= 9


@pytest.mark.clone_backends
async def test_emfile_at_each_descriptor_of_a_deferred_spawn_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is kept for a later turn of the loop takes more of them."""
    one_clone_a_turn(monkeypatch)
    await expect_that_a_spawn_works()
    before, loop = open_descriptors(), asyncio.get_running_loop()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = next_descriptor()
    for limit in itertools.count(lowest):
        # In one turn: a spawn that takes it all, the limit, and the spawn that is deferred.
        first = asyncio.ensure_future(aioreap.create_subprocess_exec("true"))
        loop.call_soon(resource.setrlimit, resource.RLIMIT_NOFILE, (limit, hard[1]))
        second = asyncio.ensure_future(aioreap.create_subprocess_exec("cat", **PIPES))  # type: ignore[arg-type]
        await asyncio.wait([first, second])
        resource.setrlimit(resource.RLIMIT_NOFILE, hard)
        assert await first.result().wait() == 0
        error = second.exception()
        if error is None:
            assert await second.result().communicate(b"in") == (b"in", b"")
            break
        assert isinstance(error, OSError)
        assert error.errno == errno.EMFILE
        del first, second, error
        assert children() == []
        gc.collect()
        assert open_descriptors() == before
    assert limit - lowest >= 10


@as_root
@on_both_loops
def test_a_user_with_too_many_processes_is_told_eagain(make_loop: Factory) -> None:
    async def main() -> None:
        become_an_ordinary_user()
        await expect_that_a_spawn_works()
        with limited(resource.RLIMIT_NPROC, 1):
            for options in ({}, PIPES, {"user": NOBODY}, {"preexec_fn": os.getpid}):
                error = await error_of("true", **options)
                assert type(error) is BlockingIOError
                assert error.errno == errno.EAGAIN
        await expect_that_a_spawn_works()

    run_apart(make_loop, main)


# Calls that fail.


def failing(call: Callable[..., Any], at: int, number: int) -> Callable[..., Any]:
    """`call`, but the call number `at` fails with the errno `number`."""
    calls = itertools.count(1)

    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            raise OSError(number, os.strerror(number))
        return call(*args, **kwargs)

    return counted


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM])
async def test_a_clone_that_fails_is_that_error(
    monkeypatch: pytest.MonkeyPatch, number: int, backend: str
) -> None:
    target: Any = subprocess if backend == "popen" else _clone
    name = "_fork_exec" if backend == "popen" else "spawn"
    monkeypatch.setattr(target, name, failing(getattr(target, name), 1, number))
    error = await error_of("true", **PIPES)
    assert (error.errno, error.strerror) == (number, os.strerror(number))
    await expect_that_a_spawn_works()


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
async def test_a_pipe_that_cannot_be_made_is_that_error(
    monkeypatch: pytest.MonkeyPatch, at: int, number: int
) -> None:
    monkeypatch.setattr(os, "pipe", failing(os.pipe, at, number))
    assert (await error_of("true", **PIPES)).errno == number
    await expect_that_a_spawn_works()


@pytest.mark.parametrize("pipes", [PIPES, {}], ids=["pipes", "no-pipes"])
async def test_a_reader_that_cannot_be_added_is_that_error(
    monkeypatch: pytest.MonkeyPatch, pipes: dict[str, int]
) -> None:
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "add_reader", failing(loop.add_reader, 1, errno.ENOSPC))
    assert (await error_of("cat", **pipes)).errno == errno.ENOSPC
    await expect_that_a_spawn_works()


@pytest.mark.parametrize("pipes", [PIPES, {}], ids=["pipes", "no-pipes"])
@pytest.mark.parametrize("call", ["take", "add"])
async def test_a_descriptor_that_cannot_be_watched_is_that_error(
    monkeypatch: pytest.MonkeyPatch, call: str, pipes: dict[str, int], backend: str
) -> None:
    """When the child is taken over the kernel refuses, or before that an epoll set of nobody's."""
    if backend == "popen" and call == "take":
        pytest.skip("no exec pipe, and nothing to take over")
    refuses = errno.ENOSPC

    def take(block: _clone.Block, epoll: int = -1) -> None:
        real(block)
        if epoll >= 0:
            raise OSError(refuses, os.strerror(refuses))

    def destroy(child: Child, destroy: Callable[[Child], None] = Child.destroy) -> None:
        pidfd = child.pidfd
        destroy(child)
        while not others or others[-1] < pidfd:
            others.append(os.open("/dev/null", os.O_RDONLY))

    others: list[int] = []  # which have the number of what was closed, and nobody else closes
    if backend == "popen":
        monkeypatch.setattr(EpollSet, "add", failing(EpollSet.add, 1, refuses))
    elif call == "add":
        monkeypatch.setattr(EpollSet, "take", failing(EpollSet.take, 1, refuses))
    else:
        real = _clone.take
        monkeypatch.setattr(_clone, "take", take)
    monkeypatch.setattr(Child, "destroy", destroy)
    assert (await error_of("cat", **pipes)).errno == refuses
    assert ChildWatcher.of(asyncio.get_running_loop()).open_set().members == {}
    gc.collect()  # the block, which the error's traceback keeps
    for descriptor in others:
        os.close(descriptor)
    monkeypatch.undo()
    await expect_that_a_spawn_works()


@pytest.mark.parametrize(
    ("name", "at"), [("connect_write_pipe", 1), ("connect_read_pipe", 1), ("connect_read_pipe", 2)]
)
@pytest.mark.parametrize("program", ["cat", "/nonexistent"])
async def test_a_pipe_that_cannot_be_connected_is_that_error(
    monkeypatch: pytest.MonkeyPatch, name: str, at: int, program: str, backend: str
) -> None:
    loop = asyncio.get_running_loop()
    call = failing(getattr(loop, name), at, errno.ENOSPC)
    monkeypatch.setattr(loop, name, call)
    expected = {errno.ENOSPC}
    if backend == "popen" and program != "cat":
        expected = {errno.ENOSPC, errno.ENOENT}  # Popen knows already that there is no program
    assert (await error_of(program, **PIPES)).errno in expected
    monkeypatch.undo()
    await expect_that_a_spawn_works()


async def test_a_pidfd_that_there_is_no_room_for_is_emfile(
    monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """The kernel then truncates what Popen's child sends, which runs already."""
    if backend != "popen":
        pytest.skip("the clone itself fails then")
    stdin, release = os.pipe()
    rescue = threading.Timer(60, os.write, [release, b"\n"])  # who waits for the child has lost
    rescue.start()
    real = socket.recv_fds
    monkeypatch.setattr(socket, "recv_fds", lambda *_: (bytes(8), [], socket.MSG_CTRUNC, None))
    try:
        error = await error_of("head", "-n1", stdin=stdin, stdout=-1)
        assert error.errno == errno.EMFILE
        assert not rescue.finished.is_set(), "it was waited for, not killed"
    finally:
        rescue.cancel()
        rescue.join()
        os.close(stdin)
        os.close(release)
    monkeypatch.setattr(socket, "recv_fds", real)
    await expect_that_a_spawn_works()


async def test_a_loop_without_readers_is_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def add_reader(*_: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(asyncio.get_running_loop(), "add_reader", add_reader)
    with pytest.raises(NotImplementedError):
        await aioreap.create_subprocess_exec("cat", stdin=-1)
    assert children() == []
    monkeypatch.undo()


@pytest.mark.any_backend
@pytest.mark.parametrize("options", [{}, {"preexec_fn": bool}], ids=["", "preexec_fn"])
@pytest.mark.parametrize("cancelled_after", [None, 1, 2, 3, 4, 5])
async def test_a_busy_program_that_is_tried_again_has_its_pipes(
    tmp_path: Path, options: Options, cancelled_after: int | None
) -> None:
    first = await aioreap.create_subprocess_exec("cat", stdin=-1, stdout=-1)
    await first.communicate()  # what the loop keeps comes with it
    del first
    before = open_descriptors()
    program = tmp_path / "written"
    shutil.copy("/bin/echo", program)
    with program.open("ab"):
        creating = asyncio.ensure_future(
            aioreap.create_subprocess_exec(program, "heard", stdin=-1, stdout=-1, **options)
        )
        await turns(cancelled_after or 3)
        if cancelled_after is not None:
            creating.cancel()
            with pytest.raises((asyncio.CancelledError, OSError)):
                await creating
    if cancelled_after is None:
        process = await creating
        assert await process.communicate() == (b"heard\n", None)
        del process
    del creating
    await turns(10)
    assert open_descriptors().keys() <= before.keys()


# Calls that are refused.


class Refusing:
    """_clone.spawn() behind a filter: what is in `refused` cannot be had."""

    def __init__(self, refused: set[str], number: int) -> None:
        self.calls: list[str] = []
        self._refused = refused
        self._number = number
        self._real = _clone.spawn

    def __call__(self, *arguments: Any) -> tuple[int, int, int, _clone.Block]:
        flags, legacy = arguments[4], arguments[6]
        memory = "sharing" if flags & kernel.CLONE_VM else "copying"
        name = f"{'clone' if legacy else 'clone3'} {memory}"
        self.calls.append(name)
        if name in self._refused:
            raise OSError(self._number, os.strerror(self._number))
        return self._real(*arguments)


LADDER = ["clone3 sharing", "clone sharing", "clone copying"]


@pytest.fixture
def unforced(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """The backend is what it is, but nobody insists on it."""
    monkeypatch.delenv("AIOREAP_BACKEND")
    monkeypatch.setattr(kernel, "_backend", None)
    found = kernel.backend()
    if found.name != backend:
        pytest.skip(f"this kernel's is {found.name}")


@pytest.mark.clone_backends
@pytest.mark.usefixtures("unforced")
@pytest.mark.parametrize(
    "number", [errno.EPERM, errno.ENOSYS, errno.EINVAL], ids=errno.errorcode.get
)
@pytest.mark.parametrize("rungs", range(4))
async def test_a_refused_clone_falls_down_the_ladder(
    monkeypatch: pytest.MonkeyPatch, rungs: int, number: int
) -> None:
    refusing = Refusing(set(LADDER[:rungs]), number)
    monkeypatch.setattr(_clone, "spawn", refusing)
    await expect_that_a_spawn_works()
    assert refusing.calls == LADDER[: rungs + 1]
    error = await error_of("/nonexistent", **PIPES)
    assert (error.errno, error.filename) == (errno.ENOENT, "/nonexistent")


@pytest.mark.clone_backends
@pytest.mark.usefixtures("unforced")
@as_root
@pytest.mark.parametrize(
    "refused", [set(), {"clone3 copying"}, {"clone3 copying", "clone copying"}]
)
async def test_what_must_not_share_memory_never_does_on_the_ladder(
    monkeypatch: pytest.MonkeyPatch, refused: set[str]
) -> None:
    refusing = Refusing(refused, errno.ENOSYS)
    monkeypatch.setattr(_clone, "spawn", refusing)
    process = await aioreap.create_subprocess_exec("id", "-u", stdout=-1, user=1234)
    assert await process.communicate() == (b"1234\n", None)
    assert not any("sharing" in call for call in refusing.calls)


@pytest.mark.clone_backends
async def test_a_forced_backend_that_is_refused_is_the_refusals_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_clone, "spawn", Refusing(set(LADDER), errno.EPERM))
    assert (await error_of("true", **PIPES)).errno == errno.EPERM
    monkeypatch.undo()


# Cancellation; tests/test_cancellation.py has it at each turn and at each await.


@pytest.mark.clone_backends
@pytest.mark.parametrize("again", [False, True], ids=["once", "at-each-turn"])
@pytest.mark.parametrize("pipes", [PIPES, {}], ids=["pipes", "no-pipes"])
async def test_a_cancellation_while_the_program_is_loaded_leaves_nothing(
    tmp_path: Path, pipes: dict[str, int], again: bool
) -> None:
    await expect_that_a_spawn_works()
    before = open_descriptors()
    for turn in [*range(1, 30), 1000]:
        held = HeldProgram(tmp_path / "held")
        creating = asyncio.ensure_future(aioreap.create_subprocess_exec(held.path, **pipes))  # type: ignore[arg-type]
        await turns(turn)
        assert not creating.done()
        while not creating.done():
            if again or not creating.cancelling():
                creating.cancel()
            await asyncio.sleep(0)
        assert creating.cancelled()
        held.close()
        if again:
            await until(lambda: not children() and open_descriptors() == before)
        assert children() == []
        assert open_descriptors() == before
        held.path.unlink()


@pytest.mark.clone_backends
@pytest.mark.parametrize("pipes", [PIPES, {}], ids=["pipes", "no-pipes"])
async def test_a_call_that_is_closed_while_it_waits_leaves_nothing(
    held: HeldProgram, pipes: dict[str, int]
) -> None:
    """Thrown away by whoever drives it: GeneratorExit, and nothing can be awaited."""
    creating = aioreap.create_subprocess_exec(held.path, **pipes)  # type: ignore[arg-type]
    creating.send(None)
    assert children() != []
    creating.close()
    await until(lambda: not children())
    await expect_that_a_spawn_works()


# A death before the exec.


def broken(held: HeldProgram) -> bool:
    """Whether a child stands in execve() and waits for the lease."""
    return fcntl.fcntl(held._descriptor, fcntl.F_GETLEASE) != fcntl.F_WRLCK


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGQUIT])
@pytest.mark.parametrize("pipes", [PIPES, {}], ids=["pipes", "no-pipes"])
async def test_a_signal_in_the_exec_is_the_childs_status(
    held: HeldProgram, number: int, pipes: dict[str, int], backend: str
) -> None:
    """From another thread, as Popen does not return before."""

    def kill() -> None:
        while not broken(held):
            os.sched_yield()
        for pid in children():
            os.kill(pid, number)

    killer = threading.Thread(target=kill)
    killer.start()
    creating = aioreap.create_subprocess_exec(held.path, **pipes)  # type: ignore[arg-type]
    if backend == "popen" and number == signal.SIGINT:
        with pytest.raises(InterruptedError):  # Popen's child still has Python's handler
            await creating
    else:
        process = await creating
        await process.communicate()
        # No core is dumped of what is this process's memory as well.
        killed = number if backend == "popen" or number == signal.SIGINT else signal.SIGKILL
        assert process.returncode == -killed
    killer.join()


# Loops that are closed.

ALL_FACTORIES: dict[str, Factory] = {**_LOOPS, **FACTORIES}


@pytest.fixture(params=ALL_FACTORIES)
def factory(request: pytest.FixtureRequest) -> Factory:
    return ALL_FACTORIES[request.param]


# What asyncio and uvloop themselves warn of: pipes that only a running loop could close.
OF_THE_LOOPS = re.compile(r"^loop is closed$|PipeTransport (closing )?fd=|UnixTransport closed=")


@contextlib.contextmanager
def one_warning_of_ours(count: int = 1) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
        gc.collect()
    ours = [w for w in caught if "still ran when its event loop was closed" in str(w.message)]
    assert [w.category for w in ours] == [ResourceWarning] * count
    others = [str(w.message) for w in caught if w not in ours]
    assert [other for other in others if not OF_THE_LOOPS.search(other)] == []


def expect_death_of(pidfd: int) -> None:
    """That it dies, and that the next spawn at the latest leaves nothing of it."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(60_000), "the child lives"
    os.close(pidfd)
    asyncio.run(expect_that_a_spawn_works())
    assert children() == []


@pytest.mark.parametrize("pipes", [PIPES, {"stdin": -1}, {}], ids=["pipes", "stdin", "no-pipes"])
def test_closing_any_loop_under_a_child_is_one_warning_and_its_death(
    factory: Factory, pipes: dict[str, int]
) -> None:
    with one_warning_of_ours():
        loop = factory()
        process = loop.run_until_complete(
            aioreap.create_subprocess_exec("sleep", "1000", **pipes)  # type: ignore[arg-type]
        )
        pidfd = os.pidfd_open(process.pid)
        loop.close()
        del process, loop
        gc.collect()
        expect_death_of(pidfd)


@pytest.mark.clone_backends
@pytest.mark.parametrize("pipes", [PIPES, {}], ids=["pipes", "no-pipes"])
def test_closing_any_loop_under_a_program_being_loaded_is_one_warning_and_its_death(
    factory: Factory, pipes: dict[str, int], held: HeldProgram
) -> None:
    with one_warning_of_ours():
        loop = factory()
        creating = loop.create_task(aioreap.create_subprocess_exec(held.path, **pipes))  # type: ignore[arg-type]
        creating._log_destroy_pending = False  # type: ignore[attr-defined]
        loop.run_until_complete(until(lambda: broken(held)))
        (pid,) = children()
        pidfd = os.pidfd_open(pid)
        loop.close()
        del creating, loop
        gc.collect()
        held.release()
        expect_death_of(pidfd)


def coroutines_of(call: Any) -> list[Any]:
    """The coroutines of ours that a call consists of, the outermost first."""
    found = []
    while hasattr(call, "cr_await"):
        found.append(call)
        call = call.cr_await
    return [each for each in found if "aioreap" in each.cr_code.co_filename]


@pytest.mark.clone_backends
@pytest.mark.parametrize("depth", range(3))
def test_a_call_whose_closed_loop_is_forgotten_ends_quietly_wherever_that_begins(
    factory: Factory, held: HeldProgram, depth: int
) -> None:
    """In a cycle of garbage, any of its coroutines can be the first to be closed."""
    loop = factory()
    call: Any = aioreap.create_subprocess_exec(held.path, **PIPES)  # type: ignore[arg-type]
    asyncio._set_running_loop(loop)
    call.send(None)
    asyncio._set_running_loop(None)
    coroutines = coroutines_of(call)
    assert coroutines[2].__name__ == "_connect_pipes"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        loop.close()
        coroutines[depth].close()
        for coroutine in coroutines:
            coroutine.close()
        del call, coroutines, coroutine, loop
        gc.collect()
    held.release()
    asyncio.run(expect_that_a_spawn_works())
    assert children() == []


@pytest.mark.clone_backends
@pytest.mark.parametrize("make_loop", [aioreap.EventLoop, aioreap.UvloopEventLoop])
def test_closing_our_loop_leaves_nothing_of_spawns_under_way_that_somebody_keeps(
    make_loop: Factory, held: HeldProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_clone_a_turn(monkeypatch)
    loop = make_loop()
    before = open_descriptors()
    loop.run_until_complete(expect_that_a_spawn_works())
    kept = []
    for _ in range(10):
        kept.append(loop.create_task(aioreap.create_subprocess_exec(held.path)))
        kept[-1]._log_destroy_pending = False  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        loop.call_soon(loop.stop)
        loop.run_forever()
        assert 0 < len(spawn.in_flight) < 10
        loop.close()
    assert not open_descriptors().keys() - before.keys()
    assert children() == []


@pytest.mark.clone_backends
def test_closing_any_loop_before_a_deferred_spawn_leaves_nothing(
    factory: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_clone_a_turn(monkeypatch)

    async def several() -> None:
        for _ in range(10):
            creating = asyncio.ensure_future(aioreap.create_subprocess_exec("true", **PIPES))  # type: ignore[arg-type]
            creating._log_destroy_pending = False  # type: ignore[attr-defined]
            kept.append(creating)
        await asyncio.sleep(0)

    kept: list[asyncio.Future[aioreap.Process]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        loop = factory()
        loop.run_until_complete(several())
        assert len(spawn.in_flight) < 10
        loop.close()
        kept.clear()
        del loop
        gc.collect()
    for _ in range(100):
        asyncio.run(expect_that_a_spawn_works())  # reaps what has died since
        if not children():
            break
    assert children() == []
