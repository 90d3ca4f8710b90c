"""How a child is brought to its end: Process.stop(), and the ends of ``async with``."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import errno
import signal
from collections.abc import Callable
from typing import Final

from aioreap.exitinfo import ExitInfo, ExitStatusLost
from aioreap.groups import Members
from aioreap.killing import kill, kill_and_wait, raise_again
from aioreap.transport import LONGEST_TIMER, SubprocessTransport
from aioreap.watcher import Child, logger

__all__ = ["Ladder", "begin", "leave", "seconds", "stop"]

DEFAULT_GRACE: Final = 5.0  # seconds
# After how many seconds a group whose leader is gone is looked at again, at first and at last:
# nothing tells of its end.
_GROUP_DELAY: Final = 0.002
_GROUP_DELAY_LIMIT: Final = 0.1
# How long the death of a killed group is waited for, in seconds.
_GROUP_PATIENCE: Final = 1.0


def seconds(name: str, value: float) -> float:
    """`value`, which is the argument `name`, if it is a time.

    Raises:
        ValueError: it is negative or not a number.
        TypeError: it is nothing to compare with one.
    """
    if not value >= 0:
        raise ValueError(f"{name} must be zero seconds or more, got {value!r}")
    return value


class _Step(enum.IntEnum):
    """The last that was done to the child."""

    NOTHING = 0
    EOF = 1
    SIGNAL = 2
    KILL = 3


class Ladder:
    """The steps to the end of one child, which the loop's timers and its exit lead on to.

    All who stop the child share one. It is over when the child has exited and, if
    that was asked for, nobody lives in its group.
    """

    def __init__(self, transport: SubprocessTransport, number: int, grace: float) -> None:
        self._transport = transport
        self._child = transport.child
        self._loop = transport.loop
        self._signal = number
        self._grace = grace
        self._group = False
        self._step = _Step.NOTHING
        self._timer: asyncio.TimerHandle | None = None
        self._members = Members()
        self._unreached: OSError | None = None
        self._group_timer: asyncio.TimerHandle | None = None
        self._group_delay = _GROUP_DELAY
        self._group_end: float | None = None
        self._waiters: list[asyncio.Future[None]] = []
        self._callbacks: list[Callable[[OSError | None], object]] = []
        self._is_over = False
        self._error: OSError | None = None

    def join(self, grace: float, *, group: bool, close_stdin: bool) -> None:
        """Go on for one more caller: no later than it asks, and with no less than it asks."""
        begun = self._step is not _Step.NOTHING
        widened, self._group = group and not self._group, self._group or group
        self._grace = min(self._grace, grace)
        has_eof = close_stdin and self._transport.close_pipe(0)
        if self._grace == 0:
            self._kill()
        elif not begun and has_eof:
            self._step = _Step.EOF
            self._set_timer(grace)
        elif self._step < _Step.SIGNAL and not has_eof:
            self._step = _Step.SIGNAL
            self._set_timer(grace)
            self._send(self._signal)
        else:
            if widened and self._step > _Step.EOF:
                self._send(signal.SIGKILL if self._step is _Step.KILL else self._signal)
            if self._timer is not None and self._timer.when() > self._loop.time() + grace:
                self._set_timer(grace)
        if not begun and not self._is_over:
            self._child.add_exit_callback(self._exited)

    async def wait(self) -> None:
        """Wait until it is over, each caller for itself.

        Raises:
            OSError: what kept it from going on.
        """
        while not self._is_over:
            waiter = self._loop.create_future()
            self._waiters.append(waiter)
            await waiter
        if self._error is not None:
            raise OSError(*self._error.args)

    def add_callback(self, callback: Callable[[OSError | None], object]) -> None:
        """Have `callback` called when it is over, with what kept it from going on; now if it is."""
        if self._is_over:
            callback(self._error)
        else:
            self._callbacks.append(callback)

    def kill(self) -> None:
        """SIGKILL at once, for the group too if the child leads one; no errors."""
        if not self._is_over:
            kill(self._child)
            self._members.kill()
            self._be_killed()

    def let_go(self) -> None:
        """Do nothing more: the child was detached."""
        self._finish(None)

    def _set_timer(self, delay: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(min(delay, LONGEST_TIMER), self._go_on)

    def _go_on(self) -> None:
        """The last step has had its time."""
        self._timer = None
        if self._step is _Step.EOF:
            self._step = _Step.SIGNAL
            self._set_timer(self._grace)
            self._send(self._signal)
        else:
            self._kill()

    def _send(self, number: int) -> None:
        try:
            if not (self._group and self._child.send_signal_to_group(number, self._members)):
                self._child.send_signal(number)
        except OSError as error:
            self._finish(error)

    def _kill(self) -> None:
        try:
            if self._group:
                self._kill_group()
            self._child.send_signal(signal.SIGKILL)
        except OSError as error:
            self._finish(error)
        else:
            self._be_killed()

    def _kill_group(self) -> None:
        try:
            self._child.send_signal_to_group(signal.SIGKILL, self._members)
        except OSError as error:
            if error.errno != errno.ENOSYS:
                raise
            self._unreached = error  # said only if somebody is left who was not seen before
            self._members.kill()

    def _be_killed(self) -> None:
        self._step = _Step.KILL
        for timer in (self._timer, self._group_timer):
            if timer is not None:
                timer.cancel()
        self._timer = None
        self._group_delay = _GROUP_DELAY
        if self._child.has_ended:
            self._exited(self._child)

    def _exited(self, _child: Child) -> None:
        """Now for the group, if that was asked for: it is looked at until nobody lives in it."""
        if self._is_over:
            return
        if not (self._group and (self._child.is_group_alive() or self._members.are_alive())):
            self._finish(None)
            return
        if self._step is _Step.KILL:
            if self._group_end is None:
                self._group_end = self._loop.time() + _GROUP_PATIENCE
            elif self._loop.time() > self._group_end:
                if self._unreached is None:
                    logger.warning("group %d is killed and does not die yet", self._child.pid)
                self._finish(self._unreached)
                return
        self._group_timer = self._loop.call_later(self._group_delay, self._exited, self._child)
        self._group_delay = min(2 * self._group_delay, _GROUP_DELAY_LIMIT)

    def _finish(self, error: OSError | None) -> None:
        self._is_over, self._error = True, error
        self._transport.ladder = None
        self._child.discard_exit_callback(self._exited)
        for timer in (self._timer, self._group_timer):
            if timer is not None:
                timer.cancel()
        self._members.close()
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(error)


def _check_place(transport: SubprocessTransport) -> None:
    """Raise RuntimeError, or ValueError, unless the child's end would be heard of here."""
    transport.child.check_kept()
    if transport.is_copy:
        raise RuntimeError("this process is a forked copy: the child is not its own")
    if transport.loop.is_closed():
        raise RuntimeError("Event loop is closed")
    if asyncio.get_running_loop() is not transport.loop:
        raise RuntimeError("the child belongs to another event loop")


def begin(
    transport: SubprocessTransport, number: int, grace: float, *, group: bool, close_stdin: bool
) -> Ladder | None:
    """Begin to stop the child, or join those who do; None if it has ended."""
    child = transport.child
    if child.has_ended and not (group and child.is_group_alive()):
        return None
    ladder = transport.ladder
    if ladder is None:
        ladder = transport.ladder = Ladder(transport, number, grace)
    ladder.join(grace, group=group, close_stdin=close_stdin)
    return ladder


async def _end(
    transport: SubprocessTransport, number: int, grace: float, *, group: bool, close_stdin: bool
) -> None:
    """stop() without its drain and its result; after a cancellation _kill_at_once() must follow."""
    ladder = begin(transport, number, grace, group=group, close_stdin=close_stdin)
    if ladder is not None:
        await ladder.wait()


async def _kill_at_once(transport: SubprocessTransport) -> asyncio.CancelledError | None:
    """kill_and_wait(), for all who stop the child.

    A ladder that is over was maybe for the child alone: its group is killed all the same.
    """
    if transport.ladder is not None:
        transport.ladder.kill()
    return await kill_and_wait(transport.child, transport.loop)


async def stop(
    transport: SubprocessTransport,
    number: int,
    grace: float,
    *,
    group: bool,
    close_stdin: bool,
    drain: float,
) -> ExitInfo:
    """Process.stop()."""
    seconds("grace", grace)
    seconds("drain", drain)
    if not isinstance(number, int) or number not in signal.valid_signals():
        raise ValueError(f"{number!r} is no signal")
    if group:
        transport.check_group()
    _check_place(transport)
    try:
        await _end(transport, number, grace, group=group, close_stdin=close_stdin)
        await transport.drain_output(drain)
        return await transport.wait_exit()
    except asyncio.CancelledError:
        raise_again(await _kill_at_once(transport))
        raise


async def leave(transport: SubprocessTransport, error: BaseException | None) -> None:
    """Process.__aexit__(): it ends no process of others, and nothing that was detached."""
    if transport.child.ends_with_loop and not transport.child.is_detached:
        await _leave(transport, error)
    elif error is None and not transport.child.is_detached:
        with contextlib.suppress(ExitStatusLost):
            await transport.wait_exit()


async def _leave(transport: SubprocessTransport, error: BaseException | None) -> None:
    child = transport.child
    if transport.is_copy or transport.loop.is_closed():
        transport.close()
        return
    if isinstance(error, GeneratorExit):  # nothing can be awaited any more
        kill(child)
        transport.destroy()
        return
    try:
        if error is None:
            transport.close_pipes()
            with contextlib.suppress(ExitStatusLost):
                await transport.wait_exit()
        elif isinstance(error, Exception):
            group = child.leads_group
            await _end(transport, signal.SIGTERM, DEFAULT_GRACE, group=group, close_stdin=False)
        else:
            raise_again(await kill_and_wait(child, transport.loop))
            child.forget_group()
    except asyncio.CancelledError:
        cancelled = await _kill_at_once(transport)
        child.forget_group()  # all of it is killed
        raise_again(await transport.give_up_pipes() or cancelled)
        raise
    except GeneratorExit:
        kill(child)
        transport.destroy()
        raise
    except Exception:
        await transport.give_up_pipes()
        raise
    raise_again(await transport.give_up_pipes())
