"""Children made by _clone alone, with flags of the test's choice and nothing around them."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

from aioreap import _clone, kernel

ORDINARY = kernel.CLONE_VM | kernel.CLONE_PIDFD | kernel.CLONE_CLEAR_SIGHAND
AUTOREAP = ORDINARY | kernel.CLONE_AUTOREAP


@dataclass
class Child:
    """A child that has exec'ed, with the parent's ends of its stdin and stdout."""

    pid: int
    pidfd: int
    stdin: int
    stdout: int

    def line(self) -> bytes:
        """The next line that it writes, b"" at its end."""
        line = b""
        while not line.endswith(b"\n") and (byte := os.read(self.stdout, 1)):
            line += byte
        return line

    def answers(self) -> bool:
        """Whether a child that runs `cat` still does."""
        try:
            os.write(self.stdin, b"?\n")
        except BrokenPipeError:
            return False
        return self.line() == b"?\n"

    def status(self) -> int:
        """Its wait status from its own pidfd, which is closed; stdin is closed first."""
        self.close_pipes()
        status = status_of(self.pidfd)
        os.close(self.pidfd)
        return status

    def close_pipes(self) -> None:
        """Have what reads its stdin come to the end."""
        os.close(self.stdin)
        os.close(self.stdout)


def wait_readable(descriptor: int) -> None:
    """Wait for POLLIN or a hang-up, without a limit."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    poll.poll()


def is_zombie(pidfd: int) -> bool:
    """Whether this process has to wait for what is dead."""
    try:
        return os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return False


def wait_zombie(pid: int) -> None:
    """Wait until an ordinary child of this process is dead, and leave it so."""
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def status_of(pidfd: int) -> int:
    """The wait status of an auto-reaped process by one of its pidfds."""
    with select.epoll() as edges:  # one comes at the exit, and another with the exit info
        edges.register(pidfd, select.EPOLLIN | select.EPOLLET)
        while True:
            edges.poll()
            found = kernel.exit_status(pidfd, reap=False)
            if found is not None:
                assert found[0] is not None
                return found[0]
            assert not is_zombie(pidfd), "it is not auto-reaped"


def spawn(*command: str, flags: int = AUTOREAP, exit_signal: int | None = None) -> Child:
    """Make a child, and wait until it has exec'ed.

    exit_signal is 0 with CLONE_AUTOREAP and SIGCHLD without, unless given.
    """
    if exit_signal is None:
        exit_signal = 0 if flags & kernel.CLONE_AUTOREAP else signal.SIGCHLD
    child_in, stdin = os.pipe()
    stdout, child_out = os.pipe()
    try:
        pid, pidfd, pipe, block = _clone.spawn(
            (os.fsencode(command[0]),),
            tuple(os.fsencode(argument) for argument in command),
            None,
            ((child_in, 0), (child_out, 1)),
            flags,
            exit_signal,
            False,
        )
    except BaseException:
        os.close(stdin)
        os.close(stdout)
        raise
    finally:
        os.close(child_in)
        os.close(child_out)
    _clone.take(block)
    wait_readable(pipe)
    while (outcome := _clone.outcome(block, False)) is None:
        time.sleep(0.0001)  # it may need this processor
    os.close(pipe)
    assert outcome == (_clone.STEP_EXEC, 0)
    return Child(pid, pidfd, stdin, stdout)


def shell(script: str, flags: int = AUTOREAP) -> Child:
    """Spawn a shell."""
    return spawn("/bin/sh", "-c", script, flags=flags)


def cat(flags: int = AUTOREAP) -> Child:
    """Spawn what answers until its stdin ends, and then exits with 0."""
    return spawn("/bin/cat", flags=flags)


def dead_by(status: int) -> Sequence[int]:
    """The signal that a wait status names, and whether core was dumped."""
    return os.WTERMSIG(status), os.WCOREDUMP(status)
