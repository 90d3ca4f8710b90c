"""Hostile company: others reap our children, or have them reaped, and every status is right.

On kernels that keep no exit info (before Linux 6.15) it is right, or said to be lost.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator

import pytest
from conftest import EMULATED

import aioreap

COUNT = int(os.environ.get("AIOREAP_HOSTILE_COUNT", "20" if EMULATED else "1000"))
AT_ONCE = 16

# What others have reaped.
stolen: list[int] = []


@pytest.fixture(autouse=True)
def _nothing_stolen() -> None:
    stolen.clear()


async def expect_every_status(backend: str) -> int:
    """Each of COUNT children says 3, or is lost where the kernel keeps nothing: how many are."""
    expected = iter(range(COUNT))
    statuses: list[int | None] = []

    async def several() -> None:
        for _ in expected:
            process = await aioreap.create_subprocess_exec("sh", "-c", "exit 3")
            try:
                statuses.append(await process.wait())
            except aioreap.ExitStatusLost:
                statuses.append(None)

    await asyncio.gather(*(several() for _ in range(AT_ONCE)))
    assert len(statuses) == COUNT
    assert set(statuses) <= {3, None}
    if backend == "autoreap" or aioreap.backend().features["exit_info"].available:
        assert None not in statuses
        return 0
    return statuses.count(None)


def reap_everything(flags: int) -> None:
    """waitpid(-1) until there is no child left to reap."""
    try:
        while pid := os.waitpid(-1, flags)[0]:
            stolen.append(pid)
    except ChildProcessError:
        pass


def reaping_handler(_number: int, _frame: object) -> None:
    reap_everything(os.WNOHANG)


Action = signal.Handlers | Callable[[int, object], None]


@pytest.fixture
def on_sigchld(request: pytest.FixtureRequest) -> Iterator[Action]:
    """What happens at SIGCHLD during the test."""
    before = signal.signal(signal.SIGCHLD, request.param)
    yield request.param
    signal.signal(signal.SIGCHLD, before)


@pytest.mark.main_thread
@pytest.mark.parametrize(
    "on_sigchld",
    [reaping_handler, signal.SIG_IGN, signal.SIG_DFL],
    indirect=True,
    ids=["handler-that-reaps-all", "ignored", "default"],
)
async def test_every_status_is_right_whatever_sigchld_does(
    on_sigchld: Action, backend: str
) -> None:
    lost = await expect_every_status(backend)
    assert signal.getsignal(signal.SIGCHLD) == on_sigchld
    if on_sigchld is reaping_handler:
        assert bool(stolen) == (backend != "autoreap")
    if on_sigchld != signal.SIG_IGN:  # else the kernel drops them
        assert lost in (0, len(stolen))


async def test_every_status_is_right_beside_a_thread_that_reaps_all(backend: str) -> None:
    over = threading.Event()

    def reap() -> None:
        while not over.is_set():
            reap_everything(0)
            os.sched_yield()

    thread = threading.Thread(target=reap)
    thread.start()
    try:
        lost = await expect_every_status(backend)
    finally:
        over.set()
        thread.join()
    assert bool(stolen) == (backend != "autoreap")
    assert lost in (0, len(stolen))
