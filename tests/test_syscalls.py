"""What a spawn asks of the kernel, as strace sees it, is what docs/system-calls.md says."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from aioreap import kernel

pytestmark = pytest.mark.own_backend

_DOCUMENT: Final = Path(__file__).parent.parent / "docs" / "system-calls.md"
_KINDS: Final = ("no pipes", "three pipes")
_SPAWNS: Final = 8
_PR_SET_PTRACER: Final = 0x59616D61  # else Yama lets a tracer attach to its children only

# It is traced from its first line of input on: a Python that starts makes thousands of calls.
# The marks are paths that do not exist: stat() shows them in the trace.
_SCRIPT: Final = f"""
import asyncio, ctypes, os, sys, aioreap

def mark(name):
    try:
        os.stat("/mark/" + name)
    except OSError:
        pass

async def main():
    for kind, stdio in zip({_KINDS!r}, (None, aioreap.PIPE)):
        for _ in range({_SPAWNS}):
            mark(kind)
            process = await aioreap.create_subprocess_exec(
                "/bin/true", stdin=stdio, stdout=stdio, stderr=stdio
            )
            await process.communicate()
            await asyncio.sleep(0.02)
        mark("nothing")

with asyncio.Runner(loop_factory=getattr(aioreap, sys.argv[1])) as runner:
    aioreap.backend()
    ctypes.CDLL(None).prctl({_PR_SET_PTRACER}, ctypes.c_ulong(-1))
    print("ready", flush=True)
    sys.stdin.readline()
    runner.run(main())
"""

# A loop waits as often as it has turns.
_WAITING: Final = frozenset({"epoll_wait", "epoll_pwait", "epoll_pwait2"})
# One call, whatever the C library calls it.
_SAME: Final = {"newfstatat": "fstat", "statx": "fstat"}


class Call(NamedTuple):
    """One system call, with its arguments as strace prints them."""

    name: str
    arguments: str


class Spawn(NamedTuple):
    """The calls of the parent, and those of the child up to its exec."""

    kind: str
    parent: list[Call]
    child: list[Call]

    def clones(self) -> list[str]:
        """The arguments of the parent's clones."""
        return [c.arguments for c in self.parent if c.name in {"clone", "clone3", "fork", "vfork"}]


def _spawns(trace: Iterator[str]) -> list[Spawn]:
    found: list[Spawn] = []
    server, running = "", False
    has_exec: set[str] = set()
    for line in trace:
        match = re.match(r"(\d+) +(\w+)\((.*)", line)
        if match is None:  # a signal, an exit, or the second half of a call
            continue
        pid, name, arguments = match.groups()
        server = server or pid
        mark = re.search(r'"/mark/([\w ]+)"', arguments)
        if mark is not None:
            running = mark[1] in _KINDS
            if running:
                found.append(Spawn(mark[1], [], []))
        elif running and pid == server:
            found[-1].parent.append(Call(_SAME.get(name, name), arguments))
        elif running and pid not in has_exec:
            found[-1].child.append(Call(name, arguments))
            if name == "execve":
                has_exec.add(pid)
    return found


@functools.cache
def _traced(backend: str, loop: str) -> list[Spawn]:
    assert shutil.which("strace"), "strace is needed: install the package strace"
    with (
        tempfile.NamedTemporaryFile("r") as trace,
        subprocess.Popen(
            [sys.executable, "-c", _SCRIPT, loop],
            # asyncio's debug mode, which the development mode is, asks for more.
            env={**os.environ, "AIOREAP_BACKEND": backend, "PYTHONDEVMODE": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as server,
    ):
        assert server.stdin is not None
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        with subprocess.Popen(
            ["strace", "-f", "-o", trace.name, "-p", str(server.pid)],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as tracer:
            assert tracer.stderr is not None
            said = tracer.stderr.readline()
            server.stdin.write("\n")
            server.stdin.flush()
            said += tracer.stderr.read()
        assert tracer.returncode == 0, said
        assert server.wait() == 0
        found = _spawns(iter(trace))
    assert len(found) == len(_KINDS) * _SPAWNS
    return found


def _documented(backend: str) -> dict[str, dict[str, Counter[str]]]:
    """By who calls ("parent", "child") and by kind: how often each call is made."""
    found: dict[str, dict[str, Counter[str]]] = {}
    chapters = re.findall(
        rf"^### `{backend}`: the (\w+)$(.*?)(?=^##|\Z)",
        _DOCUMENT.read_text(),
        re.MULTILINE | re.DOTALL,
    )
    for who, chapter in chapters:
        rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \|", chapter, re.MULTILINE)
        found[who] = {
            kind: Counter({row[0]: int(row[column]) for row in rows})
            for column, kind in enumerate(_KINDS, 1)
        }
    assert found.keys() == {"parent", "child"}
    return found


def _least(calls: list[list[Call]]) -> Counter[str]:
    """The counts of the spawn with the fewest calls.

    A tracer can hold a dead child for a while, and has the parent ask again.
    """
    counts = [Counter(c.name for c in some if c.name not in _WAITING) for some in calls]
    return min(counts, key=Counter.total)


@pytest.fixture(params=["EventLoop", pytest.param("UvloopEventLoop", marks=pytest.mark.slow)])
def loop_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.clone_backends
def test_a_spawn_touches_no_sigchld_and_reaps_nothing_of_others(
    backend: str, loop_name: str
) -> None:
    for spawn in _traced(backend, loop_name):
        for call in spawn.parent:
            assert call.name not in {"rt_sigaction", "signal", "signalfd4", "sigaltstack"}
            assert call.name not in {"wait4", "waitpid", "kill", "tkill", "tgkill"}
            assert call.name != "waitid" or call.arguments.startswith("P_PIDFD"), call


@pytest.mark.clone_backends
def test_a_spawn_makes_neither_sockets_nor_threads_nor_vforks(backend: str, loop_name: str) -> None:
    for spawn in _traced(backend, loop_name):
        (flags,) = spawn.clones()
        assert "CLONE_PIDFD" in flags
        assert "CLONE_VM" in flags
        assert "CLONE_VFORK" not in flags
        assert "CLONE_THREAD" not in flags
        assert not {call.name for call in spawn.parent} & {"socketpair", "socket", "pidfd_open"}


@pytest.mark.clone_backends
def test_only_autoreap_needs_no_wait(backend: str, loop_name: str) -> None:
    for spawn in _traced(backend, loop_name):
        waits = any(call.name == "waitid" for call in spawn.parent)
        signals = any("SIGCHLD" in flags for flags in spawn.clones())
        assert (waits, signals) == (backend != "autoreap", backend != "autoreap")


def test_a_spawn_makes_no_more_calls_than_documented(backend: str) -> None:
    if backend == "autoreap":
        pytest.skip("a tracer holds its dead children, and so changes what there is to count")
    if kernel.backend().legacy_clone:
        pytest.skip("a filter hides clone3, and the tables are of clone3")
    spawns = _traced(backend, "EventLoop")
    for who, by_kind in _documented(backend).items():
        for kind, documented in by_kind.items():
            made = _least([getattr(spawn, who) for spawn in spawns if spawn.kind == kind])
            assert not made - documented, f"{who}, {kind}"
