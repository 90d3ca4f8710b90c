"""The streams of a process that was detached, and what asyncio's communicate() had of them."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
from test_detached import closing, reaped, shell

import aioreap

pytestmark = pytest.mark.own_backend


async def test_what_is_written_to_a_detached_process_is_an_error_and_not_dropped() -> None:
    process = await shell("cat")
    stdin = process.stdin
    assert stdin is not None
    with closing(process.detach()) as detached:
        with pytest.raises(ValueError, match="was detached"):
            stdin.write(b"x")
        with pytest.raises(ValueError, match="was detached"):
            stdin.writelines([b"x"])
        with pytest.raises(ValueError, match="was detached"):
            stdin.write_eof()
        with pytest.raises(ValueError, match="was detached"):
            await stdin.drain()
        stdin.close()
        assert stdin.is_closing()
        assert detached.stdin is not None
        assert detached.stdout is not None
        os.write(detached.stdin, b"there\n")
        assert os.read(detached.stdout, 100) == b"there\n"
    await reaped(detached.pid)


async def communicating(script: str) -> tuple[aioreap.Process, asyncio.Task[object]]:
    """Asyncio's own, when the process has written all that it writes and stdout has ended."""
    aioreap.install()
    theirs = await asyncio.create_subprocess_shell(script, stdin=-1, stdout=-1, stderr=-1)
    call: asyncio.Task[object] = asyncio.ensure_future(theirs.communicate())
    process = aioreap.Process.of(theirs)
    assert process.stdout is not None
    while not (process.stdout.at_eof() and process.stdout._collected):  # type: ignore[attr-defined]
        await asyncio.sleep(0)
    return process, call


async def cancel(call: asyncio.Task[object]) -> None:
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


async def test_of_a_cancelled_communicate_nothing_is_kept_if_not_all_is() -> None:
    process, call = await communicating("echo out; exec >&-; exec sleep 1000")
    await cancel(call)
    assert process.stdout._kept == [[]]  # type: ignore[union-attr]
    with closing(process.detach()) as detached:
        assert detached.unread_stdout == b""
        signal.pidfd_send_signal(detached.pidfd, signal.SIGKILL)
    await reaped(detached.pid)


async def test_of_a_communicate_that_goes_on_all_comes_along() -> None:
    process, call = await communicating("echo out; exec >&-; exec sleep 1000")
    with closing(process.detach()) as detached:
        assert detached.unread_stdout == b"out\n"
        with pytest.raises(ValueError, match="was detached"):
            await call
        signal.pidfd_send_signal(detached.pidfd, signal.SIGKILL)
    await reaped(detached.pid)


async def test_of_a_communicate_that_waited_only_for_the_exit_all_comes_along() -> None:
    process, call = await communicating("echo out; echo error >&2; exec >&- 2>&-; exec sleep 1000")
    assert process.stderr is not None
    while len(process.stderr._collected) < 2:  # type: ignore[attr-defined]
        await asyncio.sleep(0)
    for _ in range(3):  # until it is the exit that it waits for
        await asyncio.sleep(0)
    await cancel(call)
    with closing(process.detach()) as detached:
        assert (detached.unread_stdout, detached.unread_stderr) == (b"out\n", b"error\n")
        signal.pidfd_send_signal(detached.pidfd, signal.SIGKILL)
    await reaped(detached.pid)
