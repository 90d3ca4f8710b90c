"""What `autokill="tree"` promises: what a child starts ends with it, and it with its server."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from conftest import EMULATED, children
from test_autokill import await_end, in_a_thread, kill, server, tell

import aioreap
from aioreap import _clone, hold, kernel

LEGACY = kernel._probe()["clone3"].available is False
pytestmark = [
    pytest.mark.clone_backends,
    pytest.mark.own_backend,
    pytest.mark.main_thread,
    pytest.mark.skipif(
        _clone.probe(hold._namespaces(), LEGACY) != errno.EFAULT,
        reason="no namespaces may be made here; what that gives is in test_autokill.py",
    ),
]


async def spawn(*command: str, **options: Any) -> aioreap.Process:
    return await aioreap.create_subprocess_exec(*command, autokill="tree", **options)


async def shell(script: str, **options: Any) -> aioreap.Process:
    return await spawn("/bin/sh", "-c", script, **options)


async def output_of(script: str, **options: Any) -> str:
    process = await shell(script, stdout=-1, **options)
    output, _ = await process.communicate()
    assert process.returncode == 0
    return output.decode().rstrip("\n")


def members(process: aioreap.Process) -> list[int]:
    """The pids of the init's children, as seen from here."""
    return children_of(process.pid)


def children_of(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)


# How it ends.

OWN_SIGNALS = (
    ("TERM", "KILL") if EMULATED else ("TERM", "KILL", "HUP", "SEGV", "ABRT", "USR1", "CHLD")
)


async def test_its_status_is_the_programs() -> None:
    for code in (0, 3, 255):
        assert await (await shell(f"exit {code}")).wait() == code
    for name in OWN_SIGNALS:
        number = signal.Signals["SIG" + name]
        expected = 0 if number == signal.SIGCHLD else -number
        process = await shell(f"ulimit -c 0; kill -{name} $$")
        assert await process.wait() == expected


async def test_it_is_known_though_somebody_else_has_reaped_the_init() -> None:
    gate, key = os.pipe()
    process = await shell("read line; kill -TERM $$", stdin=gate, autoreap=False)
    os.close(gate)
    os.close(key)
    os.waitpid(process.pid, 0)
    assert await process.wait() == -signal.SIGTERM


@in_a_copy
def test_it_is_known_though_this_process_ignores_its_childrens_ends() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)

    async def main() -> None:
        process = await shell("kill -TERM $$")
        assert await process.wait() == -signal.SIGTERM
        grep = await spawn("grep", "SigIgn", "/proc/self/status", stdout=-1)
        output, _ = await grep.communicate()
        assert int(output.split()[1], 16) & 1 << signal.SIGCHLD - 1, "the program inherits that"

    asyncio.run(main())


async def test_kill_ends_it_by_that_signal() -> None:
    process = await spawn("sleep", "1000")
    process.kill()
    assert await process.wait() == -signal.SIGKILL


@pytest.mark.autoreap
async def test_a_forked_copy_that_asks_takes_nothing_away() -> None:
    gate, key = os.pipe()
    process = await shell("read line; kill -TERM $$", stdin=gate)
    os.close(gate)
    os.close(key)
    await_end(process.pidfd)
    copy = os.fork()
    if copy == 0:
        while process.poll() is None:
            pass
        os._exit(-(process.returncode or 0))
    assert os.waitpid(copy, 0)[1] == signal.SIGTERM << 8
    assert await process.wait() == -signal.SIGTERM


# Signals.

SENT = ("HUP", "INT", "TERM", "USR1", "CHLD", "TSTP", "CONT", "RTMIN")
TELLS_SIGNALS = """
import signal
every = signal.valid_signals()
signal.pthread_sigmask(signal.SIG_BLOCK, every)
print("ready", flush=True)
while True:
    print(signal.Signals(signal.sigwait(every)).name[3:], flush=True)
"""


async def test_signals_reach_the_program_and_not_the_init() -> None:
    process = await spawn(sys.executable, "-c", TELLS_SIGNALS, stdout=-1)
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    for name in SENT:
        process.send_signal(signal.Signals["SIG" + name])
        assert await process.stdout.readline() == f"{name}\n".encode()
    process.kill()
    await process.communicate()


async def test_sigstop_stops_the_program_and_sigcont_lets_it_go_on() -> None:
    process = await spawn("cat", stdin=-1, stdout=-1)
    (program,) = members(process)

    def state() -> str:
        return Path(f"/proc/{program}/stat").read_text().rpartition(")")[2].split()[0]

    process.send_signal(signal.SIGSTOP)
    await until(lambda: state() == "T")
    process.send_signal(signal.SIGCONT)
    assert await process.communicate(b"on") == (b"on", None)
    assert process.returncode == 0


TELLS_USR1 = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
who = b"leader\\n"
if os.fork() == 0:
    who = b"member\\n"
os.write(1, b"ready\\n")
while True:
    signal.sigwait([signal.SIGUSR1])
    os.write(1, who)
"""


@pytest.mark.parametrize("option", [{"start_new_session": True}, {"process_group": 0}])
async def test_a_groups_signals_reach_the_programs_group(option: dict[str, Any]) -> None:
    process = await spawn(sys.executable, "-c", TELLS_USR1, stdout=-1, **option)
    assert process.stdout is not None
    assert {await process.stdout.readline() for _ in "12"} == {b"ready\n"}
    process.kill_group(signal.SIGUSR1)
    assert {await process.stdout.readline() for _ in "12"} == {b"leader\n", b"member\n"}
    (program,) = members(process)
    both = [program, *children_of(program)]

    def states() -> set[str]:
        return {Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in both}

    process.kill_group(signal.SIGSTOP)
    await until(lambda: states() == {"T"})
    process.kill_group(signal.SIGCONT)
    await until(lambda: "T" not in states())
    assert len(both) == 2
    with pytest.raises(OSError, match="Invalid argument"):
        process.kill_group(1000)
    exit_info = await process.stop(group=True)
    assert exit_info.signal == signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        process.kill_group(signal.SIGUSR1)


async def test_what_the_program_sends_to_its_init_is_nothing() -> None:
    script = """
    trap 'echo on; exit 3' TERM
    kill -HUP $PPID; kill -KILL $PPID; kill -STOP 1
    echo sent; sleep 1000 & wait
    """
    process = await shell(script, stdout=-1)
    assert process.stdout is not None
    assert await process.stdout.readline() == b"sent\n"
    process.terminate()  # the init takes it after SIGHUP
    assert await process.stdout.read() == b"on\n"
    assert await process.wait() == 3


# What it takes along.

ESCAPEES = """
setsid sh -c 'sleep 1000 & exec sleep 1000' &
(setsid sh -c 'trap "" HUP TERM; sleep 1000; sleep 1000' </dev/null &)
"""


async def test_what_the_program_leaves_behind_ends_with_it() -> None:
    process = await shell(ESCAPEES + "exit 3", stdout=-1)
    assert process.stdout is not None
    assert await process.stdout.read() == b"", "somebody holds the pipe"
    assert await process.wait() == 3


async def test_escapees_end_when_it_is_killed() -> None:
    process = await shell(ESCAPEES + "echo started; exec sleep 1000", stdout=-1)
    assert process.stdout is not None
    assert await process.stdout.readline() == b"started\n"
    process.kill()
    assert await process.stdout.read() == b""
    assert await process.wait() == -signal.SIGKILL


def expect_that_a_killed_server_takes_escapees_along(
    make_loop: Factory, before: Callable[[], None]
) -> None:
    output, there = os.pipe()

    async def serve(descriptor: int) -> object:
        process = await shell(ESCAPEES + "echo started; exec sleep 1000", stdout=there)
        tell(descriptor, process.pid)
        return process

    def make() -> asyncio.AbstractEventLoop:
        before()
        return make_loop()

    with server(serve, make) as (pid, init):
        os.close(there)
        assert os.read(output, 100) == b"started\n"
        pidfd = os.pidfd_open(init)
        kill(pid)
    assert os.read(output, 1) == b"", "somebody lives"
    await_end(pidfd)
    if kernel.backend().name != "autoreap":
        os.waitpid(init, 0)
    os.close(pidfd)
    os.close(output)
    assert children() == []


@on_both_loops
@in_a_copy
def test_a_killed_server_takes_escapees_along(make_loop: Factory) -> None:
    expect_that_a_killed_server_takes_escapees_along(make_loop, lambda: None)


@as_root
@in_a_copy
def test_so_does_that_of_an_ordinary_user() -> None:
    expect_that_a_killed_server_takes_escapees_along(
        asyncio.SelectorEventLoop, become_an_ordinary_user
    )


async def test_orphans_are_reaped() -> None:
    process = await shell(
        "for n in 1 2 3; do (true &); done; echo done; exec cat", stdin=-1, stdout=-1
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"done\n"
    await until(lambda: len(members(process)) == 1)
    await process.communicate()
    assert process.returncode == 0


@pytest.mark.any_backend
@in_a_copy
def test_a_parent_that_ends_before_the_prctl_is_noticed() -> None:
    gone = os.fork()
    if gone == 0:
        os._exit(0)
    parent = os.pidfd_open(gone)
    await_end(parent)
    flags = kernel.CLONE_PIDFD | kernel.CLONE_NEWPID
    command = ((b"/bin/true",), (b"true",), None, (), flags, signal.SIGCHLD, False)
    status = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    pid, pidfd, pipe, block = _clone.spawn(
        *(*command, None, -1, True, True, False, -1, False, -1, -1, -1, None, -1, -1),
        *(True, True, status, parent),
    )
    _clone.take(block)
    await_end(pidfd)
    assert _clone.outcome(block, True) == (_clone.STEP_PARENT_DEATH, errno.ESRCH)
    assert os.waitpid(pid, 0)[1] == 127 << 8
    os.waitpid(gone, 0)
    for descriptor in (parent, status, pidfd, pipe):
        os.close(descriptor)


# What the init holds.


async def test_the_init_holds_neither_descriptors_nor_memory_nor_a_directory(
    tmp_path: Path,
) -> None:
    read_end, write_end = os.pipe()
    ballast = bytearray(64 << 20)
    process = await spawn("cat", stdin=-1, cwd=tmp_path)
    os.close(write_end)
    assert os.read(read_end, 1) == b"", "the other end is held"
    os.close(read_end)
    status = Path(f"/proc/{process.pid}/status").read_text()
    size = dict(line.split(":\t") for line in status.splitlines())["VmSize"].split()
    assert size[1] == "kB"
    assert int(size[0]) < 1024
    assert len(os.listdir(f"/proc/{process.pid}/fd")) == 1
    assert Path(f"/proc/{process.pid}/cwd").readlink() == Path("/")
    del ballast
    await process.communicate()


# Options and errors.


@as_root
async def test_other_options_hold_for_the_program() -> None:
    read_end, write_end = os.pipe()
    ids = {"user": NOBODY, "group": NOBODY, "extra_groups": [1234]}
    script = f"id -u; id -g; id -G; pwd; umask; echo $NAME; echo passed >&{write_end}; true"
    process = await spawn(
        "bash",
        "-c",
        script,
        stdout=-1,
        **ids,
        cwd="/usr/bin",
        env={"NAME": "value", "PATH": os.environ["PATH"]},
        umask=0o27,
        pass_fds=[write_end],
        start_new_session=True,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    assert output.decode().splitlines()[:6] == [
        str(NOBODY),
        str(NOBODY),
        f"{NOBODY} 1234",
        "/usr/bin",
        "0027",
        "value",
    ]
    assert os.read(read_end, 100) == b"passed\n"
    os.close(read_end)
    os.close(write_end)


async def test_its_errors_are_those_of_any_spawn(tmp_path: Path) -> None:
    (tmp_path / "program").write_text("")
    with pytest.raises(FileNotFoundError) as caught:
        await spawn("/nonexistent/program", stdin=-1)
    assert caught.value.filename == "/nonexistent/program"
    with pytest.raises(FileNotFoundError) as caught:
        await spawn("cat", stdin=-1, cwd=tmp_path / "nonexistent")
    assert caught.value.filename == tmp_path / "nonexistent"
    with pytest.raises(PermissionError) as denied:
        await spawn(str(tmp_path / "program"), stdin=-1)
    assert denied.value.filename == str(tmp_path / "program")


async def test_a_cancelled_start_leaves_nothing_behind() -> None:
    """At each turn of the loop; the fixture looks for what is left."""
    for turns in range(3 if EMULATED else 30):
        task = asyncio.ensure_future(shell(ESCAPEES + "exec sleep 1000", stdin=-1, stdout=-1))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        try:
            process = await task
        except asyncio.CancelledError:
            continue
        process.kill()
        await process.communicate()


@on_both_loops
def test_without_descriptors_it_is_an_error_and_nothing_is_left(make_loop: Factory) -> None:
    async def main() -> None:
        highest = max(map(int, os.listdir("/proc/self/fd")))
        maximum = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 20, maximum))
        taken = []
        with pytest.raises(OSError, match="Too many"):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        while taken:
            os.close(taken.pop())
            try:
                process = await spawn("cat", stdin=-1, stdout=-1)
                break
            except OSError as error:
                if error.errno != errno.EMFILE:
                    raise
        assert len(taken) > 1, "there was room for all but a few"
        assert await process.communicate(b"on") == (b"on", None)
        while taken:
            os.close(taken.pop())

    run_apart(make_loop, main)


@on_both_loops
def test_off_the_main_thread_it_takes_a_pidfd_that_kills(make_loop: Factory, backend: str) -> None:
    async def main() -> None:
        if backend == "autoreap":
            assert await (await shell("exit 3")).wait() == 3
        with pytest.raises(OSError, match="needs CLONE_PIDFD_AUTOKILL") as caught:
            await spawn("true", stdin=-1, autoreap=False)
        assert caught.value.errno == errno.ENOSYS

    in_a_thread(make_loop, main)


@as_root
@on_both_loops
def test_an_ordinary_user_has_a_user_namespace_of_its_own(make_loop: Factory, backend: str) -> None:
    async def main() -> None:
        become_an_ordinary_user()
        assert await output_of("id -u; id -g; echo $PPID") == f"{NOBODY}\n{NOBODY}\n1"
        assert await output_of("id -u", user=NOBODY, group=NOBODY) == str(NOBODY)
        with pytest.raises(OSError, match="no other user or group"):
            await spawn("true", stdin=-1, user=NOBODY + 1)
        process = await shell("kill -TERM $$")
        assert await process.wait() == -signal.SIGTERM
        if backend == "autoreap":
            with pytest.raises(PermissionError, match="CAP_SYS_ADMIN"):
                await spawn("true", stdin=-1, no_new_privs=False)

    run_apart(make_loop, main)
