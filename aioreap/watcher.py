"""From a pidfd to exit info: one ChildWatcher per event loop, through its readers.

Caveats, each shown by tests/test_watcher.py:

* Readable is not "exit info ready": the kernel wakes the pollers of a pidfd
  first and stores the exit info later, much later while a tracer holds the
  dead child. A level-triggered reader would spin. Such a pidfd moves to an
  inner epoll, edge-triggered, and that one is registered with the loop.
* An epoll set is shared with forked copies of the program: one that removes a
  reader makes the parent deaf. In a copy, only descriptors are closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import signal
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Final

from aioreap import kernel
from aioreap.exitinfo import ExitInfo, ExitStatusLost

__all__ = ["Child", "ChildWatcher"]

logger: Final = logging.getLogger("aioreap")

# After how many seconds a pidfd that says ESRCH is asked again, before its
# status counts as lost.
_ESRCH_PATIENCE: Final = (0.001, 0.01, 0.1)
# After how many seconds another inner epoll is tried when there was no descriptor for it.
_EPOLL_RETRY: Final = 0.02
# How long destroy() stays for the death of what it killed, in milliseconds.
_DEATH_PATIENCE_MS: Final = 200

# The pidfds of children that were killed without a loop and had not died yet.
_orphans: list[int] = []


def _close_orphans() -> None:
    while _orphans:
        os.close(_orphans.pop())


os.register_at_fork(after_in_child=_close_orphans)


def reap_orphans() -> None:
    """Reap what destroy() had to leave; done at every spawn."""
    for _ in range(len(_orphans)):
        try:
            pidfd = _orphans.pop(0)
        except IndexError:  # another thread is at it
            return
        try:
            dead = kernel.exit_status(pidfd, reap=True) is not None
        except OSError:
            dead = True
        if dead:
            os.close(pidfd)
        else:
            _orphans.append(pidfd)


class Child:
    """One child, from its clone until its exit info is known.

    Attributes:
        pid: its process id.
        pidfd: the pidfd that came from its clone; closed at its exit and -1 from then on.
        exit_info: None until its exit is known; its status is None if that is lost.
    """

    def __init__(self, pid: int, pidfd: int, *, reap: bool, started_ns: int) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.exit_info: ExitInfo | None = None
        self._reap = reap
        self._started_ns = started_ns
        self._owner = os.getpid()
        self._watcher: ChildWatcher | None = None
        self._callbacks: list[Callable[[Child], object]] = []
        self._edge: _EdgeReader | None = None
        self._esrch_count = 0

    def __repr__(self) -> str:
        state = "running" if self.exit_info is None else "exited"
        return f"<{type(self).__name__} pid={self.pid} {state}>"

    def __del__(self) -> None:
        self.abandon()

    def abandon(self) -> None:
        """Kill the child if it runs, with a ResourceWarning: its loop is closed, or about to be."""
        if self.pidfd < 0:
            return
        if self._owner != os.getpid():
            self.destroy()
            return
        self.destroy()  # first: the warning may be an exception
        warnings.warn(
            f"child {self.pid} still ran when its event loop was closed; it is killed",
            ResourceWarning,
            stacklevel=2,
            source=self,
        )

    def add_exit_callback(self, callback: Callable[[Child], object]) -> None:
        """Have `callback(child)` called once, from the loop, when exit_info is there.

        At once if it is there already.
        """
        if self.exit_info is None:
            self._callbacks.append(callback)
        else:
            callback(self)

    def discard_exit_callback(self, callback: Callable[[Child], object]) -> None:
        """Undo add_exit_callback()."""
        if callback in self._callbacks:
            self._callbacks.remove(callback)

    def send_signal(self, number: int) -> None:
        """Send a signal through the pidfd, which cannot reach any other process.

        Nothing happens if the child has exited.

        Raises:
            PermissionError: as for kill(2).
        """
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, number)

    def poll(self) -> ExitInfo | None:
        """Ask the kernel now. What it knows is in exit_info then, and the callbacks are called."""
        if self.exit_info is None and self.pidfd >= 0:
            try:
                status = kernel.exit_status(self.pidfd, reap=self._reap)
            except OSError:
                status = None
            if status is not None:
                self.settle(status)
        return self.exit_info

    def settle(self, status: kernel.ExitStatus) -> None:
        """Set exit_info, give up the pidfd and its reader, and call the callbacks."""
        self.exit_info = ExitInfo(
            self.pid, status.status, status.cgroup_id, self._started_ns, time.monotonic_ns()
        )
        if status.status is None:
            logger.error("%s", ExitStatusLost(self.pid))
        os.close(self._detach())
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(self)

    def _detach(self) -> int:
        """Stop being watched, and hand the pidfd to the caller."""
        watcher, self._watcher = self._watcher, None
        if watcher is not None and self._owner == os.getpid():
            watcher.forget(self)
        pidfd, self.pidfd = self.pidfd, -1
        return pidfd

    def destroy(self) -> None:
        """Kill the child at once and give up its descriptors, with no help from a loop.

        It is gone at the return, or (in uninterruptible sleep) later: then the next spawns reap it,
        if it does not do so itself.
        """
        self._callbacks.clear()
        if self.pidfd < 0:
            return
        if self._owner != os.getpid():  # a forked copy: the child is not its own
            os.close(self._detach())
            return
        with contextlib.suppress(PermissionError):  # it runs a set-user-ID program
            self.send_signal(signal.SIGKILL)
        pidfd = self._detach()
        poll = select.poll()
        # An auto-reaped child is gone when its pidfd hangs up, a little after it is readable.
        poll.register(pidfd, select.POLLIN if self._reap else select.POLLHUP)
        poll.poll(_DEATH_PATIENCE_MS)
        if not self._reap:
            os.close(pidfd)
            return
        _orphans.append(pidfd)
        reap_orphans()


class _EdgeReader:
    """An inner epoll that becomes readable at each new event of one pidfd."""

    def __init__(self, pidfd: int) -> None:
        self._epoll = select.epoll()
        try:
            self._epoll.register(pidfd, select.EPOLLIN | select.EPOLLET)
        except BaseException:
            self._epoll.close()
            raise
        self.fileno = self._epoll.fileno()

    def take(self) -> None:
        self._epoll.poll(0)

    def close(self) -> None:
        self._epoll.close()


class ChildWatcher:
    """Resolves children into their exit info through the readers of one event loop.

    ``ChildWatcher.of(loop)`` is the one of that loop. It uses neither threads nor
    signals, and needs only ``add_reader``, ``remove_reader`` and ``call_later`` of
    the loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._children: weakref.WeakSet[Child] = weakref.WeakSet()

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> ChildWatcher:
        """The watcher of `loop`, made at the first call."""
        watcher = _watchers.get(loop)
        if watcher is None:
            watcher = _watchers.setdefault(loop, cls(loop))
        return watcher

    def watch(self, child: Child) -> None:
        """Ask for the child's exit info whenever its pidfd is readable, and settle it.

        Raises:
            RuntimeError: the loop is closed.
            NotImplementedError: it has no ``add_reader``.
            OSError: the kernel has no room for another watch (ENOSPC, ENOMEM).
        """
        loop = self._loop()
        if loop is None or loop.is_closed():
            raise RuntimeError("Event loop is closed")
        loop.add_reader(child.pidfd, self._readable, child)
        child._watcher = self
        self._children.add(child)

    def forget(self, child: Child) -> None:
        """Stop watching; the pidfd can be closed after this."""
        self._stop_reading(child)
        self._children.discard(child)

    def abandon_children(self) -> None:
        """Kill the children that are left; for a loop that is about to be closed."""
        with contextlib.ExitStack() as stack:  # all of them, though a warning may be an exception
            for child in list(self._children):
                stack.callback(child.abandon)

    def _readable(self, child: Child) -> None:
        if child.pidfd < 0:  # settled meanwhile, by poll() or before a second try
            return
        if child._edge is not None:
            child._edge.take()
        try:
            status = kernel.exit_status(child.pidfd, reap=child._reap)
        except OSError as error:
            self._ask_later(child, error)
            return
        if status is not None:
            child.settle(status)
        elif child._edge is None:
            self._await_edges(child)

    def _await_edges(self, child: Child) -> None:
        self._stop_reading(child)
        loop = self._loop()
        if loop is None:
            return
        try:
            child._edge = _EdgeReader(child.pidfd)
            loop.add_reader(child._edge.fileno, self._readable, child)
        except OSError:
            self._stop_reading(child)
            loop.call_later(_EPOLL_RETRY, self._readable, child)

    def _ask_later(self, child: Child, error: OSError) -> None:
        self._stop_reading(child)
        loop = self._loop()
        if loop is None or child._esrch_count == len(_ESRCH_PATIENCE):
            logger.debug("no exit info for %r", child, exc_info=error)
            child.settle(kernel.ExitStatus(None, None))
            return
        loop.call_later(_ESRCH_PATIENCE[child._esrch_count], self._readable, child)
        child._esrch_count += 1

    def _stop_reading(self, child: Child) -> None:
        loop = self._loop()
        edge, child._edge = child._edge, None
        if loop is not None and not loop.is_closed() and child._owner == os.getpid():
            loop.remove_reader(child.pidfd if edge is None else edge.fileno)
        if edge is not None:
            edge.close()


_watchers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, ChildWatcher] = (
    weakref.WeakKeyDictionary()
)
