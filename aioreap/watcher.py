"""From a pidfd to exit info: one ChildWatcher per event loop, through a reader of it.

Caveats, each shown by tests/test_watcher.py:

* Readable is not "exit info ready": the kernel wakes the pollers of a pidfd
  first and stores the exit info later, much later while a tracer holds the
  dead child. Level-triggered, such a pidfd would spin: it is told of by edges.
* An epoll set is shared with forked copies of the program: one that removes a
  reader makes the parent deaf. In a copy, asyncio's loops get a set of their
  own, as the children do; no other loop is touched there. (tests/test_copies.py)
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import errno
import logging
import os
import select
import selectors
import signal
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Protocol

from aioreap import _clone, groups, hold, kernel
from aioreap.epollset import EpollSet, Member, Turn
from aioreap.exitinfo import ExitInfo, ExitStatusLost

__all__ = ["Child", "ChildWatcher"]

logger: Final = logging.getLogger("aioreap")

# After how many seconds a pidfd that says ESRCH is asked again, before its
# status counts as lost.
_ESRCH_PATIENCE: Final = (0.001, 0.01, 0.1)
# After how many seconds it is asked again where there was no room to be told of edges.
_EPOLL_RETRY: Final = 0.02
# How long destroy() stays for the death of what it killed, in milliseconds.
_DEATH_PATIENCE_MS: Final = 200

# To reap a child and to note its status are one step for all threads: a blocking
# wait() in another thread than the loop's would else find a status that was taken.
# Reentrant: the collector may destroy another child in the midst of it.
_reaping = threading.RLock()


def _renew_lock() -> None:
    global _reaping
    _reaping = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)

# The pidfds of children that were killed without a loop and had not died yet.
orphans: list[int] = []


def _close_orphans() -> None:
    while orphans:
        os.close(orphans.pop())


os.register_at_fork(after_in_child=_close_orphans)


def reap_orphans() -> None:
    """Reap what destroy() had to leave; done at every spawn."""
    for _ in range(len(orphans)):
        try:
            pidfd = orphans.pop(0)
        except IndexError:  # another thread is at it
            return
        try:
            dead = kernel.exit_status(pidfd, reap=True) is not None
        except OSError:
            dead = True
        if dead:
            os.close(pidfd)
        else:
            orphans.append(pidfd)


class _Launch(Protocol):
    def child_exited(self) -> None: ...


class Child:
    """One child, from its clone until its exit info is known.

    Attributes:
        pid: its process id.
        pidfd: the pidfd that came from its clone; closed at its exit and -1 from then on.
        leads_group: whether it was started as the leader of a process group of its own.
        status: what the kernel has said of its end, maybe before the loop was told; None: nothing.
        has_ended: whether its exit is known.
        started_ns: what its exit_info will say of its beginning.
        held: what kills it when this process ends: its pidfd, this thread, or nothing.
        status_socket: where the child, if it is the init of a tree, tells how its program ended;
            else -1.
        heir: who reaps it in its place, if it was detached before, and so knows its status.
        is_detached: whether it was given up: all that asks of it is a ValueError then.
        launch: what hears of its exit before all others, between its clone and its exec.
        watcher: who asks for its exit info, is about to, or has; None: nobody.
    """

    # Whether it is to end with its loop, and how loudly it is said that its status is lost.
    ends_with_loop: bool = True
    _lost_level: int = logging.ERROR

    # By position: with keywords, CPython 3.13 makes it half as fast.
    def __init__(self, pid: int, pidfd: int, reap: bool, started_ns: int) -> None:  # noqa: FBT001
        self.pid = pid
        self.pidfd: int = pidfd
        self.leads_group: bool = False
        self.started_ns = started_ns
        self._reap = reap
        self._owner = os.getpid()
        self._callbacks: tuple[Callable[[Child], object], ...] = ()
        # No defaults of the class: on Python 3.12 and 3.13 they make each access slower.
        self.status: kernel.ExitStatus | None = None
        self.has_ended: bool = False
        self._finished_ns = 0
        self._exit_info: ExitInfo | None = None
        self.launch: _Launch | None = None
        self.held: hold.Held | None = None
        self.status_socket: int = -1
        self.heir: Child | None = None
        self.is_detached: bool = False
        self.watcher: ChildWatcher | None = None
        self._keeps_group = True
        self._group_pidfd = -1  # what was the pidfd, while the group outlives its leader
        self._esrch_count = 0

    def __repr__(self) -> str:
        state = "exited" if self.has_ended else "running"
        return f"<{type(self).__name__} pid={self.pid} {state}>"

    def __del__(self) -> None:
        if self.pidfd >= 0 or self._group_pidfd >= 0:
            self.abandon()

    @property
    def is_copy(self) -> bool:
        """Whether this process is a forked copy of the one that made the child."""
        return self._owner != os.getpid()

    @property
    def exit_info(self) -> ExitInfo | None:
        """None until its exit is known; its status is None if that is lost."""
        if self._exit_info is None and self.has_ended:
            assert self.status is not None
            self._exit_info = ExitInfo(self.pid, *self.status, self.started_ns, self._finished_ns)
        return self._exit_info

    def ready(self) -> None:
        """Its pidfd is readable: ask for its exit info, and settle it, or ask again."""
        watcher = self.watcher
        if watcher is None or self.pidfd < 0:  # settled meanwhile, by poll() or before a second try
            return
        try:
            status = self.ask()
        except OSError as error:
            watcher.ask_later(self, error)
            return
        if status is not None:
            self.settle(status)
        else:
            watcher.await_edges(self)

    def abandon(self) -> None:
        """Kill the child if it runs, with a ResourceWarning: its loop is closed, or about to be."""
        if self.pidfd < 0 or self.is_copy:
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
        """Have `callback(child)` called once, from the loop, when its exit is known.

        At once if it is already.
        """
        if self.has_ended:
            callback(self)
        else:
            self._callbacks += (callback,)

    def discard_exit_callback(self, callback: Callable[[Child], object]) -> None:
        """Undo add_exit_callback()."""
        self._callbacks = tuple(other for other in self._callbacks if other != callback)

    def send_signal(self, number: int) -> None:
        """Send a signal through the pidfd, which cannot reach any other process.

        Nothing happens if the child has exited.

        Raises:
            PermissionError: as for kill(2).
            ValueError: it was detached.
        """
        self.check_kept()
        with _reaping, contextlib.suppress(ProcessLookupError):
            if self.status_socket >= 0 and number == signal.SIGSTOP:
                number = _clone.STOP_PROGRAM
            if self.pidfd >= 0:
                signal.pidfd_send_signal(self.pidfd, number)

    def send_signal_to_group(self, number: int, members: groups.Members | None = None) -> bool:
        """Signal the group that the child leads, or led: groups.send_signal(), with its errors.

        Raises:
            ValueError: the child was detached.
        """
        self.check_kept()
        with _reaping:
            if self.status_socket >= 0 and number in signal.valid_signals() - {signal.SIGKILL}:
                return hold.signal_group(self.status_socket, self.pidfd, number)
            return groups.send_signal(
                self._any_pidfd, self.pid, number, groups.Members() if members is None else members
            )

    def is_group_alive(self) -> bool:
        """Whether anybody lives in the group that the child leads, or led."""
        with _reaping:
            if self._group_pidfd >= 0 and not groups.has_members(self._group_pidfd):
                self.forget_group()
            alive = groups.is_alive(self._any_pidfd, self.pid)
            if not alive:  # zombies, which nobody may ever reap, need no descriptor
                self.forget_group()
            return alive

    @property
    def _any_pidfd(self) -> int:
        return self._group_pidfd if self.pidfd < 0 else self.pidfd

    def poll(self) -> ExitInfo | None:
        """Ask the kernel now. What it knows is in exit_info then, and the callbacks are called."""
        if not self.has_ended:
            with contextlib.suppress(OSError):
                self.ask()
            if self.status is not None:
                self.settle(self.status)
        return self.exit_info

    def ask(self) -> kernel.ExitStatus | None:
        """Ask the kernel now, and return `status`; nobody is told. Any thread may call it.

        Once the pidfd is given up, nobody can know any more what is not known.

        Raises:
            OSError: as kernel.exit_status().
            ValueError: it was detached.
        """
        with _reaping:
            if self.is_detached:
                self.check_kept()
            if self.status is None and self.heir is not None:
                self.status = self.heir.ask()
            elif self.status is None:
                if self.pidfd >= 0:
                    self.status = kernel.exit_status(self.pidfd, reap=self._reap)
                else:
                    self.status = kernel.LOST
                if self.status_socket >= 0 and self.status is not None:
                    self.status = hold.status_of_program(self.status_socket, self.status)
            return self.status

    def _lost(self) -> kernel.ExitStatus:
        """What is left to say where the kernel knows nothing of the child's end."""
        if self.status_socket < 0:
            return kernel.LOST
        return hold.status_of_program(self.status_socket, kernel.LOST)

    def wait(self, timeout: float | None) -> kernel.ExitStatus | None:
        """Block this thread, for at most `timeout` seconds, until there is a `status`; return it.

        As with ask(), nobody is told, and any thread may call it.
        """
        end = None if timeout is None else time.monotonic() + timeout
        patience = iter(_ESRCH_PATIENCE)
        if self._ask_with(patience):
            return self.status
        with _reaping:
            if self.pidfd < 0:
                return self.ask()
            copy = os.dup(self.pidfd)  # which the loop's thread cannot close
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, copy)
            edges = stack.enter_context(select.epoll())
            edges.register(copy, select.EPOLLIN | select.EPOLLET)
            while not self._ask_with(patience):
                left = None if end is None else end - time.monotonic()
                if left is not None and left <= 0:
                    break
                edges.poll(left)
        return self.status

    def _ask_with(self, patience: Iterator[float]) -> bool:
        """Ask, with patience while the kernel says ESRCH; whether the child has ended."""
        while True:
            try:
                return self.ask() is not None
            except OSError:
                pause = next(patience, None)
            if pause is None:
                with _reaping:
                    self.status = self.status or self._lost()
                return True
            time.sleep(pause)

    def settle(self, status: kernel.ExitStatus) -> None:
        """Note that it has ended, give up the pidfd and its reader, and call the callbacks."""
        self.status = status
        self._finished_ns = time.monotonic_ns()
        self.has_ended = True
        if status[0] is None:
            logger.log(self._lost_level, "%s", ExitStatusLost(self.pid))
        try:
            self._close(keep_group=self.leads_group and self._keeps_group)
        finally:
            callbacks, self._callbacks = self._callbacks, ()
            if self.launch is not None:
                self.launch.child_exited()
            for callback in callbacks:
                callback(self)

    def check_kept(self) -> None:
        """Raise a ValueError if the child was detached."""
        if self.is_detached:
            raise ValueError(f"process {self.pid} was detached")

    def check_detachable(self) -> None:
        """Raise what detach() would.

        Raises:
            ValueError: it was detached, or is held by what nobody can take over.
            ProcessLookupError: it is known to have ended.
            RuntimeError: it is the child of the process that this is a forked copy of.
        """
        self.check_kept()
        if self.status is not None:
            raise ProcessLookupError(errno.ESRCH, f"process {self.pid} has ended")
        if self.held == "pdeathsig":
            raise ValueError(
                f"process {self.pid} is held by PR_SET_PDEATHSIG: it cannot be detached"
            )
        if self.status_socket >= 0:
            raise ValueError(
                f"process {self.pid} is held with its tree: nobody else is told how it ends"
            )
        if self.is_copy:
            raise RuntimeError(f"process {self.pid} is not a child of this forked copy")

    def detach(self) -> int:
        """Give the child up, with its pidfd, which is returned open; nobody is told anything.

        Raises:
            ValueError, ProcessLookupError, RuntimeError: as check_detachable().
        """
        self.check_detachable()
        self._stop_being_watched()
        self._callbacks = ()
        with _reaping:
            self.is_detached = True
            pidfd, self.pidfd = self.pidfd, -1
        return pidfd

    def give_back(self) -> None:
        """Leave the process, and its pidfd, to the caller: what should have taken it has failed."""
        self._callbacks = ()
        try:
            self._stop_being_watched()
        finally:
            self.pidfd = -1

    @property
    def has_to_be_reaped(self) -> bool:
        """Whether it is an ordinary child, which somebody has to wait for."""
        return self._reap

    def _close(self, *, keep_group: bool = False) -> None:
        """Stop being watched, and give up the pidfd, while no other thread uses it.

        It is kept apart for a group that still has members: nothing else can reach them.
        """
        watcher = self.watcher
        epoll_set = None if watcher is None else watcher.epoll_set()
        with _reaping:
            if self.status_socket >= 0:
                self._close_status_socket()
            if keep_group and self.pidfd >= 0 and groups.has_members(self.pidfd):
                self._stop_being_watched()
                self._group_pidfd, self.pidfd = self.pidfd, -1
            elif epoll_set is not None:
                epoll_set.close(self, "pidfd")
            else:
                _clone.close(-1, -1, {}, self, "pidfd")

    def forget_group(self) -> None:
        """Give up what reaches the group after the leader's exit, or would after a later one."""
        with _reaping:
            self._keeps_group = False
            pidfd, self._group_pidfd = self._group_pidfd, -1
            if pidfd >= 0:
                os.close(pidfd)

    def _close_status_socket(self) -> None:
        if self.status_socket >= 0:
            os.close(self.status_socket)
            self.status_socket = -1

    def _stop_being_watched(self) -> None:
        watcher = self.watcher
        if watcher is not None:
            epoll_set = watcher.epoll_set()
            if epoll_set is not None:
                epoll_set.remove(self.pidfd)
            self.watcher = None  # not before, as an interrupt may come

    def destroy(self) -> None:
        """Kill the child at once and give up its descriptors, with no help from a loop.

        It is gone at the return, or (in uninterruptible sleep) later: then the next spawns reap it,
        if it does not do so itself.
        """
        self._callbacks = ()
        self.launch = None
        self.forget_group()
        if self.pidfd < 0:
            return
        if self.is_copy:  # the child is not its own
            self._close()
            return
        self._stop_being_watched()
        try:
            with contextlib.suppress(PermissionError):  # it runs a set-user-ID program
                self.send_signal(signal.SIGKILL)
            poll = select.poll()
            # An auto-reaped child is gone when its pidfd hangs up, a little after it is readable.
            poll.register(self.pidfd, select.POLLIN if self._reap else select.POLLHUP)
            poll.poll(_DEATH_PATIENCE_MS)
        finally:
            self._leave()
        reap_orphans()

    def _leave(self) -> None:
        """Note the status for who asks later, and close the pidfd, or keep it to be reaped."""
        with _reaping:
            with contextlib.suppress(OSError):
                self.ask()
            if self.status is None and self._reap:
                orphans.append(self.pidfd)
                self.pidfd = -1
                self._close_status_socket()
                return
        self._close()


def nothing() -> None:
    """What a dead reference says."""


class ChildWatcher:
    """Resolves children into their exit info through a reader of one event loop.

    ``ChildWatcher.of(loop)`` is the one of that loop. It uses neither threads nor
    signals, and needs only ``add_reader`` and ``call_later`` of the loop.

    Attributes:
        turn: what is known of the loop's turn.
        epoll_set: says which set its reader keeps, and with it the children; this would keep the
            loop. None: there is none yet, or the loop is closed.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.turn: Turn = Turn()
        self._loop = weakref.ref(loop)
        self.epoll_set: Callable[[], EpollSet | None] = nothing

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> ChildWatcher:
        """The watcher of `loop`, made at the first call."""
        watcher = _watchers.get(loop)
        if watcher is None:
            watcher = _watchers.setdefault(loop, cls(loop))
        return watcher

    @property
    def is_over(self) -> bool:
        """Whether its loop is closed or gone."""
        loop = self._loop()
        return loop is None or loop.is_closed()

    def is_watching(self, pidfd: int) -> bool:
        """Whether a child has this descriptor."""
        epoll_set = self.epoll_set()
        return epoll_set is not None and pidfd in epoll_set.members

    def open_set(self) -> EpollSet:
        """The loop's set, made at the first call.

        Raises:
            RuntimeError: the loop is closed.
            NotImplementedError: it has no ``add_reader``.
            OSError: there is no descriptor for it (EMFILE), or no room in the kernel for
                another watch (ENOSPC, ENOMEM).
        """
        epoll_set = self.epoll_set()
        if epoll_set is None:
            loop = self._loop()
            if loop is None or loop.is_closed():
                raise RuntimeError("Event loop is closed")
            try:
                epoll_set = EpollSet(loop, self.turn, _remember)
            except NotImplementedError:
                raise NotImplementedError(
                    f"{loop!r} has no add_reader(), and so cannot watch a child"
                ) from None
            self.epoll_set = weakref.ref(epoll_set)
        return epoll_set

    def watch(self, child: Child) -> None:
        """Ask for the child's exit info whenever its pidfd is readable, and settle it.

        Raises:
            RuntimeError, NotImplementedError, OSError: as open_set(), EpollSet.add().
        """
        child.watcher = self  # first: an interrupt may come after add()
        self.open_set().add(child.pidfd, child)

    def abandon_children(self) -> None:
        """Kill the children that are left; for a loop that is about to be closed."""
        epoll_set = self.epoll_set()
        if epoll_set is None:
            return
        with contextlib.ExitStack() as stack:  # all of them, though a warning may be an exception
            for child in list(epoll_set.members.values()):
                if isinstance(child, Child):
                    stack.callback(child.abandon)

    def await_edges(self, child: Child) -> None:
        """It is readable, and has not ended yet: have it told only when more happens."""
        loop, epoll_set = self._loop(), self.epoll_set()
        if loop is None or epoll_set is None or epoll_set.tells_of_edges(child.pidfd):
            return
        try:
            epoll_set.tell_of_edges(child.pidfd)
        except OSError:
            epoll_set.pause(child.pidfd)
            loop.call_later(_EPOLL_RETRY, child.ready)

    def ask_later(self, child: Child, error: OSError) -> None:
        """The kernel has answered so: have it asked again, or settle what is lost."""
        loop, epoll_set = self._loop(), self.epoll_set()
        if loop is None or epoll_set is None or child._esrch_count == len(_ESRCH_PATIENCE):
            logger.debug("no exit info for %r", child, exc_info=error)
            child.settle(child._lost())
            return
        epoll_set.pause(child.pidfd)
        loop.call_later(_ESRCH_PATIENCE[child._esrch_count], child.ready)
        child._esrch_count += 1


_watchers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, ChildWatcher] = (
    weakref.WeakKeyDictionary()
)


def _unshare_epoll_sets() -> None:
    """Give the loops of a forked copy epoll sets of their own, with the same descriptors in them.

    Streams, pipes and loops that are freed or closed there remove readers, in an
    order that is not ours, and the parent would no longer hear those.
    """
    for loop in list(_watchers):
        shared = getattr(loop, "_selector", None)
        if loop.is_closed() or not isinstance(shared, selectors.EpollSelector):
            continue
        # Without a descriptor for another set it stays the shared one.
        with contextlib.suppress(OSError), selectors.EpollSelector() as own:
            for key in shared.get_map().values():
                with contextlib.suppress(OSError):
                    own.register(key.fd, key.events)
            os.dup2(own.fileno(), shared.fileno(), inheritable=False)


os.register_at_fork(after_in_child=_unshare_epoll_sets)


# Those of loops that were closed.
_left: weakref.WeakSet[Child] = weakref.WeakSet()


def _remember(members: Iterable[Member]) -> None:
    _left.update(member for member in members if isinstance(member, Child))


def _abandon_children_of_closed_loops() -> None:
    """At the end of the interpreter, which may never free what still holds them."""
    with contextlib.ExitStack() as stack:  # all of them, though a warning may be an exception
        for child in list(_left):
            stack.callback(child.abandon)


atexit.register(_abandon_children_of_closed_loops)
