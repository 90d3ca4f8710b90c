"""Loops whose children are aioreap's: classes, install(), and any SubprocessProtocol."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import uvloop
from conftest import _LOOPS, open_descriptors

import aioreap
from aioreap import ChildWatcher, _clone
from aioreap.launch import Launcher

Factory = Callable[[], asyncio.AbstractEventLoop]

FACTORIES: dict[str, Factory] = {
    "EventLoop": aioreap.EventLoop,
    "UvloopEventLoop": aioreap.UvloopEventLoop,
    "installed": lambda: aioreap.install(asyncio.new_event_loop()),
    "installed-uvloop": lambda: aioreap.install(uvloop.new_event_loop()),
}


@pytest.fixture(params=FACTORIES)
def factory(request: pytest.FixtureRequest) -> Factory:
    return FACTORIES[request.param]


class Recorder(asyncio.SubprocessProtocol):
    """Writes down what it is told, in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.data: dict[int, bytes] = {1: b"", 2: b""}
        self.closed = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.calls.append("connection_made")

    def pipe_data_received(self, fd: int, data: bytes | str) -> None:
        assert isinstance(data, bytes)
        self.calls.append(f"data {fd}")
        self.data[fd] += data

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        self.calls.append(f"pipe_connection_lost {fd} {exc}")

    def process_exited(self) -> None:
        self.calls.append("process_exited")

    def connection_lost(self, exc: Exception | None) -> None:
        self.calls.append(f"connection_lost {exc}")
        self.closed.set_result(None)


def test_asyncios_own_functions_lead_here(factory: Factory) -> None:
    async def main() -> None:
        process = await asyncio.create_subprocess_exec(
            "sh", "-c", "cat; exit 3", stdin=-1, stdout=-1
        )
        assert aioreap.Process.of(process).pidfd >= 0
        assert await process.communicate(b"x") == (b"x", None)
        assert process.returncode == 3
        process = await asyncio.create_subprocess_shell("exit 4")
        assert await process.wait() == 4

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())


def test_a_protocol_is_told_in_asyncios_order(factory: Factory) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        transport, protocol = await loop.subprocess_shell(
            Recorder, "echo out; echo err >&2; exit 3"
        )
        assert protocol.calls[0] == "connection_made"
        await protocol.closed
        calls = protocol.calls
        assert protocol.data == {1: b"out\n", 2: b"err\n"}
        assert calls[0] == "connection_made"
        assert calls[-1] == "connection_lost None"
        assert calls.count("process_exited") == 1
        assert {f"pipe_connection_lost {fd} None" for fd in (0, 1, 2)} <= set(calls)
        assert len(calls) == len(set(calls))
        assert transport.get_returncode() == 3
        assert transport.get_extra_info("exit_info").returncode == 3
        assert transport.get_extra_info("pidfd") == -1
        assert transport.get_extra_info("nothing", "default") == "default"
        transport.close()
        assert transport.is_closing()

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())


def test_closing_the_transport_kills(factory: Factory) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        transport, protocol = await loop.subprocess_exec(Recorder, "cat")
        output = transport.get_pipe_transport(1)
        assert output is not None
        assert output.get_extra_info("pipe").fileno() >= 0
        assert transport.get_pipe_transport(3) is None
        transport.close()
        transport.close()
        await protocol.closed
        assert transport.get_returncode() == -9

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())


def test_a_forgotten_process_runs_on_and_is_reaped(factory: Factory, tmp_path: Path) -> None:
    async def main() -> None:
        read_end, write_end = os.pipe()
        process = await aioreap.create_subprocess_shell(
            "read line; echo still here > output", stdin=read_end, cwd=tmp_path
        )
        os.close(read_end)
        child = process._transport.child
        del process
        gc.collect()
        os.close(write_end)
        while child.exit_info is None:
            await asyncio.sleep(0)
        assert child.exit_info.returncode == 0
        assert (tmp_path / "output").read_text() == "still here\n"

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())


def test_debug_mode_and_its_log(factory: Factory, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        process = await asyncio.create_subprocess_exec("sh", "-c", "exit 3")
        assert await process.wait() == 3

    caplog.set_level("INFO", logger="aioreap")
    with asyncio.Runner(debug=True, loop_factory=factory) as runner:
        runner.run(main())
    assert "returncode=3" in caplog.text


def test_installing_twice_is_installing_once() -> None:
    for make in (asyncio.new_event_loop, uvloop.new_event_loop, aioreap.EventLoop):
        loop = make()
        assert aioreap.install(loop) is loop
        first = loop.subprocess_exec
        assert aioreap.install(loop) is loop
        assert loop.subprocess_exec == first
        loop.close()


def test_install_without_a_loop_needs_a_running_one() -> None:
    with pytest.raises(RuntimeError, match="no running event loop"):
        aioreap.install()


def test_loops_are_freed(factory: Factory) -> None:
    async def main() -> int:
        return await (await aioreap.create_subprocess_exec("true")).wait()

    with asyncio.Runner(loop_factory=factory) as runner:
        loop = weakref.ref(runner.get_loop())
        runner.run(main())
    del runner
    gc.collect()
    assert loop() is None


async def test_two_threads_spawn_at_once() -> None:
    """On loops of their own, like this one, with children that are known by what they say."""

    async def answer(text: bytes) -> bytes:
        process = await aioreap.create_subprocess_exec("cat", stdin=-1, stdout=-1)
        output, _ = await process.communicate(text)
        assert process.returncode == 0
        return output

    async def several(name: str) -> list[bytes]:
        together.wait()
        return await asyncio.gather(*(answer(f"{name} {n}".encode()) for n in range(20)))

    def thread(name: str) -> None:
        with asyncio.Runner(loop_factory=type(loop)) as runner:
            found[name] = runner.run(several(name))

    loop = asyncio.get_running_loop()
    found: dict[str, list[bytes]] = {}
    together = threading.Barrier(3)
    threads = [threading.Thread(target=thread, args=[name]) for name in ("one", "two")]
    for each in threads:
        each.start()
    found["here"] = await several("here")
    for each in threads:
        await asyncio.to_thread(each.join)
    assert found == {
        name: [f"{name} {n}".encode() for n in range(20)] for name in ("one", "two", "here")
    }


@pytest.mark.parametrize("count", [pytest.param(1000, marks=pytest.mark.slow), 40])
def test_loops_made_and_closed_by_the_thousand_leave_nothing(count: int) -> None:
    """Neither the loop nor what aioreap has for it, nor descriptors, nor memory for spawns."""
    kinds = [*_LOOPS.values(), *FACTORIES.values()]

    async def main() -> list[weakref.ref[object]]:
        process = await aioreap.create_subprocess_exec("true", stdin=-1)
        await process.communicate()
        assert process.returncode == 0
        loop = asyncio.get_running_loop()
        mechanism = (loop, ChildWatcher.of(loop), Launcher.of(loop), process, process._transport)
        return [weakref.ref(each) for each in mechanism]

    def run_on(kinds: Iterable[Factory]) -> list[weakref.ref[object]]:
        references = []
        for make_loop in kinds:
            with asyncio.Runner(loop_factory=make_loop) as runner:
                references += runner.run(main())
        del runner
        gc.collect()
        return references

    run_on(kinds)
    descriptors, blocks = open_descriptors(), _clone.blocks()
    references = run_on(itertools.islice(itertools.cycle(kinds), count))
    assert len(references) == 5 * count
    assert [each() for each in references if each() is not None] == []
    assert open_descriptors() == descriptors
    assert _clone.blocks() <= blocks


@pytest.mark.any_backend
def test_an_installed_loop_is_in_no_cycle() -> None:
    loop = aioreap.install(asyncio.new_event_loop())
    loop.close()
    reference = weakref.ref(loop)
    gc.disable()
    try:
        del loop
        assert reference() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("held", [False, True], ids=["dropped", "held"])
def test_closing_a_loop_under_a_child_is_one_warning_and_its_death(
    factory: Factory, held: bool
) -> None:
    async def main() -> tuple[aioreap.Process, int]:
        process = await aioreap.create_subprocess_exec("cat", stdin=-1, stdout=-1)
        return process, os.pidfd_open(process.pid)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runner = asyncio.Runner(loop_factory=factory)
        process, pidfd = runner.run(main())
        if not held:
            del process
        runner.close()
        gc.collect()
    os.close(pidfd)
    ours = [w for w in caught if "still ran" in str(w.message)]
    assert len(ours) == 1
    assert ours[0].category is ResourceWarning
    # uvloop itself warns of its handles on the pipes, which only a running loop can close.
    others = [str(w.message) for w in caught if w not in ours]
    assert all("UnixTransport" in other and "uvloop" in sys.modules for other in others), others


def test_a_loop_is_closed_though_its_warning_is_an_exception(factory: Factory) -> None:
    async def main() -> None:
        await aioreap.create_subprocess_exec("sleep", "1000")

    loop = factory()
    loop.run_until_complete(main())
    with warnings.catch_warnings(), pytest.raises(ResourceWarning, match="still ran"):
        warnings.simplefilter("error")
        loop.close()
    assert loop.is_closed()


@pytest.mark.any_backend
def test_uvloop_is_imported_only_when_it_is_asked_for() -> None:
    script = """
import sys, aioreap
assert "uvloop" not in sys.modules
assert aioreap.UvloopEventLoop is aioreap.UvloopEventLoop
assert "uvloop" in sys.modules
"""
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", script]) == 0
    with pytest.raises(AttributeError):
        aioreap.nothing  # noqa: B018
