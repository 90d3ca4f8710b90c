"""A shell at a terminal: runs ``python -m aioreap init`` as a job, and says what it sees of it.

Started as ``python terminal.py SCENARIO``. It presses the terminal's keys as well.
"""

from __future__ import annotations

import fcntl
import functools
import os
import signal
import subprocess
import sys
import termios
from collections.abc import Callable

SUSPEND, INTERRUPT = b"\x1a", b"\x03"

# It tells of lines that it reads, of SIGCONT and, at first, of who has the terminal. Python's
# handlers wait for the end of a read() that they just miss: the interpreter's own tells of it.
CONTINUED = bytes([signal.SIGCONT])
PROGRAM = r"""
import os, signal
def tell(what):
    os.write(OUTPUT, what.encode() + b"\n")
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.set_blocking(OUTPUT, False)
signal.set_wakeup_fd(OUTPUT)
signal.signal(signal.SIGCONT, lambda *_: None)
tell("foreground" if os.tcgetpgrp(0) == os.getpid() == os.getpgrp() else "background")
while line := os.read(0, 100):
    tell(line.decode().strip())
"""


class Shell:
    """A terminal, the process that sits at it, and one job."""

    def __init__(self) -> None:
        self.keys, self.terminal = os.openpty()
        self._heard, self._told = os.pipe()
        self._program = PROGRAM.replace("OUTPUT", str(self._told))

    def start(self, become: Callable[[], None], *wrapper: str) -> None:
        """Have an init run the program; `become` comes first in the new process."""
        init = [*wrapper, sys.executable, "-m", "aioreap", "init", "--"]
        self.job = subprocess.Popen(
            [*init, sys.executable, "-c", self._program],
            stdin=self.terminal,
            pass_fds=[self._told],
            preexec_fn=become,  # noqa: PLW1509 - it has one thread
        )
        os.close(self._told)

    def lead_the_session(self) -> None:
        os.setsid()
        fcntl.ioctl(self.terminal, termios.TIOCSCTTY, 0)

    def become_a_job(self, *, foreground: bool = True) -> None:
        os.setpgid(0, 0)
        if foreground:
            os.tcsetpgrp(self.terminal, os.getpid())
        signal.signal(signal.SIGTTOU, signal.SIG_DFL)

    def press(self, keys: bytes) -> None:
        os.write(self.keys, keys)

    def hear(self, expected: str) -> None:
        """The next thing that the program tells."""
        told = b""
        while told != CONTINUED and not told.endswith(b"\n"):
            byte = os.read(self._heard, 1)
            assert byte, f"it ended after {told!r}"
            told += byte
        heard = "continued" if told == CONTINUED else told.decode().strip()
        assert heard == expected, heard
        print(heard)

    def see(self) -> None:
        """The next thing that happens to the job, of which a shell sees init alone."""
        _, status = os.waitpid(self.job.pid, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            print("stopped by", signal.Signals(os.WSTOPSIG(status)).name)
            return
        self.job.returncode = os.waitstatus_to_exitcode(status)
        print("ended with", self.job.returncode)

    def take_the_terminal(self) -> None:
        owner = os.tcgetpgrp(self.terminal)
        os.tcsetpgrp(self.terminal, os.getpgrp())
        print("the terminal was", "given back" if owner == self.job.pid else "the program's")

    def go_on(self, *, foreground: bool) -> None:
        """As the commands fg and bg do it."""
        if foreground:
            os.tcsetpgrp(self.terminal, self.job.pid)
        os.killpg(self.job.pid, signal.SIGCONT)


def shell_with_jobs() -> Shell:
    shell = Shell()
    shell.lead_the_session()
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # it gives the terminal away and takes it
    return shell


def foreground() -> None:
    """Ctrl-Z, bg, a program that reads in the background, fg, Ctrl-C."""
    shell = shell_with_jobs()
    shell.start(shell.become_a_job)
    shell.hear("foreground")
    shell.press(SUSPEND)
    shell.see()
    shell.take_the_terminal()
    shell.go_on(foreground=False)
    shell.hear("continued")
    shell.see()
    shell.go_on(foreground=True)
    shell.hear("continued")
    shell.press(b"line\n")
    shell.hear("line")
    shell.press(INTERRUPT)
    shell.see()
    shell.take_the_terminal()


def background() -> None:
    """A job that never had the terminal takes it from nobody."""
    shell = shell_with_jobs()
    shell.start(functools.partial(shell.become_a_job, foreground=False))
    shell.hear("background")
    shell.see()  # it reads
    assert os.tcgetpgrp(shell.terminal) == os.getpgrp()
    shell.go_on(foreground=True)
    shell.hear("continued")
    shell.press(INTERRUPT)
    shell.see()


def script() -> None:
    """The job is a script, of which the init is a part."""
    shell = shell_with_jobs()
    shell.start(shell.become_a_job, "sh", "-c", '"$@"; exit $?', "sh")
    shell.hear("foreground")
    shell.press(SUSPEND)
    shell.see()
    shell.go_on(foreground=True)
    shell.hear("continued")
    shell.press(b"line\n")
    shell.hear("line")
    shell.press(INTERRUPT)
    shell.see()


def alone(*wrapper: str) -> None:
    """With nobody who could continue it, Ctrl-Z leaves nothing stopped."""
    shell = Shell()
    shell.start(shell.lead_the_session, *wrapper)
    shell.hear("foreground")
    shell.press(SUSPEND)
    shell.hear("continued")
    shell.press(b"line\n")
    shell.hear("line")
    shell.press(INTERRUPT)
    shell.see()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
