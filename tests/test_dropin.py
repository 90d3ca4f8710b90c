"""What code written for asyncio's subprocesses does with them, and what it is told if it errs."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from typing import Any, cast

import pytest
from conftest import EMULATED, children
from test_loops import FACTORIES

import aioreap
from aioreap.transport import SubprocessTransport

Factory = Callable[[], asyncio.AbstractEventLoop]
PIPES = {"stdin": aioreap.PIPE, "stdout": aioreap.PIPE, "stderr": aioreap.PIPE}
pytestmark = pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)


def run(factory: Factory, main: Coroutine[Any, Any, None], *, debug: bool = False) -> None:
    with asyncio.Runner(debug=debug, loop_factory=factory) as runner:
        runner.run(main)


def stream_protocol() -> asyncio.subprocess.SubprocessStreamProtocol:
    return asyncio.subprocess.SubprocessStreamProtocol(2**16, asyncio.get_running_loop())


def test_a_process_is_made_of_a_transport_by_hand(factory: Factory) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        transport, protocol = await loop.subprocess_exec(stream_protocol, "sh", "-c", "cat; exit 3")
        process = asyncio.subprocess.Process(transport, protocol, loop)
        assert await process.communicate(b"x") == (b"x", b"")
        assert process.returncode == 3

    run(factory, main())


def test_a_reader_that_a_protocol_has_handed_out_stays_the_one_that_is_read_into(
    factory: Factory,
) -> None:
    class Handing(asyncio.subprocess.SubprocessStreamProtocol):
        handed: asyncio.StreamReader | None = None

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self.handed = self.stdout

    async def main() -> None:
        loop = asyncio.get_running_loop()
        transport, protocol = await loop.subprocess_shell(
            lambda: Handing(2**16, loop), "echo hi; read line", stderr=None
        )
        assert protocol.handed is not None
        assert protocol.handed is protocol.stdout
        assert await protocol.handed.readline() == b"hi\n"
        await asyncio.subprocess.Process(transport, protocol, loop).communicate(b"\n")

    run(factory, main())


def test_a_read_asks_for_what_a_pipe_usually_holds(factory: Factory) -> None:
    size = 500_000

    class Measuring(asyncio.SubprocessProtocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.sizes: list[int] = []
            self.output = transport.get_pipe_transport(1)  # type: ignore[attr-defined]
            self.output.pause_reading()
            self.over = asyncio.get_running_loop().create_future()

        def pipe_data_received(self, fd: int, data: bytes | str) -> None:
            self.sizes.append(len(data))

        def process_exited(self) -> None:
            self.output.resume_reading()

        def connection_lost(self, exc: Exception | None) -> None:
            self.over.set_result(None)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        command = ["head", "-c", str(size), "/dev/zero"]
        _, protocol = await loop.subprocess_exec(
            Measuring, *command, stdin=None, stderr=None, pipesize=2**20
        )
        await protocol.over
        assert sum(protocol.sizes) == size
        if isinstance(loop, asyncio.SelectorEventLoop):
            assert max(protocol.sizes) == 2**16

    run(factory, main())


def test_stdio_is_a_pipe_unless_it_is_said_otherwise(factory: Factory) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        transport, protocol = await loop.subprocess_shell(stream_protocol, "cat", stderr=None)
        assert transport.get_pipe_transport(0) is protocol.stdin.transport  # type: ignore[union-attr]
        assert transport.get_pipe_transport(1) is not None
        assert transport.get_pipe_transport(2) is None
        await asyncio.subprocess.Process(transport, protocol, loop).communicate(b"")

    run(factory, main())


def test_nothing_is_told_before_the_call_has_returned(factory: Factory) -> None:
    class Counting(asyncio.SubprocessProtocol):
        told = 0

        def pipe_data_received(self, fd: int, data: bytes | str) -> None:
            self.told += 1

        def process_exited(self) -> None:
            self.told += 1

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for _ in range(5 if EMULATED else 50):
            transport, protocol = await loop.subprocess_shell(Counting, "echo hi")
            assert protocol.told == 0
            await transport._wait()  # type: ignore[attr-defined]
            transport.close()

    run(factory, main())


def test_a_replaced_connect_read_pipe_is_called(factory: Factory) -> None:
    async def main() -> None:
        loop, connected = asyncio.get_running_loop(), []
        connect = loop.connect_read_pipe

        async def connect_read_pipe(protocol_factory: Any, pipe: Any) -> Any:
            connected.append(pipe.fileno())
            return await connect(protocol_factory, pipe)

        loop.connect_read_pipe = connect_read_pipe  # type: ignore[method-assign]
        process = await asyncio.create_subprocess_exec("cat", **PIPES)  # type: ignore[arg-type]
        assert len(connected) == 2
        assert await process.communicate(b"x") == (b"x", b"")

    run(factory, main())


def test_a_protocol_can_be_replaced_while_the_child_runs(factory: Factory) -> None:
    class Second(asyncio.SubprocessProtocol):
        def __init__(self) -> None:
            self.data = b""
            self.closed = asyncio.get_running_loop().create_future()

        def pipe_data_received(self, fd: int, data: bytes | str) -> None:
            assert isinstance(data, bytes)
            self.data += data

        def connection_lost(self, exc: Exception | None) -> None:
            self.closed.set_result(exc)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        transport, first = await loop.subprocess_exec(asyncio.SubprocessProtocol, "cat")
        assert transport.get_protocol() is first
        second = Second()
        transport.set_protocol(second)
        stdin = cast("asyncio.WriteTransport", transport.get_pipe_transport(0))
        stdin.write(b"to the second")
        stdin.close()
        assert await second.closed is None
        assert second.data == b"to the second"

    run(factory, main())


def test_write_eof_ends_the_input_and_is_no_error(factory: Factory) -> None:
    async def main() -> None:
        process = await asyncio.create_subprocess_exec("cat", **PIPES)  # type: ignore[arg-type]
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdin.can_write_eof()
        process.stdin.write(b"x" * 200_000)
        process.stdin.write_eof()
        assert await process.stdout.read() == b"x" * 200_000
        await process.stdin.wait_closed()
        assert await process.communicate() == (b"", b"")
        assert process.returncode == 0

    run(factory, main())


def test_input_that_nobody_reads_is_no_error_of_asyncios_communicate(factory: Factory) -> None:
    async def main() -> None:
        process = await asyncio.create_subprocess_exec(
            "sh",
            "-c",
            "exec <&-; echo closed; exec sleep 1000",
            **PIPES,  # type: ignore[arg-type]
        )
        assert process.stdin is not None
        assert process.stdout is not None
        assert await process.stdout.readline() == b"closed\n"
        while not aioreap.Process.of(process)._transport._pipes[0].disconnected:
            await asyncio.sleep(0)
        process.stdin.write(b"x")
        process.stdin.writelines([b"x", b"x"])
        process.stdin.write_eof()
        process.kill()
        assert await process.communicate(b"x" * 100_000) == (b"", b"")

    run(factory, main())


def test_a_connection_made_that_fails_is_the_loops_to_tell(factory: Factory) -> None:
    class Failing(asyncio.SubprocessProtocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            raise LookupError("no connection")

    async def main() -> None:
        loop, told = asyncio.get_running_loop(), []
        loop.set_exception_handler(lambda _, context: told.append(context["exception"]))
        transport, _ = await loop.subprocess_exec(Failing, "cat")
        transport.close()
        assert await transport._wait() == -9  # type: ignore[attr-defined]
        assert [str(error) for error in told] == ["no connection"]

    run(factory, main())


def test_the_transport_is_asyncios_in_all_its_methods(factory: Factory) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.subprocess_exec(asyncio.SubprocessProtocol, "cat")
        assert isinstance(transport, SubprocessTransport)
        names = {name for name in dir(asyncio.SubprocessTransport) if not name.startswith("_")}
        inherited = {
            name
            for name in names
            if getattr(SubprocessTransport, name) is getattr(asyncio.SubprocessTransport, name)
        }
        assert inherited == set()
        assert not transport.is_closing()
        assert transport.get_returncode() is None
        transport.terminate()
        assert await transport._wait() == -15
        assert transport.get_returncode() == -15
        with pytest.raises(ProcessLookupError):
            transport.terminate()
        transport.close()
        assert transport.is_closing()

    run(factory, main())


def test_debug_mode_changes_nothing(factory: Factory) -> None:
    async def main() -> None:
        process = await asyncio.create_subprocess_exec("cat", **PIPES)  # type: ignore[arg-type]
        assert await process.communicate(b"x" * 100_000) == (b"x" * 100_000, b"")

    run(factory, main(), debug=True)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="needs Python 3.12")
def test_eager_tasks_run_children_too(factory: Factory) -> None:
    async def child(number: int) -> int:
        process = await asyncio.create_subprocess_exec("sh", "-c", f"exit {number}")
        return await process.wait()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined]
        coroutine = asyncio.sleep(0)
        try:
            await loop.create_task(coroutine)
        except TypeError:
            coroutine.close()
            loop.set_task_factory(None)
            pytest.skip("this uvloop has no eager tasks on this Python")
        assert await asyncio.gather(*(child(n) for n in range(5))) == list(range(5))

    run(factory, main())


@pytest.mark.skipif(sys.version_info < (3, 12), reason="needs Python 3.12")
def test_asyncio_run_takes_the_factory(factory: Factory) -> None:
    async def main() -> int:
        return await (await asyncio.create_subprocess_exec("sh", "-c", "exit 3")).wait()

    assert asyncio.run(main(), loop_factory=factory) == 3  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"text": True}, "text must be False"),
        ({"universal_newlines": True}, "universal_newlines must be False"),
        ({"encoding": "utf-8"}, "encoding must be None"),
        ({"errors": "strict"}, "errors must be None"),
        ({"bufsize": 1}, "bufsize must be 0"),
        ({"shell": True}, "shell must be False"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_text_and_buffers_are_refused(
    factory: Factory, option: dict[str, Any], message: str
) -> None:
    async def main() -> None:
        for create in (asyncio.create_subprocess_exec, aioreap.create_subprocess_exec):
            with pytest.raises(ValueError, match=message):
                await create("true", **option)

    run(factory, main())


def test_a_closed_loop_is_said_to_be_closed(factory: Factory) -> None:
    loop = factory()
    loop.close()
    opening = loop.subprocess_exec(asyncio.SubprocessProtocol, "true")
    with pytest.raises(RuntimeError, match="closed"):
        opening.send(None)


@pytest.mark.parametrize("runs", [True, False], ids=["another runs", "none runs"])
def test_a_loop_that_does_not_run_is_named_and_has_no_child(factory: Factory, runs: bool) -> None:
    loop = factory()

    async def main() -> None:
        with pytest.raises(RuntimeError, match=f"{type(loop).__name__}.* is not running"):
            await loop.subprocess_exec(asyncio.SubprocessProtocol, "cat")
        assert not children()

    if runs:
        run(factory, main())
    else:
        with pytest.raises(StopIteration):
            main().send(None)
    loop.close()


def test_a_coroutine_without_a_running_loop_is_an_error(factory: Factory) -> None:
    with pytest.raises(RuntimeError, match="no running event loop"):
        aioreap.create_subprocess_exec("true").send(None)


def test_a_loop_without_add_reader_is_named(
    factory: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def add_reader(*_: object) -> None:
        raise NotImplementedError

    async def main() -> None:
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(loop, "add_reader", add_reader, raising=False)
        with pytest.raises(NotImplementedError, match=type(loop).__name__):
            await aioreap.create_subprocess_exec("true")

    run(factory, main())
