"""What a cancelled call does with its child: SIGKILL at once, and the exit awaited."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from typing import Final

from aioreap.watcher import Child, logger

__all__ = ["kill", "kill_and_wait", "raise_again"]

# How long the death of a killed child is waited for, in seconds, and how much
# processor time of this thread that may take when the caller is cancelled again and again.
_PATIENCE: Final = 1.0
_DISTURBED_CPU: Final = 0.03


def kill(child: Child) -> None:
    """SIGKILL for the child, and for the group that it leads. Errors are for nobody: it goes on."""
    found = _kill_group(child)
    with contextlib.suppress(PermissionError):  # it runs a set-user-ID program
        child.send_signal(signal.SIGKILL)
    if not found:  # it may have come to lead the group meanwhile; now it makes no more members
        _kill_group(child)


def _kill_group(child: Child) -> bool:
    if child.leads_group:
        with contextlib.suppress(OSError):
            return child.send_signal_to_group(signal.SIGKILL)
    return False


async def kill_and_wait(
    child: Child, loop: asyncio.AbstractEventLoop
) -> asyncio.CancelledError | None:
    """Kill the child, with the group that it leads, and wait until its exit is known.

    Returns what it was cancelled with meanwhile: the caller has to raise that, if no
    cancellation brought it here. It goes on all the same, but not for long: some
    frameworks cancel again at each turn of the loop. A child that cannot be killed
    yet (in uninterruptible sleep) is left to the loop's readers, after a second at most.
    """
    if child.is_detached:
        return None
    kill(child)
    if child.has_ended or child.pidfd < 0:
        return None
    waiter: asyncio.Future[None] = loop.create_future()
    cancelled: asyncio.CancelledError | None = None
    is_over = False

    def wake(_child: Child | None = None) -> None:
        nonlocal is_over
        is_over = True
        if not waiter.done():
            waiter.set_result(None)

    child.add_exit_callback(wake)
    begin = time.thread_time()
    timer = loop.call_later(_PATIENCE, wake)
    try:
        while not is_over:
            try:
                await waiter
            except asyncio.CancelledError as error:
                cancelled = error.with_traceback(None)  # else this frame would keep it
                is_over = is_over or time.thread_time() - begin >= _DISTURBED_CPU
                waiter = loop.create_future()
    finally:
        timer.cancel()
        child.discard_exit_callback(wake)
    if not child.has_ended:
        logger.warning("child %d is killed and does not die yet", child.pid)
    return cancelled


def raise_again(cancelled: asyncio.CancelledError | None) -> None:
    """Raise what a clean-up was cancelled with meanwhile, that very one, if it was.

    It comes before what made the clean-up necessary, even if that was a cancellation
    too: anyio knows its own by the message, and asyncio.timeout() has another.
    """
    if cancelled is not None:
        try:
            raise cancelled
        finally:
            del cancelled  # its traceback has this frame
