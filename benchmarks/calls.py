"""aioreap's system calls on asyncio's loop with nothing around them: how little there could be."""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from benchmarks.peers import AsyncioPeer, check

__all__ = ["CallsPeer"]

_T = TypeVar("_T")


class CallsPeer(AsyncioPeer):
    """Clones, waits for the exec and for the exit through an epoll set, and asks for the status.

    No process, transport, protocol or watcher; the program is looked up and encoded once;
    nothing is checked, can be cancelled or be spared a turn of the loop. It only spawns.
    """

    def __init__(self) -> None:
        super().__init__(package="aioreap", loop="asyncio")
        self._plans: dict[tuple[str, ...], Any] = {}
        self._told: dict[int, Callable[[int], None]] = {}

    def run(self, main: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        from aioreap.epollset import TOLD_IN_A_TURN

        self._told_in_a_turn = TOLD_IN_A_TURN

        async def with_a_set() -> _T:
            with select.epoll() as self._epoll:
                loop = asyncio.get_running_loop()
                loop.add_reader(self._epoll.fileno(), self._tell)
                try:
                    return await main()
                finally:
                    loop.remove_reader(self._epoll.fileno())

        return super().run(with_a_set)

    def _tell(self) -> None:
        for descriptor, _ in self._epoll.poll(0, self._told_in_a_turn):
            self._told[descriptor](descriptor)

    def _watch(self, descriptor: int, tell: Callable[[int], None]) -> None:
        self._told[descriptor] = tell
        self._epoll.register(descriptor, select.EPOLLIN)

    def _close(self, descriptor: int) -> None:
        del self._told[descriptor]
        self._epoll.unregister(descriptor)
        os.close(descriptor)

    async def spawn(self, *command: str) -> None:
        from aioreap import _clone, kernel
        from aioreap.spawn import SpawnPlan, in_flight

        def look_at_exec(pipe: int) -> None:
            if _clone.outcome(spawned.block, False) is not None:
                in_flight.discard(spawned)  # which would keep its stack from the next ones
                self._close(pipe)
                started.set_result(None)

        def look_at_exit(pidfd: int) -> None:
            status = kernel.exit_status(pidfd, reap=spawned.reap)
            if status is not None:
                self._close(pidfd)
                ended.set_result(status[0])

        if command not in self._plans:
            self._plans[command] = SpawnPlan.of(command, (None, None, None), {}, shell=False)
        loop = asyncio.get_running_loop()
        started: asyncio.Future[None] = loop.create_future()
        ended: asyncio.Future[int | None] = loop.create_future()
        spawned = self._plans[command].clone()
        _clone.take(spawned.block)
        self._watch(spawned.pidfd, look_at_exit)
        self._watch(spawned.pipe, look_at_exec)
        await started
        check(await ended)
