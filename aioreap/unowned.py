"""Processes that are watched and not owned: they do not end with a loop, and nobody may kill them.

An Heir is a child that was given up, and that this process alone can reap. A
Stranger is a process that somebody else started. A Grandchild is owned until it is given
up, and somebody else's to reap from the beginning.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os

from aioreap import kernel
from aioreap.watcher import Child, ChildWatcher

__all__ = ["Grandchild", "Heir", "Stranger", "is_child", "reap_heirs"]

# Until they are reaped. A watcher does not keep its loop alive.
heirs: dict[ChildWatcher, set[Heir]] = {}


class _Unowned(Child):
    """What may not be killed for a loop's sake."""

    ends_with_loop: bool = False
    _lost_level: int = logging.DEBUG

    def abandon(self) -> None:
        """Let go of the process: its loop is closed, or about to be."""
        self.destroy()


class Heir(_Unowned):
    """Goes on waiting for a detached child, with a copy of its pidfd, so that it is reaped."""

    @classmethod
    def of(cls, child: Child, loop: asyncio.AbstractEventLoop) -> Heir:
        """That of a child of `loop` which is about to be detached.

        Raises:
            OSError: there is no descriptor for it, or no room for the watch.
        """
        heir = child.heir
        if not isinstance(heir, cls):
            pidfd = fcntl.fcntl(child.pidfd, fcntl.F_DUPFD_CLOEXEC, 3)
            heir = cls(child.pid, pidfd, reap=True, started_ns=child.started_ns)
            try:
                heir._settle_in(ChildWatcher.of(loop))
            except BaseException:
                heir._close()
                raise
        elif heir.status is None and heir._home.is_over:
            heir._settle_in(ChildWatcher.of(loop))
        return heir

    @classmethod
    def of_dead(cls, pid: int, status: int, started_ns: int) -> Heir:
        """One that knows what another process has learnt of its child's end."""
        heir = cls(pid, -1, reap=True, started_ns=started_ns)
        heir.status = status, None
        return heir

    @classmethod
    def waiting_for(cls, pid: int) -> Heir | None:
        """That of a child that is not reaped yet, so that no other process has its number."""
        for of_one_loop in list(heirs.values()):
            for heir in list(of_one_loop):
                if heir.pid == pid and heir.status is None:
                    return heir
        return None

    def _settle_in(self, home: ChildWatcher) -> None:
        home.watch(self)
        self._leave_home()
        self._home = home
        heirs.setdefault(home, set()).add(self)

    def _leave_home(self) -> None:
        home: ChildWatcher | None = getattr(self, "_home", None)
        if home in heirs:
            heirs[home].discard(self)
            if not heirs[home]:
                del heirs[home]

    def settle(self, status: kernel.ExitStatus) -> None:
        """As Child.settle(); it is over then."""
        self._leave_home()
        super().settle(status)

    def destroy(self) -> None:
        """Leave the child to the next spawns; in a forked copy, it is not its own."""
        self._stop_being_watched()

    @property
    def is_here(self) -> bool:
        """Whether the child is one of this process, which is no forked copy."""
        return not self.is_copy


class Stranger(_Unowned):
    """A process that may be no child of this one, and is never reaped here."""

    def destroy(self) -> None:
        """Close the pidfd."""
        self._callbacks = ()
        self._close()

    def give_back(self) -> None:
        """As Child.give_back(), but that the pidfd is this one's own."""
        self.destroy()


class Grandchild(Child):
    """A child's child, between its clone and its exec: that it has ended is all that is known.

    Where this process is a subreaper, or the first of its pid namespace, it is our child when
    the one between is gone, and reaped.
    """

    _lost_level: int = logging.DEBUG

    def ask(self) -> kernel.ExitStatus | None:
        """As Child.ask(); the status is always lost, as whoever is init may never reap it."""
        if self.status is None and (self.pidfd < 0 or kernel.is_readable(self.pidfd)):
            with contextlib.suppress(OSError):
                os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
            self.status: kernel.ExitStatus | None = self._lost()
        return self.status


def is_child(pidfd: int) -> bool:
    """Whether the process is a child of this one that has not been reaped."""
    try:
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    except BlockingIOError:  # libuv makes the descriptor non-blocking
        return True
    return True


def reap_heirs() -> None:
    """Reap the dead heirs of loops that are closed; done at every spawn."""
    for watcher, of_one_loop in list(heirs.items()):
        if watcher.is_over:
            for heir in list(of_one_loop):
                heir.poll()


def _close_heirs() -> None:
    while heirs:
        for heir in heirs.popitem()[1]:
            heir._close()


os.register_at_fork(after_in_child=_close_heirs)
