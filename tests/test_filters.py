"""Behind seccomp filters of the kernel itself: the backend, its reason, and that all of it works.

A filter stays for good, so that each is installed in a process of its own: in a
forked copy of the tests, or in an interpreter that runs some of them again.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import seccomp
from apart import Factory, as_root, become_an_ordinary_user, on_both_loops, run_apart
from conftest import BACKENDS, EMULATED
from test_launch import HeldProgram, until

import aioreap
from aioreap import forking, kernel, spawn

pytestmark = pytest.mark.skipif(not seccomp.IS_POSSIBLE, reason="no filter for this machine")

HERE = Path(__file__).parent
BEST = BACKENDS[0]
PIPES: dict[str, Any] = {"stdin": -1, "stdout": -1, "stderr": -1}


class Filter(NamedTuple):
    """Its rules, and the backend behind it: None where there cannot be one."""

    rules: tuple[str, ...]
    backend: str | None
    reason: str


NO_AUTOREAP = "no CLONE_AUTOREAP (autoreap: no "
REASON_OF_BEST = "this kernel has CLONE_AUTOREAP" if BEST == "autoreap" else NO_AUTOREAP + "(EINVAL"

FILTERS = {
    "clone3-ENOSYS": Filter(("clone3=ENOSYS",), "pidfd", NO_AUTOREAP + "(ENOSYS"),
    "clone3-EPERM": Filter(("clone3=EPERM",), "pidfd", NO_AUTOREAP + "(EPERM"),
    "pidfd_open-EPERM": Filter(("pidfd_open=EPERM",), BEST, REASON_OF_BEST),
    "shared-memory-EPERM": Filter(
        ("clone3=ENOSYS", "clone_vm=EPERM"), "pidfd", NO_AUTOREAP + "(ENOSYS"
    ),
    "clone3-pidfd_open-close_range-EPERM": Filter(
        ("clone3=EPERM", "pidfd_open=EPERM", "close_range=EPERM"), "pidfd", NO_AUTOREAP + "(EPERM"
    ),
    "close_range-ENOSYS": Filter(("close_range=ENOSYS",), BEST, REASON_OF_BEST),
    "close_range-EPERM": Filter(("close_range=EPERM",), BEST, REASON_OF_BEST),
    "clones-with-a-pidfd-EPERM": Filter(
        ("clone3=EPERM", "clone_pidfd=EPERM"), "popen", "; clone_pidfd: no (EPERM"
    ),
    "clones-with-a-pidfd-and-close_range": Filter(
        ("clone3=ENOSYS", "clone_pidfd=EINVAL", "close_range=ENOSYS"),
        "popen",
        "; clone_pidfd: no (EINVAL",
    ),
    "everything-EPERM": Filter(
        ("clone3=EPERM", "clone_pidfd=EPERM", "pidfd_open=EPERM"),
        None,
        "clone_pidfd: no (EPERM: no such call, or hidden by a filter); "
        "pidfd_open: no (EPERM: no such call, or hidden by a filter)",
    ),
}
EVERYTHING = FILTERS["everything-EPERM"].rules

each_filter = pytest.mark.parametrize("behind", FILTERS.values(), ids=FILTERS)


def run_filtered(
    rules: tuple[str, ...], *arguments: str, backend: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the interpreter behind a filter, with AIOREAP_BACKEND as it is given here."""
    environment = {n: value for n, value in os.environ.items() if not n.startswith("AIOREAP_")}
    if backend is not None:
        environment["AIOREAP_BACKEND"] = backend
    return subprocess.run(
        [sys.executable, HERE / "seccomp.py", *rules, "--", sys.executable, *arguments],
        cwd=HERE.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


# A server that starts behind a filter.


@pytest.mark.slow
@pytest.mark.any_backend
@each_filter
def test_the_backend_is_the_best_that_is_left_and_says_why(behind: Filter) -> None:
    done = run_filtered(behind.rules, "-m", "aioreap", "--json")
    if behind.backend is None:
        assert done.returncode == 1
        assert "aioreap needs pidfds (Linux 5.4)" in done.stderr
        assert behind.reason in done.stderr
        return
    found = json.loads(done.stdout)
    assert found["backend"] == behind.backend
    assert behind.reason in found["reason"]
    for rule in behind.rules:
        name, _, error = rule.partition("=")
        if name in found["features"]:
            assert not found["features"][name]["available"]
            assert f"no ({error}: " in found["features"][name]["answer"]


@pytest.mark.slow
@pytest.mark.any_backend
def test_children_that_could_not_be_killed_are_not_made() -> None:
    done = run_filtered(("pidfd_open=EPERM",), "-m", "aioreap", "--json")
    assert json.loads(done.stdout)["features"]["pidfd_send_signal"]["available"]
    done = run_filtered(("pidfd_send_signal=EPERM",), "-m", "aioreap")
    assert done.returncode == 1
    assert "aioreap needs pidfds (Linux 5.4); pidfd_send_signal: no (EPERM: " in done.stderr


@pytest.mark.slow
@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("forced", "rules", "missing"),
    [
        ("autoreap", ("clone3=ENOSYS",), "autoreap: no (ENOSYS"),
        ("pidfd", ("clone3=EPERM", "clone_pidfd=EPERM"), "clone_pidfd: no (EPERM"),
        ("popen", ("pidfd_open=EPERM",), "pidfd_open: no (EPERM"),
    ],
)
def test_a_forced_backend_that_a_filter_hides_is_an_error_that_says_so(
    forced: str, rules: tuple[str, ...], missing: str
) -> None:
    done = run_filtered(rules, "-m", "aioreap", backend=forced)
    assert done.returncode == 1
    assert f"AIOREAP_BACKEND={forced} cannot be had here; {missing}" in done.stderr


PROCESS, LAUNCH, DETACHED = (
    "tests/test_process.py",
    "tests/test_launch.py",
    "tests/test_detached.py",
)
# The tests that count clones, or replace the exec pipe, do not apply where a clone
# is refused at each spawn; and given EPERM for clone3, the C library starts no
# thread, and no program by posix_spawn().
AGAIN = {
    "clone3-ENOSYS": (PROCESS, LAUNCH, DETACHED),
    "clone3-EPERM": (PROCESS,),
    "pidfd_open-EPERM": (PROCESS, LAUNCH),
    "shared-memory-EPERM": (PROCESS, DETACHED),
    "clone3-pidfd_open-close_range-EPERM": (PROCESS,),
    "clones-with-a-pidfd-EPERM": (PROCESS,),
}
# On emulated kernels: the one that leaves CLONE_AUTOREAP, and that of most containers.
IN_A_GUEST = "pidfd_open-EPERM" if BEST == "autoreap" else "clone3-ENOSYS"


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == IN_A_GUEST else pytest.mark.slow) for name in AGAIN],
)
def test_the_tests_of_the_backend_pass_behind_the_filter(name: str) -> None:
    behind = FILTERS[name]
    loops = ("uvloop",) if EMULATED else ("asyncio", "uvloop")
    which = f"{behind.backend} and ({' or '.join(loops)})"
    done = run_filtered(
        behind.rules,
        *("-m", "pytest", "-v", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=0"),
        *("-k", which, *(AGAIN[name][:1] if EMULATED else AGAIN[name])),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    header = re.search(r"^aioreap: .* backends (\w+)", done.stdout, re.MULTILINE)
    assert header is not None
    assert header[1] == behind.backend
    for loop in loops:
        passed = re.findall(rf"\[{loop}-{behind.backend}.*\] PASSED", done.stdout)
        assert len(passed) > 10


@pytest.fixture
def unforced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AIOREAP_BACKEND")
    monkeypatch.setattr(kernel, "_backend", None)


async def expect_that_children_work() -> None:
    process = await aioreap.create_subprocess_shell("cat; echo error >&2; exit 3", **PIPES)
    assert await process.communicate(b"in") == (b"in", b"error\n")
    assert process.returncode == 3
    process = await aioreap.create_subprocess_exec("cat", stdin=-1)
    process.kill()
    assert await process.wait() == -9
    with pytest.raises(FileNotFoundError) as caught:
        await aioreap.create_subprocess_exec("/nonexistent", **PIPES)
    assert caught.value.filename == "/nonexistent"


async def is_made_by_popen() -> bool:
    """Whether subprocess.Popen makes the next child, and so holds the loop until its exec."""
    real, plans = forking.spawn, []

    def spy(plan: spawn.SpawnPlan) -> tuple[int, int]:
        plans.append(plan)
        return real(plan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forking, "spawn", spy)
        process = await aioreap.create_subprocess_exec("true")
    assert await process.wait() == 0
    return bool(plans)


async def expect_that_no_descriptor_leaks() -> None:
    """More of them than one read of a directory can hold, and one that is to be passed."""
    read_end, write_end = os.pipe()
    extra = [os.dup(read_end) for _ in range(100)]
    for descriptor in extra:
        os.set_inheritable(descriptor, True)
    passed = extra[50]
    process = await aioreap.create_subprocess_exec("cat", pass_fds=[passed], **PIPES)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"in")
    assert await process.stdout.readexactly(2) == b"in"  # its libraries are loaded by now
    assert sorted(map(int, os.listdir(f"/proc/{process.pid}/fd"))) == [0, 1, 2, passed]
    assert await process.communicate() == (b"", b"")
    for descriptor in (read_end, write_end, *extra):
        os.close(descriptor)


def run_filtered_server(
    make_loop: Factory, behind: Filter, become: Callable[[], None] = lambda: None
) -> None:
    async def main() -> None:
        become()
        seccomp.install(*behind.rules)
        kernel._backend = None  # as at the start of a program
        if behind.backend is None:
            with pytest.raises(OSError, match=re.escape(behind.reason)):
                await aioreap.create_subprocess_exec("true", **PIPES)
            return
        assert aioreap.backend().name == behind.backend
        assert behind.reason in aioreap.backend().reason
        assert await is_made_by_popen() is (behind.backend == "popen")
        await expect_that_children_work()
        await expect_that_no_descriptor_leaks()

    run_apart(make_loop, main)


@pytest.mark.any_backend
@pytest.mark.usefixtures("unforced")
@on_both_loops
@each_filter
def test_children_work_and_no_descriptor_leaks_behind_the_filter(
    make_loop: Factory, behind: Filter
) -> None:
    run_filtered_server(make_loop, behind)


@pytest.mark.any_backend
@pytest.mark.usefixtures("unforced")
@as_root
@on_both_loops
@each_filter
def test_the_same_is_true_for_an_ordinary_user(make_loop: Factory, behind: Filter) -> None:
    run_filtered_server(make_loop, behind, become_an_ordinary_user)


@pytest.mark.any_backend
@pytest.mark.usefixtures("unforced")
@on_both_loops
def test_preexec_fn_without_pidfd_open_is_an_error_that_says_so(make_loop: Factory) -> None:
    async def main() -> None:
        seccomp.install("pidfd_open=EPERM")
        with pytest.raises(PermissionError, match="pidfd_open") as caught:
            await aioreap.create_subprocess_exec("true", preexec_fn=os.getpid, **PIPES)
        assert caught.value.errno == errno.EPERM
        await expect_that_children_work()

    run_apart(make_loop, main)


# A filter that is installed when the server has children already.


class Children:
    """One that runs, and one that is held between its clone and its exec."""

    def __init__(self, held: HeldProgram) -> None:
        self._held = held

    async def start(self) -> None:
        self._running = await aioreap.create_subprocess_shell("cat; exit 4", **PIPES)
        self._starting = asyncio.ensure_future(
            aioreap.create_subprocess_exec(self._held.path, stdout=-1)
        )
        await until(lambda: spawn.in_flight)

    async def expect_that_they_are_settled(self) -> None:
        assert not self._starting.done()
        self._held.release()
        started = await self._starting
        assert await started.communicate() == (b"", None)
        assert await started.wait() == 0
        assert await self._running.communicate(b"in") == (b"in", b"")
        assert (await self._running.wait_exit()).returncode == 4
        self._held.close()


@pytest.mark.any_backend
@pytest.mark.usefixtures("unforced")
@on_both_loops
@each_filter
def test_a_spawn_after_a_filter_falls_back_and_those_before_it_are_settled(
    make_loop: Factory, behind: Filter, tmp_path: Path
) -> None:
    async def main() -> None:
        found = aioreap.backend()
        before = Children(HeldProgram(tmp_path / "held"))
        await before.start()
        seccomp.install(*behind.rules)
        if behind.backend is None:
            with pytest.raises(PermissionError, match="pidfd_open") as caught:
                await aioreap.create_subprocess_exec("true", **PIPES)
            assert caught.value.errno == errno.EPERM
        else:
            assert await is_made_by_popen() is (behind.backend == "popen")
            await expect_that_children_work()
            await expect_that_no_descriptor_leaks()
        await before.expect_that_they_are_settled()
        assert aioreap.backend() is found, "it says what the kernel answered at the first call"

    run_apart(make_loop, main)


@on_both_loops
@pytest.mark.parametrize(
    "rules", [FILTERS["clones-with-a-pidfd-EPERM"].rules, ("pidfd_open=EPERM",), EVERYTHING]
)
def test_a_forced_backend_falls_back_to_no_other_after_a_filter(
    make_loop: Factory, rules: tuple[str, ...], backend: str
) -> None:
    refused = "pidfd_open=EPERM" if backend == "popen" else "clone3=EPERM"

    async def main() -> None:
        running = await aioreap.create_subprocess_shell("cat; exit 4", **PIPES)
        seccomp.install(*rules)
        if refused not in rules:
            await expect_that_children_work()
        else:
            says = "pidfd_open" if backend == "popen" else "AIOREAP_BACKEND says so"
            with pytest.raises(PermissionError, match=says) as caught:
                await aioreap.create_subprocess_exec("true", **PIPES)
            assert caught.value.errno == errno.EPERM
        assert aioreap.backend().name == backend
        assert await running.communicate(b"in") == (b"in", b"")
        assert running.returncode == 4

    run_apart(make_loop, main)


@on_both_loops
def test_a_forced_pidfd_or_popen_needs_no_clone3(make_loop: Factory, backend: str) -> None:
    async def main() -> None:
        seccomp.install("clone3=ENOSYS")
        if backend == "autoreap":
            with pytest.raises(OSError, match="AIOREAP_BACKEND says so") as caught:
                await aioreap.create_subprocess_exec("true", **PIPES)
            assert caught.value.errno == errno.ENOSYS
        else:
            await expect_that_children_work()

    run_apart(make_loop, main)


@pytest.mark.autoreap
@on_both_loops
def test_an_autoreap_that_was_asked_for_falls_back_to_nothing_after_a_filter(
    make_loop: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        seccomp.install("clone3=EPERM")
        with pytest.raises(PermissionError, match="autoreap=True") as caught:
            await aioreap.create_subprocess_exec("true", autoreap=True, **PIPES)
        assert caught.value.errno == errno.EPERM
        await expect_that_children_work()

    monkeypatch.delenv("AIOREAP_BACKEND")
    monkeypatch.setattr(kernel, "_backend", None)
    run_apart(make_loop, main)
