"""Sharing memory with a child until its exec harms neither side."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import EMULATED
from test_launch import end_exec_pipes

import aioreap
from aioreap.options import Options

PR_GET_DUMPABLE = 3


def controllers(cgroup: Path) -> list[str]:
    try:
        return (cgroup / "cgroup.subtree_control").read_text().split()
    except OSError:
        return []


@pytest.mark.parametrize(
    "options",
    [{"user": 65534}, {"group": 65534}, {"extra_groups": [65534]}, {"user": 65534, "group": 65534}],
    ids=" ".join,
)
async def test_a_child_with_other_credentials_leaves_this_process_dumpable(
    options: Options,
) -> None:
    """What shares this memory and changes its ids clears the flag, for good and for all."""
    libc = ctypes.CDLL(None)
    assert libc.prctl(PR_GET_DUMPABLE) == 1
    process = await aioreap.create_subprocess_exec("true", **options)
    assert await process.wait() == 0
    assert libc.prctl(PR_GET_DUMPABLE) == 1


AT_ONCE = 10


async def expect_every_status(count: int, *, close_fds: bool) -> None:
    """Each child has the status that was asked of it."""

    async def several() -> None:
        for status in range(count // AT_ONCE):
            process = await aioreap.create_subprocess_exec(
                "sh", "-c", f"exit {status}", close_fds=close_fds, env={"A": "x" * 10_000}
            )
            assert await process.wait() == status

    await asyncio.gather(*(several() for _ in range(AT_ONCE)))


@pytest.mark.clone_backends
@pytest.mark.any_backend
@pytest.mark.own_backend("uvloop")
async def test_hundreds_of_descriptors_to_close_at_the_exec_corrupt_nothing() -> None:
    """Linux 7.3 closes descriptors first, and leaves the memory later.

    Whether the loop sees it is the kernel's affair: the next test has it at each spawn.
    """
    lower = [os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC) for _ in range(100)]
    descriptors = [os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC) for _ in range(300)]
    for descriptor in lower:  # the exec pipes get these numbers, and are closed before the others
        os.close(descriptor)
    await expect_every_status(1_000, close_fds=False)
    for descriptor in descriptors:
        os.close(descriptor)


@pytest.mark.clone_backends
@pytest.mark.any_backend
async def test_eof_ahead_of_the_child_tid_word_corrupts_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is freed at the pipe's EOF would still be the child's stack and arguments."""
    end_exec_pipes(monkeypatch)
    await expect_every_status(100 if EMULATED else 1_000, close_fds=True)


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="None is immortal")
async def test_spawns_lose_no_reference_of_none() -> None:
    """An interpreter that has lost all that it had aborts."""

    async def references_after(count: int) -> int:
        for _ in range(count):
            assert await (await aioreap.create_subprocess_exec("true")).wait() == 0
        gc.collect()
        return sys.getrefcount(None)

    before = await references_after(10)
    count = 20 if EMULATED else 50
    assert before - await references_after(count) < count // 2


async def test_an_oom_kill_in_its_cgroup_spares_this_process() -> None:
    """What shares memory with a cgroup over its limit is killed with it."""
    root = Path("/sys/fs/cgroup")
    if "memory" not in controllers(root):
        assert not EMULATED
        pytest.skip("no cgroup v2 with a memory controller here; a kernel of make test-kernel has")
    cgroup = root / "aioreap-test"
    cgroup.mkdir()
    try:
        (cgroup / "memory.max").write_text("32768")
        (cgroup / "memory.swap.max").write_text("0")
        for _ in range(5):
            try:
                process = await aioreap.create_subprocess_exec("sleep", "1000", cgroup=cgroup)
            except (MemoryError, OSError, subprocess.SubprocessError):
                continue  # killed before its exec, or the exec had no memory
            assert await process.wait() == -signal.SIGKILL
        assert "oom_kill 0" not in (cgroup / "memory.events").read_text().splitlines()
    finally:
        cgroup.rmdir()
