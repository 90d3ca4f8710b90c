"""From a SpawnPlan to a running program: the time between clone and exec, which holds no loop.

The wakeup is the exec pipe, which reaches EOF about when the child has exec'ed
or died. The truth is what _clone.outcome() says, and only after it may the
block be freed. A copy of the pipe in some other process can keep EOF away, so a
timer asks as well while launches are in flight.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import errno
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Final

from aioreap import _clone, spawn
from aioreap.killing import kill_and_wait
from aioreap.spawn import Spawned, SpawnPlan
from aioreap.unowned import Grandchild, heirs, reap_heirs
from aioreap.watcher import Child, ChildWatcher, nothing, orphans, reap_orphans

__all__ = ["Launch", "Launcher"]

# How many clones there may be in one turn of the loop, and how long all of them may take together,
# about, if they are more. An EpollSet tells no more in most turns: tasks that start a program
# whenever one has ended do not have to wait for a turn, for which much has to be kept.
CLONES_IN_A_TURN = 3
TURN_BUDGET_NS = 150_000
# How often launches are looked at although no EOF woke anybody, in seconds.
_BACKSTOP: Final = 0.05
# EOF can come before the child has left the memory (on 7.3 by 0.1 ms). For so
# many turns of the loop it is asked again, and then after growing times, in seconds.
_EARLY_TURNS: Final = 4
_EARLY_DELAY: Final = 0.001
_EARLY_DELAY_LIMIT: Final = 0.05
# How often a busy program is looked at again, in seconds, and tried again. The kernel gives up a
# child's copies of descriptors a little after it says that the child has exec'ed.
_BUSY_DELAY: Final = 0.001
_BUSY_RETRIES: Final = 4


class Launch:
    """One program being started; made by Launcher.begin().

    Attributes:
        child: None while the launch waits for its turn.
    """

    def __init__(self, launcher: Launcher, plan: SpawnPlan) -> None:
        self.child: Child | None = None
        self._launcher = launcher
        self._plan = plan
        self._spawned: Spawned | None = None
        self._pipe = -1
        self._asked_early = 0
        self._retries = 0
        self._aborted = False
        self._is_over = False
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None

    def __del__(self) -> None:
        if self._spawned is not None or not self._is_over:
            self._plan.close()
            self._let_go()

    async def cloned(self) -> None:
        """Wait until there is a child, or the launch has failed; otherwise as started()."""
        while self.child is None and not self._is_over:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    async def started(self) -> Child:
        """Wait until the program runs.

        A cancelled call leaves the launch as it is: abort() or destroy() must follow.

        Raises:
            OSError, subprocess.SubprocessError: as subprocess.Popen; no child is left.
        """
        while not self._is_over:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        # Neither this frame nor the launch may keep what the traceback refers to.
        if self._error is not None:
            error, self._error = self._error, None
            try:
                raise error
            finally:
                del error
        assert self.child is not None
        return self.child

    async def abort(self) -> asyncio.CancelledError | None:
        """Kill the child and wait until nothing of it is left.

        Returns what it was cancelled with meanwhile, as kill_and_wait().
        """
        self._aborted = True
        self._give_up()
        if self.child is None:
            return None
        try:
            return await kill_and_wait(self.child, self._launcher.loop)
        finally:
            self.child.forget_group()

    def destroy(self) -> None:
        """Kill the child with no help from a loop."""
        self._aborted = True
        self._give_up()
        if self.child is not None:
            self.child.destroy()
        self._let_go()

    def abandon(self) -> None:
        """Kill the child, with a ResourceWarning: the loop is about to be closed."""
        try:
            if self.child is not None:
                self.child.abandon()
        finally:
            self.destroy()

    def clone(self) -> None:
        """Make the child, now. What fails is raised by started()."""
        if self._aborted:
            return
        try:
            self._clone()
        except BaseException as error:
            if isinstance(error, OSError) and error.errno == errno.ETXTBSY and self._may_retry():
                self._retry(set(spawn.in_flight))
                return
            if isinstance(error, Exception):
                self._end(error)
                return
            self._end(asyncio.CancelledError())  # KeyboardInterrupt goes one way only
            raise

    def _clone(self) -> None:
        if orphans:
            reap_orphans()
        if heirs:
            reap_heirs()
        plan, watcher = self._plan, self._launcher.watcher
        epoll_set = watcher.open_set()
        spawned = plan.clone()
        made = Child if spawned.is_child else Grandchild
        child = made(spawned.pid, spawned.pidfd, spawned.reap, spawned.started_ns)
        block = spawned.block
        try:
            self.child, self._spawned, self._pipe = child, spawned, spawned.pipe
            if plan.options:
                self._note_options(child, spawned)
            child.watcher = watcher
            if block is None:
                epoll_set.add(spawned.pidfd, child)
            else:
                epoll_set.take(block, spawned.pidfd, child, spawned.pipe, self)
        except BaseException:
            if block is not None:
                _clone.take(block)  # else it, too, would close what destroy() closes
            child.destroy()
            self._let_go()
            raise
        if self._waiter is not None:
            self._wake()
        if block is None:
            self._end(None)
        else:
            child.launch = self
            self._launcher.look_after(self)

    def _note_options(self, child: Child, spawned: Spawned) -> None:
        child.leads_group = self._plan.leads_group
        child.held = spawned.held
        if spawned.status >= 0:
            child.status_socket = self._plan.give(spawned.status)

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _give_up(self) -> None:
        self._plan.close()
        self._launcher.forget(self)

    def _end(self, error: BaseException | None) -> None:
        """The program runs, or cannot."""
        self._is_over, self._error = True, error
        self._give_up()
        self._wake()

    # Between the clone and the exec.

    def examine(self) -> bool:
        """Look whether the child has exec'ed or failed; True if that is known."""
        return self._examine(exited=False)

    def child_exited(self) -> None:
        """The child is gone, by its pidfd, and what came of it has not been found yet."""
        self._examine(exited=True)

    def ready(self) -> None:
        """EOF in the pipe, or a report of a child with memory of its own, which examining takes."""
        if self._examine(exited=False):
            return
        if self._spawned is not None and self._spawned.shares_memory:
            self._close_pipe()
            self._ask_early()

    def _ask_early(self) -> None:
        if self.examine():
            return
        loop = self._launcher.loop
        turns = self._asked_early - _EARLY_TURNS
        self._asked_early += 1
        if turns < 0:
            loop.call_soon(self._ask_early)
        else:
            loop.call_later(min(_EARLY_DELAY * 2**turns, _EARLY_DELAY_LIMIT), self._ask_early)

    def _examine(self, *, exited: bool) -> bool:
        spawned, child = self._spawned, self.child
        if spawned is None or spawned.block is None:
            return True
        outcome = _clone.outcome(spawned.block, exited)
        if outcome is None:
            return False
        self._let_go()
        assert child is not None
        child.launch = None
        step, error = outcome
        if step == _clone.STEP_EXEC and not error:
            self._end(None)
        else:
            child.add_exit_callback(lambda _: self._failed(step, error))
        return True

    def _failed(self, step: int, error: int) -> None:
        """The child could not exec, and is gone by now."""
        if error == errno.ETXTBSY and self._may_retry() and not self._aborted:
            self._retry(set(spawn.in_flight))
            return
        self._end(self._plan.error_for(step, error))

    def _may_retry(self) -> bool:
        self._retries += 1
        return self._retries <= _BUSY_RETRIES

    def _retry(self, others: set[Spawned]) -> None:
        """Try once more when no child of ours holds a copy of all descriptors any more.

        A program that this process has just written is busy as long as a child
        before its exec holds a copy of the descriptor it was written through.
        """
        if self._aborted:
            return
        self._launcher.look_after(self)
        if any(other.holds_descriptors() for other in others):
            self._launcher.loop.call_later(_BUSY_DELAY, self._retry, others)
        elif self._retries > 1:
            self._launcher.loop.call_later(_BUSY_DELAY, self.clone)
        else:
            self.clone()

    def _let_go(self) -> None:
        """Give up the pipe and the block, which is kept until the child has left it."""
        self._close_pipe()
        if self._spawned is not None:
            spawn.in_flight.discard(self._spawned)
            self._spawned = None

    def _close_pipe(self) -> None:
        epoll_set = self._launcher.watcher.epoll_set()
        if epoll_set is not None:
            epoll_set.close(self, "_pipe")
        else:
            _clone.close(-1, -1, {}, self, "_pipe")


class _Launches(set[Launch]):
    """Those of one loop that are not over; kept by a timer of that loop, and by nobody else."""


class Launcher:
    """Starts programs for one event loop; ``Launcher.of(loop)`` is the one of that loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.watcher: ChildWatcher = ChildWatcher.of(loop)
        self._loop = weakref.ref(loop)
        self._launches: Callable[[], _Launches | None] = nothing
        # The calls that wait hold the launches: this must not keep a closed loop alive.
        self._deferred: deque[weakref.ref[Launch]] = deque()
        self._turn_follows = False

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> Launcher:
        """The launcher of `loop`, made at the first call."""
        global _last
        last = _last()
        if last is not None and last._loop() is loop:
            return last
        launcher = _launchers.get(loop)
        if launcher is None:
            launcher = _launchers.setdefault(loop, cls(loop))
        _last = weakref.ref(launcher)
        return launcher

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop; RuntimeError if it is closed."""
        loop = self._loop()
        if loop is None or loop.is_closed():
            raise RuntimeError("Event loop is closed")
        return loop

    def begin(self, plan: SpawnPlan) -> Launch:
        """Start the program at once, or in a later turn of the loop if this one has started many.

        A deferred plan is frozen, so that nothing that happens meanwhile changes it.

        Raises:
            RuntimeError: the loop is closed, or does not run.
        """
        launch = Launch(self, plan)
        loop = self._loop()
        if loop is None or not loop.is_running():
            loop = self.loop
            # Nobody would reap what it leaves. This costs a system call on Python 3.11.
            if asyncio._get_running_loop() is not loop:
                raise RuntimeError(f"{loop!r} is not running")
        turn = self.watcher.turn
        try:
            if (self._deferred or turn.is_spent) and not plan.by_fork:
                self._defer(launch, plan)
            else:
                self._clone(launch)
            if (self._deferred or turn.is_spent) and not self._turn_follows:
                loop.call_soon(self._begin_turn, context=contextvars.Context())
                self._turn_follows = True  # not before, as an interrupt may come
        except BaseException:  # an interrupt: nobody else knows of what there is of it
            launch.destroy()
            raise
        return launch

    def _defer(self, launch: Launch, plan: SpawnPlan) -> None:
        try:
            plan.freeze()
        except OSError:  # no descriptors, or a working directory that cannot be opened
            self._clone(launch)
        else:
            self._deferred.append(weakref.ref(launch))

    def _clone(self, launch: Launch) -> None:
        begin = time.monotonic_ns()
        launch.clone()
        turn = self.watcher.turn
        turn.clones += 1
        turn.cloning_ns += time.monotonic_ns() - begin
        if turn.clones >= CLONES_IN_A_TURN and turn.cloning_ns >= TURN_BUDGET_NS:
            turn.is_spent = True

    def _begin_turn(self) -> None:
        turn = self.watcher.turn
        turn.forget()
        try:
            while self._deferred and not turn.is_spent:
                launch = self._deferred.popleft()()
                if launch is not None:
                    self._clone(launch)
        finally:  # KeyboardInterrupt too: those behind it still have their turn
            self._turn_follows = False
            if self._deferred or turn.is_spent:
                self.loop.call_soon(self._begin_turn)
                self._turn_follows = True

    def look_after(self, launch: Launch) -> None:
        """Examine the launch now and then, until forget()."""
        launches = self._launches()
        if launches is None:
            launches = _Launches()
            self._launches = weakref.ref(launches)
            empty = contextvars.Context()
            self.loop.call_later(_BACKSTOP, self._look, launches, context=empty)
        launches.add(launch)

    def forget(self, launch: Launch) -> None:
        """The launch is over, or given up."""
        launches = self._launches()
        if launches is not None:
            launches.discard(launch)

    def _look(self, launches: _Launches) -> None:
        for launch in list(launches):
            launch.examine()
        if launches:
            self.loop.call_later(_BACKSTOP, self._look, launches)

    def abandon_launches(self) -> None:
        """Kill what is between its clone and its exec, and give up what waits for its turn."""
        under_way = {*(launch for each in self._deferred if (launch := each()) is not None)}
        under_way |= self._launches() or set()
        with contextlib.ExitStack() as stack:  # all of them, though a warning may be an exception
            for launch in under_way:
                stack.callback(launch.abandon)


_launchers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Launcher] = (
    weakref.WeakKeyDictionary()
)
# The one that was asked for last: in most programs there is no other.
_last: Callable[[], Launcher | None] = nothing
