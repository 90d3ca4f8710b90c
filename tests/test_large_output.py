"""What communicate() and run_process() keep of a child that writes much."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import gc
import os
import signal
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import seccomp
import uvloop
from program import run_program
from test_copies import in_a_copy

import aioreap
from aioreap import bulk, transport
from aioreap._clone import Output
from aioreap.completed import OutputLimitExceeded

pytestmark = pytest.mark.own_backend

LAST: Final = 500_000
DATA: Final = b"".join(b"%d\n" % number for number in range(1, LAST + 1))
WRITER: Final = f"seq {LAST}"
# After the first half, which is all of DATA, it waits for a line.
HALVES: Final = f"{WRITER}; read line; {WRITER}"


def test_it_is_long_enough() -> None:
    assert len(DATA) >= 2 * bulk.LARGE


@pytest.fixture
def intakes(monkeypatch: pytest.MonkeyPatch) -> list[Output]:
    """Where those were read to that were read by an Intake."""
    found: list[Output] = []
    make = bulk.Intake.__init__

    def note(intake: bulk.Intake, *arguments: Any) -> None:
        make(intake, *arguments)
        found.append(arguments[2])

    monkeypatch.setattr(bulk.Intake, "__init__", note)
    return found


async def test_every_byte_comes(intakes: list[Output]) -> None:
    process = await aioreap.create_subprocess_shell(
        f"{WRITER} & {WRITER} >&2; wait", stdout=-1, stderr=-1
    )
    assert await process.communicate() == (DATA, DATA)
    assert len(intakes) == 2
    result = await aioreap.run_process(f"{WRITER}; echo err >&2", shell=True, capture_output=True)
    assert (result.stdout, result.stderr) == (DATA, b"err\n")
    assert len(intakes) == 3


async def test_it_follows_what_the_reader_has_already() -> None:
    process = await aioreap.create_subprocess_shell(WRITER, stdout=-1)
    assert process.stdout is not None
    lines = [await process.stdout.readline() for _ in range(1000)]
    assert (await process.communicate())[0] == DATA[len(b"".join(lines)) :]


async def test_it_is_read_from_a_pipe_that_never_was_full(intakes: list[Output]) -> None:
    command = ["dd", "if=/dev/zero", "bs=100", "count=30000", "status=none"]
    process = await aioreap.create_subprocess_exec(*command, stdout=-1)
    assert await process.communicate() == (bytes(3_000_000), None)
    assert intakes


async def test_without_a_descriptor_for_it_it_comes_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process = await aioreap.create_subprocess_shell(WRITER, stdout=-1)
    asked = []

    def none_left(*arguments: object) -> int:
        asked.append(arguments)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(fcntl, "fcntl", none_left)
    assert await process.communicate() == (DATA, None)
    assert asked


class Half:
    """A child that has written the first half, all of which is in communicate()'s hands."""

    def __init__(self, process: aioreap.Process) -> None:
        assert process.stdin is not None
        self.process = process
        self._gate = os.dup(process.stdin.transport.get_extra_info("pipe").fileno())
        self.call = asyncio.ensure_future(process.communicate())

    @classmethod
    async def collected(cls) -> Half:
        half = cls(await aioreap.create_subprocess_shell(HALVES, stdin=-1, stdout=-1))
        await asyncio.sleep(0)
        collected = half.process._transport.get_protocol()._output  # type: ignore[attr-defined]
        while len(collected[1]) < len(DATA):
            await asyncio.sleep(0)
        return half

    def let_go_on(self) -> None:
        os.write(self._gate, b"\n")

    def close(self) -> None:
        os.close(self._gate)

    async def cancel(self) -> None:
        self.call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await self.call


@contextlib.asynccontextmanager
async def half_collected() -> AsyncIterator[Half]:
    half = await Half.collected()
    with contextlib.closing(half):
        yield half


async def test_it_goes_on_after_a_pause() -> None:
    async with half_collected() as half:
        half.let_go_on()
        assert await half.call == (DATA + DATA, None)


async def test_a_cancelled_call_loses_nothing_of_it() -> None:
    async with half_collected() as half:
        await half.cancel()
        assert half.process.stdout is not None
        assert await half.process.stdout.readline() == b"1\n"
        half.let_go_on()
        assert await half.process.communicate() == (DATA[2:] + DATA, None)


async def test_it_is_due_as_long_as_it_is_read() -> None:
    async with half_collected() as half:
        drained = asyncio.ensure_future(half.process._transport.drain_output(1000))
        await asyncio.sleep(0)
        assert not drained.done()
        half.let_go_on()
        await half.call
        await drained


@pytest.mark.parametrize("case", ["untold", "paused", "closing"])
async def test_it_is_not_taken_in_before_its_turn(case: str) -> None:
    process = await aioreap.create_subprocess_exec("cat", stdin=-1, stdout=-1)
    pipe = process._transport._pipes[1]
    if case == "untold":
        pipe.untold.append(b"before")
    elif case == "paused":
        process._transport.get_pipe_transport(1).pause_reading()
    else:
        process._transport.get_pipe_transport(1).close()
    process._transport.take_in(1, Output())
    assert pipe._intake is None
    pipe.untold.clear()
    process._transport.close()
    await process.wait()
    await process._transport.let_pipes_close()


async def test_another_protocol_is_told_of_what_comes_next() -> None:
    class Other(asyncio.SubprocessProtocol):
        def __init__(self) -> None:
            self.told = b""

        def pipe_data_received(self, fd: int, data: bytes | str) -> None:
            assert isinstance(data, bytes)
            self.told += data

    async with half_collected() as half:
        other = Other()
        half.process._transport.set_protocol(other)
        half.let_go_on()
        await half.process.wait()
        while half.process._transport.is_pipe_open(1):
            await asyncio.sleep(0)
        assert other.told == DATA
        half.call.cancel()


async def test_a_closed_pipe_is_read_no_more() -> None:
    async with half_collected() as half:
        half.process._transport.get_pipe_transport(1).close()
        while half.process._transport.is_pipe_open(1):
            await asyncio.sleep(0)
        half.let_go_on()
        assert await half.call == (DATA, None)
        assert half.process.returncode in (-signal.SIGPIPE, 128 + signal.SIGPIPE)


def test_an_interrupt_at_its_end_leaves_it_to_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = bulk.Intake.stop
    interrupts = [KeyboardInterrupt]

    def stop_or_interrupt(intake: bulk.Intake) -> None:
        if interrupts:
            raise interrupts.pop()
        stop(intake)

    loop = asyncio.SelectorEventLoop()
    half = loop.run_until_complete(Half.collected())
    monkeypatch.setattr(bulk.Intake, "stop", stop_or_interrupt)
    half.let_go_on()
    with pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(half.call)
    assert loop.run_until_complete(half.call) == (DATA + DATA, None)
    half.close()
    loop.close()


@pytest.fixture
async def errors() -> list[dict[str, Any]]:
    """What the loop's exception handler was told."""
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    return told


async def test_an_error_ends_it(errors: list[dict[str, Any]]) -> None:
    """The next read of the transport has the same one: that of a terminal nobody else has."""
    ours, theirs = os.openpty()
    os.set_blocking(ours, False)
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def end() -> None:
        intake.stop()
        ended.set_result(None)

    intake = bulk.Intake(asyncio.get_running_loop(), ours, Output(), None, end)
    os.close(theirs)
    await ended
    os.close(ours)
    assert not errors


async def test_a_closed_transport_ends_it() -> None:
    async with half_collected() as half:
        half.process._transport.close()
        assert await half.call == (DATA, None)
        assert half.process.returncode == -signal.SIGKILL


async def test_a_forked_copy_can_drop_it_and_the_rest_comes() -> None:
    async with half_collected() as half:

        def drop() -> None:
            asyncio._set_running_loop(None)
            transport.abandon_children(half.process._transport.loop)
            os._exit(5)

        assert in_a_copy(drop) == 5
        half.let_go_on()
        assert await half.call == (DATA + DATA, None)


def test_a_copy_that_goes_on_with_the_loop_reads_nothing_of_it() -> None:
    loop = asyncio.SelectorEventLoop()
    half = loop.run_until_complete(Half.collected())
    pipe: Any = half.process._transport._pipes[1]

    async def until_it_is_given_up() -> None:
        while pipe._intake._pipe >= 0:
            await asyncio.sleep(0)

    def go_on() -> None:
        half.let_go_on()
        loop.run_until_complete(until_it_is_given_up())
        os._exit(5)

    assert in_a_copy(go_on) == 5
    assert loop.run_until_complete(half.call) == (DATA + DATA, None)
    half.close()
    loop.close()


@pytest.mark.filterwarnings("ignore:unclosed resource:ResourceWarning")  # uvloop's
@pytest.mark.parametrize("make_loop", [aioreap.EventLoop, aioreap.UvloopEventLoop])
def test_a_loop_that_closes_meanwhile_closes_the_pipe(
    make_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    """Its descriptor is looked for after each test."""
    loop = make_loop()
    half = loop.run_until_complete(Half.collected())
    with pytest.warns(ResourceWarning, match="still ran when its event loop was closed"):
        loop.close()
    half.call._log_destroy_pending = False  # type: ignore[attr-defined]
    half.close()


@pytest.mark.filterwarnings("ignore:unclosed resource:ResourceWarning")
@pytest.mark.parametrize("make_loop", [asyncio.SelectorEventLoop, uvloop.new_event_loop])
def test_a_foreign_loop_that_closes_meanwhile_closes_it_with_the_process(
    make_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    loop = make_loop()
    half = loop.run_until_complete(Half.collected())
    loop.close()
    half.call._log_destroy_pending = False  # type: ignore[attr-defined]
    half.close()
    with pytest.warns(ResourceWarning, match="still ran when its event loop was closed"):
        half.process._transport.close()


async def test_a_limit_can_be_of_any_size(errors: list[dict[str, Any]]) -> None:
    call = aioreap.run_process(WRITER, shell=True, stdout=-1, output_limit=2**63)
    assert (await call).stdout == DATA
    assert not errors


@pytest.mark.parametrize("more", [0, 1, 100_000])
async def test_a_limit_is_kept_to_the_byte(more: int) -> None:
    limit = len(DATA) - more
    call = aioreap.run_process(WRITER, shell=True, stdout=-1, output_limit=limit)
    if not more:
        assert (await call).stdout == DATA
        return
    with pytest.raises(OutputLimitExceeded) as caught:
        await call
    assert caught.value.stdout == DATA[:limit]


async def test_a_drain_cuts_it_off() -> None:
    read_end, write_end = os.pipe()
    try:
        script = f"{WRITER}; cat /dev/fd/{read_end} & exit 4"
        result = await aioreap.run_process(
            script, shell=True, pass_fds=[read_end], stdout=-1, drain=0
        )
    finally:
        os.close(read_end)
        os.close(write_end)
    assert (result.returncode, result.stdout, result.truncated) == (4, DATA, True)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("communicate", "MemoryError\nNone\nMemoryError\n"),
        ("cancel", "True\nMemoryError\n"),
        ("run", "MemoryError\n"),
        ("run_with_a_limit", "MemoryError\n"),
        ("output", "0\nMemoryError\nMemoryError\n1 b'x'\n"),
    ],
)
def test_what_there_is_no_memory_for_is_an_error(call: str, said: str) -> None:
    run_program("little_memory", call, development_mode=False).expect(said)


class Lost:
    """An output that there was no memory for."""

    def __len__(self) -> int:
        return 0

    def write(self, data: bytes) -> int:
        raise MemoryError

    def take(self) -> bytes:
        raise MemoryError


async def test_what_was_lost_is_an_error_when_only_the_end_is_heard_of() -> None:
    async with half_collected() as half:
        half.process._transport.get_protocol()._output[1] = Lost()  # type: ignore[attr-defined]
        half.let_go_on()
        with pytest.raises(MemoryError):
            await half.call
        assert half.process.stdout is not None
        with pytest.raises(MemoryError):
            await half.process.stdout.read()


async def test_what_had_collected_it_is_freed_without_a_collection() -> None:
    async with half_collected() as half:
        collector: Any = half.process._transport.get_protocol()
        collector._output[1] = Lost()
        freed = weakref.ref(collector)
        del collector
        gc.disable()
        try:
            half.let_go_on()
            await asyncio.wait([half.call])
            assert isinstance(half.call.exception(), MemoryError)
            del half.call
            assert freed() is None
        finally:
            gc.enable()


@pytest.mark.skipif(not seccomp.IS_POSSIBLE, reason="no filter for this machine")
def test_a_kernel_that_cannot_be_asked_for_pages_ahead_is_none_the_worse() -> None:
    """That is one before Linux 5.14."""

    async def main() -> None:
        process = await aioreap.create_subprocess_shell(WRITER, stdout=-1)
        assert await process.communicate() == (DATA, None)

    def behind_a_filter() -> None:
        seccomp.install("madvise=EINVAL")
        asyncio._set_running_loop(None)
        asyncio.run(main())
        os._exit(5)

    assert in_a_copy(behind_a_filter) == 5


def test_it_is_in_memory_once() -> None:
    done = run_program("peak_memory", development_mode=False)
    assert 0.9 < float(done.stdout) < 1.2


# What it is kept in.


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read_end, write_end = os.pipe2(os.O_NONBLOCK)
    yield read_end, write_end
    for end in (read_end, write_end):
        with contextlib.suppress(OSError):
            os.close(end)


def test_what_others_have_is_not_changed() -> None:
    first = bytes(range(10))
    output = Output()
    assert output.write(first) == 10
    assert output.write(b"more") == len(output) == 14
    assert output.take() == first + b"more"
    assert first == bytes(range(10))
    assert (len(output), output.take()) == (0, b"")


def test_a_single_chunk_is_not_copied() -> None:
    first = b"all of it"
    output = Output()
    output.write(first)
    output.write(b"")
    assert output.take() is first


def test_it_is_given_up_with_what_it_is_kept_in() -> None:
    first = bytes(range(10))
    before = sys.getrefcount(first)
    output = Output()
    output.write(first)
    assert sys.getrefcount(first) == before + 1
    del output
    assert sys.getrefcount(first) == before


def test_it_can_be_used_again() -> None:
    output = Output()
    for _ in range(2):
        output.write(b"one")
        output.write(b"two")
        assert output.take() == b"onetwo"


def test_nothing_is_something_to_write() -> None:
    class Bytes(bytes):
        pass

    output = Output()
    assert output.write(Bytes()) == output.write(b"") == 0
    assert output.write(Bytes(b"some")) == 4
    assert type(output.take()) is bytes


@contextlib.contextmanager
def read_by_a_thread() -> Iterator[Output]:
    """One that a thread has in hand, in a read() of a pipe that blocks."""
    read_end, write_end = os.pipe()
    output = Output()
    output.write(b"before")
    thread = threading.Thread(target=output.read, args=(read_end,))
    thread.start()
    call = Path(f"/proc/self/task/{thread.native_id}/syscall")
    while call.read_text().split()[1:2] != [hex(read_end)]:  # the first argument: it waits there
        pass
    try:
        yield output
    finally:
        os.close(write_end)
        thread.join()
        os.close(read_end)


def test_another_thread_does_not_get_it_in_hand() -> None:
    with read_by_a_thread() as output:
        for call in (lambda: output.write(b"x"), lambda: output.read(0), output.take):
            with pytest.raises(RuntimeError, match="another thread"):
                call()
    assert output.take() == b"before"


def test_a_forked_copy_has_it_in_hand_alone() -> None:
    def take() -> None:
        if output.take() == b"before":
            os._exit(5)

    with read_by_a_thread() as output:
        assert in_a_copy(take) == 5


def test_it_takes_bytes_alone() -> None:
    with pytest.raises(TypeError):
        Output().write(bytearray(b"x"))  # type: ignore[arg-type]


def test_a_pipe_is_read_until_it_is_empty_or_has_ended(pipe: tuple[int, int]) -> None:
    read_end, write_end = pipe
    output = Output()
    assert output.read(read_end)
    os.write(write_end, b"some")
    assert output.read(read_end)
    assert len(output) == 4
    os.write(write_end, b"more")
    os.close(write_end)
    assert not output.read(read_end)
    assert output.take() == b"somemore"


def test_no_more_is_read_than_is_asked_for(pipe: tuple[int, int]) -> None:
    read_end, write_end = pipe
    os.write(write_end, b"x" * 10)
    output = Output()
    output.write(b"before")
    assert output.read(read_end, 9)
    assert not output.read(read_end, 9)
    assert output.take() == b"beforexxx"
    assert os.read(read_end, 100) == b"x" * 7


def test_an_error_of_a_read_is_one_of_its(pipe: tuple[int, int]) -> None:
    output = Output()
    output.write(b"before")
    with pytest.raises(OSError, match="Bad file descriptor"):
        output.read(pipe[1])
    assert output.take() == b"before"
