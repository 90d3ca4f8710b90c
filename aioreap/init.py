"""``python -m aioreap init -- program``: a container's init, alone in its process.

All signals are blocked and taken one at a time by sigwaitinfo(): there is no
handler, no event loop, and nothing that could be interrupted. SIGCHLD says that
somebody is to be reaped, SIGCONT that a stopped job goes on; what else comes is the
program's.

The program leads a process group of its own, so that a signal from the terminal
reaches it once, and has the terminal whenever init's own group has got it. A shell
sees of its job only init, which therefore stops when the program is stopped, and
hands on the terminal and SIGCONT when the shell gives it both.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Collection
from typing import Final, NoReturn

from aioreap import kernel

__all__ = ["run"]

# The statuses of env(1) and of shells.
_FAILED: Final = 125
_NOT_EXECUTABLE: Final = 126
_NOT_FOUND: Final = 127
_KILLED: Final = 128

# From a terminal these come to a whole group, so they go to one.
_JOB_CONTROL: Final = frozenset({signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGCONT})
# Python ignores these, and nobody knows what they were before.
_IGNORED_BY_PYTHON: Final = (signal.SIGPIPE, signal.SIGXFSZ)


def run(command: list[str], *, to_group: bool = False) -> int:
    """Run a program as an init does, and return the exit status to end with.

    Signals go on to the program, with `to_group` to its whole process group;
    SIGTSTP, SIGTTIN, SIGTTOU and SIGCONT always do that. Orphans become children of
    this process, which is pid 1 or makes itself a subreaper, and are reaped. When the
    program ends, this is over: what still runs is killed by the kernel if this is pid
    1, and otherwise left to the next reaper above.

    The status is that of the program, 128 + n if signal n killed it. Where this is not
    pid 1, it does not return then, but dies of the same signal. 127 stands for a
    program that is not found, 126 for one that cannot be executed, and 125 for a
    failure of init itself; stderr has the reason.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    # Ignored, it would leave nobody to reap: the children's statuses would be gone.
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    is_first, group = os.getpid() == 1, os.getpgrp()
    try:
        if not is_first:
            _prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
        terminal = _Terminal()
        child = os.fork()
    except OSError as error:
        _complain(os.strerror(error.errno or 0))
        return _FAILED
    if child == 0:
        signal.signal(signal.SIGCHLD, handler)
        _become(command, terminal, group, mask)
    with contextlib.suppress(PermissionError):  # the child was first, and has exec'ed
        os.setpgid(child, child)
    code = _Job(child, terminal, to_group=to_group).wait()
    terminal.move(child, group)
    if code < 0 and not is_first:
        _die_of(-code)
    return code if code >= 0 else _KILLED - code


class _Terminal:
    """The controlling terminal, if there is one: which process group is in its foreground."""

    def __init__(self) -> None:
        try:
            self._descriptor = os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            self._descriptor = -1

    def belongs_to(self, group: int) -> bool:
        """Whether `group` is in the foreground."""
        try:
            return os.tcgetpgrp(self._descriptor) == group
        except OSError:  # there is none, or it has hung up
            return False

    def move(self, owner: int, group: int) -> None:
        """Put `group` into the foreground if `owner` is there.

        SIGTTOU has to be blocked: the caller's group may be in the background.
        """
        if self.belongs_to(owner):
            with contextlib.suppress(OSError):  # the group has gone
                os.tcsetpgrp(self._descriptor, group)


class _Job:
    """The program, and what else is to be reaped."""

    def __init__(self, child: int, terminal: _Terminal, *, to_group: bool) -> None:
        self._child = child
        self._terminal = terminal
        self._to_group = to_group

    def wait(self) -> int:
        """Do an init's work until the program ends; its exit code, or the negated signal."""
        while True:
            number = signal.sigwaitinfo(signal.valid_signals()).si_signo
            if number == signal.SIGCHLD:
                code = self._reap()
                if code is not None:
                    return code
                self._stop_with_the_child()
            else:
                if number == signal.SIGCONT:
                    self._terminal.move(os.getpgrp(), self._child)
                self._send(number)

    def _send(self, number: int) -> None:
        """Send a signal on; the child is not reaped yet, so the number is still its own."""
        send: Callable[[int, int], None] = os.kill
        if self._to_group or number in _JOB_CONTROL:
            send = os.killpg
        try:
            send(self._child, number)
        except OSError as error:  # the child has become another user
            _complain(f"signal {number} to process {self._child}: {error.strerror}")

    def _reap(self) -> int | None:
        """Reap all that are dead; how the program ended, if it is among them."""
        code = None
        with contextlib.suppress(ChildProcessError):  # not even the program is left
            while (found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG)) is not None:
                if found.si_pid == self._child:
                    exited = found.si_code == os.CLD_EXITED
                    code = found.si_status if exited else -found.si_status
        return code

    def _stop_with_the_child(self) -> None:
        """If the program was stopped by job control, do what a job that it were part of did."""
        try:
            found = os.waitid(os.P_PID, self._child, os.WSTOPPED | os.WNOHANG)
        except ChildProcessError:  # it has died since
            return
        if found is None or signal.SIGCONT in signal.sigpending():
            return
        has_terminal = self._terminal.belongs_to(self._child)
        number = found.si_status
        if number not in _JOB_CONTROL and not has_terminal:
            return  # SIGSTOP from somebody, who will also know how to go on
        stop = number if number in _JOB_CONTROL else signal.SIGTSTP
        if has_terminal:  # a key that was pressed: it meant all of the shell's job
            os.killpg(os.getpgrp(), stop)
        else:
            os.kill(os.getpid(), stop)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {stop})  # here it stops
        signal.pthread_sigmask(signal.SIG_BLOCK, {stop})
        # Neither pid 1 nor a process that no shell cares for can be stopped so. Then
        # nobody would continue the program after a key that would do nothing without init.
        if number == signal.SIGTSTP and signal.SIGCONT not in signal.sigpending():
            self._send(signal.SIGCONT)


def _become(command: list[str], terminal: _Terminal, owner: int, mask: Collection[int]) -> NoReturn:
    """In the child: be the program, with what of signals this process was started with."""
    status = _FAILED
    try:
        os.setpgid(0, 0)
        terminal.move(owner, os.getpgrp())
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)) or number in _IGNORED_BY_PYTHON:
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.execvp(command[0], command)  # noqa: S606 - what it is here for
    except (FileNotFoundError, NotADirectoryError) as error:
        status = _NOT_FOUND
        _complain(f"{command[0]}: {error.strerror}")
    except OSError as error:
        status = _NOT_EXECUTABLE
        _complain(f"{command[0]}: {error.strerror}")
    finally:
        os._exit(status)


def _die_of(number: int) -> None:
    """End as the program did, without a second core dump."""
    with contextlib.suppress(OSError):
        _prctl(kernel.PR_SET_DUMPABLE, 0)
    with contextlib.suppress(OSError):  # SIGKILL has no handler
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})


def _prctl(option: int, value: int) -> None:
    import ctypes  # noqa: PLC0415 - as pid 1, with nothing but the smallest of Pythons, none is needed

    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _complain(what: str) -> None:
    with contextlib.suppress(OSError):  # whoever read it has gone
        print(f"aioreap init: {what}", file=sys.stderr, flush=True)
