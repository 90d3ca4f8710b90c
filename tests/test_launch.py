"""Between clone and exec: the loop is never held, and nothing is decided before it is known."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import children, open_descriptors

import aioreap
from aioreap import _clone, launch, spawn
from aioreap.options import Options
from aioreap.spawn import SpawnPlan

pytestmark = pytest.mark.clone_backends


class HeldProgram:
    """A program whose execve() waits until release(): this process has a lease on its file."""

    def __init__(self, path: Path, program: str = "/bin/true") -> None:
        shutil.copy(program, path)
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.fcntl(self._descriptor, fcntl.F_SETSIG, signal.SIGURG)  # ignored by default
        fcntl.fcntl(self._descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)

    def release(self) -> None:
        fcntl.fcntl(self._descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)

    def close(self) -> None:
        os.close(self._descriptor)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[HeldProgram]:
    program = HeldProgram(tmp_path / "held")
    yield program
    program.close()


def one_clone_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "CLONES_IN_A_TURN", 1)
    monkeypatch.setattr(launch, "TURN_BUDGET_NS", 1)


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0)


async def test_the_loop_runs_while_a_program_is_being_loaded(held: HeldProgram) -> None:
    creating = asyncio.ensure_future(aioreap.create_subprocess_exec(held.path))
    await turns(1000)
    assert not creating.done()
    held.release()
    process = await creating
    assert await process.wait() == 0


@pytest.mark.parametrize("options", [{}, {"extra_groups": [0]}], ids=["shared", "copied"])
async def test_a_program_killed_while_it_is_loaded_has_that_status(
    held: HeldProgram, options: Options
) -> None:
    creating = asyncio.ensure_future(aioreap.create_subprocess_exec(held.path, **options))
    await until(lambda: spawn.in_flight)
    (spawned,) = spawn.in_flight
    block = spawned.block
    assert block is not None
    # outcome() also takes the report of a child with memory of its own.
    await until(lambda: _clone.outcome(block, False) or _clone.step(block) == _clone.STEP_EXEC)
    signal.pidfd_send_signal(spawned.pidfd, signal.SIGINT)
    assert await (await creating).wait() == -signal.SIGINT


async def test_a_child_killed_before_its_exec_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    real = _clone.outcome

    def died_early(block: _clone.Block, exited: bool, /) -> tuple[int, int] | None:
        outcome = real(block, exited)
        return None if outcome is None else (_clone.STEP_CHDIR, 0)

    monkeypatch.setattr(_clone, "outcome", died_early)
    with pytest.raises(subprocess.SubprocessError, match="killed before it could run 'true'"):
        await aioreap.create_subprocess_exec("true")


def end_exec_pipes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each exec pipe replaced by one that has ended."""
    real = _clone.spawn

    def spawn(*arguments: Any) -> tuple[int, int, int, _clone.Block]:
        pid, pidfd, pipe, block = real(*arguments)
        read_end, write_end = os.pipe()
        os.close(write_end)
        os.dup2(read_end, pipe, inheritable=False)
        os.close(read_end)
        return pid, pidfd, pipe, block

    monkeypatch.setattr(_clone, "spawn", spawn)


async def test_eof_while_the_program_is_loaded_decides_nothing(
    held: HeldProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is freed then is still the child's stack."""
    end_exec_pipes(monkeypatch)
    creating = asyncio.ensure_future(aioreap.create_subprocess_exec(held.path))
    await turns(1000)
    assert not creating.done()
    held.release()
    assert await (await creating).wait() == 0


async def test_eof_before_the_child_has_left_the_memory_decides_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Linux 7.3 closes the exec pipe up to 0.1 ms before it switches memory."""
    real, asked = _clone.outcome, 0

    def late(block: _clone.Block, exited: bool, /) -> tuple[int, int] | None:
        nonlocal asked
        asked += 1
        return real(block, exited) if asked > 10 or exited else None

    monkeypatch.setattr(_clone, "outcome", late)
    process = await aioreap.create_subprocess_exec("sh", "-c", "read line; exit 3", stdin=-1)
    assert asked > 10
    await process.communicate(b"\n")
    assert process.returncode == 3


async def test_a_stranger_that_holds_the_exec_pipe_delays_no_exit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A fork outside Python's sight, between pipe2 and close, inherits the pipe's other end."""
    real, held_ends = _clone.spawn, []

    def with_a_stranger(*arguments: object) -> tuple[int, int, int, _clone.Block]:
        pid, pidfd, pipe, block = real(*arguments)  # type: ignore[arg-type]
        read_end, write_end = os.pipe()
        os.dup2(read_end, pipe, inheritable=False)
        os.set_blocking(pipe, False)
        os.close(read_end)
        held_ends.append(write_end)
        return pid, pidfd, pipe, block

    monkeypatch.setattr(_clone, "spawn", with_a_stranger)
    process = await aioreap.create_subprocess_exec("sh", "-c", "read line; exit 3", stdin=-1)
    await process.communicate(b"\n")
    assert process.returncode == 3
    with pytest.raises(FileNotFoundError):
        await aioreap.create_subprocess_exec("/nonexistent")
    for end in held_ends:
        os.close(end)


@pytest.mark.parametrize("clones", [1, launch.CLONES_IN_A_TURN])
async def test_many_spawns_of_one_turn_are_spread_over_turns(
    monkeypatch: pytest.MonkeyPatch, clones: int
) -> None:
    monkeypatch.setattr(launch, "CLONES_IN_A_TURN", clones)
    monkeypatch.setattr(launch, "TURN_BUDGET_NS", 1)  # which each of them takes
    loop, real = asyncio.get_running_loop(), _clone.spawn
    turn, cloned_in = 0, []

    def counting(*arguments: object) -> tuple[int, int, int, _clone.Block]:
        cloned_in.append(turn)
        return real(*arguments)  # type: ignore[arg-type]

    def next_turn() -> None:
        nonlocal turn
        turn += 1
        if len(cloned_in) < 20:
            loop.call_soon(next_turn)

    monkeypatch.setattr(_clone, "spawn", counting)
    next_turn()
    before = turn
    spawns = [asyncio.ensure_future(aioreap.create_subprocess_exec("true")) for _ in range(20)]
    processes = await asyncio.gather(*spawns)
    assert cloned_in[0] <= before + 1, "the first of a turn is never deferred"
    assert {*Counter(cloned_in).values()} == {clones, 20 % clones or clones}
    assert await asyncio.gather(*(p.wait() for p in processes)) == [0] * 20


async def test_what_happens_before_its_turn_does_not_change_a_deferred_spawn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one_clone_a_turn(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AIOREAP_SAYS", "then")
    (tmp_path / "sub").mkdir()
    script = 'pwd; umask; echo "$AIOREAP_SAYS"; cat; cat /dev/fd/%d'
    output, passed = tmp_path / "output", tmp_path / "passed"
    output.touch()
    passed.write_text("passed\n")
    stdin_read, stdin_write = os.pipe()
    os.write(stdin_write, b"stdin\n")
    os.close(stdin_write)
    umask = os.umask(0o027)
    try:
        with output.open("wb") as stdout, passed.open("rb") as extra:
            first = asyncio.ensure_future(aioreap.create_subprocess_exec("true"))
            second = asyncio.ensure_future(
                aioreap.create_subprocess_exec(
                    "sh",
                    "-c",
                    script % extra.fileno(),
                    cwd="sub",
                    stdin=stdin_read,
                    stdout=stdout,
                    pass_fds=[extra.fileno()],
                )
            )
            await asyncio.sleep(0)  # both have been asked for, the second is deferred
            assert len(spawn.in_flight) <= 1
        os.close(stdin_read)
        os.umask(0o077)
        monkeypatch.chdir("/")
        monkeypatch.setenv("AIOREAP_SAYS", "now")
        for process in await asyncio.gather(first, second):
            assert await process.wait() == 0
    finally:
        os.umask(umask)
    assert output.read_text().splitlines() == [f"{tmp_path}/sub", "0027", "then", "stdin", "passed"]


async def test_a_program_just_written_is_not_busy_because_of_a_spawn_in_flight(
    held: HeldProgram, tmp_path: Path
) -> None:
    """close_fds=False: the held child keeps a copy of the written descriptor until its exec."""
    program = tmp_path / "written"
    with program.open("wb") as file:
        file.write(Path("/bin/true").read_bytes())
        os.fchmod(file.fileno(), 0o755)
        holder = asyncio.ensure_future(aioreap.create_subprocess_exec(held.path, close_fds=False))
        await until(lambda: spawn.in_flight)
    busy = asyncio.ensure_future(aioreap.create_subprocess_exec(program))
    with pytest.raises(OSError, match="busy") as direct:
        os.close(os.posix_spawn(program, [str(program)], {}))
    assert direct.value.errno == errno.ETXTBSY
    await turns(1000)
    assert not busy.done()
    held.release()
    assert await (await busy).wait() == 0
    assert await (await holder).wait() == 0


async def test_a_program_that_is_open_for_writing_is_busy(tmp_path: Path) -> None:
    program = tmp_path / "written"
    shutil.copy("/bin/true", program)
    with program.open("ab"), pytest.raises(OSError, match="busy") as caught:
        await aioreap.create_subprocess_exec(program)
    assert (caught.value.errno, caught.value.filename) == (errno.ETXTBSY, program)


async def test_a_forked_copy_holds_no_pipe_of_a_spawn_in_flight(held: HeldProgram) -> None:
    creating = asyncio.ensure_future(aioreap.create_subprocess_exec(held.path, stdout=-1))
    await until(lambda: spawn.in_flight)
    go_read, go_write = os.pipe()
    copy = os.fork()
    if copy == 0:
        os.close(go_write)
        os.read(go_read, 1)
        os._exit(0)
    os.close(go_read)
    held.release()
    process = await creating
    assert await process.communicate() == (b"", None)  # EOF, while the copy lives
    os.close(go_write)
    assert os.waitpid(copy, 0)[1] == 0


async def test_a_deferred_spawn_from_a_negative_descriptor_is_popens_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one_clone_a_turn(monkeypatch)
    process, error = await asyncio.gather(
        aioreap.create_subprocess_exec("true"),
        aioreap.create_subprocess_exec("true", stdin=-7),
        return_exceptions=True,
    )
    assert isinstance(process, aioreap.Process)
    assert await process.wait() == 0
    assert isinstance(error, OSError)
    assert error.errno == errno.EBADF


async def test_an_interrupted_turn_leaves_the_others_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one_clone_a_turn(monkeypatch)
    launcher = launch.Launcher.of(asyncio.get_running_loop())
    real, count = _clone.spawn, 0

    def interrupted(*arguments: object) -> tuple[int, int, int, _clone.Block]:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    def turn(turn: Callable[[], None] = launcher._begin_turn) -> None:
        try:
            turn()
        except KeyboardInterrupt:  # which would end the loop's run here
            interruptions.append(count)

    interruptions: list[int] = []
    monkeypatch.setattr(_clone, "spawn", interrupted)
    monkeypatch.setattr(launcher, "_begin_turn", turn)
    spawns = [asyncio.ensure_future(aioreap.create_subprocess_exec("true")) for _ in range(4)]
    first, *others = await asyncio.gather(*spawns, return_exceptions=True)
    assert interruptions == [2]
    processes = [p for p in (first, *others) if isinstance(p, aioreap.Process)]
    assert len(processes) == 3
    assert await asyncio.gather(*(p.wait() for p in processes)) == [0] * 3


def test_a_child_whose_caller_was_interrupted_after_the_clone_is_killed() -> None:
    async def main() -> None:
        real = _clone.spawn

        def interrupted(*arguments: object) -> tuple[int, int, int, _clone.Block]:
            real(*arguments)  # type: ignore[arg-type]
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_clone, "spawn", interrupted)
            await aioreap.create_subprocess_exec("sleep", "1000")

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())


async def test_a_turn_in_which_children_are_told_of_is_not_spent_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one_clone_a_turn(monkeypatch)
    launcher = launch.Launcher.of(asyncio.get_running_loop())
    plans = [SpawnPlan.of(("true",), (None,) * 3, {}, shell=False) for _ in range(2)]
    first = launcher.begin(plans[0])
    assert launcher.watcher.turn.is_spent
    launcher.watcher.open_set()._tell()
    second = launcher.begin(plans[1])
    assert second.child is not None
    for each in (first, second):
        await each.abort()


@pytest.mark.parametrize("is_taken", [False, True])
def test_a_child_whose_caller_was_interrupted_while_it_is_taken_over_is_killed(
    is_taken: bool,
) -> None:
    async def main() -> None:
        real, held = _clone.take, list[int]()

        def interrupted(block: _clone.Block, epoll: int = -1) -> None:
            if is_taken or epoll < 0:
                real(block, epoll)
            if epoll >= 0:
                (spawned,) = spawn.in_flight
                held.extend(map(os.dup, (spawned.pidfd, spawned.pipe)))
                raise KeyboardInterrupt

        await (await aioreap.create_subprocess_exec("true")).wait()
        before = open_descriptors()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_clone, "take", interrupted)
            try:
                launcher = launch.Launcher.of(asyncio.get_running_loop())
                launcher.begin(SpawnPlan.of(("sleep", "1000"), (None,) * 3, {}, shell=False))
            finally:
                assert children() == []
                epoll_set = launcher.watcher.open_set()
                assert epoll_set.members == {}
                assert epoll_set._epoll.poll(0) == []
                for descriptor in held:
                    os.close(descriptor)
                assert open_descriptors() == before

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())


@pytest.mark.parametrize(
    ("kind", "name"),
    [(launch.Launcher, "look_after"), (asyncio.SelectorEventLoop, "call_soon")],
    ids=["look_after", "call_soon"],
)
def test_a_child_whose_caller_is_interrupted_when_it_is_taken_over_is_killed(
    monkeypatch: pytest.MonkeyPatch, kind: type, name: str
) -> None:
    async def main() -> None:
        def interrupted(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        await (await aioreap.create_subprocess_exec("true")).wait()
        before = open_descriptors()
        one_clone_a_turn(monkeypatch)
        launcher = launch.Launcher.of(asyncio.get_running_loop())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kind, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                launcher.begin(SpawnPlan.of(("sleep", "1000"), (None,) * 3, {}, shell=False))
        assert children() == []
        assert open_descriptors() == before
        assert launcher.watcher.open_set().members == {}
        spawns = [aioreap.create_subprocess_exec("true") for _ in range(2)]
        for process in await asyncio.gather(*spawns):  # the second waits for its turn
            await process.wait()

    asyncio.run(main())


async def test_where_nothing_can_be_kept_nothing_is_deferred(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused() -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), ".")

    one_clone_a_turn(monkeypatch)
    monkeypatch.setattr(spawn.Surroundings, "now", refused)
    spawns = [aioreap.create_subprocess_exec("sh", "-c", "exit 3") for _ in range(10)]
    processes = await asyncio.gather(*spawns)
    assert await asyncio.gather(*(p.wait() for p in processes)) == [3] * 10


async def test_a_cancellation_while_a_failed_spawn_is_cleaned_up_is_not_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = launch.Launch.abort

    async def cancelled_meanwhile(self: launch.Launch) -> asyncio.CancelledError | None:
        assert task is not None
        task.cancel("why")
        return await real(self)

    task = asyncio.current_task()
    monkeypatch.setattr(launch.Launch, "abort", cancelled_meanwhile)
    with pytest.raises(asyncio.CancelledError, match="why"):  # anyio knows its own by that
        await aioreap.create_subprocess_exec("/nonexistent", stdin=-1, stdout=-1, stderr=-1)
    assert task is not None
    task.uncancel()
