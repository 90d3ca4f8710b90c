"""attach(): processes that run already, ours again or somebody else's."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import gc
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import raw
from apart import Factory, as_root, on_both_loops
from conftest import open_descriptors
from test_detached import ECHO, closing, died, reaped, shell

import aioreap
from aioreap import kernel, killing
from aioreap.reader import OutputReader

attaching = sys.modules["aioreap.attach"]  # the package has a function of that name

pytestmark = pytest.mark.own_backend

# Whether a status can be read here that another process has taken.
KEEPS_EXIT_INFO = kernel._probe()["exit_info"].available
keeps_exit_info = pytest.mark.skipif(
    not KEEPS_EXIT_INFO, reason="needs a kernel that keeps exit info (Linux 6.15)"
)
# On pidfs, each process has an inode of its own.
HAS_PIDFS = tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 9)


class Other:
    """A process that Python's subprocess started, and reaps when it is told to."""

    def __init__(self, script: str = "read -r line; exit 3", stdout: int | None = None) -> None:
        self.popen = subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, stdout=stdout)
        self.pid: int = self.popen.pid

    def end(self) -> None:
        """Let it end; it stays a zombie."""
        assert self.popen.stdin is not None
        self.popen.stdin.close()

    def reap(self) -> int:
        return self.popen.wait()


@pytest.fixture
def other() -> Iterator[Other]:
    process = Other()
    yield process
    process.end()
    process.popen.kill()
    process.reap()


def start_time(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


# A Detached.


async def test_what_was_detached_is_a_process_again() -> None:
    process = await shell(ECHO)
    detached = process.detach()
    attached = await aioreap.attach(detached)
    assert isinstance(attached, aioreap.Process)
    assert (attached.pid, attached.pidfd) == (detached.pid, detached.pidfd)
    assert attached.returncode is attached.exit_info is attached.poll() is None
    assert await attached.communicate(b"one\nexit\n") == (b"one\n", b"")
    info = await attached.wait_exit()
    assert info is attached.exit_info
    assert (info.pid, info.returncode, info.started_ns) == (process.pid, 7, detached.started_ns)
    assert attached.returncode == await attached.wait() == 7


async def test_unread_output_comes_before_what_follows() -> None:
    process = await shell('echo one; echo two; read -r line; echo "$line"; echo error >&2')
    assert process.stdout is not None
    assert await process.stdout.readline() == b"one\n"
    attached = await aioreap.attach(process.detach())
    assert attached.stdout is not None
    assert await attached.stdout.readline() == b"two\n"
    assert await attached.communicate(b"three\n") == (b"three\n", b"error\n")


async def test_unread_output_of_a_stream_that_has_ended_can_be_read() -> None:
    process = await shell("echo end; exec >&-; read -r line; exit 4")
    while process._transport._pipes[1].is_open:
        await asyncio.sleep(0)
    attached = await aioreap.attach(process.detach())
    assert await attached.communicate() == (b"end\n", b"")
    assert attached.returncode == 4


@pytest.mark.slow
async def test_more_unread_output_than_the_limit_is_whole_again() -> None:
    detached = (await shell("exec cat")).detach()
    data = os.urandom(300_000)
    attached = await aioreap.attach(dataclasses.replace(detached, unread_stdout=data), limit=100)
    assert await attached.communicate(b"end") == (data + b"end", b"")


@pytest.mark.slow
async def test_detached_and_attached_again_and_again() -> None:
    process = await shell(ECHO)
    for n in range(10):
        line = b"%d\n" % n
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(line)
        await process.stdin.drain()
        if n % 2:
            assert await process.stdout.readline() == line
        process = await aioreap.attach(process.detach())
        if not n % 2:
            assert process.stdout is not None
            assert await process.stdout.readline() == line
    assert await process.communicate(b"exit\n") == (b"", b"")
    assert process.returncode == 7


async def test_one_that_has_ended_meanwhile_has_its_status_however_late_it_is_asked() -> None:
    process = await shell(ECHO)
    detached = process.detach()
    assert detached.stdin is not None
    os.write(detached.stdin, b"exit\n")
    died(detached.pidfd)
    await reaped(detached.pid)
    attached = await aioreap.attach(detached)
    assert (await attached.wait_exit()).returncode == 7
    assert await attached.communicate() == (b"", b"")
    assert isinstance(attached.stdout, OutputReader)
    assert attached.stdout._kept is None


async def test_one_that_is_a_zombie_has_its_status() -> None:
    process = await shell(ECHO)
    detached = process.detach()
    assert detached.stdin is not None
    os.write(detached.stdin, b"exit\n")
    died(detached.pidfd)
    attached = await aioreap.attach(detached)
    assert await attached.communicate() == (b"", b"")
    assert attached.returncode == 7


async def test_signals_reach_it_and_its_transport_ends_it() -> None:
    attached = await aioreap.attach((await shell("cat")).detach())
    attached.terminate()
    await attached.communicate()
    assert attached.returncode == -signal.SIGTERM
    attached = await aioreap.attach((await shell("cat")).detach())
    attached._transport.close()
    await attached.communicate()
    assert attached.returncode == -signal.SIGKILL


@pytest.mark.any_backend
async def test_one_whose_descriptor_is_another_processs_is_refused(other: Other) -> None:
    pidfd = os.pidfd_open(other.pid)
    with pytest.raises(ValueError, match=rf"is of process {other.pid}, not {os.getpid()}"):
        await aioreap.attach(aioreap.Detached(os.getpid(), pidfd))
    os.close(pidfd)


async def test_what_was_taken_over_is_not_to_be_had_again() -> None:
    detached = (await aioreap.create_subprocess_exec("sleep", "1000")).detach()
    process = await aioreap.attach(detached)
    with pytest.raises(ValueError, match="attached to already"):
        await aioreap.attach(detached)
    process.kill()
    assert await process.wait() == -signal.SIGKILL


async def test_a_failed_attach_leaves_all_to_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    detached = (await shell("cat")).detach()
    assert detached.stdin is not None

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no room")

    with monkeypatch.context() as patch:
        patch.setattr(aioreap.ChildWatcher, "watch", fail)
        with pytest.raises(OSError, match="no room"):
            await aioreap.attach(detached)
    with pytest.raises(TypeError, match="only limit"):
        await aioreap.attach(detached, inode=1)  # type: ignore[call-overload]
    broken = dataclasses.replace(detached, stderr=10**6)
    with pytest.raises(OSError, match="Bad file descriptor"):
        await aioreap.attach(broken)
    attached = await aioreap.attach(detached)
    assert await attached.communicate(b"still\n") == (b"still\n", b"")


@pytest.mark.slow
async def test_a_cancelled_attach_leaves_all_to_the_caller() -> None:
    detached = (await shell("cat")).detach()
    for turns in range(20):
        call = asyncio.ensure_future(aioreap.attach(detached))
        for _ in range(turns):
            await asyncio.sleep(0)
        if call.done():
            break
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    else:
        pytest.fail("it never came to an end")
    attached = await call
    assert turns > 3
    assert await attached.communicate(b"still\n") == (b"still\n", b"")


async def test_a_cancelled_attach_takes_no_output_and_leaves_the_pipes_blocking() -> None:
    process = await shell("read -r line; echo out; echo error >&2; exec cat")
    detached = process.detach()
    assert detached.stdin is not None
    assert detached.stdout is not None
    assert detached.stderr is not None
    os.write(detached.stdin, b"go\n")
    raw.wait_readable(detached.stderr)
    for turns in range(20):
        call = asyncio.ensure_future(aioreap.attach(detached))
        for _ in range(turns):
            await asyncio.sleep(0)
        if call.done():
            break
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert all(map(os.get_blocking, detached.descriptors[1:]))
    attached = await call
    assert turns > 3
    output, errors = await attached.communicate(b"still\n")
    if isinstance(asyncio.get_running_loop(), asyncio.SelectorEventLoop):
        assert (output, errors) == (b"out\nstill\n", b"error\n")
    else:  # uvloop reads at once
        assert output in (b"out\nstill\n", b"still\n")


async def test_two_calls_at_once_do_not_both_have_it() -> None:
    detached = (await shell("cat")).detach()
    calls = await asyncio.gather(
        *(aioreap.attach(detached) for _ in range(2)), return_exceptions=True
    )
    (attached,) = (call for call in calls if isinstance(call, aioreap.Process))
    (refused,) = (call for call in calls if call is not attached)
    assert "attached to already" in str(refused)
    assert await attached.communicate(b"still\n") == (b"still\n", b"")
    assert attached.returncode == 0


class Interrupt(BaseException):
    """As KeyboardInterrupt, which a loop or pytest would not hand on."""


@pytest.mark.parametrize("kind", [OSError, asyncio.CancelledError, Interrupt])
@pytest.mark.parametrize("after", ["watch", "feed"])
async def test_an_attach_that_fails_when_it_has_begun_to_watch_leaves_all_to_the_caller(
    monkeypatch: pytest.MonkeyPatch, kind: type[BaseException], after: str, other: Other
) -> None:
    where = {"watch": (aioreap.ChildWatcher, "watch"), "feed": (attaching._Streams, "feed")}[after]
    real: Callable[..., None] = getattr(*where)

    def fail(*arguments: object) -> None:
        real(*arguments)
        raise kind

    detached = dataclasses.replace((await shell(ECHO)).detach(), unread_stdout=b"read\n")
    watcher = aioreap.ChildWatcher.of(asyncio.get_running_loop())
    before = open_descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(*where, fail)
        for call in (aioreap.attach(detached), aioreap.attach(other.pid)):
            with pytest.raises(kind):
                await call
    for _ in range(20):  # the pipes are closed in turns of the loop
        await asyncio.sleep(0)
    assert open_descriptors().items() <= before.items()
    assert not watcher.is_watching(detached.pidfd)
    assert other.popen.poll() is None
    attached = await aioreap.attach(detached)
    assert await attached.communicate(b"on\nexit\n") == (b"read\non\n", b"")
    assert attached.returncode == 7


@pytest.mark.any_backend
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "no room"), NotImplementedError()])
async def test_no_descriptor_is_left_of_a_stranger_that_cannot_be_watched(
    monkeypatch: pytest.MonkeyPatch, error: Exception, other: Other
) -> None:
    def fail(*_: object) -> None:
        raise error

    pidfd = os.pidfd_open(other.pid)
    before = open_descriptors()
    kept: list[BaseException] = []  # with the frames of the calls, which would close it when freed
    with monkeypatch.context() as patch:
        patch.setattr(aioreap.ChildWatcher, "watch", fail)
        for call in (aioreap.attach(other.pid), aioreap.attach(pidfd=pidfd)):
            with pytest.raises(type(error)) as raised:
                await call
            kept.append(raised.value)
    assert open_descriptors() == before
    os.close(pidfd)
    assert other.popen.poll() is None


@pytest.mark.any_backend
@pytest.mark.parametrize("limit", [0, -1])
async def test_a_limit_that_is_none_is_refused_and_all_is_as_it_was(
    limit: int, other: Other
) -> None:
    detached = dataclasses.replace((await shell(ECHO)).detach(), unread_stdout=b"read\n")
    before = open_descriptors()
    for call in (
        aioreap.attach(detached, limit=limit),
        aioreap.attach(other.pid, limit=limit),  # type: ignore[call-overload]
        aioreap.create_subprocess_exec("cat", stdout=aioreap.PIPE, limit=limit),
        aioreap.create_subprocess_shell("cat", stderr=aioreap.PIPE, limit=limit),
    ):
        with pytest.raises(ValueError, match="Limit cannot be <= 0"):
            await call
    assert open_descriptors() == before
    process = await aioreap.create_subprocess_exec("true", limit=limit)  # as in asyncio
    assert await process.wait() == 0
    attached = await aioreap.attach(detached)
    assert await attached.communicate(b"on\nexit\n") == (b"read\non\n", b"")
    assert attached.returncode == 7


# Somebody else's.


async def test_a_strangers_exit_is_known_when_its_parent_has_reaped_it(other: Other) -> None:
    attached = await aioreap.attach(other.pid)
    assert attached.pid == other.pid
    assert attached.stdin is attached.stdout is attached.stderr is None
    assert attached.poll() is None
    waiting = [asyncio.ensure_future(attached.wait_exit()) for _ in range(2)]
    other.end()
    died(attached.pidfd)
    if KEEPS_EXIT_INFO:  # it is a zombie until its parent looks
        for _ in range(5):
            await asyncio.sleep(0)
        assert attached.poll() is None
        assert other.reap() == 3
        assert [info.returncode for info in await asyncio.gather(*waiting)] == [3, 3]
        assert attached.returncode == await attached.wait() == 3
    else:
        for call in waiting:
            with pytest.raises(aioreap.ExitStatusLost):
                await call
        assert other.reap() == 3


@pytest.mark.any_backend
@pytest.mark.parametrize("without", ["any exit info (6.13)", "PIDFD_GET_INFO (6.12)"])
async def test_a_dead_strangers_status_is_lost_when_it_is_reaped_or_before_6_13_at_once(
    other: Other, monkeypatch: pytest.MonkeyPatch, without: str
) -> None:
    """The kernel answers for a zombie and not for what is gone, or it answers nothing at all."""
    if without.startswith("any") and not HAS_PIDFS:
        pytest.skip("this kernel wakes nobody when the zombie is reaped (Linux 6.9 does)")

    def answer(pidfd: int) -> None:
        if without.startswith("PIDFD_GET_INFO"):
            raise OSError(errno.ENOTTY, "no such ioctl")
        if attaching.pid_of(pidfd) == attaching.GONE:
            raise OSError(errno.ESRCH, "gone")

    monkeypatch.setattr(kernel, "_exit_info", answer)
    other.end()
    raw.wait_zombie(other.pid)
    attached = await aioreap.attach(other.pid)
    calls = [asyncio.ensure_future(call) for call in (attached.stop(grace=0), attached.wait_exit())]
    if without.startswith("any"):
        for _ in range(20):
            await asyncio.sleep(0)
        assert not any(call.done() for call in calls)
        assert other.reap() == 3
    for call in calls:
        with pytest.raises(aioreap.ExitStatusLost):
            await call


@pytest.mark.any_backend
async def test_a_stranger_can_be_sent_signals(other: Other) -> None:
    attached = await aioreap.attach(other.pid)
    attached.send_signal(signal.SIGTERM)
    died(attached.pidfd)
    assert other.reap() == -signal.SIGTERM
    with contextlib.suppress(aioreap.ExitStatusLost):
        assert await attached.wait() == -signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        attached.kill()


@pytest.mark.any_backend
async def test_a_strangers_pidfd_is_copied(other: Other) -> None:
    pidfd = os.pidfd_open(other.pid)
    attached = await aioreap.attach(pidfd=pidfd)
    assert attached.pid == other.pid
    assert attached.pidfd != pidfd
    os.close(pidfd)
    other.end()
    assert other.reap() == 3
    with contextlib.suppress(aioreap.ExitStatusLost):
        assert await attached.wait() == 3


@pytest.mark.any_backend
async def test_a_strangers_start_is_known_to_the_tick(other: Other) -> None:
    attached = await aioreap.attach(other.pid)
    process = await aioreap.create_subprocess_exec("true")
    info = await process.wait_exit()
    attached.kill()
    other.reap()
    with contextlib.suppress(aioreap.ExitStatusLost):
        assert (await attached.wait_exit()).started_ns <= info.started_ns
    await attached._transport.wait_exit() if KEEPS_EXIT_INFO else None


@on_both_loops
def test_a_stranger_does_not_end_with_the_loop(make_loop: Factory, other: Other) -> None:
    async def main(*, forget: bool) -> aioreap.Process | None:
        attached = await aioreap.attach(other.pid)
        attached._transport.close()
        return None if forget else attached

    kept = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for forget in (True, False):
            with asyncio.Runner(loop_factory=make_loop) as runner:
                aioreap.install(runner.get_loop())
                kept.append(runner.run(main(forget=forget)))
        kept.clear()
        gc.collect()
    assert other.popen.poll() is None
    other.end()
    assert other.reap() == 3


@pytest.mark.any_backend
async def test_a_stranger_can_be_let_go(other: Other) -> None:
    attached = await aioreap.attach(other.pid)
    waiting = asyncio.ensure_future(attached.wait())
    await asyncio.sleep(0)
    with closing(attached.detach()) as detached:
        assert detached.descriptors == [detached.pidfd]
    with pytest.raises(ValueError, match="was detached"):
        await waiting
    assert other.popen.poll() is None


async def test_our_own_child_can_be_attached_and_its_status_is_not_taken() -> None:
    process = await shell("read -r line; exit 5")
    attached = await aioreap.attach(process.pid)
    assert await process.communicate() == (b"", b"")
    assert process.returncode == 5
    with contextlib.suppress(aioreap.ExitStatusLost):
        assert await attached.wait() == 5


async def test_a_childs_child_can_be_waited_for() -> None:
    read_end, write_end = os.pipe()
    parent = await aioreap.create_subprocess_shell(
        f"(read -r line; exit 6) </dev/fd/{read_end} & echo $!; wait $!",
        stdout=aioreap.PIPE,
        pass_fds=[read_end],
    )
    os.close(read_end)
    assert parent.stdout is not None
    attached = await aioreap.attach(int(await parent.stdout.readline()))
    os.close(write_end)
    with contextlib.suppress(aioreap.ExitStatusLost):
        assert (await attached.wait_exit()).returncode == 6
    assert await parent.communicate() == (b"", None)
    assert parent.returncode == 6


# Which process a number means.


@pytest.mark.any_backend
async def test_the_start_time_tells_a_stale_pid(other: Other) -> None:
    started = start_time(other.pid)
    attached = await aioreap.attach(other.pid, start_time=started)
    os.close(attached.detach().pidfd)
    with pytest.raises(ProcessLookupError, match=f"started at {started}, and not at {started - 1}"):
        await aioreap.attach(other.pid, start_time=started - 1)


@pytest.mark.any_backend
@pytest.mark.skipif(not HAS_PIDFS, reason="needs pidfs (Linux 6.9)")
async def test_the_inode_tells_a_stale_pid(other: Other) -> None:
    pidfd = os.pidfd_open(other.pid)
    inode = os.fstat(pidfd).st_ino
    attached = await aioreap.attach(other.pid, inode=inode)
    os.close(attached.detach().pidfd)
    with pytest.raises(ProcessLookupError, match="another inode"):
        await aioreap.attach(other.pid, inode=inode + 1)
    with pytest.raises(ProcessLookupError, match="another inode"):
        await aioreap.attach(pidfd=pidfd, inode=inode + 1)
    os.close(pidfd)


@pytest.mark.any_backend
@pytest.mark.skipif(HAS_PIDFS, reason="is about kernels before pidfs (Linux 6.9)")
async def test_an_inode_that_means_nothing_is_an_error(other: Other) -> None:
    with pytest.raises(OSError, match=r"needs Linux 6\.9"):
        await aioreap.attach(other.pid, inode=1)


@pytest.mark.any_backend
async def test_a_process_that_ends_while_it_is_attached_is_an_error_or_waited_for(
    other: Other, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number may be a stranger's after the descriptor was opened: nothing is said of that."""
    real = os.pidfd_open

    def opened_and_gone(pid: int, flags: int = 0) -> int:
        pidfd = real(pid, flags)
        other.end()
        other.reap()
        return pidfd

    monkeypatch.setattr(os, "pidfd_open", opened_and_gone)
    with pytest.raises(ProcessLookupError, match="has ended, and was reaped"):
        await aioreap.attach(other.pid)


@pytest.mark.any_backend
async def test_no_process_of_that_number(other: Other) -> None:
    pidfd = os.pidfd_open(other.pid)
    other.end()
    other.reap()
    with pytest.raises(ProcessLookupError, match=f"no process {other.pid}"):
        await aioreap.attach(other.pid)
    with pytest.raises(ProcessLookupError, match="has ended, and was reaped"):
        await aioreap.attach(pidfd=pidfd)
    os.close(pidfd)
    with pytest.raises(ProcessLookupError, match="no process 2147483647"):
        await aioreap.attach(2**31 - 1)
    with pytest.raises(ProcessLookupError, match="no process"):
        await aioreap.attach(2**70)


@pytest.mark.any_backend
@pytest.mark.parametrize("pid", [0, -1, True, False, -(2**70)])
async def test_no_number_of_a_process(pid: int) -> None:
    with pytest.raises(ValueError, match="is no process id"):
        await aioreap.attach(pid)


@pytest.mark.any_backend
async def test_a_thread_is_no_process() -> None:
    go_on = threading.Event()
    thread = threading.Thread(target=go_on.wait)
    thread.start()
    tid = thread.native_id
    assert tid is not None
    try:
        with pytest.raises(ProcessLookupError, match=f"{tid} is a thread, and no process"):
            await aioreap.attach(tid)
        with contextlib.suppress(OSError):  # before Linux 6.9
            pidfd = os.pidfd_open(tid, os.O_EXCL)
            with pytest.raises(ValueError, match="is the pidfd of a thread"):
                await aioreap.attach(pidfd=pidfd)
            os.close(pidfd)
    finally:
        go_on.set()
        thread.join()


@pytest.mark.any_backend
async def test_a_descriptor_that_is_no_pidfd() -> None:
    own = os.open(f"/proc/{os.getpid()}", os.O_RDONLY | os.O_DIRECTORY)
    read_end, write_end = os.pipe()
    for descriptor in (own, read_end, write_end):
        with pytest.raises(ValueError, match=f"descriptor {descriptor} is no pidfd"):
            await aioreap.attach(pidfd=descriptor)
        with pytest.raises(ValueError, match=f"descriptor {descriptor} is no pidfd"):
            await aioreap.attach(aioreap.Detached(os.getpid(), descriptor))
        os.close(descriptor)
    with pytest.raises(OSError, match="Bad file descriptor"):
        await aioreap.attach(pidfd=own)
    for bad in (-1, True):
        with pytest.raises(ValueError, match="is no descriptor"):
            await aioreap.attach(pidfd=bad)


@pytest.mark.any_backend
async def test_one_thing_to_attach_to() -> None:
    for arguments in ((), ("1",), (1.0,)):
        with pytest.raises(TypeError, match=r"attach\(\) takes"):
            await aioreap.attach(*arguments)
    with pytest.raises(TypeError, match=r"attach\(\) takes"):
        await aioreap.attach(os.getpid(), pidfd=0)  # type: ignore[call-overload]


@pytest.mark.any_backend
@pytest.mark.own_backend("uvloop")
@as_root
async def test_a_process_beyond_the_pid_namespace_is_said_to_be(other: Other) -> None:
    """Seen from a new pid namespace, into which a descriptor was inherited."""
    pidfd = os.pidfd_open(other.pid)
    program = (
        "import asyncio, aioreap\n"
        "async def main():\n"
        f"    for call in (aioreap.attach(pidfd={pidfd}),"
        f" aioreap.attach(aioreap.Detached(5, {pidfd}))):\n"
        "        try: await call\n"
        "        except ProcessLookupError as error: print(error)\n"
        "asyncio.run(main())"
    )
    process = await aioreap.create_subprocess_exec(
        *("unshare", "--pid", "--fork", "--mount-proc"),
        *(sys.executable, "-c", program),
        pass_fds=[pidfd],
        stdout=-1,
        stderr=-1,
    )
    output, errors = await process.communicate()
    os.close(pidfd)
    assert output.decode().splitlines() == [
        f"[Errno 3] the process of descriptor {pidfd} is beyond this pid namespace",
        "[Errno 3] process 5 is beyond this pid namespace",
    ], errors


# Brought to an end.


async def test_an_attached_child_can_be_stopped_with_its_group() -> None:
    process = await shell("trap '' TERM; cat & cat", start_new_session=True)
    attached = await aioreap.attach(process.detach())
    info = await attached.stop(grace=0, group=True)
    assert info.signal == signal.SIGKILL
    assert await attached.communicate() == (b"", b"")


@pytest.mark.any_backend
async def test_a_stranger_can_be_stopped(other: Other) -> None:
    attached = await aioreap.attach(other.pid)
    stopping = asyncio.ensure_future(attached.stop())
    await asyncio.sleep(0)
    died(attached.pidfd)
    assert other.reap() == -signal.SIGTERM
    with contextlib.suppress(aioreap.ExitStatusLost):
        assert (await stopping).signal == signal.SIGTERM


@pytest.mark.any_backend
async def test_a_stranger_that_is_a_zombie_is_waited_for_until_its_parent_has_reaped_it(
    other: Other,
) -> None:
    other.end()
    raw.wait_zombie(other.pid)
    attached = await aioreap.attach(other.pid)
    calls = [asyncio.ensure_future(call) for call in (attached.stop(grace=0), attached.wait_exit())]
    for _ in range(5):
        await asyncio.sleep(0)
    if KEEPS_EXIT_INFO:
        assert not any(call.done() for call in calls)
        assert other.reap() == 3
        assert [info.returncode for info in await asyncio.gather(*calls)] == [3, 3]
    else:
        for call in calls:
            with pytest.raises(aioreap.ExitStatusLost):
                await call


@pytest.mark.any_backend
@keeps_exit_info
async def test_a_cancelled_stop_waits_for_a_strangers_parent_only_for_a_time(
    other: Other, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(killing, "_PATIENCE", 0.01)
    other.end()
    raw.wait_zombie(other.pid)
    attached = await aioreap.attach(other.pid)
    stopping = asyncio.ensure_future(attached.stop())
    await asyncio.sleep(0)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert attached.poll() is None
    assert other.reap() == 3
    assert await attached.wait() == 3


@pytest.mark.any_backend
async def test_a_cancelled_stop_kills_a_stranger_too_and_a_cancelled_wait_does_not() -> None:
    deaf = Other("trap '' TERM; echo; read -r line; exit 3", stdout=subprocess.PIPE)
    assert deaf.popen.stdout is not None
    assert deaf.popen.stdout.readline() == b"\n"
    attached = await aioreap.attach(deaf.pid)
    for call, ends in ((attached.wait(), False), (attached.stop(grace=1000), True)):
        waiting = asyncio.ensure_future(call)
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.sleep(0)
        if ends:
            died(attached.pidfd)
            assert deaf.reap() == -signal.SIGKILL
        else:
            assert deaf.popen.poll() is None
        with pytest.raises(asyncio.CancelledError):
            await waiting
    deaf.end()
    deaf.popen.stdout.close()


@pytest.mark.any_backend
async def test_the_group_of_a_stranger_is_out_of_reach(other: Other) -> None:
    attached = await aioreap.attach(other.pid)
    said = rf"^process {other.pid} was started by others, and it alone can be signalled"
    for ended in (False, True):
        with pytest.raises(ValueError, match=said):
            await attached.stop(group=True)
        with pytest.raises(ValueError, match=said):
            attached.kill_group()
        if not ended:
            assert other.popen.poll() is None
            other.end()
            other.reap()
            with contextlib.suppress(aioreap.ExitStatusLost):
                await attached.wait()


async def test_what_was_detached_leads_a_group_only_if_it_did_before() -> None:
    attached = await aioreap.attach((await shell("cat")).detach())
    said = rf"^process {attached.pid} was not started to lead a process group$"
    with pytest.raises(ValueError, match=said):
        await attached.stop(group=True)
    with pytest.raises(ValueError, match=said):
        attached.kill_group()
    assert await attached.communicate(b"still") == (b"still", b"")


async def test_who_stops_meanwhile_is_told_of_the_detachment() -> None:
    process = await shell("trap '' TERM; echo ready; cat")
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    stopping = [asyncio.ensure_future(process.stop()) for _ in range(2)]
    await asyncio.sleep(0)
    with closing(process.detach()) as detached:
        for call in stopping:
            with pytest.raises(ValueError, match="was detached"):
                await call
        for stop in (process.stop, process.stop):
            with pytest.raises(ValueError, match="was detached"):
                await stop()
        signal.pidfd_send_signal(detached.pidfd, 0)
    await reaped(detached.pid)


async def test_a_stop_that_is_cancelled_and_detached_at_once_is_cancelled() -> None:
    process = await shell("trap '' TERM; echo ready; cat")
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    stopping = asyncio.ensure_future(process.stop())
    await asyncio.sleep(0)
    stopping.cancel()
    with closing(process.detach()) as detached:
        with pytest.raises(asyncio.CancelledError):
            await stopping
        signal.pidfd_send_signal(detached.pidfd, 0)
    await reaped(detached.pid)


async def test_a_block_ends_nothing_that_was_detached_in_it_nor_a_stranger(other: Other) -> None:
    async with await shell("read line; exit 3") as process:
        detached = process.detach()
    with contextlib.suppress(LookupError):
        async with await aioreap.attach(other.pid):
            raise LookupError
    assert other.popen.poll() is None
    async with await aioreap.attach(other.pid) as attached:
        other.end()
        other.reap()
    assert attached.exit_info is not None
    async with await aioreap.attach(detached) as process:
        assert process.returncode is None
    assert process.returncode == 3
