"""Each option of a spawn as the child, or the caller, sees it."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import grp
import itertools
import os
import pwd
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import uvloop
from apart import NOBODY, Factory, as_root, become_an_ordinary_user, on_both_loops, run_apart
from conftest import EMULATED
from test_detached import reaped

import aioreap
from aioreap import kernel
from aioreap.options import Options

pytestmark = pytest.mark.own_backend("uvloop")

# Which of the descriptors 0 to 63 a shell has, and nothing it opens itself.
LIST_DESCRIPTORS = """
n=0
while [ $n -lt 64 ]; do [ -e /proc/self/fd/$n ] && echo $n; n=$((n+1)); done; true
"""
STDIO = (0, 1, 2)


async def output_of(*command: Any, **options: Any) -> str:
    """What a program that succeeds writes to stdout."""
    process = await aioreap.create_subprocess_exec(*command, stdout=aioreap.PIPE, **options)
    stdout, _ = await process.communicate()
    assert process.returncode == 0
    assert stdout is not None
    return stdout.decode().rstrip("\n")


async def output_of_shell(script: str, **options: Any) -> str:
    return await output_of("/bin/sh", "-c", script, **options)


async def descriptors_of_child(**options: Any) -> list[int]:
    return [int(line) for line in (await output_of_shell(LIST_DESCRIPTORS, **options)).split()]


async def status_of_child(field: str, **options: Any) -> str:
    """A line of the child's own /proc/self/status."""
    status = await output_of("cat", "/proc/self/status", **options)
    return dict(line.split(":\t") for line in status.splitlines())[field]


async def signals_of_child(field: str, **options: Any) -> set[int]:
    mask = int(await status_of_child(field, **options), 16)
    return {number for number in range(1, 65) if mask & 1 << (number - 1)}


def script_at(path: Path, script: str, mode: int = 0o755) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(mode)
    return path


# Where it runs, and what it is given.


@pytest.mark.parametrize("kind", [str, os.fsencode, Path], ids=["str", "bytes", "path"])
async def test_cwd_is_where_the_child_runs(kind: Callable[[Path], Any], tmp_path: Path) -> None:
    assert await output_of("/bin/pwd", cwd=kind(tmp_path)) == str(tmp_path)
    assert Path.cwd() != tmp_path


async def test_a_program_with_a_slash_is_looked_for_in_cwd(tmp_path: Path) -> None:
    script_at(tmp_path / "here", "pwd")
    assert await output_of("./here", cwd=tmp_path) == str(tmp_path)


async def test_env_none_inherits_what_os_environ_says_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIOREAP_TEST", "naïve\nline")
    assert await output_of_shell('echo "$AIOREAP_TEST"') == "naïve\nline"
    monkeypatch.delenv("AIOREAP_TEST")
    assert await output_of_shell('echo "${AIOREAP_TEST-unset}"', env=None) == "unset"


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, ""),
        ({"A": "1", "B": ""}, "A=1\nB="),
        ({b"A": b"\xff".replace(b"\xff", b"2")}, "A=2"),
        ({"A": "x=y"}, "A=x=y"),
    ],
)
async def test_env_is_all_that_the_child_has(env: dict[Any, Any], expected: str) -> None:
    assert await output_of("/usr/bin/env", env=env) == expected


async def test_executable_runs_in_the_name_of_the_program() -> None:
    # Not sh: where that is busybox, it takes its own name for the applet's.
    assert await output_of("my name", "-c", "echo $0", executable="/bin/bash") == "my name"
    assert await output_of("my name", "-c", "echo $0", executable=b"bash") == "my name"


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, str]:
    """Two directories that have the program `aioreap-test`; a third one that may not run it."""
    for name in ("one", "two"):
        script_at(tmp_path / name / "aioreap-test", f"echo {name}")
    script_at(tmp_path / "forbidden" / "aioreap-test", "echo forbidden", mode=0o644)
    return {name: str(tmp_path / name) for name in ("one", "two", "forbidden", "missing")}


@pytest.mark.parametrize(
    ("searched", "found"),
    [
        (["one", "two"], "one"),
        (["two", "one"], "two"),
        (["missing", "two"], "two"),
        (["forbidden", "two"], "two"),
    ],
    ids="-".join,
)
async def test_the_path_of_the_childs_env_is_searched_in_its_order(
    paths: dict[str, str], searched: list[str], found: str
) -> None:
    env = {"PATH": ":".join(paths[name] for name in searched)}
    assert await output_of("aioreap-test", env=env) == found


async def test_without_env_the_path_of_this_process_is_searched(
    paths: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", paths["two"])
    assert await output_of("aioreap-test") == "two"
    with pytest.raises(FileNotFoundError):
        await aioreap.create_subprocess_exec("aioreap-test", env={"PATH": paths["missing"]})
    with pytest.raises(PermissionError):
        await aioreap.create_subprocess_exec("aioreap-test", env={"PATH": paths["forbidden"]})


# Its descriptors.


async def test_a_child_has_three_descriptors_and_no_more() -> None:
    with open("/dev/null", "rb") as file:
        os.set_inheritable(file.fileno(), True)
        assert await descriptors_of_child() == [0, 1, 2]


async def test_close_fds_false_leaves_the_inheritable_ones() -> None:
    with open("/dev/null", "rb") as kept, open("/dev/null", "rb") as closed:
        os.set_inheritable(kept.fileno(), True)
        found = await descriptors_of_child(close_fds=False)
        assert kept.fileno() in found
        assert closed.fileno() not in found


async def test_pass_fds_are_open_in_the_child_alone() -> None:
    """Inheritable or not, and they stay as they are in this process."""
    with open("/dev/null", "rb") as one, open("/dev/null", "rb") as two, open("/dev/null") as three:
        os.set_inheritable(two.fileno(), True)
        passed = [three.fileno(), one.fileno(), two.fileno(), one.fileno()]
        assert await descriptors_of_child(pass_fds=passed) == sorted({0, 1, 2, *passed})
        assert [os.get_inheritable(d) for d in passed] == [False, False, True, False]


async def test_pass_fds_carry_data() -> None:
    read_end, write_end = os.pipe()
    process = await aioreap.create_subprocess_shell(
        f"echo through >/proc/self/fd/{write_end}", pass_fds=(write_end,)
    )
    os.close(write_end)
    with open(read_end, encoding="utf-8") as reader:
        assert reader.read() == "through\n"
    assert await process.wait() == 0


async def test_pass_fds_never_mean_a_pipe_of_our_own() -> None:
    """A number that is not open yet, and that the spawn's next pipes would get."""
    free = [os.dup(0) for _ in range(12)]
    for descriptor in free:
        os.close(descriptor)
    for descriptor in free:
        with pytest.raises(OSError, match="Bad file descriptor") as caught:
            await aioreap.create_subprocess_exec(
                "true", pass_fds=(descriptor,), stdin=-1, stdout=-1, stderr=-1
            )
        assert caught.value.errno == errno.EBADF


async def test_pass_fds_are_kept_among_the_pipes_of_the_spawn() -> None:
    """Each hole in the numbers is filled by a pipe of the spawn's own."""
    opened = [os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC) for _ in range(16)]
    passed = opened[::2]
    for descriptor in opened[1::2]:
        os.close(descriptor)
    process = await aioreap.create_subprocess_shell(
        f"{LIST_DESCRIPTORS}cat; echo err >&2", pass_fds=passed, stdin=-1, stdout=-1, stderr=-1
    )
    stdout, stderr = await process.communicate(b"in")
    assert stdout is not None
    assert stdout.decode() == "".join(f"{n}\n" for n in (0, 1, 2, *passed)) + "in"
    assert stderr == b"err\n"
    for descriptor in passed:
        os.close(descriptor)


async def test_pass_fds_overrides_close_fds_with_a_warning() -> None:
    with open("/dev/null", "rb") as file, open("/dev/null", "rb") as other:
        os.set_inheritable(other.fileno(), True)
        with pytest.warns(RuntimeWarning, match="pass_fds overriding close_fds"):
            found = await descriptors_of_child(close_fds=False, pass_fds=[file.fileno()])
        assert found == [0, 1, 2, file.fileno()]


@on_both_loops
def test_descriptors_0_to_2_can_be_given_in_every_order(make_loop: Factory, tmp_path: Path) -> None:
    result = tmp_path / "result"
    script = f"""
    for n in 0 1 2; do
        for m in 0 1 2; do [ /proc/self/fd/$n -ef "{tmp_path}/file$m" ] && is="$is $m"; done
    done
    echo $is >"{result}"
    """

    async def main() -> None:
        for number in STDIO:
            opened = os.open(tmp_path / f"file{number}", os.O_RDWR | os.O_CREAT)
            os.dup2(opened, number)
            os.close(opened)
        every = itertools.product((None, *STDIO), repeat=3)
        for given in itertools.permutations(STDIO) if EMULATED else every:
            stdin, stdout, stderr = given
            process = await aioreap.create_subprocess_exec(
                "/bin/sh", "-c", script, stdin=stdin, stdout=stdout, stderr=stderr
            )
            assert await process.wait() == 0
            expected = [n if source is None else source for n, source in enumerate(given)]
            assert result.read_text().split() == [str(n) for n in expected]

    run_apart(make_loop, main)


@on_both_loops
@pytest.mark.parametrize("early", [True, False], ids=["before-the-loop", "under-the-loop"])
def test_descriptors_0_to_2_can_be_closed_in_this_process(
    make_loop: Factory, tmp_path: Path, early: bool
) -> None:
    """Then the spawn's own pipes have those numbers, or the loop's descriptors have them."""
    if early and make_loop is uvloop.new_event_loop:
        pytest.skip("libuv aborts when it closes a descriptor of its own that is one of 0 to 2")
    result, file = tmp_path / "result", tmp_path / "file"
    file.write_text("of the file")
    list_stdio = f"""
    for n in 0 1 2; do [ -e /proc/self/fd/$n ] && is="$is $n"; done
    echo $is >"{result}"
    """
    sizes = (3,) if EMULATED else (1, 2, 3)
    subsets = [s for size in sizes for s in itertools.combinations(STDIO, size)]

    async def spawns(closed: tuple[int, ...]) -> None:
        if not early:
            for number in closed:
                os.close(number)
        process = await aioreap.create_subprocess_shell(
            "cat; echo err >&2", stdin=-1, stdout=-1, stderr=-1
        )
        assert await process.communicate(b"in") == (b"in", b"err\n")
        process = await aioreap.create_subprocess_shell("cat", stdin=-1, stdout=-1)
        assert await process.communicate(b"in") == (b"in", None)
        with file.open() as given:
            process = await aioreap.create_subprocess_shell(
                "cat; echo err >&2", stdin=given, stdout=-1, stderr=aioreap.STDOUT
            )
        assert await process.communicate() == (b"of the fileerr\n", None)
        process = await aioreap.create_subprocess_exec("/bin/sh", "-c", list_stdio)
        assert await process.wait() == 0
        assert result.read_text().split() == [str(n) for n in STDIO if n not in closed]

    for closed in subsets:

        def closing_loop(closed: tuple[int, ...] = closed) -> asyncio.AbstractEventLoop:
            if early:
                for number in closed:
                    os.close(number)
            return make_loop()

        run_apart(closing_loop, lambda closed=closed: spawns(closed))  # type: ignore[misc]


async def test_stderr_stdout_is_where_stdout_goes(tmp_path: Path) -> None:
    process = await aioreap.create_subprocess_shell(
        "echo one; echo two >&2; echo three", stdout=aioreap.PIPE, stderr=aioreap.STDOUT
    )
    assert await process.communicate() == (b"one\ntwo\nthree\n", None)
    with (tmp_path / "output").open("wb") as file:
        process = await aioreap.create_subprocess_shell(
            "echo one; echo two >&2", stdout=file, stderr=aioreap.STDOUT
        )
        assert await process.wait() == 0
    assert (tmp_path / "output").read_text() == "one\ntwo\n"


async def test_stderr_stdout_without_stdout_is_this_processs_stdout(
    capfd: pytest.CaptureFixture[str],
) -> None:
    process = await aioreap.create_subprocess_shell("echo seen >&2", stderr=aioreap.STDOUT)
    assert await process.wait() == 0
    assert capfd.readouterr() == ("seen\n", "")


async def test_files_and_numbers_are_taken_as_stdio(tmp_path: Path) -> None:
    (tmp_path / "input").write_text("of the file")
    with (tmp_path / "input").open() as stdin, (tmp_path / "output").open("wb") as stdout:
        process = await aioreap.create_subprocess_shell(
            "cat; echo err >&2", stdin=stdin, stdout=stdout.fileno(), stderr=stdout
        )
        assert await process.wait() == 0
    assert (tmp_path / "output").read_text() == "of the fileerr\n"


async def test_sockets_are_taken_as_stdio() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = await aioreap.create_subprocess_exec("cat", stdin=theirs, stdout=theirs)
        ours.sendall(b"through")
        ours.shutdown(socket.SHUT_WR)
        assert await process.wait() == 0
        assert ours.recv(100) == b"through"


async def test_devnull_is_empty_and_swallows() -> None:
    assert (
        await output_of_shell("readlink /proc/self/fd/2; cat", stderr=-3, stdin=-3) == "/dev/null"
    )
    process = await aioreap.create_subprocess_shell("cat; echo x", stdin=-3, stdout=-3, stderr=-3)
    assert await process.communicate() == (None, None)
    assert process.returncode == 0


async def test_pipes_open_again_through_dev_stdin_and_dev_stdout() -> None:
    """What /dev/stdin names can be opened if it is a pipe, and not if it is a socket."""
    process = await aioreap.create_subprocess_shell(
        "cat </dev/stdin >/dev/stdout; echo err >/dev/stderr", stdin=-1, stdout=-1, stderr=-1
    )
    assert await process.communicate(b"in") == (b"in", b"err\n")


@pytest.mark.parametrize("size", [8192, 131072])
async def test_pipesize_is_the_size_of_each_pipe(size: int) -> None:
    script = f"import fcntl\nfor n in range(3): print(fcntl.fcntl(n, {fcntl.F_GETPIPE_SZ}))"
    process = await aioreap.create_subprocess_exec(
        sys.executable, "-ISc", script, stdin=-1, stdout=-1, stderr=-1, pipesize=size
    )
    assert await process.communicate() == (f"{size}\n".encode() * 3, b"")


# Its attributes.


async def test_umask_is_the_childs_alone() -> None:
    before = await output_of_shell("umask")
    assert await output_of_shell("umask", umask=0o027) == "0027"
    assert await output_of_shell("umask", umask=0) == "0000"
    assert await output_of_shell("umask", umask=-1) == before


async def ids_of_child(**options: Any) -> str:
    """Its uid, gid and groups as `id` prints them."""
    return (await output_of_shell("id -u; id -g; id -G", **options)).replace("\n", " ")


SOMEBODY = pwd.getpwnam("nobody")
SOME_GROUP = grp.getgrgid(SOMEBODY.pw_gid)


@as_root
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"user": 1234}, "1234 0 0"),
        ({"user": "nobody"}, f"{SOMEBODY.pw_uid} 0 0"),
        ({"group": 1234}, "0 1234 1234 0"),
        ({"group": SOME_GROUP.gr_name}, f"0 {SOME_GROUP.gr_gid} {SOME_GROUP.gr_gid} 0"),
        ({"extra_groups": [1, SOME_GROUP.gr_name]}, f"0 0 0 1 {SOME_GROUP.gr_gid}"),
        ({"extra_groups": []}, "0 0 0"),
        ({"user": 1234, "group": 1235, "extra_groups": []}, "1234 1235 1235"),
        ({"user": 0, "group": 0, "extra_groups": [0]}, "0 0 0"),
    ],
    ids=str,
)
async def test_user_group_and_extra_groups_are_the_childs(options: Options, expected: str) -> None:
    groups = os.getgroups()
    os.setgroups([0])
    try:
        assert await ids_of_child(**options) == expected
        assert (os.getresuid(), os.getresgid(), os.getgroups()) == ((0,) * 3, (0,) * 3, [0])
    finally:
        os.setgroups(groups)


@as_root
@on_both_loops
def test_an_ordinary_user_has_the_ordinary_things_and_cannot_become_root(
    make_loop: Factory,
) -> None:
    async def main() -> None:
        become_an_ordinary_user()
        process = await aioreap.create_subprocess_shell("cat; exit 3", stdin=-1, stdout=-1, cwd="/")
        assert await process.communicate(b"in") == (b"in", None)
        assert process.returncode == 3
        assert (await ids_of_child()).split() == [str(NOBODY)] * 3
        assert (await ids_of_child(user=NOBODY, group=NOBODY)).split() == [str(NOBODY)] * 3
        assert await output_of_shell("umask", start_new_session=True, umask=0o77) == "0077"
        assert await status_of_child("NoNewPrivs", no_new_privs=True) == "1"
        with pytest.raises(FileNotFoundError):
            await aioreap.create_subprocess_exec("/nonexistent")
        impossible: tuple[Options, ...] = ({"user": 0}, {"group": 0}, {"extra_groups": [0]})
        for options in impossible:
            with pytest.raises(PermissionError) as caught:
                await aioreap.create_subprocess_exec("true", **options)
            assert caught.value.errno == errno.EPERM

    run_apart(make_loop, main)


async def stat_of_child(**options: Any) -> tuple[int, int, int]:
    """Its pid, process group and session."""
    line = await output_of("cat", "/proc/self/stat", **options)
    _, _, fields = line.rpartition(")")
    group, session = fields.split()[2:4]
    return int(line.split()[0]), int(group), int(session)


async def test_a_child_is_in_the_session_and_the_group_of_this_process() -> None:
    _, group, session = await stat_of_child()
    assert (group, session) == (os.getpgrp(), os.getsid(0))


async def test_start_new_session_makes_the_child_its_leader() -> None:
    pid, group, session = await stat_of_child(start_new_session=True)
    assert pid == group == session


async def test_process_group_0_makes_the_child_its_leader() -> None:
    pid, group, session = await stat_of_child(process_group=0)
    assert pid == group
    assert session == os.getsid(0)


async def test_process_group_can_be_anothers() -> None:
    leader = await aioreap.create_subprocess_exec("cat", stdin=aioreap.PIPE, process_group=0)
    _, group, _ = await stat_of_child(process_group=leader.pid)
    assert group == leader.pid
    await leader.communicate()


# Its signals.


@pytest.mark.parametrize("restore", [True, False, None])
async def test_restore_signals_undoes_what_python_ignores(restore: bool | None) -> None:
    options: Options = {} if restore is None else {"restore_signals": restore}
    ignored_by_python = {signal.SIGPIPE, signal.SIGXFSZ}
    ignored = await signals_of_child("SigIgn", **options)
    assert ignored & ignored_by_python == (ignored_by_python if restore is False else set())


@pytest.mark.parametrize("options", [{}, {"extra_groups": []}], ids=["shared", "copied"])
async def test_a_child_has_the_callers_signal_mask_and_no_handlers(options: Options) -> None:
    if options and os.geteuid() != 0:
        pytest.skip("needs root")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGRTMIN + 1})
    try:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        assert await signals_of_child("SigBlk", **options) == mask
        assert await signals_of_child("SigCgt", **options) == set()
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert await signals_of_child("SigBlk", **options) == before


@pytest.mark.main_thread
async def test_handlers_are_default_in_the_child_and_ignored_signals_stay_ignored() -> None:
    def handler(_number: int, _frame: object) -> None:
        raise AssertionError

    handlers: dict[int, Any] = {signal.SIGUSR1: signal.SIG_IGN, signal.SIGUSR2: handler}
    before = {number: signal.signal(number, action) for number, action in handlers.items()}
    try:
        ignored = await signals_of_child("SigIgn")
        assert {signal.SIGUSR1, signal.SIGUSR2} & ignored == {signal.SIGUSR1}
        assert await signals_of_child("SigCgt") == set()
        process = await aioreap.create_subprocess_shell("kill -USR2 $$")
        assert await process.wait() == -signal.SIGUSR2
        assert {number: signal.getsignal(number) for number in handlers} == handlers
    finally:
        for number, action in before.items():
            signal.signal(number, action)


# What Popen does for us.


async def test_preexec_fn_runs_in_the_child() -> None:
    assert await output_of("/bin/pwd", preexec_fn=lambda: os.chdir("/usr")) == "/usr"
    assert Path.cwd() != Path("/usr")
    process = await aioreap.create_subprocess_shell(
        "exit 3", stdout=-1, preexec_fn=lambda: os.write(1, b"first")
    )
    assert await process.communicate() == (b"first", None)
    assert process.returncode == 3


async def test_a_preexec_fn_that_raises_is_a_subprocess_error() -> None:
    def fails() -> None:
        raise KeyError("of the test")

    with pytest.raises(subprocess.SubprocessError, match="Exception occurred in preexec_fn"):
        await aioreap.create_subprocess_exec("true", stdin=-1, stdout=-1, preexec_fn=fails)


@pytest.mark.parametrize("preexec", [False, True], ids=["", "preexec_fn"])
@on_both_loops
def test_a_spawn_is_one_audit_event_that_is_popens(make_loop: Factory, preexec: bool) -> None:
    events: list[tuple[object, ...]] = []

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "subprocess.Popen":
            events.append(arguments)

    options: Options = {"env": {"PATH": "/bin:/usr/bin"}, "cwd": "/"}
    if preexec:
        options["preexec_fn"] = os.getpid

    async def main() -> None:
        sys.addaudithook(hook)
        assert await (await aioreap.create_subprocess_exec("sh", "-c", "", **options)).wait() == 0
        ours = events.copy()
        events.clear()
        with subprocess.Popen(["sh", "-c", ""], **options):  # type: ignore[call-overload]
            pass
        assert ours == events == [("sh", ["sh", "-c", ""], "/", options["env"])]

    run_apart(make_loop, main)


@on_both_loops
def test_an_audit_hook_can_forbid_a_spawn(make_loop: Factory) -> None:
    def hook(event: str, _arguments: tuple[object, ...]) -> None:
        if event == "subprocess.Popen":
            raise RuntimeError("forbidden")

    async def main() -> None:
        sys.addaudithook(hook)
        with pytest.raises(RuntimeError, match="forbidden"):
            await aioreap.create_subprocess_exec("true", stdin=-1, stdout=-1)

    run_apart(make_loop, main)


# Ours.


@pytest.mark.parametrize("autoreap", [None, False, 0])
async def test_autoreap_false_and_none_work_everywhere(autoreap: bool | None, backend: str) -> None:
    process = await aioreap.create_subprocess_shell("exit 3", autoreap=autoreap)
    is_ordinary = process._transport.child.has_to_be_reaped
    assert is_ordinary == (autoreap is not None or backend != "autoreap")
    assert await process.wait() == 3


async def test_autoreap_true_is_auto_reaped_or_an_error_that_says_why(backend: str) -> None:
    if backend == "autoreap":
        process = await aioreap.create_subprocess_exec("cat", stdin=-1, autoreap=True)
        pidfd = os.dup(process.pidfd)
        await process.communicate()
        assert process.returncode == 0
        with pytest.raises(ChildProcessError):
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
        os.close(pidfd)
        return
    with pytest.raises(OSError, match=f"needs backend autoreap; this is {backend}") as caught:
        await aioreap.create_subprocess_exec("true", stdin=-1, stdout=-1, autoreap=True)
    assert caught.value.errno == errno.ENOSYS
    assert aioreap.backend().reason in str(caught.value)


@pytest.mark.parametrize("asked", [True, False])
async def test_no_new_privs_is_the_childs_alone(asked: bool) -> None:
    assert await status_of_child("NoNewPrivs", no_new_privs=asked) == str(int(asked))
    assert "NoNewPrivs:\t0\n" in Path("/proc/self/status").read_text()


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A new cgroup of version 2."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    root = next((Path(mount[1]) for mount in mounts if mount[2] == "cgroup2"), None)
    if root is None or not os.access(root, os.W_OK):
        assert not EMULATED
        pytest.skip("no cgroup v2 to write to; a kernel of make test-kernel has")
    path = root / f"aioreap-test-{os.getpid()}"
    path.mkdir()
    yield path
    path.rmdir()


@pytest.mark.parametrize("kind", ["str", "path", "descriptor", "opened-path"])
async def test_cgroup_is_where_the_child_starts(cgroup: Path, kind: str) -> None:
    descriptor = os.open(cgroup, os.O_RDONLY | (os.O_PATH if kind == "opened-path" else 0))
    given: Any = {"str": str(cgroup), "path": cgroup}.get(kind, descriptor)
    try:
        process = await aioreap.create_subprocess_exec(
            "cat", "/proc/self/cgroup", stdout=-1, cgroup=given
        )
        stdout, _ = await process.communicate()
    finally:
        os.close(descriptor)
    assert process.returncode == 0
    assert stdout is not None
    lines = stdout.decode().splitlines()
    assert [line for line in lines if line.startswith("0::")] == [f"0::/{cgroup.name}"]
    assert process.exit_info is not None
    is_told = kernel.backend().features["exit_info"].available
    assert process.exit_info.cgroup_id == (cgroup.stat().st_ino if is_told else None)
    assert f"0::/{cgroup.name}" not in Path("/proc/self/cgroup").read_text()


@pytest.mark.parametrize(
    "fails", [{"cwd": "/nonexistent"}, {"executable": "/nonexistent"}], ids=str
)
async def test_what_fails_in_a_cgroup_leaves_it_empty(cgroup: Path, fails: dict[str, Any]) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        await aioreap.create_subprocess_exec("true", cgroup=cgroup, **fails)
    assert caught.value.filename == "/nonexistent"
    assert (cgroup / "cgroup.procs").read_text() == ""


# Shells, and what is refused.


@pytest.mark.parametrize("cmd", ["echo $((1 + 2)); exit 4", b"echo $((1 + 2)); exit 4"])
async def test_a_shell_command_is_what_the_shell_makes_of_it(cmd: str | bytes) -> None:
    process = await aioreap.create_subprocess_shell(cmd, stdout=aioreap.PIPE)
    assert await process.communicate() == (b"3\n", None)
    assert process.returncode == 4


async def test_a_shell_can_be_another_executable() -> None:
    process = await aioreap.create_subprocess_shell("echo $0", stdout=-1, executable="/bin/bash")
    assert await process.communicate() == (b"/bin/bash\n", None)


async def started_and_exited(starting: Awaitable[aioreap.Process]) -> int:
    return await (await starting).wait()


# Each starts a program, or a shell, and waits until it has exited.
STARTS: dict[str, Callable[..., Awaitable[object]]] = {
    "exec": lambda *words, **options: started_and_exited(
        aioreap.create_subprocess_exec(*words, **options)
    ),
    "shell": lambda *words, **options: started_and_exited(
        aioreap.create_subprocess_shell(*words, **options)
    ),
    "detached": aioreap.spawn_detached,
}


@pytest.mark.any_backend
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("text", True),
        ("universal_newlines", True),
        ("bufsize", 1),
        ("encoding", "utf-8"),
        ("errors", "strict"),
        ("shell", None),
    ],
)
async def test_text_and_buffers_are_refused_with_asyncios_message(
    option: str, value: object, start: str
) -> None:
    shell = start == "shell"
    options: dict[str, Any] = {option: not shell if option == "shell" else value}
    loop = asyncio.base_events.BaseEventLoop  # it refuses before it looks at itself
    theirs: Any = loop.subprocess_shell if shell else loop.subprocess_exec
    with pytest.raises(ValueError, match="must be") as expected:
        await theirs(None, asyncio.SubprocessProtocol, "true", **options)
    with pytest.raises(ValueError, match="must be") as caught:
        await STARTS[start]("true", **options)
    assert str(caught.value) == str(expected.value)


@pytest.mark.any_backend
@pytest.mark.parametrize("text", [False, None])
@pytest.mark.parametrize("start", STARTS)
async def test_what_asks_for_no_text_is_taken(start: str, text: bool | None) -> None:
    options: Any = {
        "text": text,
        "universal_newlines": False,
        "bufsize": 0,
        "encoding": None,
        "errors": None,
        "startupinfo": None,
        "creationflags": 0,
    }
    result = await STARTS[start]("true", **options, shell=start == "shell")
    if start == "detached":
        await reaped(cast("int", result))
    else:
        assert result == 0


@pytest.mark.any_backend
async def test_an_unknown_option_is_a_type_error_that_names_it() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'no_such_option'"):
        await aioreap.create_subprocess_exec("true", no_such_option=1)  # type: ignore[call-arg]


@pytest.mark.any_backend
async def test_a_shell_command_that_is_no_string_is_asyncios_error() -> None:
    with pytest.raises(ValueError, match=r"^cmd must be a string$"):
        await aioreap.create_subprocess_shell(["true"])  # type: ignore[arg-type]
