"""The end of an interpreter whose children live: no traceback, and nothing killed in silence."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Iterator

import pytest
from program import Done, run_program

pytestmark = pytest.mark.own_backend

each_loop = pytest.mark.parametrize(
    "loop", ["asyncio", "uvloop", "EventLoop", "UvloopEventLoop", "installed-uvloop"]
)


def is_alive(pid: int) -> bool:
    """Whether it runs; what was killed is not waited for by its init yet, perhaps."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return not poll.poll(0)
    finally:
        os.close(pidfd)


@contextlib.contextmanager
def ended(
    loop: str, how: str, *, development_mode: bool = True
) -> Iterator[tuple[Done, list[int]]]:
    """The program, and the children it has had; those still alive end with the block."""
    done = run_program("shutdown", loop, how, development_mode=development_mode)
    pids = [int(line) for line in done.stdout.split()]
    try:
        yield done, pids
    finally:
        for pid in filter(is_alive, pids):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@each_loop
@pytest.mark.parametrize("how", ["held", "dropped", "awaited", "exits"])
def test_children_of_a_closed_loop_die_at_the_end_with_one_warning_each(
    loop: str, how: str
) -> None:
    with ended(loop, f"{how},closed") as (done, pids):
        assert done.status == 0, done.stderr
        done.expect_no_error()
        assert len(pids) == (2 if how in {"held", "dropped"} else 1)
        assert done.warnings_of_ours() == len(pids), done.stderr
        assert not any(map(is_alive, pids))


@pytest.mark.parametrize("loop", ["EventLoop", "UvloopEventLoop"])
def test_children_of_a_closed_loop_do_not_outlive_the_interpreter(loop: str) -> None:
    with ended(loop, "held,closed") as (done, pids):
        done.expect_no_error()
        assert (len(pids), done.warnings_of_ours()) == (2, 2), done.stderr
        assert not any(map(is_alive, pids))


@pytest.mark.slow
@pytest.mark.any_backend
@each_loop
@pytest.mark.parametrize("how", ["held", "dropped", "awaited", "exits", "in-a-thread"])
@pytest.mark.parametrize("end", ["open", "unknown"])
def test_children_of_a_loop_never_closed_live_on_or_die_with_one_warning_each(
    loop: str, how: str, end: str
) -> None:
    """As with asyncio: it depends on whether the interpreter's end frees the loop.

    Not in development mode: there asyncio's loops themselves can fail when they are freed so late.
    """
    with ended(loop, f"{how},{end}", development_mode=False) as (done, pids):
        assert done.status == 0, done.stderr
        done.expect_no_error()
        assert len(pids) == (2 if how in {"held", "dropped"} else 1)
        killed = sum(not is_alive(pid) for pid in pids)
        assert killed == done.warnings_of_ours(), done.stderr
