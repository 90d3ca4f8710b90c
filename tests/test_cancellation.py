"""Every public coroutine, cancelled at each turn of the loop and at each of its awaits."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import dis
import importlib
import inspect
import itertools
import os
import re
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import pytest
from stepping import (
    WAYS,
    Operation,
    Trial,
    Way,
    cancel_at_each_await,
    cancel_at_each_turn,
    run_by,
)
from test_detached import died
from test_groups import KERNEL_SIGNALS_GROUPS

import aioreap
from aioreap import bulk, groups, handover, killing

pytestmark = pytest.mark.own_backend

PIPES: dict[str, Any] = {"stdin": aioreap.PIPE, "stdout": aioreap.PIPE, "stderr": aioreap.PIPE}
SOME = b"x" * 300_000  # bytes, more than a pipe and the buffers of the streams hold
MUCH = b"x" * bulk.LARGE  # bytes, which are written from where they lie


def child(*command: str, **options: Any) -> Callable[[Trial], Awaitable[aioreap.Process]]:
    """Starts a child with pipes."""
    return lambda trial: aioreap.create_subprocess_exec(
        *command, **{"pass_fds": [trial.life], **PIPES, **options}
    )


# It does not end by itself: a cancelled spawn that does not kill it is found out.
SLEEP = ("sleep", "1000")


async def release_child(process: asyncio.subprocess.Process) -> None:
    process.kill()
    await process.communicate()


async def release_detached(pid: int) -> None:
    """It is not reaped before it is killed."""
    pidfd = os.pidfd_open(pid)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    died(pidfd)
    os.close(pidfd)


async def release_transport(result: tuple[asyncio.SubprocessTransport, Any]) -> None:
    result[0].kill()
    result[0].close()
    await result[1].lost


class Lost(asyncio.SubprocessProtocol):
    """Knows when its transport is done with."""

    def __init__(self) -> None:
        self.lost = asyncio.get_running_loop().create_future()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set_result(None)


async def write(process: aioreap.Process, what: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(what)
    await process.stdin.drain()


async def end_and(process: aioreap.Process, then: Callable[[], Awaitable[Any]]) -> None:
    """Have the child end, and await that."""
    assert process.stdin is not None
    process.stdin.close()
    await then()


def out(process: aioreap.Process) -> asyncio.StreamReader:
    assert process.stdout is not None
    process.stdin.write(b"line\n")  # type: ignore[union-attr]
    return process.stdout


def telling_child(script: str, **options: Any) -> Callable[[Trial], Awaitable[aioreap.Process]]:
    """Starts a shell with pipes, and waits for the line that it writes when it is ready."""

    async def start(trial: Trial) -> aioreap.Process:
        process = await child("sh", "-c", script, **options)(trial)
        assert process.stdout is not None
        assert await process.stdout.readline()
        return process

    return start


async def within(trial: Trial, error: BaseException | None, *command: str, **options: Any) -> None:
    async with await child(*command, **options)(trial) as process:
        if error is not None:
            raise error
        out(process)


async def line_after_line(process: aioreap.Process) -> None:
    for what in (b"one\n", b"two\n"):
        await write(process, what)
        async for line in aioreap.lines(process.stdout):  # type: ignore[arg-type]
            assert line == what
            break


def run(*command: str, **options: Any) -> Callable[[Trial], Awaitable[object]]:
    """run_process(), with the output captured."""
    return lambda trial: aioreap.run_process(
        command, **{"capture_output": True, "pass_fds": [trial.life], **options}
    )


async def take(_line: bytes) -> None:
    await asyncio.sleep(0)


def end(detached: aioreap.Detached) -> None:
    """Kill it, and give up what belongs to it."""
    signal.pidfd_send_signal(detached.pidfd, signal.SIGKILL)
    for descriptor in detached.descriptors:
        os.close(descriptor)


async def detach_and_attach(trial: Trial) -> None:
    """What is not taken up again is ended."""
    detached = (await child("cat")(trial)).detach()
    try:
        process = await aioreap.attach(detached)
    except BaseException:
        end(detached)
        raise
    process.kill()
    await process.communicate()


async def send(trial: Trial) -> None:
    """To the child itself, which does not read before the loop has turned."""
    ours, theirs = socket.socketpair()
    read_end, write_end = os.pipe()
    with ours, contextlib.ExitStack() as stack:
        stack.callback(os.close, write_end)
        with theirs:
            stack.callback(os.close, read_end)
            process = await aioreap.create_subprocess_shell(
                f"read -r line </dev/fd/{read_end}; exec cat",
                stdin=theirs,
                stdout=aioreap.DEVNULL,
                pass_fds=[trial.life, read_end],
            )
        detached = dataclasses.replace(process.detach(), unread_stdout=SOME * 10)
        go_on = asyncio.get_running_loop().call_soon(os.write, write_end, b"\n")
        stack.callback(go_on.cancel)
        try:
            await handover.send(ours, detached)
        except BaseException:
            end(detached)
            raise


Part = tuple[bytes, list[int]]


def taken_in_parts(sock: socket.socket) -> Iterator[Part]:
    """What is in a socket, and with which bytes which descriptors come."""
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            yield socket.recv_fds(sock, 8, 4)[:2]


def give_in_turns(parts: list[Part], sock: socket.socket) -> None:
    """One in each turn of the loop, as long as the socket is open."""
    if parts and sock.fileno() >= 0:
        (content, descriptors), *rest = parts
        socket.send_fds(sock, [content], descriptors)
        asyncio.get_running_loop().call_soon(give_in_turns, rest, sock)


async def receive(trial: Trial) -> None:
    """The child ends with its pipes."""
    sent = (await child("cat")(trial)).detach()
    ours, theirs = socket.socketpair()
    with ours, theirs, contextlib.ExitStack() as stack:
        await handover.send(theirs, sent)  # there is room for it
        parts = list(taken_in_parts(ours))
        for descriptor in itertools.chain(*(descriptors for _, descriptors in parts)):
            stack.callback(os.close, descriptor)
        give_in_turns(parts, theirs)
        for received in await handover.receive(ours):
            for descriptor in received.descriptors:
                os.close(descriptor)


# It has a process beside it in its group.
GROUP = "sleep 1000 & echo; read line"
DEAF_GROUP = f"trap '' TERM; {GROUP}"

# One line adds an operation.
_OPERATIONS: dict[str, Operation] = {
    "exec": Operation(
        lambda trial: aioreap.create_subprocess_exec(*SLEEP, pass_fds=[trial.life], **PIPES),
        release=release_child,
    ),
    "exec-no-pipes": Operation(
        lambda trial: aioreap.create_subprocess_exec(*SLEEP, pass_fds=[trial.life]),
        release=release_child,
    ),
    "exec-session": Operation(
        lambda trial: aioreap.create_subprocess_exec(
            *SLEEP, pass_fds=[trial.life], start_new_session=True, **PIPES
        ),
        release=release_child,
    ),
    "exec-missing": Operation(
        lambda trial: aioreap.create_subprocess_exec("/nonexistent", **PIPES),
        error=FileNotFoundError,
    ),
    "exec-missing-no-pipes": Operation(
        lambda trial: aioreap.create_subprocess_exec("/nonexistent"), error=FileNotFoundError
    ),
    "shell": Operation(
        lambda trial: aioreap.create_subprocess_shell(
            "exec sleep 1000", pass_fds=[trial.life], **PIPES
        ),
        release=release_child,
    ),
    "preexec": Operation(
        lambda trial: aioreap.create_subprocess_exec(*SLEEP, preexec_fn=int, **PIPES),
        release=release_child,
    ),
    "loop-exec": Operation(
        lambda trial: aioreap.install().subprocess_exec(Lost, *SLEEP, pass_fds=[trial.life]),
        release=release_transport,
    ),
    "loop-shell": Operation(
        lambda trial: aioreap.install().subprocess_shell(
            Lost, "exec sleep 1000", pass_fds=[trial.life]
        ),
        release=release_transport,
    ),
    "asyncio-exec": Operation(
        lambda trial: of_asyncio(*SLEEP, pass_fds=[trial.life], **PIPES),
        release=release_child,
    ),
    "wait": Operation(lambda trial: end_and(trial.process, trial.process.wait), child("cat")),
    "wait-exit": Operation(
        lambda trial: end_and(trial.process, trial.process.wait_exit), child("cat")
    ),
    "communicate": Operation(lambda trial: trial.process.communicate(SOME), child("cat")),
    "communicate-much": Operation(lambda trial: trial.process.communicate(MUCH), child("cat")),
    "read": Operation(lambda trial: out(trial.process).read(3), child("cat")),
    "readline": Operation(lambda trial: out(trial.process).readline(), child("cat")),
    "readexactly": Operation(lambda trial: out(trial.process).readexactly(5), child("cat")),
    "readuntil": Operation(lambda trial: out(trial.process).readuntil(), child("cat")),
    "read-all": Operation(
        lambda trial: end_and(trial.process, out(trial.process).read), child("cat")
    ),
    "drain": Operation(
        lambda trial: write(trial.process, SOME), child("sh", "-c", "cat >/dev/null")
    ),
    "wait-closed": Operation(
        lambda trial: end_and(trial.process, trial.process.stdin.wait_closed),  # type: ignore[union-attr]
        child("cat"),
    ),
    "stop": Operation(lambda trial: trial.process.stop(), child("cat"), ends_child=True),
    "stop-deaf": Operation(
        lambda trial: trial.process.stop(grace=0.01),
        telling_child("trap '' TERM; echo; read line"),
        ends_child=True,
    ),
    "stop-eof": Operation(
        lambda trial: trial.process.stop(close_stdin=True), child("cat"), ends_child=True
    ),
    "stop-group": Operation(
        lambda trial: trial.process.stop(group=True),
        telling_child(GROUP, start_new_session=True),
        ends_child=True,
        goes_on=True,
    ),
    "stop-deaf-group": Operation(
        lambda trial: trial.process.stop(group=True, grace=0.01),
        telling_child(DEAF_GROUP, start_new_session=True),
        ends_child=True,
        goes_on=True,
    ),
    "with": Operation(lambda trial: within(trial, None, "cat")),
    "with-error": Operation(lambda trial: within(trial, KeyError(), "cat"), error=KeyError),
    "with-group-error": Operation(
        lambda trial: within(trial, KeyError(), "sh", "-c", GROUP, start_new_session=True),
        error=KeyError,
    ),
    "lines": Operation(lambda trial: line_after_line(trial.process), child("cat")),
    "run": Operation(run("cat", input=SOME)),
    "run-much": Operation(run("cat", input=MUCH)),
    "run-missing": Operation(run("/nonexistent"), error=FileNotFoundError),
    "run-timeout": Operation(
        run("sleep", "1000", timeout=0.01), error=aioreap.TimeoutExpired, goes_on=True
    ),
    "run-timeout-deaf-group": Operation(
        run("sh", "-c", DEAF_GROUP, timeout=0.02, grace=0.01, start_new_session=True),
        error=aioreap.TimeoutExpired,
        goes_on=True,
    ),
    "run-limit": Operation(run("yes", output_limit=100_000), error=aioreap.OutputLimitExceeded),
    "run-lines": Operation(run("cat", input=b"a\nb\n", capture_output=False, stdout=take)),
    "run-drain": Operation(run("sh", "-c", "sleep 0.02 & exit 3", drain=0.01)),
    "spawn-detached": Operation(
        lambda trial: aioreap.spawn_detached(*SLEEP, pass_fds=[trial.life]),
        release=release_detached,
    ),
    "spawn-detached-missing": Operation(
        lambda trial: aioreap.spawn_detached("/nonexistent"), error=FileNotFoundError
    ),
    "attach": Operation(detach_and_attach, goes_on=True),
    "send": Operation(send, goes_on=True),
    "receive": Operation(receive, goes_on=True),
}

# Before Linux 6.9 the members of a group are signalled one by one, and one that is
# made in that moment can escape.
OPERATIONS = {
    name: operation
    for name, operation in _OPERATIONS.items()
    if KERNEL_SIGNALS_GROUPS or not name.endswith("group")
}

# Not for backend popen, nor, where they are held by their thread, for one that is not the main one.
HELD: dict[str, Operation] = {
    "exec-autokill": Operation(
        lambda trial: aioreap.create_subprocess_exec(
            *SLEEP, pass_fds=[trial.life], autokill=True, **PIPES
        ),
        release=release_child,
    ),
    "exec-tree": Operation(
        lambda trial: aioreap.create_subprocess_exec(
            *SLEEP, pass_fds=[trial.life], autokill="tree", **PIPES
        ),
        release=release_child,
    ),
    "exec-tree-missing": Operation(
        lambda trial: aioreap.create_subprocess_exec("/nonexistent", autokill="tree", **PIPES),
        error=FileNotFoundError,
    ),
    "wait-tree": Operation(
        lambda trial: end_and(trial.process, trial.process.wait), child("cat", autokill="tree")
    ),
    "stop-tree-group": Operation(
        lambda trial: trial.process.stop(group=True),
        telling_child(GROUP, start_new_session=True, autokill="tree"),
        ends_child=True,
        goes_on=True,
    ),
}


def of_asyncio(*command: str, **options: Any) -> Awaitable[asyncio.subprocess.Process]:
    aioreap.install()
    return asyncio.create_subprocess_exec(*command, **options)


# In debug mode too: make test-dev has it for every loop.
@pytest.mark.slow
@pytest.mark.once
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OPERATIONS)
async def test_a_cancellation_at_any_moment_leaves_nothing(
    name: str, way: str, backend: str
) -> None:
    turns = await cancel_at_each_turn(OPERATIONS[name], WAYS[way])
    awaits = await cancel_at_each_await(OPERATIONS[name], WAYS[way])
    # Popen starts a program without awaiting anything.
    assert (turns and awaits) or backend == "popen"


@pytest.mark.slow
@pytest.mark.main_thread
@pytest.mark.clone_backends
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", HELD)
async def test_a_cancellation_at_any_moment_leaves_nothing_of_what_is_held(
    name: str, way: str
) -> None:
    assert await cancel_at_each_turn(HELD[name], WAYS[way])
    assert await cancel_at_each_await(HELD[name], WAYS[way])


def each_one_way(operations: Mapping[str, Operation]) -> Iterator[tuple[Operation, Way]]:
    """Each operation with one of the ways, and on the other loop with another one."""
    is_uvloops = type(asyncio.get_running_loop()).__module__.startswith("uvloop")
    ways = itertools.islice(itertools.cycle(WAYS.values()), 2 * is_uvloops, None)
    return zip(operations.values(), ways, strict=False)


async def test_a_cancellation_at_any_await_leaves_nothing(backend: str) -> None:
    asyncio.get_running_loop().set_debug(True)
    for operation, way in each_one_way(OPERATIONS):
        assert await cancel_at_each_await(operation, way) or backend == "popen"


@pytest.mark.main_thread
@pytest.mark.clone_backends
async def test_a_cancellation_at_any_await_leaves_nothing_of_what_is_held() -> None:
    asyncio.get_running_loop().set_debug(True)
    for operation, way in each_one_way(HELD):
        assert await cancel_at_each_await(operation, way)


@pytest.mark.clone_backends
@pytest.mark.parametrize(
    "name",
    [
        "spawn-detached",
        pytest.param("exec-session", marks=pytest.mark.slow),
        pytest.param("with-group-error", marks=pytest.mark.slow),
        pytest.param("run-timeout-deaf-group", marks=pytest.mark.slow),
    ],
)
async def test_what_dies_after_its_call_keeps_no_descriptor_for_a_group_of_zombies(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a busy machine lets its call give up first, and its dead wait for their reaper."""
    monkeypatch.setattr(killing, "_DISTURBED_CPU", 0)
    monkeypatch.setattr(groups, "has_members", lambda _pidfd: True)
    assert await cancel_at_each_turn(OPERATIONS[name], WAYS["scope"])
    assert await cancel_at_each_await(OPERATIONS[name], WAYS["scope"])


REFERENCE = Path(__file__).parent.parent / "docs" / "reference.md"


def public_modules() -> Iterator[ModuleType]:
    """The package, and those of its modules that the reference names."""
    yield aioreap
    for name in sorted(set(re.findall(r"aioreap\.([a-z]\w*)\.\w", REFERENCE.read_text()))):
        yield importlib.import_module(f"aioreap.{name}")


def is_awaited(function: object) -> bool:
    """Whether it is a coroutine function that awaits, or returns what is awaited or iterated."""
    if inspect.iscoroutinefunction(function):
        code = inspect.unwrap(function).__code__
        return any(step.opname == "SEND" for step in dis.get_instructions(code))
    returned = str(getattr(function, "__annotations__", {}).get("return", ""))
    return bool(re.search("Async|Awaitable|Coroutine|Future", returned))


def public_coroutines() -> dict[CodeType, str]:
    """All of them that are aioreap's, or of its Process, by what they run."""
    found: dict[CodeType, str] = {}
    for module in public_modules():
        for name in getattr(module, "__all__", vars(module)):
            member = getattr(module, name)
            functions = {name: member}
            if inspect.isclass(member):
                functions = {f"{name}.{n}": f for n, f in inspect.getmembers(member)}
            for full_name, function in functions.items():
                is_private = re.search(r"(^|\.)_(?!_)", full_name)
                home = getattr(function, "__module__", None) or ""
                is_ours = home.startswith(("aioreap", "asyncio.subprocess"))
                if is_ours and not is_private and is_awaited(function):
                    found[inspect.unwrap(function).__code__] = full_name
    return found


def test_the_public_coroutines_are_found() -> None:
    """Some of each kind: without this, the next test could be of none."""
    assert {
        "attach",
        "lines",
        "send",
        "Process.wait",
        "Process.communicate",
        "Process.__aexit__",
        "UvloopEventLoop.subprocess_exec",
    } <= set(public_coroutines().values())


@pytest.mark.any_backend
@pytest.mark.own_backend("uvloop")
async def test_each_public_coroutine_is_cancelled_in_some_operation() -> None:
    missing = public_coroutines()
    for operation in OPERATIONS.values():
        for code in await run_by(operation):
            missing.pop(code, None)
    assert not missing.values()
