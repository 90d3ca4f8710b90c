"""Output that is read as it comes: in whole chunks, which are waited for, and by lines."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, cast

import pytest

import aioreap
from aioreap import _clone
from aioreap._clone import take_line, wait_for_writer
from aioreap.reader import OutputReader

pytestmark = pytest.mark.own_backend

CHUNK: Final = 65536  # what a pipe holds
UNKNOWN: Final = 3  # chunks after which a pipe is known
PATIENCE_NS: Final = 30_000  # how long a writer is waited for
VAIN: Final = 64  # chunks for which none is waited for after that was in vain


class Pipe:
    """A pipe, and what is said of it after so many chunks."""

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe()

    def after(self, chunks: int) -> list[bool]:
        return [wait_for_writer(self.read_end) for _ in range(chunks)]

    def write(self) -> None:
        os.write(self.write_end, b"more")

    def end(self) -> None:
        os.close(self.write_end)

    def close(self) -> None:
        for end in (self.read_end, self.write_end):
            with contextlib.suppress(OSError):
                os.close(end)


@pytest.fixture
def pipes() -> Iterator[list[Pipe]]:
    made = [Pipe(), Pipe()]
    wait_for_writer(sys.maxunicode)  # or it could know one that had the same number
    yield made
    for pipe in made:
        pipe.close()


@pytest.mark.parametrize("event", [Pipe.write, Pipe.end])
def test_a_pipe_is_asked_once_it_is_known(
    pipes: list[Pipe], event: Callable[[Pipe], object]
) -> None:
    event(pipes[0])
    assert pipes[0].after(UNKNOWN + 2) == [False] * UNKNOWN + [True] * 2


def test_it_is_left_alone_after_a_wait_in_vain(pipes: list[Pipe]) -> None:
    pipes[0].write()
    assert pipes[0].after(UNKNOWN + 1)[-1]
    os.read(pipes[0].read_end, CHUNK)
    assert pipes[0].after(1) == [False]
    pipes[0].write()
    assert pipes[0].after(VAIN + 2) == [False] * VAIN + [True] * 2


def test_it_is_waited_for_that_long(pipes: list[Pipe]) -> None:
    pipes[0].after(UNKNOWN)
    begin = time.monotonic_ns()
    assert pipes[0].after(1) == [False]
    assert time.monotonic_ns() - begin >= PATIENCE_NS  # more is up to the machine


def test_none_is_waited_for_where_two_take_turns(pipes: list[Pipe]) -> None:
    for pipe in pipes:
        pipe.write()
    for _ in range(UNKNOWN + 1):
        for pipe in pipes:
            assert pipe.after(UNKNOWN) == [False] * UNKNOWN
    assert pipes[1].after(1) == [True]


def test_the_pipes_of_another_thread_are_no_others(pipes: list[Pipe]) -> None:
    for pipe in pipes:
        pipe.write()
    assert pipes[0].after(UNKNOWN + 1)[-1]
    other = threading.Thread(target=pipes[1].after, args=[1])
    other.start()
    other.join()
    assert pipes[0].after(1) == [True]


def test_it_takes_a_descriptor() -> None:
    with pytest.raises(TypeError):
        wait_for_writer("1")  # type: ignore[arg-type]
    with pytest.raises(OverflowError):
        wait_for_writer(2**63)


# When it is called.


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The descriptors whose writers were waited for."""
    found: list[int] = []
    monkeypatch.setattr(_clone, "wait_for_writer", found.append)
    return found


async def read_at_once(size: int, limit: int) -> int:
    """Read that much, by a stream of that limit, when it is all there: the pipe's descriptor."""
    process = await aioreap.create_subprocess_shell(
        f"read line; head -c {size} /dev/zero; echo >&2; read line",
        stdin=-1,
        stdout=-1,
        stderr=-1,
        limit=limit,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    stdout = cast("asyncio.ReadTransport", process._transport.get_pipe_transport(1))
    stdout.pause_reading()
    process.stdin.write(b"\n")
    await process.stderr.readline()
    stdout.resume_reading()
    assert len(await process.stdout.read(CHUNK)) == size
    descriptor: int = stdout.get_extra_info("pipe").fileno()
    await process.communicate(b"\n")
    return descriptor


async def test_a_writer_is_waited_for_after_a_whole_chunk(waits: list[int]) -> None:
    assert [await read_at_once(CHUNK, CHUNK)] == waits


async def test_it_is_not_after_less(waits: list[int]) -> None:
    await read_at_once(CHUNK - 1, CHUNK)
    assert waits == []


async def test_it_is_not_where_the_reader_has_enough(waits: list[int]) -> None:
    await read_at_once(CHUNK, CHUNK // 4)
    assert waits == []


async def test_every_chunk_of_a_stream_comes() -> None:
    size = 50 * CHUNK + 1
    process = await aioreap.create_subprocess_exec("head", "-c", str(size), "/dev/zero", stdout=-1)
    assert process.stdout is not None
    got = 0
    while chunk := await process.stdout.read(CHUNK):
        got += len(chunk)
    assert got == size
    assert await process.wait() == 0


# By lines.


class Transport:
    """Notes what a reader asks of it."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def pause_reading(self) -> None:
        self.asked.append("pause")

    def resume_reading(self) -> None:
        self.asked.append("resume")


def all_lines(reader: Any, way: str, chunks: list[bytes], end: str) -> list[object]:
    """What comes of a reader, until it would wait or an error comes again, and what is left."""
    transport = Transport()
    reader.set_transport(transport)
    for chunk in chunks:
        reader.feed_data(chunk)
    if end == "error":
        reader.set_exception(ConnectionError())
    elif end:
        reader.feed_eof()
    if end == "taken":
        with contextlib.suppress(asyncio.IncompleteReadError):
            reader.readexactly(100).send(None)
    come: list[object] = []
    while not come or come[-1] not in (b"", "waits", StopAsyncIteration, ConnectionError):
        call = getattr(reader, way)()
        try:
            call.send(None)
            come.append("waits")
        except StopIteration as stop:
            come.append(stop.value)
        except (StopAsyncIteration, ValueError, ConnectionError) as error:
            come.append(type(error))
        call.close()
    return [*come, bytes(reader._buffer), *transport.asked]


LIMITS: Final = [1, 2, 3, 4, 6, 4.5, 2**16, 2**63 - 1, 2**70, math.inf]
CHUNKS: Final = [
    [],
    [b"\n"],
    [b"one\n", b"two\nthree\n\nfour\n"],
    [b"four\nrest"],
    [b"\0\xff\n", b"no end"],
]


@pytest.mark.parametrize("way", ["readline", "__anext__"])
@pytest.mark.parametrize("end", ["", "end", "taken", "error"])
async def test_lines_are_those_of_asyncio(way: str, end: str) -> None:
    for limit in cast("list[int]", LIMITS):
        for chunks in CHUNKS:
            come = all_lines(OutputReader(limit), way, chunks, end)
            assert come == all_lines(asyncio.StreamReader(limit), way, chunks, end)


async def test_who_replaces_readline_sees_every_line(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = OutputReader()
    reader.feed_data(b"one\ntwo\n")
    reader.feed_eof()
    seen: list[bytes] = []

    async def readline() -> bytes:
        seen.append(await OutputReader.readline(reader))
        return seen[-1]

    monkeypatch.setattr(reader, "readline", readline)
    assert [line async for line in reader] == [b"one\n", b"two\n"]
    assert seen == [b"one\n", b"two\n", b""]


async def test_the_reader_is_the_same_when_the_child_has_ended_already() -> None:
    for _ in range(20):
        process = await aioreap.create_subprocess_exec("true", stdout=-1)
        assert type(process.stdout) is OutputReader
        assert await process.communicate() == (b"", None)
        assert process.stdout._kept is None


def test_a_line_that_cannot_be_cut_off_stays() -> None:
    buffer = bytearray(b"line\n")
    with memoryview(buffer), pytest.raises(BufferError):
        take_line(buffer, 10)
    assert take_line(buffer, 10) == b"line\n"
    assert buffer == b""


@pytest.mark.parametrize("arguments", [(), (bytearray(),), (b"line\n", 10)])
def test_a_line_is_cut_off_a_buffer(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError):
        take_line(*arguments)


def test_a_line_can_be_as_long_as_is_said() -> None:
    buffer = bytearray(b"four\nmore")
    assert take_line(buffer, 3) == b""
    assert take_line(buffer, 4) == b"four\n"
    assert take_line(buffer, 4) == b""
    assert buffer == b"more"


@pytest.mark.parametrize("longest", [0, -1, -(2**70)])
def test_no_line_is_shorter_than_nothing(longest: int) -> None:
    assert take_line(bytearray(b"\n"), longest) == b""
