"""One epoll set for all that a loop waits for of its children: their pidfds and exec pipes.

It is the loop's one reader for them. Caveats, each shown by tests/test_epollset.py:

* An epoll set is shared with forked copies of the program: one that removes what
  it inherits makes the parent deaf. A copy gets a set of its own at the fork; one
  that C has forked, of which Python is not told, takes nothing out of the parent's.
* Members are level-triggered, so that an exception in the midst of several, as
  KeyboardInterrupt, loses none of the others. One that has to be edge-triggered is
  looked at again.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import errno
import os
import select
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Final, NoReturn, Protocol

from aioreap import _clone

__all__ = ["EpollSet", "Member", "Turn"]

# How many are told in one turn of the loop. Each may wake a task that starts the next program, and
# what all these take is what a timer of that turn waits for. Where turns are long anyway, one more
# for each 0.5 ms that the last one took, and so many more at most.
TOLD_IN_A_TURN: Final = 3
ONE_MORE_NS: Final = 500_000
MOST_MORE: Final = 64

# Whose a set is in a forked copy that could not get one of its own.
_NOBODY: Final = -1
_EDGES: Final = select.EPOLLIN | select.EPOLLET


class Member(Protocol):
    """What waits for a descriptor."""

    def ready(self) -> None:
        """Look at the descriptor: it is readable, or was."""


class Turn:
    """What is known of a turn of the loop; forgotten whenever a set tells, which few turns do not.

    Attributes:
        clones: how many children were made.
        cloning_ns: how long that took.
        is_spent: whether no more are to be made.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Another turn begins."""
        self.clones: int = 0
        self.cloning_ns: int = 0
        self.is_spent: bool = False


class EpollSet:
    """Tells its members of what is readable, from the reader of one event loop, which keeps it.

    Attributes:
        members: by their descriptors. Those that it still has when the loop is closed, and lets
            it go, are given to take_members().

    Raises:
        NotImplementedError: the loop has no ``add_reader``.
        OSError: there is no descriptor for it, or no room for the watch.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        turn: Turn | None = None,
        take_members: Callable[[Iterable[Member]], object] | None = None,
    ) -> None:
        self.members: dict[int, Member] = {}
        self._turn = turn or Turn()
        self._take_members = take_members
        self._owner = os.getpid()
        self._edges: set[int] = set()
        # The one too many of the last turn: told first, as it stands last in the kernel's list.
        self._left: tuple[int, Member | None] | None = None
        self._told_ns = 0
        self._epoll = select.epoll()
        self._descriptor = self._epoll.fileno()  # also after a fork
        try:
            # An empty context: that of the task which comes first is not that of all others.
            contextvars.Context().run(loop.add_reader, self._descriptor, self._tell)
        except BaseException:
            self._epoll.close()
            raise
        _sets.add(self)

    def __del__(self) -> None:
        if self.members and self._take_members is not None:
            self._take_members(self.members.values())

    def add(self, descriptor: int, member: Member) -> None:
        """Have `member` told whenever `descriptor` is readable.

        Raises:
            OSError: there is no room for the watch (ENOSPC, ENOMEM), or was none at a fork for
                a set of this copy's own (EMFILE).
        """
        if self._owner == _NOBODY:
            self._refuse()
        self._epoll.register(descriptor, select.EPOLLIN)
        self.members[descriptor] = member

    def take(
        self, block: _clone.Block, pidfd: int, child: Member, pipe: int, launch: Member
    ) -> None:
        """Take the child of `block` over, and have these two told of its pidfd and exec pipe.

        Raises:
            OSError: as add(). Nobody is told of the child then, and perhaps it was not taken over.
        """
        if self._owner == _NOBODY:
            self._refuse()
        _clone.take(block, self._descriptor)
        self.members[pidfd] = child
        self.members[pipe] = launch

    def _refuse(self) -> NoReturn:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def remove(self, descriptor: int) -> None:
        """Forget the member; the descriptor can be closed after this."""
        self.members.pop(descriptor, None)
        self.pause(descriptor)  # also what an interrupted add() or take() has left in the set

    def close(self, holder: object, name: str) -> None:
        """Forget the member, and close its descriptor, an attribute of `holder` that becomes -1."""
        if self._edges or self._left is not None:
            self._put_aside(getattr(holder, name))
        _clone.close(self._descriptor, self._owner, self.members, holder, name)

    def pause(self, descriptor: int) -> None:
        """Keep the member, and tell it nothing."""
        self._put_aside(descriptor)
        _clone.unwatch(self._descriptor, self._owner, descriptor)

    def _put_aside(self, descriptor: int) -> None:
        self._edges.discard(descriptor)
        if self._left is not None and self._left[0] == descriptor:
            self._left = None

    def tells_of_edges(self, descriptor: int) -> bool:
        """Whether tell_of_edges() is in force for it."""
        return descriptor in self._edges

    def tell_of_edges(self, descriptor: int) -> None:
        """Tell its member once that it is readable, and again only when more happens to it.

        Raises:
            OSError: as add().
        """
        if self._owner == _NOBODY:
            self._refuse()
        try:
            self._epoll.modify(descriptor, _EDGES)
        except FileNotFoundError:
            self._epoll.register(descriptor, _EDGES)
        self._edges.add(descriptor)

    def _tell(self) -> None:
        if self._owner == _NOBODY:
            return
        turn, members = self._turn, self.members
        turn.clones = turn.cloning_ns = 0
        turn.is_spent = False
        try:
            # One of them may remove another, whose number may be used anew.
            for descriptor, member in self._next():
                if member is None:
                    if descriptor not in members:  # add() was interrupted, or the file is held open
                        self.pause(descriptor)
                elif members.get(descriptor) is member:
                    member.ready()
        except BaseException:
            for descriptor in list(self._edges):  # whose events may have been among these
                with contextlib.suppress(OSError):
                    self.tell_of_edges(descriptor)
            raise

    def _next(self) -> list[tuple[int, Member | None]]:
        """Who is to be told in this turn."""
        members, limit = self.members, TOLD_IN_A_TURN
        left, self._left = self._left, None
        if left is None:
            asked = limit + 1
            events = self._epoll.poll(0, asked)
            ready = [(d, members.get(d)) for d, _ in events]
        else:  # it is ready, and so the loop has not slept since
            now = time.monotonic_ns()
            asked = limit + min((now - self._told_ns) // ONE_MORE_NS, MOST_MORE)
            events = self._epoll.poll(0, asked)
            ready = [left, *[(d, members.get(d)) for d, _ in events if d != left[0]]]
        if len(events) == asked and ready[-1][0] not in self._edges:  # else it would not be told
            self._left = ready.pop()
            self._told_ns = time.monotonic_ns()
        return ready

    def _unshare(self) -> None:
        self._owner = os.getpid()
        try:
            with select.epoll() as own:
                for descriptor in self.members:
                    own.register(
                        descriptor, _EDGES if descriptor in self._edges else select.EPOLLIN
                    )
                os.dup2(own.fileno(), self._descriptor, inheritable=False)
        except OSError:
            self._owner = _NOBODY


_sets: weakref.WeakSet[EpollSet] = weakref.WeakSet()


def _unshare_all() -> None:
    for epoll_set in list(_sets):
        epoll_set._unshare()


os.register_at_fork(after_in_child=_unshare_all)
