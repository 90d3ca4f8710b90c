"""lines(): no line is too long, and none is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from test_launch import turns

import aioreap
from aioreap import lines

pytestmark = pytest.mark.own_backend


async def reader_of(script: str, **options: Any) -> tuple[aioreap.Process, asyncio.StreamReader]:
    process = await aioreap.create_subprocess_shell(script, stdin=-1, stdout=-1, **options)
    assert process.stdout is not None
    return process, process.stdout


async def fed(*chunks: bytes, limit: int = 2**16) -> asyncio.StreamReader:
    stream = asyncio.StreamReader(limit)
    for chunk in chunks:
        stream.feed_data(chunk)
    return stream


async def ended(*chunks: bytes, limit: int = 2**16) -> asyncio.StreamReader:
    stream = await fed(*chunks, limit=limit)
    stream.feed_eof()
    return stream


async def all_of(iterator: AsyncIterator[bytes]) -> list[bytes]:
    return [line async for line in iterator]


async def test_lines_have_their_ends_which_the_last_can_lack() -> None:
    process, stdout = await reader_of(r"printf 'one\n\ntwo\r\nthree'")
    assert await all_of(lines(stdout)) == [b"one\n", b"\n", b"two\r\n", b"three"]
    assert await process.wait() == 0


async def test_nothing_has_no_lines() -> None:
    process, stdout = await reader_of("exit 0")
    assert await all_of(lines(stdout)) == []
    assert await process.wait() == 0


@pytest.mark.parametrize("limit", [pytest.param(1, marks=pytest.mark.slow), 100, 2**16])
async def test_the_limit_of_the_stream_does_not_matter(limit: int) -> None:
    process, stdout = await reader_of(
        "head -c 1000000 /dev/zero; echo; echo short; head -c 200000 /dev/zero", limit=limit
    )
    found = await all_of(lines(stdout))
    assert found == [bytes(1_000_000) + b"\n", b"short\n", bytes(200_000)]
    assert await process.wait() == 0


@pytest.mark.any_backend
@pytest.mark.parametrize("end", [True, False], ids=["ended", "open"])
@pytest.mark.parametrize("limit", [1, 2**16])
async def test_a_longer_line_is_an_error_that_leaves_it_in_the_stream(
    end: bool, limit: int
) -> None:
    stream = await fed(b"one\nfour\nfives\n", limit=limit)
    if end:
        stream.feed_eof()
    iterator = lines(stream, 4)
    assert await anext(iterator) == b"one\n"
    assert await anext(iterator) == b"four\n"
    for _ in range(2):
        with pytest.raises(asyncio.LimitOverrunError, match="longer than 4 bytes") as caught:
            await anext(iterator)
        assert caught.value.consumed == 4
    assert await stream.readexactly(2) == b"fi"
    assert await anext(iterator) == b"ves\n"


@pytest.mark.any_backend
async def test_a_longer_line_can_come_in_parts() -> None:
    stream = await ended(b"one\nfour\nfives and\nmore\nthe last one")
    found = await all_of(lines(stream, 4, longer="parts"))
    assert found == [
        b"one\n", b"four\n", b"five", b"s an", b"d\n", b"more\n", b"the ", b"last", b" one"
    ]  # fmt: skip


@pytest.mark.any_backend
async def test_whether_a_line_is_longer_is_known_from_the_byte_after_it() -> None:
    stream = await fed(b"four")
    iterator = lines(stream, 4, longer="parts")
    waiting = asyncio.ensure_future(anext(iterator))
    await turns(10)
    assert not waiting.done()
    stream.feed_data(b"\n")
    assert await waiting == b"four\n"
    stream.feed_data(b"fours")
    assert await anext(iterator) == b"four"
    stream.feed_eof()
    assert await all_of(iterator) == [b"s"]


@pytest.mark.slow
async def test_parts_are_bounded_for_an_endless_line() -> None:
    process, stdout = await reader_of("yes | tr -d '\\n'", limit=1000)
    iterator = lines(stdout, 100_000, longer="parts")
    for _ in range(20):
        assert len(await anext(iterator)) == 100_000
    assert len(stdout._buffer) < 1_000_000  # type: ignore[attr-defined]
    await process.stop(drain=0)
    process._transport.close()


async def test_a_cancellation_loses_nothing() -> None:
    process, stdout = await reader_of("printf one; read line; echo two", limit=1)
    iterator = lines(stdout)
    first = asyncio.ensure_future(anext(iterator))
    while not stdout._buffer:  # type: ignore[attr-defined]
        await asyncio.sleep(0)
    await turns(10)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert await stdout.read(1) == b"o"
    assert process.stdin is not None
    process.stdin.write(b"\n")
    assert await anext(iterator) == b"netwo\n"
    assert await process.wait() == 0


@pytest.mark.any_backend
async def test_a_cancellation_when_the_line_has_come_loses_nothing() -> None:
    stream = await fed(b"on")
    waiting = asyncio.ensure_future(anext(lines(stream)))
    await turns(10)
    stream.feed_data(b"e\ntwo\n")
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await anext(lines(stream)) == b"one\n"


@pytest.mark.any_backend
async def test_what_a_dropped_iterator_has_not_returned_is_in_the_stream() -> None:
    stream = await ended(b"one\ntwo\nthree")
    async for line in lines(stream):
        assert line == b"one\n"
        break
    assert await stream.readline() == b"two\n"
    assert await stream.read() == b"three"


async def test_other_reads_can_come_between() -> None:
    process, stdout = await reader_of("seq 4")
    assert await anext(lines(stdout)) == b"1\n"
    assert await stdout.readline() == b"2\n"
    assert await all_of(lines(stdout)) == [b"3\n", b"4\n"]
    assert await process.communicate() == (b"", None)


@pytest.mark.any_backend
async def test_two_at_once_are_asyncios_error() -> None:
    stream = await fed()
    first = asyncio.ensure_future(anext(lines(stream)))
    await turns(1)
    with pytest.raises(RuntimeError, match="another coroutine is already waiting"):
        await anext(lines(stream))
    stream.feed_data(b"one\n")
    assert await first == b"one\n"


@pytest.mark.any_backend
async def test_an_error_of_the_stream_is_raised() -> None:
    stream = await fed(b"on")
    waiting = asyncio.ensure_future(anext(lines(stream)))
    await turns(1)
    stream.set_exception(OSError(5, "Input/output error"))
    with pytest.raises(OSError, match="Input/output"):
        await waiting
    with pytest.raises(OSError, match="Input/output"):
        await anext(lines(stream))


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("arguments", "options", "error"),
    [
        ((0,), {}, ValueError),
        ((-1,), {}, ValueError),
        ((1.5,), {}, TypeError),
        ((None,), {}, TypeError),
        ((), {"longer": "cut"}, ValueError),
    ],
)
async def test_bad_input_is_said_at_once(
    arguments: Any, options: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match=r"max_line|longer|integer"):
        lines(asyncio.StreamReader(), *arguments, **options)
