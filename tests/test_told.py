"""When and in whose context a protocol is told, and what becomes of what it raises."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import signal
import weakref
from asyncio.subprocess import SubprocessStreamProtocol
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

import aioreap

_name: contextvars.ContextVar[Any] = contextvars.ContextVar("_name", default="nobody's")
Calls = list[tuple[str, Any]]


class Noting(asyncio.SubprocessProtocol):
    """Notes each call, and in whose context it came."""

    def __init__(self) -> None:
        self.calls: Calls = []
        self.lost = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.calls.append(("connection_made", _name.get()))

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self.calls.append((f"pipe_data_received {fd}", _name.get()))

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        self.calls.append((f"pipe_connection_lost {fd}", _name.get()))

    def process_exited(self) -> None:
        self.calls.append(("process_exited", _name.get()))

    def connection_lost(self, exc: Exception | None) -> None:
        self.calls.append(("connection_lost", _name.get()))
        self.lost.set_result(None)


async def test_a_protocol_is_told_in_the_context_of_its_own_spawn() -> None:
    loop: Any = aioreap.install(asyncio.get_running_loop())
    protocols = {}
    for name in ("first", "second"):
        _name.set(name)
        _, protocols[name] = await loop.subprocess_exec(
            Noting, "sh", "-c", "echo; exit 3", stdin=None, stderr=None
        )
    _name.set("third")
    for name, protocol in protocols.items():
        await protocol.lost
        assert {whose for _, whose in protocol.calls} == {name}
        assert len(protocol.calls) == 5


async def test_who_waits_for_the_exit_goes_on_when_the_protocol_has_been_told() -> None:
    loop: Any = aioreap.install(asyncio.get_running_loop())
    transport, protocol = await loop.subprocess_exec(Noting, "cat", stdout=None, stderr=None)
    transport.get_pipe_transport(0).close()
    await transport._wait()
    assert "process_exited" in dict(protocol.calls)
    await protocol.lost


class Derived(SubprocessStreamProtocol):
    """A stream protocol of somebody's own, which notes as well."""

    def __init__(self, error: type[Exception] | None) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(limit=2**16, loop=loop)
        self.calls: Calls = []
        self.error = error
        self.is_lost = loop.create_future()

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        self.calls.append((f"pipe_connection_lost {fd}", _name.get()))
        if fd:  # asyncio's calls connection_lost() itself for stdin
            super().pipe_connection_lost(fd, exc)

    def process_exited(self) -> None:
        self.calls.append(("process_exited", _name.get()))
        super().process_exited()
        if self.error is not None:
            raise self.error

    def connection_lost(self, exc: Exception | None) -> None:
        self.calls.append(("connection_lost", _name.get()))
        super().connection_lost(exc)
        self.is_lost.set_result(None)


async def create_derived(error: type[Exception] | None) -> tuple[aioreap.Process, Derived]:
    loop: Any = aioreap.install(asyncio.get_running_loop())
    _name.set("the spawn's")
    transport, protocol = await loop.subprocess_exec(
        lambda: Derived(error), "sh", "-c", "read line; echo out; echo err >&2; exit 3"
    )
    _name.set("another's")
    return aioreap.Process(transport, protocol, loop), protocol


async def test_during_communicate_a_derived_protocol_is_told_as_without_it() -> None:
    process, protocol = await create_derived(None)
    assert await process.communicate(b"\n") == (b"out\n", b"err\n")
    await protocol.is_lost
    calls = dict(protocol.calls)
    assert calls["process_exited"] == calls["connection_lost"] == "the spawn's"
    assert [name for name, _ in protocol.calls][-1] == "connection_lost"
    lost = {f"pipe_connection_lost {fd}" for fd in range(3)}
    assert calls.keys() == {"process_exited", "connection_lost", *lost}
    assert len(protocol.calls) == 5


async def test_an_error_for_one_streams_end_keeps_none_of_the_others_away() -> None:
    process, protocol = await create_derived(None)
    real = protocol.pipe_connection_lost

    def raising(fd: int, exc: Exception | None) -> None:
        real(fd, exc)
        if fd == 1:
            raise ZeroDivisionError

    protocol.pipe_connection_lost = raising  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        await process.communicate(b"\n")
    await protocol.is_lost
    assert len(protocol.calls) == 5


@pytest.mark.parametrize("how", ["stop", "poll"])
async def test_what_a_derived_protocol_raises_is_the_loops_to_handle(how: str) -> None:
    said: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context))
    process, protocol = await create_derived(ZeroDivisionError)
    communicating = asyncio.ensure_future(process.communicate())
    await asyncio.sleep(0)
    if how == "stop":
        assert (await process.stop()).signal == signal.SIGTERM
    else:
        process.kill()
        while process.poll() is None:
            pass
        assert process.poll() == -signal.SIGKILL
    await communicating
    await protocol.is_lost
    assert [type(context["exception"]) for context in said].count(ZeroDivisionError) == 1


async def test_an_error_of_asyncios_own_protocol_keeps_nothing_from_its_end() -> None:
    """It sets a result that a cancelled ``stdin.wait_closed()`` has taken the future of."""
    said: list[dict[str, Any]] = []
    loop: Any = aioreap.install(asyncio.get_running_loop())
    loop.set_exception_handler(lambda _, context: said.append(context))
    process = await asyncio.create_subprocess_exec("cat", stdin=-1)
    assert process.stdin is not None
    waiting = asyncio.ensure_future(process.stdin.wait_closed())
    await asyncio.sleep(0)
    waiting.cancel()
    process.stdin.close()
    transport: Any = process._transport  # type: ignore[attr-defined]
    assert await process.wait() == 0
    while not transport._finished:
        await asyncio.sleep(0)
    assert [type(context["exception"]) for context in said] == [asyncio.InvalidStateError]


class Request:
    """Something that a context variable holds."""

    process: aioreap.Process | None = None


async def test_no_context_is_kept() -> None:
    def requests() -> Iterator[Request]:
        for _ in range(2):
            request = Request()
            _name.set(request)
            yield request

    async def spawn() -> list[weakref.ref[Request]]:
        references = []
        for request in requests():
            request.process = await aioreap.create_subprocess_exec("true")
            await request.process.communicate()
            references.append(weakref.ref(request))
            del request
        _name.set(None)
        return references

    gc.disable()
    try:
        references = await asyncio.ensure_future(spawn())
        for _ in range(20):
            await asyncio.sleep(0)
        assert [reference() for reference in references] == [None, None]
    finally:
        gc.enable()


async def test_no_context_of_a_communicate_that_is_given_up_is_kept() -> None:
    process = await aioreap.create_subprocess_exec("cat", stdin=-1, stdout=-1)

    async def given_up() -> weakref.ref[Request]:
        request = Request()
        _name.set(request)
        communicating = asyncio.ensure_future(process.communicate())
        await asyncio.sleep(0)
        communicating.cancel()
        with pytest.raises(asyncio.CancelledError):
            await communicating
        _name.set(None)
        return weakref.ref(request)

    reference = await asyncio.ensure_future(given_up())
    for _ in range(20):
        await asyncio.sleep(0)
    gc.collect()
    kept = reference()
    await process.communicate()
    assert kept is None


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What asyncio's protocols are told, in its order."""

    def note(name: str) -> None:
        real = getattr(SubprocessStreamProtocol, name)

        def noting(*arguments: Any) -> None:
            calls.append(name)
            real(*arguments)

        monkeypatch.setattr(SubprocessStreamProtocol, name, noting)

    calls: list[str] = []
    for name in ("connection_made", "process_exited", "connection_lost"):
        note(name)
    return calls


@pytest.fixture
async def sleeper() -> AsyncIterator[aioreap.Process]:
    """A child without pipes; it ends at a SIGTERM."""
    async with await aioreap.create_subprocess_exec("sleep", "1000") as process:
        yield process
        process._transport.close()


async def test_a_child_without_pipes_has_asyncios_protocol_when_somebody_asks(
    sleeper: aioreap.Process, told: list[str]
) -> None:
    protocol = sleeper._transport.get_protocol()
    assert isinstance(protocol, SubprocessStreamProtocol)
    assert told == ["connection_made"]
    sleeper.terminate()
    assert await sleeper.wait() == -signal.SIGTERM
    assert told == ["connection_made", "process_exited", "connection_lost"]
    assert sleeper._transport.get_protocol() is protocol


async def test_who_asks_for_it_after_the_exit_gets_one_that_was_told(
    sleeper: aioreap.Process, told: list[str]
) -> None:
    sleeper.terminate()
    await sleeper.wait()
    assert isinstance(sleeper._transport.get_protocol(), SubprocessStreamProtocol)
    assert told == ["connection_made", "process_exited", "connection_lost"]


async def test_who_asks_for_that_of_what_was_detached_gets_one_that_lost_it(
    sleeper: aioreap.Process, told: list[str]
) -> None:
    detached = sleeper.detach()
    await asyncio.sleep(0)
    assert told == []
    sleeper._transport.get_protocol()
    assert told == ["connection_made", "connection_lost"]
    again = await aioreap.attach(detached)
    await again.stop()


async def test_a_protocol_that_is_set_for_a_child_without_pipes_is_told(
    sleeper: aioreap.Process,
) -> None:
    _name.set("the setter's")
    protocol = Noting()
    sleeper._transport.set_protocol(protocol)
    sleeper.terminate()
    await protocol.lost
    assert protocol.calls == [
        ("process_exited", "the setter's"),
        ("connection_lost", "the setter's"),
    ]


@pytest.mark.parametrize("start_new_session", [False, True])
async def test_the_transport_of_a_child_without_pipes_is_closed_by_its_exit(
    start_new_session: bool,
) -> None:
    process = await aioreap.create_subprocess_exec("true", start_new_session=start_new_session)
    await process.wait()
    assert process._transport.is_closing()
