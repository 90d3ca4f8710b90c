"""Detached processes in other hands: they live, and what they say arrives, however they travel."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import raw
from conftest import open_descriptors
from test_attach import KEEPS_EXIT_INFO
from test_detached import ECHO, closing, died, reaped, shell

import aioreap
from aioreap import handover, kernel

pytestmark = pytest.mark.own_backend

SO_PASSPIDFD = 76
EXAMPLE = Path(__file__).parent.parent / "examples" / "handover.py"


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def without_numbers(detached: aioreap.Detached) -> aioreap.Detached:
    """As it is, but for the numbers of its descriptors, which are not None."""
    return dataclasses.replace(
        detached,
        pidfd=0,
        stdin=detached.stdin and 1,
        stdout=detached.stdout and 1,
        stderr=detached.stderr and 1,
    )


Pair = tuple[socket.socket, socket.socket]


async def test_what_is_sent_is_received(pair: Pair) -> None:
    echo = (await shell(ECHO)).detach()
    echo = dataclasses.replace(echo, unread_stdout=b"read\n", unread_stderr=b"\0error")
    read_end, write_end = os.pipe()
    bare = (await aioreap.create_subprocess_exec("cat", stdin=read_end)).detach()
    os.close(read_end)
    before = open_descriptors().keys() - {*echo.descriptors, *bare.descriptors}
    await handover.send(pair[0], echo, bare)
    assert open_descriptors().keys() == before  # they are given up
    received = await handover.receive(pair[1])
    assert list(map(without_numbers, received)) == list(map(without_numbers, (echo, bare)))
    assert not any(os.get_inheritable(d) for one in received for d in one.descriptors)
    os.close(write_end)
    processes = [await aioreap.attach(one) for one in received]
    processes[0].stdin.write(b"one\nexit\n")  # type: ignore[union-attr]
    assert await processes[0].stdout.read() == b"read\none\n"  # type: ignore[union-attr]
    assert await processes[0].stderr.read() == b"\0error"  # type: ignore[union-attr]
    # What goes on reaping them here may come first, and the sent ones do not know it.
    lost = [] if KEEPS_EXIT_INFO else [aioreap.ExitStatusLost]
    for process, code in zip(processes, (7, 0), strict=True):
        with contextlib.suppress(*lost):
            assert await process.wait() == code


@pytest.mark.any_backend
@pytest.mark.parametrize("option", ["SO_PASSCRED", "SO_PASSPIDFD", "both"])
async def test_what_the_kernel_says_of_the_sender_is_not_taken_for_descriptors(
    pair: Pair, option: str
) -> None:
    """Credentials are three numbers, of which the last two are 0 for root."""
    if option != "SO_PASSPIDFD":
        pair[1].setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    if option != "SO_PASSCRED":
        try:
            pair[1].setsockopt(socket.SOL_SOCKET, SO_PASSPIDFD, 1)
        except OSError:
            pytest.skip("needs SO_PASSPIDFD (Linux 6.5)")
    detached = (await shell("cat")).detach()
    before = open_descriptors()
    await handover.send(pair[0], dataclasses.replace(detached, unread_stdout=b"read\n"))
    (received,) = await handover.receive(pair[1])
    process = await aioreap.attach(received)
    assert await process.communicate(b"one") == (b"read\none", b"")
    with contextlib.suppress(aioreap.ExitStatusLost):
        assert await process.wait() == 0
    await reaped(detached.pid)
    assert open_descriptors().items() <= before.items()


@pytest.mark.any_backend
async def test_a_failed_receive_closes_no_number_that_the_kernel_said_of_the_sender(
    pair: Pair,
) -> None:
    pair[1].setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    before = open_descriptors()
    pair[0].send(b"x" * 1000)
    with pytest.raises(ValueError, match="no hand-over of aioreap"):
        await handover.receive(pair[1])
    assert open_descriptors() == before


@pytest.mark.any_backend
async def test_more_descriptors_than_it_says_are_refused_and_closed(pair: Pair) -> None:
    detached = (await shell("cat")).detach()
    with closing(detached):
        body = handover._body(dataclasses.replace(detached, stderr=None))
        pair[0].send(handover._HEAD.pack(handover._MAGIC, 1))
        socket.send_fds(pair[0], [body], detached.descriptors)
        before = open_descriptors()
        with pytest.raises(ValueError, match="more descriptors than it says"):
            await handover.receive(pair[1])
        assert open_descriptors() == before
    await reaped(detached.pid)


@pytest.mark.slow
@pytest.mark.parametrize("blocking", [True, False])
async def test_more_than_fits_into_the_socket_waits_without_holding_the_loop(
    pair: Pair, blocking: bool
) -> None:
    detached = (await shell("cat")).detach()
    data = os.urandom(3_000_000)
    for end in pair:
        end.setblocking(blocking)
    sending = asyncio.ensure_future(
        handover.send(pair[0], dataclasses.replace(detached, unread_stdout=data))
    )
    (received,) = await handover.receive(pair[1])
    await sending
    assert received.unread_stdout == data
    process = await aioreap.attach(received)
    assert await process.communicate() == (data, b"")


@pytest.mark.slow
async def test_many_follow_each_other(pair: Pair) -> None:
    processes = [await aioreap.create_subprocess_exec("cat", stdin=-1) for _ in range(10)]
    pids = [process.pid for process in processes]
    await handover.send(pair[0], *(process.detach() for process in processes[:6]))
    await handover.send(pair[0])
    await handover.send(pair[0], *(process.detach() for process in processes[6:]))
    received = [await handover.receive(pair[1]) for _ in range(3)]
    assert [one.pid for some in received for one in some] == pids
    assert list(map(len, received)) == [6, 0, 4]
    for some in received:
        for one in some:
            assert await (await aioreap.attach(one)).communicate() == (None, None)


# Runs in another process: says what it is told by the process that it receives, and how it ended.
RECEIVER = """
import asyncio, socket, sys
import aioreap
from aioreap import handover

async def main():
    with socket.socket(fileno=int(sys.argv[1])) as sock:
        (detached,) = await handover.receive(sock)
    process = await aioreap.attach(detached)
    print("attached", process.pid, flush=True)
    process.stdin.write(b"two\\nexit\\n")
    process.stdin.close()
    print((await process.stdout.read(), await process.stderr.read()))
    try:
        print("exit", (await process.wait_exit()).returncode)
    except aioreap.ExitStatusLost:
        print("lost")

asyncio.run(main())
"""


@pytest.mark.own_backend("uvloop")
async def test_another_process_goes_on_with_it(pair: Pair) -> None:
    process = await shell(ECHO)
    assert process.stdin is not None
    process.stdin.write(b"one\n")
    await process.stdin.drain()
    detached = process.detach()
    receiver = await aioreap.create_subprocess_exec(
        *(sys.executable, "-c", RECEIVER, str(pair[1].fileno())),
        pass_fds=[pair[1].fileno()],
        stdout=aioreap.PIPE,
    )
    await handover.send(pair[0], detached)
    output, _ = await receiver.communicate()
    is_known = kernel.backend().name == "autoreap" or KEEPS_EXIT_INFO
    assert output.decode().splitlines() == [
        f"attached {process.pid}",
        "(b'one\\ntwo\\n', b'')",
        "exit 7" if is_known else "lost",
    ]
    await reaped(process.pid)


async def test_one_that_is_dead_when_it_is_sent_has_its_status(pair: Pair) -> None:
    """Where the kernel keeps none, the sender's is sent along."""
    detached = (await shell(ECHO)).detach()
    assert detached.stdin is not None
    os.write(detached.stdin, b"exit\n")
    died(detached.pidfd)
    await reaped(detached.pid)
    await handover.send(pair[0], detached)
    (received,) = await handover.receive(pair[1])
    process = await aioreap.attach(dataclasses.replace(received))
    assert await process.communicate() == (b"", b"")
    assert process.returncode == 7


@pytest.mark.any_backend
async def test_a_send_that_fails_leaves_all_to_the_caller(pair: Pair) -> None:
    detached = (await shell("cat")).detach()
    pair[1].close()
    with pytest.raises(BrokenPipeError):
        await handover.send(pair[0], detached)
    process = await aioreap.attach(detached)
    assert await process.communicate(b"still") == (b"still", b"")


@pytest.mark.any_backend
async def test_a_cancelled_send_leaves_all_to_the_caller(pair: Pair) -> None:
    detached = (await shell("cat")).detach()
    sending = asyncio.ensure_future(
        handover.send(pair[0], dataclasses.replace(detached, unread_stdout=bytes(10**7)))
    )
    await asyncio.sleep(0)
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    pair[1].close()  # it has copies
    process = await aioreap.attach(detached)
    assert await process.communicate(b"still") == (b"still", b"")


@pytest.mark.any_backend
async def test_what_ends_too_early_is_an_error_and_nothing_is_kept(pair: Pair) -> None:
    detached = (await shell("cat")).detach()
    sending = asyncio.ensure_future(
        handover.send(pair[0], dataclasses.replace(detached, unread_stdout=bytes(10**7)))
    )
    receiving = asyncio.ensure_future(handover.receive(pair[1]))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    pair[0].close()
    with pytest.raises(EOFError, match="before all was handed over"):
        await receiving
    with closing(detached):
        pass
    await reaped(detached.pid)


@pytest.mark.any_backend
async def test_a_cancelled_receive_keeps_nothing(pair: Pair) -> None:
    detached = (await shell("cat")).detach()
    for turns in range(8):
        sender, receiver = socket.socketpair()
        with sender, receiver:
            sending = asyncio.ensure_future(
                handover.send(sender, dataclasses.replace(detached, unread_stdout=bytes(10**7)))
            )
            receiving = asyncio.ensure_future(handover.receive(receiver))
            for _ in range(turns):
                await asyncio.sleep(0)
            receiving.cancel()
            sending.cancel()
            for call in (sending, receiving):
                with pytest.raises(asyncio.CancelledError):
                    await call
    with closing(detached):
        pass
    await reaped(detached.pid)


@pytest.mark.any_backend
async def test_strange_sockets_and_strange_messages_are_refused(pair: Pair) -> None:
    await asyncio.get_running_loop().run_in_executor(None, pair[0].send, b"x" * 1000)
    with pytest.raises(ValueError, match="no hand-over of aioreap"):
        await handover.receive(pair[1])
    for kind in (socket.SOCK_SEQPACKET, socket.SOCK_DGRAM):
        ends = socket.socketpair(type=kind)
        with ends[0], ends[1]:
            with pytest.raises(ValueError, match="stream socket of the family AF_UNIX"):
                await handover.send(ends[0])
            with pytest.raises(ValueError, match="stream socket of the family AF_UNIX"):
                await handover.receive(ends[0])
    with socket.socket() as inet, pytest.raises(ValueError, match="AF_UNIX"):
        await handover.send(inet)


@pytest.mark.any_backend
async def test_a_descriptor_that_is_no_pidfd_is_refused(pair: Pair) -> None:
    read_end, write_end = os.pipe()
    os.close(write_end)
    await handover.send(pair[0], aioreap.Detached(os.getpid(), read_end))
    with pytest.raises(ValueError, match="is no pidfd"):
        await handover.receive(pair[1])


@pytest.mark.any_backend
async def test_without_room_for_the_descriptors_nothing_is_kept(pair: Pair) -> None:
    detached = (await shell("cat")).detach()
    await handover.send(pair[0], detached)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # One for the copy of the socket, and two of the four that come.
    numbers = [os.dup(pair[0].fileno()) for _ in range(3)]
    for number in numbers:
        os.close(number)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(open_descriptors()) + 1, hard))
        keep = []
        with contextlib.suppress(OSError):
            while True:
                keep.append(os.dup(pair[0].fileno()))
        for number in keep[-3:]:
            os.close(number)
        with pytest.raises(OSError, match=r"no room for the descriptors|Too many open"):
            await handover.receive(pair[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for number in keep[:-3]:
            os.close(number)
    pair[1].close()  # which may hold them still
    await reaped(detached.pid)


# Across an exec.


SUCCESSOR = """
import asyncio, os
import aioreap
from aioreap import handover

async def main():
    await (await aioreap.create_subprocess_exec("true")).wait()  # the loop's own comes with it
    before = set(os.listdir("/proc/self/fd"))
    (detached,) = handover.from_environment()
    assert not any(map(os.get_inheritable, detached.descriptors))
    assert handover.VARIABLE not in os.environ
    assert handover.from_environment() == []
    process = await aioreap.attach(detached)
    print(process.pid, await process.communicate(b"two\\nexit\\n"))
    print((await process.wait_exit()).returncode)
    left = before - set(os.listdir("/proc/self/fd"))
    assert len(left) == 5, left  # the four, and the description

asyncio.run(main())
"""

SERVER = """
import asyncio, os, sys
import aioreap
from aioreap import handover

async def main():
    process = await aioreap.create_subprocess_exec(
        "sh", "-c", sys.argv[1], stdin=-1, stdout=-1, stderr=-1
    )
    process.stdin.write(b"one\\n")
    assert await process.stdout.readline() == b"one\\n"
    process.stdin.write(b"1.5\\n")
    if len(sys.argv) > 3:
        process.stdin.write(b"two\\nexit\\n")
    detached = process.detach()
    while len(sys.argv) > 3 and detached.heir and detached.heir.exit_info is None:
        await asyncio.sleep(0)
    return detached

detached = asyncio.run(main())
with handover.across_exec(detached) as variables:
    os.execve(sys.executable, [sys.executable, "-c", sys.argv[2]], {**os.environ, **variables})
"""


def without_remarks(errors: str) -> str:
    """Without what asyncio's debug mode says of each callback that took long, on a busy machine."""
    return "".join(
        line for line in errors.splitlines(keepends=True) if not line.startswith("Executing <")
    )


@pytest.mark.own_backend("uvloop")
@pytest.mark.parametrize(
    "arguments", [(), pytest.param(("ended",), marks=pytest.mark.slow)], ids=["runs", "ended"]
)
async def test_the_successor_of_an_exec_has_its_predecessors_child(arguments: tuple[str]) -> None:
    """It reaps it, or knows what its predecessor has learnt that did."""
    server = await aioreap.create_subprocess_exec(
        *(sys.executable, "-c", SERVER, ECHO, SUCCESSOR, *arguments), stdout=-1, stderr=-1
    )
    output, errors = await server.communicate()
    assert not without_remarks(errors.decode())
    said, status = output.decode().splitlines()
    assert said.endswith("(b'1.5\\ntwo\\n', b'')")
    assert status == "7"
    assert server.returncode == 0


@pytest.mark.any_backend
async def test_a_failed_exec_leaves_all_as_it_was() -> None:
    detached = (await shell("cat")).detach()
    before = open_descriptors()
    with (
        pytest.raises(FileNotFoundError),
        handover.across_exec(detached) as variables,
    ):
        assert all(map(os.get_inheritable, detached.descriptors))
        os.execve("/does/not/exist", ["x"], {**os.environ, **variables})
    assert open_descriptors() == before
    assert not any(map(os.get_inheritable, detached.descriptors))
    process = await aioreap.attach(detached)
    assert await process.communicate(b"still") == (b"still", b"")


@pytest.mark.any_backend
async def test_across_exec_with_a_closed_descriptor_changes_nothing() -> None:
    detached = (await shell("cat")).detach()
    before = open_descriptors()
    broken = dataclasses.replace(detached, stderr=10**6)
    with pytest.raises(OSError, match="Bad file"), handover.across_exec(broken):
        pass
    assert open_descriptors() == before
    assert not any(map(os.get_inheritable, detached.descriptors))
    with closing(detached):
        pass
    await reaped(detached.pid)


@pytest.mark.any_backend
@pytest.mark.parametrize("value", ["", "x", "-1", "1000000", "0"])
async def test_a_variable_that_means_nothing_here_is_an_error(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv(handover.VARIABLE, value)
    with pytest.raises(ValueError, match="is no hand-over to this program"):
        handover.from_environment()
    assert handover.from_environment() == []


@pytest.mark.autoreap
async def test_an_autokill_child_lives_as_long_as_somebody_holds_it(pair: Pair) -> None:
    child = raw.cat(raw.AUTOREAP | kernel.CLONE_NNP | kernel.CLONE_PIDFD_AUTOKILL)
    watch = os.pidfd_open(child.pid)  # which is no copy
    await handover.send(
        pair[0],
        aioreap.Detached(child.pid, child.pidfd, child.stdin, child.stdout, autoreap=True),
    )
    assert not kernel.is_readable(watch)  # it is held by the socket
    (received,) = await handover.receive(pair[1])
    assert received.stdin is not None
    assert received.stdout is not None
    os.write(received.stdin, b"lives\n")
    assert os.read(received.stdout, 100) == b"lives\n"
    os.close(received.pidfd)
    died(watch)
    assert raw.status_of(watch) == signal.SIGKILL
    for descriptor in (watch, received.stdin, received.stdout):
        os.close(descriptor)


@pytest.mark.autoreap
async def test_an_attached_autokill_child_is_one_again(pair: Pair) -> None:
    child = raw.cat(raw.AUTOREAP | kernel.CLONE_NNP | kernel.CLONE_PIDFD_AUTOKILL)
    detached = aioreap.Detached(child.pid, child.pidfd, child.stdin, child.stdout, autoreap=True)
    process = await aioreap.attach(detached)
    assert process.pidfd == child.pidfd
    with closing(process.detach()) as detached:
        assert detached.pidfd == child.pidfd
        watch = os.pidfd_open(child.pid)
    died(watch)
    assert raw.status_of(watch) == signal.SIGKILL
    os.close(watch)


# Starts an AUTOKILL child, hands it over, and dies.
OWNER = """
import asyncio, os, signal, socket, sys
import aioreap
from aioreap import handover

async def main():
    process = await aioreap.create_subprocess_exec("cat", stdin=-1, stdout=-1, autokill=True)
    process.stdin.write(b"one\\n")
    assert await process.stdout.readline() == b"one\\n"
    with socket.socket(fileno=int(sys.argv[1])) as sock:
        await handover.send(sock, process.detach())
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


@pytest.mark.own_backend("uvloop")
@pytest.mark.autoreap
async def test_an_autokill_child_outlives_its_owner_in_other_hands_and_ends_with_them(
    pair: Pair,
) -> None:
    owner = await aioreap.create_subprocess_exec(
        *(sys.executable, "-c", OWNER, str(pair[1].fileno())), pass_fds=[pair[1].fileno()]
    )
    (received,) = await handover.receive(pair[0])
    assert await owner.wait() == -signal.SIGKILL
    process = await aioreap.attach(received)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"two\n")
    assert await process.stdout.readline() == b"two\n"
    watcher = await aioreap.attach(process.pid)  # with a pidfd of its own, which is no copy
    detached = process.detach()
    assert watcher.poll() is None
    os.close(detached.pidfd)  # before the end of its input, which would end it as well
    for descriptor in detached.descriptors[1:]:
        os.close(descriptor)
    assert await watcher.wait() == -signal.SIGKILL


# Starts an AUTOKILL child and becomes another program, which goes on with it.
PREDECESSOR = """
import asyncio, os, sys
import aioreap
from aioreap import handover

async def main():
    process = await aioreap.create_subprocess_exec("cat", stdin=int(sys.argv[1]), autokill=True)
    return process.detach()

with handover.across_exec(asyncio.run(main())) as variables:
    os.execve(sys.executable, [sys.executable, "-c", sys.argv[2]], {**os.environ, **variables})
"""
# Says its number, and waits for its end, or for that of its input.
HOLDER = """
import asyncio, sys
import aioreap
from aioreap import handover

async def main():
    (detached,) = handover.from_environment()
    process = await aioreap.attach(detached)
    print(process.pid, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    process.detach()

asyncio.run(main())
"""


@pytest.mark.own_backend("asyncio")
@pytest.mark.autoreap
@pytest.mark.parametrize("way", ["killed", pytest.param("ended", marks=pytest.mark.slow)])
async def test_an_autokill_child_outlives_an_exec_and_ends_with_the_successor(way: str) -> None:
    """The test has the other end of what it reads: nothing but the kernel ends it."""
    read_end, write_end = os.pipe()
    server = await aioreap.create_subprocess_exec(
        *(sys.executable, "-c", PREDECESSOR, str(read_end), HOLDER),
        pass_fds=[read_end],
        stdin=-1,
        stdout=-1,
    )
    os.close(read_end)
    assert server.stdin is not None
    assert server.stdout is not None
    child = await aioreap.attach(int(await server.stdout.readline()))
    assert child.poll() is None
    if way == "killed":
        server.kill()
    server.stdin.close()
    assert await server.wait() == (-signal.SIGKILL if way == "killed" else 0)
    os.close(write_end)
    assert await child.wait() == -signal.SIGKILL


# The example.


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_the_example_hands_everything_over(loop: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLE, loop, "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, without_remarks(done.stderr)) == (0, "")
    assert done.stdout.count("hands over") == 3
    assert done.stdout.endswith("generation 3: all have ended\n")
