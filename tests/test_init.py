"""``python -m aioreap init``: as a subreaper, as the pid 1 of a namespace, and at a terminal."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from apart import as_root
from conftest import _state
from program import run_program

pytestmark = pytest.mark.any_backend

INIT = [sys.executable, "-m", "aioreap", "init"]
PID_NAMESPACE = ["unshare", "--fork", "--pid", "--mount-proc", "--kill-child"]
USER_NAMESPACE = [*PID_NAMESPACE, "--user", "--map-root-user"]

# Takes all signals, and says which; SIGUSR2 ends it.
LISTENER = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
print("ready", flush=True)
while (number := signal.sigwait(signal.valid_signals())) != signal.SIGUSR2:
    print(int(number), flush=True)
"""


@contextlib.contextmanager
def running(
    *command: str, wrapper: Sequence[str] = (), as_job: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """An init in a session of its own, so that nobody else's job control is disturbed.

    `as_job`: only in a process group of its own, as job control has it.
    """
    process = subprocess.Popen(
        [*wrapper, *INIT, *command],
        start_new_session=not as_job,
        process_group=0 if as_job else None,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        with process:
            yield process
    finally:
        process.kill()


def status_of(*command: str, wrapper: Sequence[str] = ()) -> tuple[int, str]:
    """The exit status of an init, and what was on stderr."""
    done = subprocess.run(
        [*wrapper, *INIT, *command],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def children_of(pid: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has gone
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def slow(*values: object) -> list[Any]:
    """Parameters that emulated kernels do without: each is one more Python there."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def can(wrapper: Sequence[str]) -> bool:
    """Whether this machine lets such a namespace be made."""
    return not subprocess.run([*wrapper, "true"], stderr=subprocess.DEVNULL, check=False).returncode


# What becomes of the program.


def test_the_exit_status_is_passed_on() -> None:
    assert status_of("--", "sh", "-c", "exit 3") == (3, "")


@pytest.mark.parametrize("name", ["SEGV", *slow("KILL", "TERM", "USR1")])
def test_a_signal_that_kills_the_program_kills_the_init_too(name: str) -> None:
    assert status_of("sh", "-c", f"kill -{name} $$") == (-signal.Signals[f"SIG{name}"], "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "status", "reason"),
    [
        ("no-such-program", 127, "No such file or directory"),
        ("/nonexistent", 127, "No such file or directory"),
        ("/dev/null/program", 127, "Not a directory"),
        ("/dev/null", 126, "Permission denied"),
        ("/", 126, "Permission denied"),
    ],
)
def test_a_program_that_cannot_be_had_is_a_shells_status(
    program: str, status: int, reason: str
) -> None:
    assert status_of(program) == (status, f"aioreap init: {program}: {reason}\n")


@pytest.mark.slow
@pytest.mark.parametrize("command", [["-x", "true"], [], ["--"], ["--nonsense"]])
def test_a_wrong_use_is_told_with_2(command: list[str]) -> None:
    status, errors = status_of(*command)
    assert status == 2
    assert errors.startswith("usage: python -m aioreap")


@pytest.mark.slow
@pytest.mark.parametrize("options", [["-g"], [], ["--"], ["--group", "--"]], ids=" ".join)
def test_the_programs_arguments_are_the_programs(options: list[str]) -> None:
    with running(*options, "sh", "-c", 'echo "$*"', "sh", "-g", "--", "--json") as init:
        assert line_of(init) == "-g -- --json"


# Signals.


@pytest.mark.newest_kernel
def test_all_that_can_be_caught_is_sent_on() -> None:
    with running("--", sys.executable, "-c", LISTENER) as init:
        assert line_of(init) == "ready"
        for number in signal.valid_signals():
            if number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD, signal.SIGUSR2):
                continue
            init.send_signal(number)
            assert line_of(init) == str(int(number))
        init.send_signal(signal.SIGCHLD)
        init.send_signal(signal.SIGUSR2)
        assert init.wait() == 0


@pytest.mark.newest_kernel
@pytest.mark.parametrize("options", [[], ["-g"]], ids=["program", "group"])
def test_a_signal_is_for_the_program_or_if_so_asked_for_its_group(options: list[str]) -> None:
    with running(*options, "sh", "-c", "sleep 1000 & echo $!; read line") as init:
        other = int(line_of(init))
        pidfd = os.pidfd_open(other)
        try:
            assert os.getpgid(other) != os.getpgid(init.pid)
            init.terminate()
            assert init.wait() == -signal.SIGTERM
            if options:  # its parent was reaped before it died, maybe
                assert init.stdout is not None
                assert init.stdout.read() == ""
            else:
                assert _state(other) in ("S", "R")
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)


SIGNAL_STATE = ["grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status"]


@pytest.mark.newest_kernel
def test_the_program_has_the_mask_and_the_handlers_that_the_init_was_started_with() -> None:
    def spoil() -> None:
        for number in (signal.SIGHUP, signal.SIGCHLD, signal.SIGINT, signal.SIGTSTP):
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGUSR1, signal.SIGRTMIN})

    def lines(*wrapper: str) -> str:
        command = [*wrapper, *SIGNAL_STATE]
        return subprocess.check_output(command, preexec_fn=spoil, text=True)

    assert lines(*INIT) == lines()
    assert "0000000000000000" not in lines()


def is_pending(pid: int, number: int) -> bool:
    lines = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return bool((int(lines["SigPnd"], 16) | int(lines["ShdPnd"], 16)) >> (number - 1) & 1)


@pytest.mark.newest_kernel
def test_a_program_that_somebody_has_stopped_is_not_job_control() -> None:
    """Who stops the program alone can have it go on alone."""
    with running("--", "cat", as_job=True) as init:
        (program,) = until_there_are_children_of(init.pid)
        os.kill(program, signal.SIGSTOP)
        while _state(program) != "T" or is_pending(init.pid, signal.SIGCHLD):
            os.sched_yield()
        init.terminate()
        os.kill(program, signal.SIGCONT)
        assert os.waitpid(init.pid, os.WUNTRACED)[1] == signal.SIGTERM
        init.returncode = -signal.SIGTERM


@pytest.mark.newest_kernel
def test_a_stop_stops_the_init_and_all_of_the_programs_group_and_sigcont_continues_them() -> None:
    with running("sh", "-c", "sleep 1000 & echo $!; read line; kill $!", as_job=True) as init:
        other = int(line_of(init))
        init.send_signal(signal.SIGTSTP)
        assert os.WSTOPSIG(os.waitpid(init.pid, os.WUNTRACED)[1]) == signal.SIGTSTP
        while _state(other) != "T":
            os.sched_yield()
        init.send_signal(signal.SIGCONT)
        while _state(other) == "T":
            os.sched_yield()
        assert init.stdin is not None
        print(file=init.stdin, flush=True)
        assert init.wait() == 0


def until_there_are_children_of(pid: int) -> list[int]:
    while not (found := children_of(pid)):
        os.sched_yield()
    return found


# Orphans.


@pytest.mark.parametrize("count", [1, pytest.param(50, marks=pytest.mark.slow)])
def test_orphans_are_reaped_while_the_program_runs(count: int) -> None:
    orphan = "(sleep 1000 >/dev/null & echo $!);"
    with running("--", "sh", "-c", f"{orphan * count} read line; exit 5") as init:
        orphans = [int(line_of(init)) for _ in range(count)]
        while len(children_of(init.pid)) != count + 1:  # the program, and those
            os.sched_yield()
        for orphan_pid in orphans:
            os.kill(orphan_pid, signal.SIGTERM)
        for orphan_pid in orphans:
            while _state(orphan_pid) is not None:
                os.sched_yield()
        assert init.stdin is not None
        print(file=init.stdin, flush=True)
        assert init.wait() == 5


@pytest.mark.newest_kernel
def test_what_outlives_the_program_is_left_to_the_next_reaper() -> None:
    with running("--", "sh", "-c", "sleep 1000 >/dev/null & echo $!") as init:
        other = int(line_of(init))
        assert init.wait() == 0
        assert _state(other) in ("S", "R")
        os.kill(other, signal.SIGKILL)


# As pid 1.


@pytest.fixture(params=[PID_NAMESPACE, USER_NAMESPACE], ids=["root", "user"])
def namespace(request: pytest.FixtureRequest) -> list[str]:
    """A command that runs another as the pid 1 of a new pid namespace."""
    wrapper: list[str] = request.param
    if not can(wrapper):
        pytest.skip("no such namespace here")
    return wrapper


def test_as_pid_1_it_reaps_sends_on_and_ends_with_128_and_the_signal(namespace: list[str]) -> None:
    script = (
        "echo $PPID; orphan=$(sh -c 'true & echo $!'); "
        "while kill -0 $orphan 2>/dev/null; do :; done; sleep 1000 & exec cat"
    )
    with running("sh", "-c", script, wrapper=namespace) as outside:
        assert line_of(outside) == "1"
        (init,) = children_of(outside.pid)
        while not (others := [pid for child in children_of(init) for pid in children_of(child)]):
            os.sched_yield()
        os.kill(init, signal.SIGTERM)
        assert outside.wait() == 128 + signal.SIGTERM
        assert outside.stdout is not None
        assert outside.stdout.read() == ""  # the kernel has ended who wrote there
        assert not any(map(_state, others))


@pytest.mark.newest_kernel
@as_root
def test_as_pid_1_a_missing_program_is_127_too() -> None:
    status, errors = status_of("/nonexistent", wrapper=PID_NAMESPACE)
    assert (status, errors) == (127, "aioreap init: /nonexistent: No such file or directory\n")


# At a terminal.


def test_a_job_is_suspended_continued_and_interrupted_as_without_an_init() -> None:
    run_program("terminal", "foreground").expect(
        "foreground\n"
        "stopped by SIGTSTP\n"
        "the terminal was the program's\n"
        "continued\n"  # in the background, where it reads
        "stopped by SIGTTIN\n"
        "continued\n"
        "line\n"
        "ended with -2\n"
        "the terminal was given back\n"
    )


@pytest.mark.slow
def test_a_job_in_the_background_does_not_take_the_terminal() -> None:
    run_program("terminal", "background").expect(
        "background\nstopped by SIGTTIN\ncontinued\nended with -2\n"
    )


@pytest.mark.slow
def test_a_script_is_suspended_with_the_program_that_an_init_runs_for_it() -> None:
    run_program("terminal", "script").expect(
        "foreground\nstopped by SIGTSTP\ncontinued\nline\nended with 130\n"
    )


@pytest.mark.slow
def test_what_no_shell_could_continue_is_not_left_stopped_by_ctrl_z() -> None:
    run_program("terminal", "alone").expect("foreground\ncontinued\nline\nended with -2\n")


@pytest.mark.slow
@as_root
def test_what_runs_under_a_pid_1_is_not_left_stopped_by_ctrl_z() -> None:
    run_program("terminal", "alone", *PID_NAMESPACE).expect(
        "foreground\ncontinued\nline\nended with 130\n"
    )
