"""One epoll set for all that a loop waits for of its children: their pidfds and exec pipes.

It is the loop's one reader for them. Caveats, each shown by tests/test_epollset.py:

* An epoll set is shared with forked copies of the program: one that removes what
  it inherits, or takes an event, makes the parent deaf. A copy gets a set of its own
  at the fork; one that C has forked, of which Python is not told, gets none, and
  leaves the parent's as it is.
* Who is told is told once (EPOLLONESHOT), and again if it still is a member then.
  Most are not, and what was told of needs no removal: the kernel forgets it when it
  is closed. Who else has it open, as a child before its exec, may keep it in the set
  for longer, and nobody hears of that.
* An exception in the midst of several, as KeyboardInterrupt, loses none of the
  others: they are looked at again.
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

__all__ = ["EpollSet", "Member", "Turn"]

# How many are told in one turn of the loop. Each may wake a task that starts the next program, and
# what all these take is what a timer of that turn waits for. Where turns are long anyway, one more
# for each 0.5 ms that the last one took, and so many more at most.
TOLD_IN_A_TURN: Final = 3
ONE_MORE_NS: Final = 500_000
MOST_MORE: Final = 64

# Whose a set is in a forked copy that could not get one of its own.
_NOBODY: Final = -1
_ONCE: Final = select.EPOLLIN | select.EPOLLONESHOT
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
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Another turn begins."""
        self.clones = self.cloning_ns = 0


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
        # That of the member which is being told: of it the kernel tells no more.
        self._spent = -1
        # When the last turn was, and whether some are ready since: the loop has not slept then.
        self._told_ns = 0
        self._has_left = False
        self._epoll = select.epoll()
        self._readable = select.poll()
        self._readable.register(self._epoll, select.POLLIN)
        try:
            # An empty context: that of the task which comes first is not that of all others.
            contextvars.Context().run(loop.add_reader, self._epoll.fileno(), self._tell)
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
            self.refuse()
        self._edges.discard(descriptor)
        try:
            self._epoll.register(descriptor, _ONCE)
        except FileExistsError:  # it was told of before, and somebody has kept it open
            self._epoll.modify(descriptor, _ONCE)
        self.members[descriptor] = member

    def is_of(self, process: int) -> bool:
        """Whether it is of the process with this id, and not of one that this is a copy of."""
        return self._owner == process

    def refuse(self) -> NoReturn:
        """Raise what add() raises in a copy without a set of its own."""
        raise OSError(errno.EMFILE, "this forked copy has no epoll set of its own")

    def remove(self, descriptor: int) -> None:
        """Forget the member; the descriptor can be closed after this."""
        if self.members.pop(descriptor, None) is None:
            return
        if descriptor == self._spent:
            self._spent = -1
        else:
            self.pause(descriptor)

    def pause(self, descriptor: int) -> None:
        """Keep the member, and tell it nothing."""
        self._edges.discard(descriptor)
        if self._owner != os.getpid():
            return
        with contextlib.suppress(OSError):  # it is not told of anything now
            self._epoll.unregister(descriptor)
        if self._has_left:  # maybe this one alone
            self._has_left = self._is_readable()

    def tells_of_edges(self, descriptor: int) -> bool:
        """Whether tell_of_edges() is in force for it."""
        return descriptor in self._edges

    def tell_of_edges(self, descriptor: int) -> None:
        """Tell its member once that it is readable, and again only when more happens to it.

        Raises:
            OSError: as add().
        """
        if self._owner != os.getpid():
            self.refuse()
        try:
            self._epoll.modify(descriptor, _EDGES)
        except FileNotFoundError:
            self._epoll.register(descriptor, _EDGES)
        self._edges.add(descriptor)

    def _tell(self) -> None:
        if self._owner != os.getpid():
            return
        turn, members = self._turn, self.members
        turn.clones = turn.cloning_ns = 0
        now, limit = time.monotonic_ns(), TOLD_IN_A_TURN
        if self._has_left:
            limit += min((now - self._told_ns) // ONE_MORE_NS, MOST_MORE)
        self._told_ns, self._has_left = now, False
        outer = self._spent  # a ready() may run the loop
        ready: list[tuple[int, Member | None]] | None = None
        try:
            # One of them may remove another, whose number may be used anew.
            ready = [(d, members.get(d)) for d, _ in self._epoll.poll(0, limit)]
            for descriptor, member in ready:
                if member is None or members.get(descriptor) is not member:
                    continue
                self._spent = -1 if descriptor in self._edges else descriptor
                member.ready()
                if self._spent >= 0:
                    self._tell_again([descriptor])
        except BaseException:
            self._tell_again(list(members) if ready is None else [d for d, _ in ready])
            raise
        finally:
            self._spent = outer
        self._has_left = len(ready) == limit and self._is_readable()

    def _is_readable(self) -> bool:
        return bool(self._readable.poll(0))

    def _tell_again(self, descriptors: list[int]) -> None:
        """Have those told that are ready, whatever the kernel has told of them."""
        try:
            while descriptors:
                how = _EDGES if descriptors[-1] in self._edges else _ONCE
                with contextlib.suppress(OSError):  # it is no member, or paused
                    self._epoll.modify(descriptors[-1], how)
                descriptors.pop()
        finally:
            if descriptors:  # interrupted once more
                self._tell_again(descriptors)

    def _unshare(self) -> None:
        self._owner, self._spent = os.getpid(), -1
        try:
            with select.epoll() as own:
                for descriptor in self.members:
                    own.register(descriptor, _EDGES if descriptor in self._edges else _ONCE)
                os.dup2(own.fileno(), self._epoll.fileno(), inheritable=False)
        except OSError:
            self._owner = _NOBODY


_sets: weakref.WeakSet[EpollSet] = weakref.WeakSet()


def _unshare_all() -> None:
    for epoll_set in list(_sets):
        epoll_set._unshare()


os.register_at_fork(after_in_child=_unshare_all)
