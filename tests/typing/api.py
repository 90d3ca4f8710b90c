"""The API as its users write it, for type checkers: `make types` has two read this.

Each line that has to be wrong says so to both, and they fail where it is not.
"""
# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

import asyncio
import os
import signal
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, assert_type

import uvloop

import aioreap
from aioreap import handover
from aioreap.options import Options


async def processes() -> None:
    process = await aioreap.create_subprocess_exec(
        "program",
        b"argument",
        Path("argument"),
        stdin=aioreap.DEVNULL,
        stdout=aioreap.PIPE,
        stderr=aioreap.STDOUT,
        limit=2**20,
        cwd=Path("/"),
        env={**os.environ, "NAME": "value"},
        pass_fds=[3],
        user="nobody",
        extra_groups=("one", 2),
        process_group=0,
        umask=0o077,
        autoreap=None,
        no_new_privs=True,
        cgroup=b"/sys/fs/cgroup/one",
        autokill=True,
    )
    assert_type(process, aioreap.Process)
    assert_type(process.pid, int)
    assert_type(process.pidfd, int)
    assert_type(process.stdin, asyncio.StreamWriter | None)
    assert_type(process.stdout, asyncio.StreamReader | None)
    assert_type(process.returncode, int | None)
    assert_type(process.poll(), int | None)
    assert_type(process.exit_info, aioreap.ExitInfo | None)
    assert_type(await process.wait(), int)
    assert_type(await process.communicate(memoryview(b"input")), tuple[bytes, bytes])
    assert_type(process.send_signal(signal.SIGHUP), None)
    assert_type(process.kill_group(), None)
    assert_type(process.kill_group(signal.SIGHUP), None)
    ended = await process.stop(
        signal=signal.SIGINT, grace=1, group=True, close_stdin=True, drain=0.5
    )
    assert_type(ended, aioreap.ExitInfo)
    await process.stop(signal.SIGINT)  # type: ignore[call-arg]
    async with process as entered:
        assert_type(entered, aioreap.Process)

    with open(os.devnull, "rb") as source:
        shell = await aioreap.create_subprocess_shell("exit 3", source, env={b"NAME": b"value"})
    assert_type(shell, aioreap.Process)

    theirs: asyncio.subprocess.Process = shell  # for code that is annotated with asyncio's
    assert_type(aioreap.Process.of(theirs), aioreap.Process)


async def options() -> None:
    common: Options = {"cwd": "/", "start_new_session": True}
    await aioreap.create_subprocess_exec("program", **common)
    await aioreap.create_subprocess_exec("program", autokill="tree")
    await aioreap.create_subprocess_exec("program", autokill="group")  # type: ignore[arg-type]
    await aioreap.create_subprocess_exec("program", unknown=True)  # type: ignore[call-arg]
    await aioreap.create_subprocess_exec("program", text=True)  # type: ignore[call-arg]
    await aioreap.create_subprocess_exec("program", umask="022")  # type: ignore[arg-type]
    await aioreap.create_subprocess_exec("program", 1)  # type: ignore[arg-type]
    await aioreap.create_subprocess_shell(["program"])  # type: ignore[arg-type]
    common["unknown"] = True  # type: ignore[typeddict-unknown-key]


async def runs() -> None:
    result = await aioreap.run_process(
        ["program", b"argument", Path("argument")],
        input="text",
        capture_output=True,
        check=True,
        timeout=1.5,
        text=True,
        cwd="/",
        start_new_session=True,
        grace=0,
        drain=1,
        output_limit=2**20,
    )
    assert_type(result, aioreap.CompletedProcess[Any])
    theirs: subprocess.CompletedProcess[str] = result  # for code that is annotated with it
    assert_type(theirs.returncode, int)
    assert_type(result.exit_info, aioreap.ExitInfo)
    assert_type(result.truncated, bool)

    async def consume(line: bytes) -> None:
        del line

    kept: list[bytes] = []
    try:
        await aioreap.run_process("program", shell=True, stdout=consume, stderr=kept.append)
    except aioreap.TimeoutExpired as expired:
        timeout: TimeoutError = expired
        subprocess_s: subprocess.TimeoutExpired = expired
        assert_type(expired.timeout, float)
        raise timeout from subprocess_s
    except aioreap.OutputLimitExceeded as exceeded:
        error: subprocess.SubprocessError = exceeded
        assert_type(exceeded.limit, int)
        raise error from None
    await aioreap.run_process(["program"], unknown=True)  # type: ignore[call-arg]
    await aioreap.run_process(["program"], timeout="1")  # type: ignore[arg-type]
    await aioreap.run_process(["program"], limit=1)  # type: ignore[call-arg]


async def by_line(process: aioreap.Process) -> None:
    assert process.stdout is not None
    async for line in aioreap.lines(process.stdout, 2**20, longer="parts"):
        assert_type(line, bytes)
    aioreap.lines(process.stdout, longer="cut")  # type: ignore[arg-type]


async def ends(process: aioreap.Process) -> None:
    try:
        exit_info = await process.wait_exit()
    except aioreap.ExitStatusLost as lost:
        assert_type(lost.pid, int)
        error: ChildProcessError = lost
        raise error from None
    assert_type(exit_info, aioreap.ExitInfo)
    assert_type(exit_info.pid, int)
    assert_type(exit_info.status, int | None)
    assert_type(exit_info.returncode, int)
    assert_type(exit_info.signal, signal.Signals | int | None)
    assert_type(exit_info.core_dumped, bool)
    assert_type(exit_info.cgroup_id, int | None)
    assert_type(exit_info.started_ns, int)
    assert_type(exit_info.finished_ns, int)
    exit_info.status = 0  # type: ignore[misc]


async def detached(process: aioreap.Process, sock: socket.socket) -> None:
    options: Options = {"cwd": "/"}
    assert_type(await aioreap.spawn_detached("program", Path("argument"), **options), int)
    await aioreap.spawn_detached("program", limit=1)  # type: ignore[call-arg]
    found = process.detach()
    assert_type(found, aioreap.Detached)
    assert_type((found.pid, found.pidfd), tuple[int, int])
    assert_type(found.stdin, int | None)
    assert_type(found.unread_stdout, bytes)
    assert_type(found.started_ns, int | None)
    assert_type((found.autoreap, found.leads_group), tuple[bool, bool])
    assert_type(found.descriptors, list[int])
    found.pid = 1  # type: ignore[misc]
    assert_type(await aioreap.attach(found, limit=2**20), aioreap.Process)
    assert_type(await aioreap.attach(1, start_time=2, inode=3), aioreap.Process)
    assert_type(await aioreap.attach(pidfd=1), aioreap.Process)
    await aioreap.attach("1")  # type: ignore[call-overload]
    await aioreap.attach(found, pidfd=1)  # type: ignore[call-overload]
    assert_type(await handover.send(sock, found, found), None)
    assert_type(await handover.receive(sock), list[aioreap.Detached])
    with handover.across_exec(found) as variables:
        assert_type(variables, dict[str, str])
    assert_type(handover.from_environment(), list[aioreap.Detached])


def loops() -> None:
    with asyncio.Runner(loop_factory=aioreap.EventLoop) as runner:
        assert_type(runner.run(processes()), None)
    with asyncio.Runner(loop_factory=aioreap.UvloopEventLoop) as runner:
        runner.run(options())
    assert_type(aioreap.install(uvloop.new_event_loop()), uvloop.Loop)
    assert_type(aioreap.install(asyncio.SelectorEventLoop()), asyncio.SelectorEventLoop)
    assert_type(aioreap.install(), asyncio.AbstractEventLoop)
    aioreap.install("loop")  # type: ignore[call-overload]
    assert_type(aioreap.ChildWatcher.of(aioreap.EventLoop()), aioreap.ChildWatcher)


async def protocols(loop: aioreap.EventLoop) -> None:
    transport, protocol = await loop.subprocess_exec(asyncio.SubprocessProtocol, "program")
    assert_type(protocol, asyncio.SubprocessProtocol)
    assert_type(transport.get_pid(), int)
    assert_type(await transport.wait_exit(), aioreap.ExitInfo)


def backends() -> None:
    backend = aioreap.backend()
    assert_type(backend, aioreap.Backend)
    assert_type(backend.name, Literal["autoreap", "pidfd", "popen"])
    assert_type(backend.reason, str)
    assert_type(backend.features, Mapping[str, aioreap.Feature])
    assert_type(backend.features["exit_info"].available, bool)
    assert_type(backend.features["exit_info"].answer, str)
