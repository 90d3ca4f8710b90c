"""The kernel's promises for a child made with CLONE_AUTOREAP, through our clone."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
from pathlib import Path

import pytest
from apart import (
    Factory,
    as_root,
    become_an_ordinary_user,
    in_a_copy,
    on_both_loops,
    run_apart,
)
from conftest import children
from raw import AUTOREAP, ORDINARY, cat, dead_by, shell, spawn, status_of, wait_readable

import aioreap
from aioreap import _clone, kernel

pytestmark = pytest.mark.autoreap

CLONE_SIGHAND = 0x00000800
CLONE_PARENT = 0x00008000
CLONE_THREAD = 0x00010000
PR_SET_CHILD_SUBREAPER = 36
SYS_EXIT = {"x86_64": 60, "aarch64": 93, "riscv64": 93}

AUTOKILL = AUTOREAP | kernel.CLONE_NNP | kernel.CLONE_PIDFD_AUTOKILL

# They are ignored or stop a process, by default.
NOT_FATAL = {
    signal.SIGCHLD,
    signal.SIGCONT,
    signal.SIGURG,
    signal.SIGWINCH,
    signal.SIGSTOP,
    signal.SIGTSTP,
    signal.SIGTTIN,
    signal.SIGTTOU,
}
FATAL = [number for number in range(1, 65) if number not in NOT_FATAL]


def nothing_to_wait_for(pid: int) -> bool:
    """Whether every way to wait for `pid` says ECHILD."""
    for kind, number in ((os.P_PID, pid), (os.P_ALL, 0)):
        try:
            os.waitid(kind, number, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            continue
        return False
    return True


@in_a_copy
def test_the_dead_child_is_no_zombie_and_nobody_can_wait_for_it() -> None:
    child = shell("read line; exit 3")
    assert children() == [child.pid]
    assert os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED | os.WNOHANG) is None
    child.close_pipes()
    assert status_of(child.pidfd) == 3 << 8
    assert not children()
    assert nothing_to_wait_for(child.pid)
    with pytest.raises(ChildProcessError):
        os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED | os.WNOHANG)
    assert status_of(child.pidfd) == 3 << 8, "it can be read twice"
    os.close(child.pidfd)


@in_a_copy
def test_a_stray_waitpid_blocks_while_it_lives_and_then_finds_nothing() -> None:
    child = shell("read line; exit 3")
    assert os.waitpid(-1, os.WNOHANG) == (0, 0), "it can be waited for while it lives"
    child.close_pipes()
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, 0)
    assert kernel.is_readable(child.pidfd), "it returned before the exit"
    assert status_of(child.pidfd) == 3 << 8
    os.close(child.pidfd)


def next_sigchld() -> tuple[int, int]:
    """Wait for SIGCHLD: the sender's pid, and the reason."""
    info = signal.sigwaitinfo([signal.SIGCHLD])
    return info.si_pid, info.si_code


def keep_sigchld() -> None:
    """Keep SIGCHLD for next_sigchld(): handled, as an ignored one is dropped, and blocked."""
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])


@in_a_copy
def test_no_sigchld_comes_at_its_exit_even_after_execve() -> None:
    keep_sigchld()
    child = shell("read line; exec /bin/sh -c 'exit 3'")
    assert child.status() == 3 << 8
    assert signal.SIGCHLD not in signal.sigpending()
    ordinary = cat(ORDINARY)
    ordinary.close_pipes()
    assert next_sigchld() == (ordinary.pid, os.CLD_EXITED)
    os.waitid(os.P_PIDFD, ordinary.pidfd, os.WEXITED)
    os.close(ordinary.pidfd)


@in_a_copy
def test_sigchld_still_comes_when_it_stops_and_goes_on() -> None:
    keep_sigchld()
    child = cat()
    signal.pidfd_send_signal(child.pidfd, signal.SIGSTOP)
    assert os.waitpid(-1, os.WUNTRACED)[0] == child.pid
    assert next_sigchld() == (child.pid, os.CLD_STOPPED)
    signal.pidfd_send_signal(child.pidfd, signal.SIGCONT)
    assert os.waitpid(-1, os.WCONTINUED)[0] == child.pid
    assert next_sigchld() == (child.pid, os.CLD_CONTINUED)
    assert child.status() == 0
    assert signal.SIGCHLD not in signal.sigpending()


@in_a_copy
def test_an_ordinary_child_beside_it_is_waited_for_as_ever() -> None:
    ordinary, auto = shell("read line; exit 5", ORDINARY), shell("read line; exit 3")
    assert auto.status() == 3 << 8
    ordinary.close_pipes()
    assert os.waitpid(-1, 0) == (ordinary.pid, 5 << 8)
    assert nothing_to_wait_for(ordinary.pid)
    os.close(ordinary.pidfd)


@in_a_copy
def test_each_exit_code_is_read_from_the_pidfd() -> None:
    codes = [0, 1, 2, 42, 127, 128, 255]
    assert [shell(f"exit {code}").status() for code in codes] == [code << 8 for code in codes]


@in_a_copy
def test_each_fatal_signal_is_read_from_the_pidfd() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in FATAL:
        child = cat()
        signal.pidfd_send_signal(child.pidfd, number)
        assert dead_by(child.status()) == (number, False), signal.strsignal(number)


@in_a_copy
def test_a_core_dump_is_read_from_the_pidfd(tmp_path: Path) -> None:
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    assert not pattern.startswith(("|", "/", "@")), f"core_pattern is {pattern}"
    os.chdir(tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_CORE)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (limit, limit))
    child = cat()
    signal.pidfd_send_signal(child.pidfd, signal.SIGQUIT)
    assert dead_by(child.status()) == (signal.SIGQUIT, True)
    assert [path.name.partition(".")[0] for path in tmp_path.iterdir()] == [pattern]


TWO_THREADS = """
import ctypes, os, sys, threading
leader = f"/proc/self/task/{os.getpid()}/stat"
def outlive():
    while open(leader).read().rpartition(")")[2].split()[0] != "Z":
        pass
    os.write(1, b"alone\\n")
    os.read(0, 1)
    os._exit(3)
threading.Thread(target=outlive).start()
ctypes.CDLL(None).syscall(int(sys.argv[1]), 0)
"""


@in_a_copy
def test_a_child_whose_leader_exits_first_lives_until_its_last_thread_ends() -> None:
    program = [os.path.realpath("/proc/self/exe"), "-c", TWO_THREADS]
    child = spawn(*program, str(SYS_EXIT[os.uname().machine]))
    assert child.line() == b"alone\n"
    assert not kernel.is_readable(child.pidfd)
    assert kernel.exit_status(child.pidfd, reap=False) is None
    assert children() == [child.pid]
    assert child.status() == 3 << 8
    assert nothing_to_wait_for(child.pid)


def orphan(flags: int) -> tuple[int, int]:
    """A child of a process that was killed since: its pid and a pidfd, opened while it lived."""
    read_end, write_end = os.pipe()
    parent = os.fork()
    if parent == 0:
        os.write(write_end, b"%d" % spawn("/bin/sleep", "1000", flags=flags).pid)
        signal.pause()
    os.close(write_end)
    wait_readable(read_end)
    pid = int(os.read(read_end, 20))
    os.close(read_end)
    pidfd = os.pidfd_open(pid)
    os.kill(parent, signal.SIGKILL)
    assert os.waitpid(parent, 0)[1] == signal.SIGKILL
    return pid, pidfd


@in_a_copy
def test_a_child_that_a_subreaper_inherits_leaves_no_zombie_either() -> None:
    assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    pid, pidfd = orphan(AUTOREAP)
    assert children() == [pid]
    assert os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG) is None
    signal.pidfd_send_signal(pidfd, signal.SIGTERM)
    assert status_of(pidfd) == signal.SIGTERM
    assert not children()
    assert nothing_to_wait_for(pid)
    os.close(pidfd)


@in_a_copy
def test_its_own_children_are_ordinary() -> None:
    script = "/bin/sh -c 'exit 5' & wait $!; test $? = 5 && exit 3"
    assert shell(script).status() == 3 << 8


@in_a_copy
def test_it_reaps_itself_without_a_pidfd_too() -> None:
    child = cat(AUTOREAP & ~kernel.CLONE_PIDFD)
    assert child.pidfd == -1
    watching = os.pidfd_open(child.pid)
    assert child.answers()
    child.close_pipes()
    assert status_of(watching) == 0
    assert not children()
    assert nothing_to_wait_for(child.pid)
    os.close(watching)


@in_a_copy
def test_an_exit_signal_is_refused() -> None:
    with pytest.raises(OSError, match="Invalid argument") as caught:
        spawn("/bin/true", flags=AUTOREAP, exit_signal=signal.SIGCHLD)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    ("flags", "refused_with"),
    [
        (CLONE_PARENT, kernel.CLONE_AUTOREAP),
        (CLONE_THREAD | CLONE_SIGHAND, kernel.CLONE_AUTOREAP),
        (CLONE_THREAD | CLONE_SIGHAND, kernel.CLONE_NNP),
    ],
    ids=["CLONE_PARENT", "CLONE_THREAD", "CLONE_THREAD with CLONE_NNP"],
)
def test_a_flag_that_contradicts_is_refused(flags: int, refused_with: int) -> None:
    assert _clone.probe(flags, False) == errno.EFAULT
    assert _clone.probe(flags | refused_with, False) == errno.EINVAL


@in_a_copy
def test_nnp_is_set_in_the_child_and_not_in_the_parent() -> None:
    def no_new_privs(status: str) -> str:
        return next(line for line in status.splitlines() if line.startswith("NoNewPrivs"))

    def own() -> str:
        return no_new_privs(Path("/proc/self/status").read_text())

    assert own() == "NoNewPrivs:\t0"
    for flags, expected in ((AUTOREAP, "0"), (AUTOREAP | kernel.CLONE_NNP, "1")):
        child = shell("grep NoNewPrivs /proc/self/status", flags)
        assert child.line().decode() == f"NoNewPrivs:\t{expected}\n"
        assert child.status() == 0
    assert own() == "NoNewPrivs:\t0"


def killed(watching: int) -> bool:
    """Whether what a pidfd_open copy names dies by SIGKILL."""
    status = status_of(watching)
    os.close(watching)
    return status == signal.SIGKILL


@in_a_copy
def test_autokill_kills_when_the_pidfd_closes_and_a_pidfd_open_copy_does_not_delay_it() -> None:
    child = cat(AUTOKILL)
    watching = os.pidfd_open(child.pid)
    assert child.answers()
    os.close(child.pidfd)
    assert killed(watching)
    assert not child.answers()
    child.close_pipes()


@in_a_copy
def test_without_autokill_nothing_happens_when_the_pidfd_closes() -> None:
    child = cat()
    watching = os.pidfd_open(child.pid)
    os.close(child.pidfd)
    assert child.answers()
    child.close_pipes()
    assert status_of(watching) == 0
    os.close(watching)


@in_a_copy
def test_autokill_kills_when_the_parent_is_killed() -> None:
    assert killed(orphan(AUTOKILL)[1])


@in_a_copy
def test_closing_a_pidfd_open_copy_kills_nobody() -> None:
    child = cat(AUTOKILL)
    os.close(os.pidfd_open(child.pid))
    assert child.answers()
    assert child.status() == 0


@in_a_copy
def test_a_dup_delays_autokill_until_it_is_closed_too() -> None:
    child = cat(AUTOKILL)
    watching = os.pidfd_open(child.pid)
    duplicate = os.dup(child.pidfd)
    os.close(child.pidfd)
    assert child.answers()
    os.close(duplicate)
    assert killed(watching)
    child.close_pipes()


@pytest.mark.parametrize(
    "missing", [kernel.CLONE_AUTOREAP, kernel.CLONE_PIDFD], ids=["CLONE_AUTOREAP", "CLONE_PIDFD"]
)
@in_a_copy
def test_autokill_alone_is_refused(missing: int) -> None:
    with pytest.raises(OSError, match="Invalid argument") as caught:
        spawn("/bin/true", flags=AUTOKILL & ~missing)
    assert caught.value.errno == errno.EINVAL


@as_root
@in_a_copy
def test_autokill_takes_nnp_or_a_capability() -> None:
    """CAP_SYS_ADMIN, which an ordinary user lacks; else a set-user-ID child could be killed."""
    without_nnp = AUTOKILL & ~kernel.CLONE_NNP
    privileged = cat(without_nnp)
    assert privileged.status() == 0
    become_an_ordinary_user()
    with pytest.raises(PermissionError):
        spawn("/bin/true", flags=without_nnp)
    ordinary = cat(AUTOKILL)
    assert ordinary.answers()
    assert ordinary.status() == 0


@in_a_copy
def test_its_usage_is_not_in_rusage_children() -> None:
    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime + usage.ru_minflt

    assert shell("exit 3").status() == 3 << 8
    assert used() == 0
    ordinary = shell("exit 3", ORDINARY)
    ordinary.close_pipes()
    os.waitid(os.P_PIDFD, ordinary.pidfd, os.WEXITED)
    os.close(ordinary.pidfd)
    assert used() > 0


async def test_what_the_library_makes_is_auto_reaped() -> None:
    process = await aioreap.create_subprocess_exec("cat", stdin=-1)
    pidfd = os.dup(process.pidfd)
    process.kill()
    wait_readable(pidfd)
    with pytest.raises(ChildProcessError):
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    os.close(pidfd)
    assert await process.wait() == -signal.SIGKILL


CODES = [code for _ in range(10) for code in range(1, 256)]
NEVER = "the kernel has not woken us early: what is tested has not happened"


def be_woken_before_the_child_goes_on() -> None:
    """Share one processor with the children, and run as soon as one of them wakes us.

    So we often run between their waking us and their storing the exit info.
    """
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))


@as_root
@in_a_copy
def test_pollin_before_the_exit_bit_is_not_yet_and_then_the_right_status() -> None:
    be_woken_before_the_child_goes_on()
    for code in CODES:
        child = shell(f"read line; exit {code}")
        child.close_pipes()
        wait_readable(child.pidfd)
        early = kernel.exit_status(child.pidfd, reap=False) is None
        assert status_of(child.pidfd) == code << 8
        os.close(child.pidfd)
        if early:
            return
    raise AssertionError(NEVER)


@as_root
@on_both_loops
def test_a_loop_that_is_woken_before_the_exit_bit_reads_the_right_status(
    monkeypatch: pytest.MonkeyPatch, make_loop: Factory
) -> None:
    real, early = kernel.exit_status, False

    def exit_status(pidfd: int, *, reap: bool) -> kernel.ExitStatus | None:
        nonlocal early
        is_readable = kernel.is_readable(pidfd)
        status = real(pidfd, reap=reap)
        early = early or (is_readable and status is None)
        return status

    async def main() -> None:
        be_woken_before_the_child_goes_on()
        for code in CODES:
            process = await aioreap.create_subprocess_exec("sh", "-c", f"exit {code}")
            assert await process.wait() == code
            if early:
                return
        raise AssertionError(NEVER)

    monkeypatch.setattr(kernel, "exit_status", exit_status)
    run_apart(make_loop, main)
