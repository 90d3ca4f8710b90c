"""One child of run_process(), from its start to its end."""

from __future__ import annotations

import asyncio
import inspect
import signal
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from typing import Any

from aioreap.capture import Capture
from aioreap.exitinfo import ExitInfo
from aioreap.killing import kill, kill_and_wait, raise_again
from aioreap.lines import LineCutter
from aioreap.stopping import begin
from aioreap.transport import SubprocessTransport

__all__ = ["Run"]


class Run:
    """One child of run_process(), from its start to its end."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        timeout: float | None,
        grace: float,
        drain: float | None,
        limit: int | None,
        kept: Collection[int],
        lines: Mapping[int, LineCutter],
    ) -> None:
        self.timed_out: bool = False
        self.capture: Capture = Capture(
            loop, kept=kept, handed_on=lines, limit=limit, drain=drain, stop=self._begin_stop
        )
        self._loop = loop
        self._deadline = None if timeout is None else loop.time() + timeout
        self._grace = grace
        self._lines = lines
        self._transport: SubprocessTransport | None = None

    async def start(
        self,
        opening: Callable[..., Coroutine[Any, Any, tuple[SubprocessTransport, Capture]]],
        *command: Any,
        **options: Any,
    ) -> None:
        """Start the program, or note that the time was over before it ran."""
        try:
            async with asyncio.timeout_at(self._deadline) as scope:
                self._transport, _ = await opening(
                    self._loop, lambda: self.capture, *command, **options
                )
        except TimeoutError:
            if not scope.expired():
                raise
            self.timed_out = True

    async def finish(self, data: bytes | memoryview | None) -> ExitInfo | None:
        """Send `data`, and hand lines on, until the child and its pipes have ended.

        Cancelled, it kills the child. What a consumer raises is raised when the
        child has been stopped.
        """
        if self._transport is None:
            return None
        timer = None
        if self._deadline is not None:
            timer = self._loop.call_at(self._deadline, self._time_out)
        try:
            self.capture.send(data)
            try:
                await self._hand_on()
            except Exception:
                await self._give_up()
                raise
        except asyncio.CancelledError:
            raise_again(await self._kill())
            raise
        except BaseException as error:
            if not isinstance(error, Exception):  # GeneratorExit and its like
                kill(self._transport.child)
                self._transport.destroy()
            raise
        finally:
            if timer is not None:
                timer.cancel()
            self._transport.close_pipes()
            self._transport.child.forget_group()  # nobody can ask for it any more
            self.capture.release()
        return self._transport.child.exit_info

    async def _hand_on(self) -> None:
        while (chunk := await self.capture.next_chunk()) is not None:
            fd, data = chunk
            lines = self._lines[fd]
            for line in lines.cut(data):
                result = lines.consumer(line)
                if inspect.isawaitable(result) and not await self._in_time(result):
                    await self._give_up()
                    return
            self.capture.resume(fd)

    async def _in_time(self, result: Awaitable[object]) -> bool:
        """Await what a consumer returned, for at most `grace` seconds after the timeout."""
        end = None if self._deadline is None else self._deadline + self._grace
        try:
            async with asyncio.timeout_at(end) as scope:
                await result
        except TimeoutError:
            if not scope.expired():
                raise
            self.timed_out = True
            return False
        return True

    async def _give_up(self) -> None:
        """Have the child stopped, and wait for its end, with no more lines for anybody."""
        self.capture.stop()
        self.capture.drop()
        while await self.capture.next_chunk() is not None:
            pass

    def _time_out(self) -> None:
        if not self.capture.finished and not self.capture.stopping:
            self.timed_out = True
            self.capture.stop()

    def _begin_stop(self) -> None:
        assert self._transport is not None
        group = self._transport.child.leads_group
        ladder = begin(self._transport, signal.SIGTERM, self._grace, group=group, close_stdin=False)
        if ladder is None:
            self._stopped(None)
        else:
            ladder.add_callback(self._stopped)

    def _stopped(self, error: OSError | None) -> None:
        assert self._transport is not None
        if error is not None and not self._transport.child.has_ended:
            self.capture.fail(error)
        else:
            self.capture.stopped()

    async def _kill(self) -> asyncio.CancelledError | None:
        """Leave nothing behind; what it was cancelled with meanwhile."""
        assert self._transport is not None
        if self._transport.ladder is not None:
            self._transport.ladder.kill()
        cancelled = await kill_and_wait(self._transport.child, self._loop)
        return await self._transport.give_up_pipes() or cancelled
