"""What `autokill` promises: a child ends with the server that made it, however that ends."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeAlias

import pytest
from apart import (
    NOBODY,
    Factory,
    as_root,
    become_an_ordinary_user,
    in_a_copy,
    on_both_loops,
    run_apart,
)
from conftest import EMULATED, children, force_backend

import aioreap
from aioreap import _clone, kernel

pytestmark = pytest.mark.own_backend

MANY = 200
# Seconds after a server's kill in which all its children are gone. It takes some milliseconds.
ALL_GONE = 30 if EMULATED else 1
PR_SET_CHILD_SUBREAPER = 36
CLONE_NEWPID = 0x20000000

Serve: TypeAlias = Callable[[int], Coroutine[Any, Any, object]]

_libc = ctypes.CDLL(None, use_errno=True)


def adopt_orphans() -> None:
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@contextmanager
def server(serve: Serve, make_loop: Factory = asyncio.SelectorEventLoop) -> Iterator[list[int]]:
    """A forked copy that runs serve() and goes on; its pid, and the numbers that it tells.

    What it leaves behind comes to this process.
    """
    adopt_orphans()
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        _be_server(serve, make_loop, write_end)
    os.close(write_end)
    with open(read_end, "rb") as reader:
        told = reader.readline()
    assert told.endswith(b"\n"), "it failed"
    yield [pid, *map(int, told.split())]


def _be_server(serve: Serve, make_loop: Factory, write_end: int) -> NoReturn:
    async def main() -> None:
        kept = await serve(write_end)  # noqa: F841 - a forgotten Process would live on as well
        await asyncio.Event().wait()

    try:
        with asyncio.Runner(loop_factory=make_loop) as runner:
            runner.run(main())
    finally:
        os._exit(1)


def tell(descriptor: int, *numbers: int) -> None:
    os.write(descriptor, b" ".join(b"%d" % number for number in numbers) + b"\n")


async def spawn(*command: str, **options: Any) -> aioreap.Process:
    return await aioreap.create_subprocess_exec(*command, autokill=True, **options)


def kill(pid: int) -> None:
    """Kill a child of this process that nobody else waits for, and see it gone."""
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL


def await_end(pidfd: int, seconds: float | None = None) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(None if seconds is None else seconds * 1000))


def expect_killed(*pidfds: int, deadline: float | None = None) -> None:
    """All of them end by SIGKILL until then, and none is left, as a zombie or otherwise."""
    for pidfd in pidfds:
        left = None if deadline is None else max(0, deadline - time.monotonic())
        assert await_end(pidfd, left), "it lives"
        try:
            end = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        except ChildProcessError:  # it has reaped itself
            pass
        else:
            assert end is not None
            assert (end.si_code, end.si_status) == (os.CLD_KILLED, signal.SIGKILL)
        os.close(pidfd)
    assert children() == []


@on_both_loops
@in_a_copy
def test_a_killed_server_takes_all_its_children_along(make_loop: Factory) -> None:
    async def serve(descriptor: int) -> object:
        processes = await asyncio.gather(*(spawn("sleep", "1000") for _ in range(MANY)))
        tell(descriptor, *(process.pid for process in processes))
        return processes

    with server(serve, make_loop) as (pid, *pids):
        pidfds = list(map(os.pidfd_open, pids))
        assert len(pidfds) == MANY
        assert not any(map(kernel.is_readable, pidfds))
        deadline = time.monotonic() + ALL_GONE
        kill(pid)
    expect_killed(*pidfds, deadline=deadline)


@pytest.mark.parametrize(
    "options",
    [
        {"user": NOBODY, "group": NOBODY, "extra_groups": []},
        {"preexec_fn": lambda: os.setuid(NOBODY)},
        {"no_new_privs": False},
        {"no_new_privs": False, "autoreap": False},
    ],
    ids="-".join,
)
@as_root
@in_a_copy
def test_so_it_does_whatever_else_is_asked_for(options: dict[str, Any]) -> None:
    async def serve(descriptor: int) -> object:
        process = await spawn("sleep", "1000", **options)
        tell(descriptor, process.pid)
        return process

    with server(serve) as (pid, child):
        pidfd = os.pidfd_open(child)
        kill(pid)
    expect_killed(pidfd)


class Cat:
    """What a `cat` reads and writes, whoever its parent is."""

    def __init__(self) -> None:
        self.stdin, self._questions = os.pipe()
        self._answers, self.stdout = os.pipe()

    async def spawn(self) -> aioreap.Process:
        return await spawn("cat", stdin=self.stdin, stdout=self.stdout)

    def answers(self) -> bool:
        os.write(self._questions, b"?")
        return os.read(self._answers, 1) == b"?"

    def has_ended(self) -> bool:
        """Wait for its end."""
        os.close(self.stdout)
        self.stdout = os.dup(self._answers)
        return os.read(self._answers, 1) == b""

    def close(self) -> None:
        for descriptor in (self.stdin, self._questions, self._answers, self.stdout):
            os.close(descriptor)


def fork_a_worker() -> int:
    pid = os.fork()
    while pid == 0:
        signal.pause()
    return pid


@in_a_copy
def test_a_forked_workers_copy_of_the_pidfd_keeps_the_child_alive(backend: str) -> None:
    cat = Cat()

    async def serve(descriptor: int) -> object:
        process = await cat.spawn()
        tell(descriptor, process.pid, fork_a_worker())
        return process

    with server(serve) as (pid, child, worker):
        pidfd = os.pidfd_open(child)
        kill(pid)
        if backend == "autoreap":
            assert cat.answers()
        else:
            await_end(pidfd)
        kill(worker)
        expect_killed(pidfd)
    cat.close()


@in_a_copy
def test_an_exec_of_the_server_closes_the_pidfd_which_kills(backend: str) -> None:
    cat = Cat()

    async def serve(descriptor: int) -> None:
        process = await cat.spawn()
        os.dup2(descriptor, 1)
        script = f"echo {process.pid}; exec >/dev/null sleep 1000"
        os.execv("/bin/sh", ["sh", "-c", script])

    with server(serve) as (pid, child):
        if backend == "autoreap":
            assert cat.has_ended()
            kill(pid)
        else:
            assert cat.answers()
            pidfd = os.pidfd_open(child)
            kill(pid)
            expect_killed(pidfd)
    cat.close()


async def test_a_child_is_held_by_its_pidfd_or_by_its_parents_thread(backend: str) -> None:
    async def held(**options: Any) -> str | None:
        process = await aioreap.create_subprocess_exec("true", **options)
        assert await process.wait() == 0
        return process._transport.child.held

    way = "autokill" if backend == "autoreap" else "pdeathsig"
    if threading.current_thread() is threading.main_thread():
        assert await held(autokill=True) == way
        assert await held(autokill=True, autoreap=False) == "pdeathsig"
        assert await held(autokill=True, preexec_fn=lambda: None) == "pdeathsig"
    assert await held(autokill=False) is None
    assert await held() is None


def in_a_thread(make_loop: Factory, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    failed: list[BaseException] = []

    def run() -> None:
        try:
            with asyncio.Runner(loop_factory=make_loop) as runner:
                runner.run(main())
        except BaseException as error:  # noqa: BLE001 - raised below
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    for error in failed:
        raise error


@on_both_loops
def test_off_the_main_thread_it_takes_a_pidfd_that_kills(make_loop: Factory, backend: str) -> None:
    async def main() -> None:
        if backend == "autoreap":
            process = await spawn("cat", stdin=-1)
            await process.communicate()
            assert process.returncode == 0
        for options in ({"autoreap": False}, {"preexec_fn": lambda: None}):
            with pytest.raises(OSError, match=f"needs CLONE_PIDFD_AUTOKILL.*{backend}") as caught:
                await spawn("true", stdin=-1, **options)
            assert caught.value.errno == errno.ENOSYS

    in_a_thread(make_loop, main)


async def no_new_privs(**options: Any) -> str:
    command = ("grep", "NoNewPrivs", "/proc/self/status")
    process = await aioreap.create_subprocess_exec(*command, stdout=-1, **options)
    output, _ = await process.communicate()
    return output.split()[1].decode()


@as_root
@pytest.mark.main_thread
async def test_no_new_privs_is_implied_unless_it_is_declined() -> None:
    assert await no_new_privs(autokill=True) == "1"
    assert await no_new_privs(autokill=True, no_new_privs=None) == "1"
    assert await no_new_privs(autokill=True, no_new_privs=True) == "1"
    assert await no_new_privs(autokill=True, no_new_privs=False) == "0"
    assert await no_new_privs(autokill=False) == "0"
    assert await no_new_privs(no_new_privs=None) == "0"


@as_root
@on_both_loops
def test_an_ordinary_user_cannot_decline_it_where_the_pidfd_kills(
    make_loop: Factory, backend: str
) -> None:
    async def main() -> None:
        become_an_ordinary_user()
        assert await no_new_privs(autokill=True) == "1"
        if backend == "autoreap":
            with pytest.raises(PermissionError, match="CAP_SYS_ADMIN"):
                await spawn("true", stdin=-1, no_new_privs=False)
        assert await no_new_privs(autokill=True, no_new_privs=False, autoreap=False) == "0"

    run_apart(make_loop, main)


async def test_what_is_neither_true_nor_false_is_refused() -> None:
    with pytest.raises(ValueError, match="autokill must be"):
        await aioreap.create_subprocess_exec("true", autokill="yes")  # type: ignore[arg-type]


# A tree that cannot be had; tests/test_tree.py is about those that can.


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EPERM, "needs a pid namespace: may not be made here"),
        (errno.ENOSPC, "there are as many as there may be"),
        (errno.EINVAL, "unknown to this kernel"),
    ],
    ids=lambda value: errno.errorcode.get(value) if isinstance(value, int) else "",
)
@as_root
@pytest.mark.clone_backends
@pytest.mark.main_thread
async def test_a_namespace_that_is_refused_is_named(
    number: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(_clone, "spawn", refuse)
    with pytest.raises(OSError, match=words) as caught:
        await aioreap.create_subprocess_exec("true", stdin=-1, autokill="tree")
    assert caught.value.errno == number


async def test_preexec_fn_and_a_tree_are_refused() -> None:
    with pytest.raises(ValueError, match="preexec_fn"):
        await aioreap.create_subprocess_exec(
            "true", stdin=-1, autokill="tree", preexec_fn=lambda: None
        )


async def test_subprocess_popen_makes_no_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    force_backend(monkeypatch, "popen")
    with pytest.raises(OSError, match="needs backend autoreap or pidfd; this is popen") as caught:
        await aioreap.create_subprocess_exec("true", stdin=-1, autokill="tree")
    assert caught.value.errno == errno.ENOSYS


# Between the clone and the exec.


def gate() -> tuple[int, int]:
    """A full pipe: in the place of cgroup.procs it holds a child there until it is read."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(write_end, bytes(4096))
    os.set_blocking(write_end, True)
    return read_end, write_end


@pytest.mark.clone_backends
@pytest.mark.any_backend
@in_a_copy
def test_a_parent_that_ends_before_the_prctl_is_noticed() -> None:
    held, gatekeeper = gate()
    read_end, write_end = os.pipe()

    async def serve(descriptor: int) -> object:
        flags = kernel.CLONE_PIDFD | kernel.CLONE_VM
        script = (b"sh", b"-c", b"echo started; exec sleep 1000")
        options = (None, -1, True, True, False, -1, False, -1, -1, -1, None, -1, gatekeeper, True)
        found = _clone.spawn(
            *((b"/bin/sh",), script, (), ((write_end, 1),), flags, signal.SIGCHLD, False, *options)
        )
        _clone.take(found[3])
        tell(descriptor, found[0])
        return found

    with server(serve) as (pid, child):
        pidfd = os.pidfd_open(child)
        assert not kernel.is_readable(pidfd)
        kill(pid)
    os.close(write_end)
    os.close(gatekeeper)
    while os.read(held, 65536):
        pass
    assert os.read(read_end, 7) == b"", "the program did run"
    end = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    assert end is not None
    assert (end.si_code, end.si_status) == (os.CLD_EXITED, 127)
    for descriptor in (pidfd, held, read_end):
        os.close(descriptor)


@pytest.mark.any_backend
@in_a_copy
def test_so_it_is_by_a_child_that_was_forked() -> None:
    copy = os.fork()
    if copy == 0:
        try:
            _clone.set_pdeathsig(os.getppid())
            _clone.set_pdeathsig(os.getpid())
        except OSError as error:
            os._exit(error.errno or 0)
        os._exit(0)
    assert os.waitpid(copy, 0)[1] == errno.EREMOTE << 8


@as_root
@on_both_loops
def test_children_beyond_a_pid_namespace_cannot_be_held_by_the_parents_thread(
    make_loop: Factory,
) -> None:
    async def main() -> None:
        assert _libc.unshare(CLONE_NEWPID) == 0
        with pytest.raises(OSError, match="different pid namespaces") as caught:
            await spawn("true", stdin=-1, autoreap=False)
        assert caught.value.errno == errno.EREMOTE

    run_apart(make_loop, main)
