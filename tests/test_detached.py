"""Children that are given up: whole, by detach(), or from the beginning, by spawn_detached()."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import resource
import select
import signal
import warnings
from collections.abc import Awaitable, Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from apart import NOBODY, Factory, as_root, on_both_loops, run_apart
from conftest import children
from raw import wait_readable
from test_launch import HeldProgram, turns

import aioreap
from aioreap import kernel, unowned, watcher
from aioreap.process import subprocess_shell
from aioreap.unowned import reap_heirs

pytestmark = pytest.mark.own_backend

PR_SET_CHILD_SUBREAPER: Final = 36
PIPES = {"stdin": aioreap.PIPE, "stdout": aioreap.PIPE, "stderr": aioreap.PIPE}
# Says what it is told, and how it ends: with what it is told last.
ECHO = 'while read -r line; do case $line in exit) exit 7;; esac; echo "$line"; done'


@contextlib.contextmanager
def closing(detached: aioreap.Detached) -> Iterator[aioreap.Detached]:
    """Its descriptors closed at the end; the child, which has a pipe as its stdin, ends then."""
    with contextlib.ExitStack() as stack:
        for descriptor in detached.descriptors:
            stack.callback(os.close, descriptor)
        yield detached


async def reaped(pid: int) -> None:
    """Wait until no child of this process has that number."""
    while pid in children():
        await asyncio.sleep(0.001)


def died(pidfd: int) -> None:
    """Block until the process has died."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.poll()


async def shell(script: str, **options: int) -> aioreap.Process:
    return await aioreap.create_subprocess_shell(script, **{**PIPES, **options})  # type: ignore[arg-type]


async def test_a_detached_child_is_given_up_whole_and_runs_on() -> None:
    process = await shell(ECHO)
    pid, pidfd = process.pid, process.pidfd
    with closing(process.detach()) as detached:
        assert (detached.pid, detached.pidfd) == (pid, pidfd)
        assert detached.started_ns is not None
        assert None not in (detached.stdin, detached.stdout, detached.stderr)
        assert detached.unread_stdout == detached.unread_stderr == b""
        assert detached.stdin is not None
        assert detached.stdout is not None
        os.write(detached.stdin, b"one\n")
        assert os.read(detached.stdout, 100) == b"one\n"  # in blocking mode
        assert not os.get_inheritable(detached.pidfd)
        signal.pidfd_send_signal(detached.pidfd, signal.SIGTERM)
        await reaped(pid)


async def test_without_pipes_there_is_only_the_pidfd() -> None:
    read_end, write_end = os.pipe()
    process = await aioreap.create_subprocess_exec("cat", stdin=read_end)
    os.close(read_end)
    with closing(process.detach()) as detached:
        assert detached.descriptors == [detached.pidfd]
        os.close(write_end)
        await reaped(detached.pid)


async def test_what_was_read_and_not_taken_comes_along() -> None:
    process = await shell("echo one; echo two; echo error >&2; exec cat")
    assert process.stdout is not None
    assert process.stderr is not None
    assert await process.stdout.readline() == b"one\n"
    while not process.stderr._buffer:  # type: ignore[attr-defined]
        await asyncio.sleep(0)
    with closing(process.detach()) as detached:
        assert detached.stdout is not None
        rest = detached.unread_stdout
        while rest != b"two\n":
            rest += os.read(detached.stdout, 100)
        assert detached.unread_stderr == b"error\n"
    await reaped(detached.pid)


class OtherProtocol(asyncio.subprocess.SubprocessStreamProtocol):
    """Not the one that is told of output in the midst of anything."""


async def test_what_the_streams_were_not_told_of_yet_comes_along() -> None:
    loop = asyncio.get_running_loop()
    transport, protocol = await subprocess_shell(
        loop, lambda: OtherProtocol(limit=2**16, loop=loop), "echo one; read -r line"
    )
    process = aioreap.Process(transport, protocol, loop)
    told: list[object] = []
    transport._tell = lambda *telling: told.append(telling)  # type: ignore[method-assign]
    while not transport._pipes[1].untold:
        await asyncio.sleep(0)
    with closing(process.detach()) as detached:
        assert detached.unread_stdout == b"one\n"
    await reaped(detached.pid)


@pytest.mark.slow
async def test_many_chunks_come_along_in_order() -> None:
    process = await aioreap.create_subprocess_shell(
        "seq 100000", stdout=aioreap.PIPE, stderr=aioreap.PIPE, limit=2**14
    )
    assert process.stdout is not None
    taken = b"".join([await process.stdout.readline() for _ in range(1000)])
    detached = process.detach()
    assert detached.stdout is not None
    with open(detached.stdout, "rb") as rest:
        output = taken + detached.unread_stdout + rest.read()
    assert output == b"".join(b"%d\n" % n for n in range(1, 100_001))
    os.close(detached.pidfd)
    assert detached.stderr is not None
    os.close(detached.stderr)
    await reaped(detached.pid)


async def test_a_stream_that_has_ended_leaves_what_it_said() -> None:
    process = await shell("echo end; exec >&-; read -r line")
    while process._transport._pipes[1].is_open:
        await asyncio.sleep(0)
    with closing(process.detach()) as detached:
        assert detached.stdout is None
        assert detached.unread_stdout == b"end\n"
    await reaped(detached.pid)


async def test_a_closed_stdin_is_none() -> None:
    process = await shell("cat; exec 1>&2; exec sleep 1000")
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    await process.stdin.wait_closed()
    assert await process.stdout.read() == b""
    with closing(process.detach()) as detached:
        assert (detached.stdin, detached.stdout) == (None, None)
        signal.pidfd_send_signal(detached.pidfd, signal.SIGKILL)
    await reaped(detached.pid)


async def test_unsent_input_is_refused_and_lost_by_nobody() -> None:
    process = await shell("cat")
    assert process.stdin is not None
    data = os.urandom(2**20)
    process.stdin.write(data)
    with pytest.raises(BlockingIOError, match="bytes written to stdin are not in the pipe yet"):
        process.detach()
    assert process.returncode is None
    assert await process.communicate() == (data, b"")
    assert process.returncode == 0


async def test_input_is_sent_when_the_documented_drain_is_over() -> None:
    process = await shell("cat")
    assert process.stdin is not None
    process.stdin.write(b"sent\n")
    process.stdin.transport.set_write_buffer_limits(0)
    await process.stdin.drain()
    with closing(process.detach()) as detached:
        assert detached.stdout is not None
        assert os.read(detached.stdout, 100) == b"sent\n"
    await reaped(detached.pid)


async def test_a_detached_process_is_done_with() -> None:
    process = await shell("cat")
    detached = process.detach()
    with closing(detached):
        assert process.pid == detached.pid
        assert process.pidfd == -1
        assert "detached" in repr(process._transport)
        for ask in (
            process.poll,
            process.terminate,
            process.kill,
            process.detach,
            lambda: process.send_signal(0),
            lambda: process.returncode,
            lambda: process.exit_info,
            process._transport.get_extra_info("subprocess").poll,
            process._transport.get_extra_info("subprocess").kill,
        ):
            with pytest.raises(ValueError, match=rf"process {process.pid} was detached"):
                ask()
        waits: list[Callable[[], Awaitable[object]]] = [
            process.wait,
            process.wait_exit,
            process.communicate,
            process.stop,
            lambda: process.stop(grace=0, close_stdin=True),
            process.stdout.read,  # type: ignore[union-attr]
        ]
        for wait in waits:
            with pytest.raises(ValueError, match=rf"process {process.pid} was detached"):
                await wait()
        process._transport.close()  # kills nobody
        assert signal.pidfd_send_signal(detached.pidfd, 0) is None  # type: ignore[func-returns-value]
    await reaped(detached.pid)


async def test_the_group_of_what_was_detached_is_no_longer_ours() -> None:
    process = await shell("cat", start_new_session=True)
    with closing(process.detach()) as detached:
        with pytest.raises(ValueError, match=rf"process {process.pid} was detached"):
            process.kill_group()
        with pytest.raises(ValueError, match=rf"process {process.pid} was detached"):
            await process.stop(group=True)
        signal.pidfd_send_signal(detached.pidfd, 0)
    await reaped(detached.pid)


async def test_who_waits_meanwhile_is_told() -> None:
    process = await shell("cat")
    assert process.stdout is not None
    waiting = [
        asyncio.ensure_future(call)
        for call in (process.wait(), process.wait_exit(), process.stdout.readline())
    ]
    await asyncio.sleep(0)
    with closing(process.detach()):
        for call in waiting:
            with pytest.raises(ValueError, match="was detached"):
                await call
    await reaped(process.pid)


async def test_a_communicate_meanwhile_is_not_disturbed() -> None:
    process = await shell("cat")
    call = asyncio.ensure_future(process.communicate(b"x"))
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="communicate"):
        process.detach()
    assert await call == (b"x", b"")


async def test_who_has_ended_cannot_be_detached() -> None:
    process = await shell("exit 3")
    await process.wait()
    with pytest.raises(ProcessLookupError, match="has ended"):
        process.detach()
    assert await process.communicate() == (b"", b"")


async def test_what_has_ended_and_nobody_knows_it_can_be_detached_and_its_status_read() -> None:
    process = await shell(ECHO)
    assert process.stdin is not None
    process.stdin.write(b"exit\n")
    died(process.pidfd)  # while the loop does not turn
    attached = await aioreap.attach(process.detach())
    assert (await attached.wait_exit()).returncode == 7


async def test_what_is_held_cannot_be_detached() -> None:
    process = await shell("cat")
    process._transport.child.held = "pdeathsig"
    with pytest.raises(ValueError, match="held by PR_SET_PDEATHSIG"):
        process.detach()
    assert await process.communicate() == (b"", b"")


async def test_a_closed_transport_has_nothing_to_detach() -> None:
    process = await shell("cat")
    process._transport.close()
    with pytest.raises(RuntimeError, match="is closed"):
        process.detach()
    assert await process.wait() == -signal.SIGKILL


@pytest.mark.slow
async def test_without_descriptors_nothing_has_changed() -> None:
    process = await shell(ECHO)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Of three pipes, and of the pidfd for who reaps it.
    copies = 3 + process._transport.child.has_to_be_reaped
    keep = [os.open("/dev/null", os.O_RDONLY) for _ in range(copies)]
    top = max(map(int, os.listdir("/proc/self/fd"))) + 1
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (top + 1, hard))
        with contextlib.suppress(OSError):
            while True:
                keep.append(os.open("/dev/null", os.O_RDONLY))
        for _ in range(copies):  # one more succeeds each time
            with pytest.raises(OSError, match="Too many open files"):
                process.detach()
            os.close(keep.pop())
            resource.setrlimit(resource.RLIMIT_NOFILE, (top + 1, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        while keep:
            os.close(keep.pop())
    assert await process.communicate(b"on\nexit\n") == (b"on\n", b"")
    assert process.returncode == 7


@pytest.mark.slow
async def test_a_number_that_is_used_again_for_the_same_pipe_is_not_closed() -> None:
    """Under uvloop it is free before its file object is told."""
    process = await shell("cat")
    with closing(process.detach()) as detached:
        copies = []
        for _ in range(10):
            copies += [os.dup(pipe) for pipe in detached.descriptors[1:]]
            await asyncio.sleep(0)
        for copy in copies:
            os.close(copy)  # EBADF if somebody else has
    await reaped(detached.pid)


async def test_asyncios_own_process_can_be_detached_too() -> None:
    aioreap.install()
    theirs = await asyncio.create_subprocess_exec("cat", stdin=-1, stdout=-1)
    detached = aioreap.Process.of(theirs).detach()
    with closing(detached), pytest.raises(ValueError, match="was detached"):
        await theirs.wait()
    await reaped(detached.pid)


class Talker:
    """A shell that says on stdout and stderr what it is told to, and when it has said it."""

    def __init__(self) -> None:
        self._go_on, self._told = os.pipe(), os.pipe()
        self.pass_fds = (self._go_on[0], self._told[1])

    def script(self, *words: str) -> str:
        """Runs these, and after each tells of it and waits until it is to go on."""
        pause = f"echo >/dev/fd/{self._told[1]}; read -r line </dev/fd/{self._go_on[0]}; "
        return "".join(f"{word}; {pause}" for word in words)

    async def has_said(self, process: aioreap.Process, *, ended: Collection[int] = ()) -> None:
        """Wait until the loop has read it, and these of the pipes to their ends."""
        wait_readable(self._told[0])
        assert os.read(self._told[0], 1)
        pipes = process._transport._pipes
        while not all(pipes[number].told_of_loss for number in ended):
            await asyncio.sleep(0)
        for pipe in pipes.values():
            while pipe.is_open and kernel.is_readable(pipe.end.fileno()):
                await asyncio.sleep(0)
        for _ in range(10):  # who waits for it takes it
            await asyncio.sleep(0)

    def go_on(self) -> None:
        os.write(self._go_on[1], b"\n")

    def close(self) -> None:
        for descriptor in (*self._go_on, *self._told):
            os.close(descriptor)


@pytest.fixture
def talker() -> Iterator[Talker]:
    talker = Talker()
    yield talker
    talker.close()


@pytest.mark.parametrize(
    ("words", "ended"),
    [
        ("echo out; echo err >&2", ()),
        ("echo out; exec >&-; echo err >&2", (1,)),
        ("echo err >&2; exec 2>&-; echo out", (2,)),
        ("echo out; exec >&-; echo err >&2; exec 2>&-", (1, 2)),
    ],
    ids=["no end", "end of stdout", "end of stderr", "both ends"],
)
async def test_what_asyncios_communicate_has_collected_comes_along(
    talker: Talker, words: str, ended: tuple[int, ...]
) -> None:
    aioreap.install()
    theirs = await asyncio.create_subprocess_shell(
        talker.script(words) + "exit 3", stdout=-1, stderr=-1, pass_fds=talker.pass_fds
    )
    process = aioreap.Process.of(theirs)
    call = asyncio.ensure_future(theirs.communicate())
    await talker.has_said(process, ended=ended)
    detached = process.detach()
    with pytest.raises(ValueError, match="was detached"):
        await call
    assert (detached.unread_stdout, detached.unread_stderr) == (b"out\n", b"err\n")
    talker.go_on()
    attached = await aioreap.attach(detached)
    assert await attached.communicate() == (b"out\n", b"err\n")
    assert attached.returncode == 3


@pytest.mark.parametrize("ours", [True, False], ids=["aioreap", "asyncio"])
async def test_what_a_read_to_the_end_has_collected_comes_along(talker: Talker, ours: bool) -> None:
    aioreap.install()
    start: Any = aioreap.create_subprocess_shell if ours else asyncio.create_subprocess_shell
    process = aioreap.Process.of(
        await start(
            talker.script("echo one", "echo two") + "echo three",
            stdout=-1,
            pass_fds=talker.pass_fds,
        )
    )
    assert process.stdout is not None
    call = asyncio.ensure_future(process.stdout.read())
    await talker.has_said(process)
    talker.go_on()
    await talker.has_said(process)
    detached = process.detach()
    with pytest.raises(ValueError, match="was detached"):
        await call
    assert detached.unread_stdout == b"one\ntwo\n"
    talker.go_on()
    assert await (await aioreap.attach(detached)).communicate() == (b"one\ntwo\nthree\n", None)


async def test_what_a_read_has_returned_does_not_come_along(talker: Talker) -> None:
    process = await aioreap.create_subprocess_shell(
        talker.script("echo out; exec >&-"), stdout=-1, stderr=-1, pass_fds=talker.pass_fds
    )
    assert process.stdout is not None
    assert await process.stdout.read() == b"out\n"
    with closing(process.detach()) as detached:
        assert detached.unread_stdout == b""
    talker.go_on()
    await reaped(process.pid)


@pytest.mark.parametrize(
    "read",
    [
        lambda stream: stream.read(10),
        lambda stream: stream.read(),
        lambda stream: stream.readline(),
        lambda stream: stream.readuntil(),
        lambda stream: stream.readexactly(10),
        lambda stream: anext(aioreap.lines(stream)),
    ],
    ids=["some", "all", "line", "until", "exactly", "lines"],
)
async def test_who_is_about_to_read_what_comes_along_sees_no_end(
    read: Callable[[asyncio.StreamReader], Awaitable[bytes]],
) -> None:
    """It has been woken for the output, and does not find it any more."""
    process = await shell("cat")
    assert process.stdout is not None
    call = asyncio.ensure_future(read(process.stdout))
    await asyncio.sleep(0)
    process.stdout.feed_data(b"part")
    with closing(process.detach()) as detached:
        assert detached.unread_stdout == b"part"
    with pytest.raises(ValueError, match="was detached"):
        await call
    await reaped(process.pid)


async def test_nothing_is_kept_of_the_output_of_a_child_that_has_exited(talker: Talker) -> None:
    aioreap.install()
    process = await asyncio.create_subprocess_shell(
        talker.script("echo out; exec >&-"), stdout=-1, pass_fds=talker.pass_fds
    )
    call = asyncio.ensure_future(process.communicate())
    await talker.has_said(aioreap.Process.of(process), ended=(1,))
    talker.go_on()
    output, _ = await call
    assert output == b"out\n"
    assert not [
        found for found in gc.get_referrers(output) if type(found) is list and len(found) == 1
    ]


async def test_a_forked_copy_cannot_detach_its_parents_child() -> None:
    process = await shell("cat")
    copy = os.fork()
    if copy == 0:
        try:
            process.detach()
        except RuntimeError:
            os._exit(5)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1]) == 5
    assert await process.communicate() == (b"", b"")


@on_both_loops
def test_the_loop_ends_and_the_detached_child_does_not(make_loop: Factory) -> None:
    read_end, write_end = os.pipe()

    async def main() -> aioreap.Detached:
        process = await aioreap.create_subprocess_shell("read -r line; exit 7", stdin=read_end)
        return process.detach()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with asyncio.Runner(loop_factory=make_loop) as runner:
            detached = runner.run(main())
        gc.collect()
    signal.pidfd_send_signal(detached.pidfd, 0)
    os.close(read_end)
    os.close(write_end)

    async def attach() -> int:
        return await (await aioreap.attach(detached)).wait()

    with asyncio.Runner(loop_factory=make_loop) as runner:
        assert runner.run(attach()) == 7
    reap_heirs()
    assert not unowned.heirs
    assert not watcher.orphans


@on_both_loops
def test_when_its_loop_is_closed_the_next_spawn_reaps_it(make_loop: Factory) -> None:
    async def main() -> aioreap.Detached:
        return (await aioreap.create_subprocess_exec("cat", stdin=-1)).detach()

    async def spawn() -> int:
        return await (await aioreap.create_subprocess_exec("true")).wait()

    with asyncio.Runner(loop_factory=make_loop) as runner:
        detached = runner.run(main())
    with closing(detached):
        signal.pidfd_send_signal(detached.pidfd, signal.SIGKILL)
        died(detached.pidfd)
    with asyncio.Runner(loop_factory=make_loop) as runner:
        assert runner.run(spawn()) == 0
    assert detached.pid not in children()


@pytest.mark.slow
@on_both_loops
def test_a_hundred_are_detached_and_none_is_left_a_zombie(make_loop: Factory) -> None:
    async def main() -> None:
        processes = [
            await aioreap.create_subprocess_exec("cat", stdin=-1, stdout=-1) for _ in range(100)
        ]
        for process in processes:
            detached = process.detach()
            for descriptor in detached.descriptors:
                os.close(descriptor)
        while children():
            await asyncio.sleep(0.001)
        await asyncio.sleep(0)

    run_apart(make_loop, main)


# spawn_detached().


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


class Told:
    """What a detached program writes into a pipe, and another one that it ends with.

    Attributes:
        write, wait: the program's ends of the two.
    """

    def __init__(self) -> None:
        read, self.write = os.pipe()
        self.wait, self._end = os.pipe()
        self._open = {self.write, self.wait, self._end}
        self._reader = os.fdopen(read, "rb", buffering=0)

    async def line(self) -> bytes:
        """The next line, b"" at the end."""
        return (await asyncio.get_running_loop().run_in_executor(None, self._reader.readline))[:-1]

    def give(self) -> None:
        """Close what is the program's now."""
        self._close({self.write, self.wait})

    def close(self) -> None:
        """Let the program end."""
        self._reader.close()
        self._close({self.write, self.wait, self._end})

    def _close(self, descriptors: set[int]) -> None:
        for descriptor in descriptors & self._open:
            os.close(descriptor)
        self._open -= descriptors


@pytest.fixture
def told() -> Iterator[Told]:
    told = Told()
    yield told
    told.close()


SAYS = """echo $$; cut -d ' ' -f 4,6 /proc/$$/stat
readlink /proc/$$/fd/0; readlink /proc/$$/fd/2; exec cat <&9"""


async def test_a_detached_program_runs_in_a_session_of_its_own_and_is_no_child(told: Told) -> None:
    pid = await aioreap.spawn_detached(
        "sh", "-c", SAYS.replace("9", str(told.wait)), stdout=told.write, pass_fds=[told.wait]
    )
    told.give()
    assert int(await told.line()) == pid
    parent, session = map(int, (await told.line()).split())
    assert session == pid
    assert (parent == os.getpid()) is (kernel.backend().name == "autoreap")
    assert await told.line() == await told.line() == b"/dev/null"
    told.close()
    await reaped(pid)


async def test_all_is_said_of_a_program_that_cannot_be_started() -> None:
    with pytest.raises(FileNotFoundError) as missing:
        await aioreap.spawn_detached("/does/not/exist")
    assert missing.value.filename == "/does/not/exist"
    with pytest.raises(PermissionError):
        await aioreap.spawn_detached("/etc/passwd")
    with pytest.raises(PermissionError):  # a step before that: a session's leader has its group
        await aioreap.spawn_detached("true", start_new_session=True, process_group=0)
    with pytest.raises(FileNotFoundError) as missing:
        await aioreap.spawn_detached("true", cwd="/does/not/exist")
    assert missing.value.filename == "/does/not/exist"
    for stdio in ("stdin", "stdout", "stderr"):
        with pytest.raises(ValueError, match="PIPE cannot be used"):
            await aioreap.spawn_detached("true", **{stdio: aioreap.PIPE})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="autokill cannot be used"):
        await aioreap.spawn_detached("true", autokill=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'no_such_option'"):
        await aioreap.spawn_detached("true", no_such_option=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "options", [{}, {"umask": 0o77}, {"start_new_session": False}, {"process_group": 0}]
)
async def test_options_are_those_of_every_spawn(told: Told, options: dict[str, int]) -> None:
    pid = await aioreap.spawn_detached(
        *("sh", "-c", "umask; pwd; echo $NAME; cut -d ' ' -f 5,6 /proc/$$/stat"),
        stdout=told.write,
        stderr=aioreap.STDOUT,
        cwd="/",
        env={"NAME": "value", "PATH": os.environ["PATH"]},
        **options,  # type: ignore[arg-type]
    )
    told.give()
    assert int(await told.line(), 8) == options.get("umask", 0o22)
    assert await told.line() == b"/"
    assert await told.line() == b"value"
    group, session = map(int, (await told.line()).split())
    leads = options.get("start_new_session", "process_group" not in options)
    assert session == (pid if leads else os.getsid(0))
    assert (group == pid) is (leads or "process_group" in options)


@as_root
async def test_another_user_can_be_given_its_programs(told: Told) -> None:
    await aioreap.spawn_detached(
        *("sh", "-c", "id -u; id -g"), stdout=told.write, user=NOBODY, group=NOBODY, extra_groups=[]
    )
    told.give()
    assert int(await told.line()) == int(await told.line()) == NOBODY


async def test_a_preexec_fn_runs_in_the_detached_program(told: Told) -> None:
    pid = await aioreap.spawn_detached(
        *("sh", "-c", "echo $$"),
        stdout=told.write,
        preexec_fn=lambda: os.write(1, b"%d\n" % os.getpid()),
    )
    told.give()
    assert int(await told.line()) == int(await told.line()) == pid


@pytest.mark.main_thread
async def test_no_exit_signal_of_it_is_ever_raised(told: Told) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGCHLD, lambda number, _: heard.append(number))
    try:
        for _ in range(5):
            await aioreap.spawn_detached("true")
    finally:
        signal.signal(signal.SIGCHLD, before)
    if kernel.backend().name == "popen":  # Popen's own child, which makes it
        heard.clear()
    assert not heard


@pytest.mark.clone_backends
async def test_a_cancelled_spawn_is_ended_before_its_program_runs(tmp_path: Path) -> None:
    """What it would have run, once its file may be executed, leaves a trace.

    tests/test_cancellation.py cancels it at each turn and at each await.
    """
    shell = os.path.realpath("/bin/sh")
    for turn in [*range(1, 30), 1000]:
        held, told = HeldProgram(tmp_path / "sh", shell), Told()
        trace = tmp_path / "trace"
        call = asyncio.ensure_future(
            aioreap.spawn_detached(held.path, "-c", f"echo >'{trace}'", stdout=told.write)
        )
        await turns(turn)
        assert not call.done()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        held.close()
        told.give()
        assert await told.line() == b""  # nobody has its other end, who could run yet
        assert not trace.exists()
        told.close()
        held.path.unlink()


@pytest.mark.clone_backends
async def test_a_cancelled_spawn_leaves_no_process(told: Told) -> None:
    call = asyncio.ensure_future(aioreap.spawn_detached("cat", stdin=told.wait, stdout=told.write))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    told.give()
    assert await told.line() == b""  # nobody has its other end


@pytest.mark.slow
async def test_many_at_once_are_all_started(told: Told) -> None:
    pids = await asyncio.gather(
        *(aioreap.spawn_detached("sh", "-c", "echo $$", stdout=told.write) for _ in range(20))
    )
    told.give()
    assert sorted([int(await told.line()) for _ in pids]) == sorted(pids)


@on_both_loops
def test_what_a_subreaper_detaches_comes_back_and_is_reaped(make_loop: Factory) -> None:
    """An orphan is a child of this process then, as it is of a container's init."""

    async def main() -> None:
        assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
        read_end, write_end = os.pipe()
        pid = await aioreap.spawn_detached("cat", stdin=read_end)
        assert pid in children()
        os.close(write_end)
        await reaped(pid)
        with pytest.raises(FileNotFoundError):
            await aioreap.spawn_detached("/does/not/exist")
        if kernel.backend().name != "popen":  # which has a program or an error at once
            call = asyncio.ensure_future(aioreap.spawn_detached("cat", stdin=read_end))
            await asyncio.sleep(0)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
        os.close(read_end)

    run_apart(make_loop, main)


@pytest.mark.autoreap
async def test_an_ordinary_one_can_be_asked_for_with_autoreap_too(told: Told) -> None:
    pid = await aioreap.spawn_detached(
        "sh", "-c", "echo $$; cut -d ' ' -f 4 /proc/$$/stat", stdout=told.write, autoreap=False
    )
    told.give()
    assert int(await told.line()) == pid
    assert int(await told.line()) != os.getpid()
