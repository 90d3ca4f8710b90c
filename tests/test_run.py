"""run_process() as the users of subprocess.run know it, and what that one cannot do."""

from __future__ import annotations

import asyncio
import gc
import io
import itertools
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from conftest import _LOOPS, children, open_descriptors
from program import run_program
from test_groups import KERNEL_SIGNALS_GROUPS
from test_launch import turns, until

import aioreap
from aioreap import CompletedProcess, OutputLimitExceeded, TimeoutExpired, run_process
from aioreap.capture import Capture
from aioreap.watcher import Child

pytestmark = pytest.mark.own_backend

PIPE = aioreap.PIPE
# What a shell does that heeds a trap at once: a signal just before a read() would wait for its end.
ON = "while :; do :; done"


class Latch:
    """A pipe that a child can read from, and that stays empty and open until it is released."""

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe()

    def release(self, data: bytes = b"") -> None:
        os.write(self.write_end, data)
        os.close(self.write_end)
        self.write_end = -1

    def close(self) -> None:
        for end in (self.read_end, self.write_end):
            if end >= 0:
                os.close(end)


@pytest.fixture
def latch() -> Iterator[Latch]:
    latch = Latch()
    yield latch
    latch.close()


# The same as subprocess.run.

BOTH = "echo out; echo err >&2; exit 3"
NEWLINES = r"printf 'one\r\ntwo\rthree\n'; printf 'err\r\n' >&2"
CAPTURE = {"capture_output": True}
SH: dict[str, Any] = {"shell": True, **CAPTURE}

SAME: list[tuple[Any, dict[str, Any]]] = [
    (["true"], {}),
    (["false"], {}),
    (("sh", "-c", "exit 3"), {}),
    ([Path("/bin/sh"), b"-c", "exit 3"], {}),
    (["sh", "-c", BOTH], CAPTURE),
    (["sh", "-c", BOTH], {"stdout": PIPE}),
    (["sh", "-c", BOTH], {"stdout": aioreap.DEVNULL, "stderr": PIPE}),
    (["sh", "-c", BOTH], {"stdout": PIPE, "stderr": aioreap.STDOUT}),
    (BOTH, SH),
    (BOTH.encode(), SH),
    ("kill -KILL $$", {"shell": True}),
    ("kill -TERM $$", {"shell": True, "check": True}),
    (BOTH, {**SH, "check": True}),
    (BOTH, {**SH, "check": True, "text": True}),
    ("exit 0", {**SH, "check": True}),
    (["cat"], {"input": b"input", "stdout": PIPE}),
    (["cat"], {"input": b"", "stdout": PIPE}),
    (["cat"], {"input": bytearray(b"input"), **CAPTURE}),
    (["cat"], {"input": memoryview(b"input"), **CAPTURE}),
    (["cat"], {"input": memoryview(b"in__put").cast("B")[::1], **CAPTURE}),
    (["cat"], {"input": b"x" * 1_000_000, "stdout": PIPE}),
    (["cat"], {"input": "in\nput\r\n", "text": True, "stdout": PIPE}),
    (["cat"], {"input": "input", "universal_newlines": True, **CAPTURE}),
    (["cat"], {"input": "\u00e4\u20ac", "encoding": "utf-8", **CAPTURE}),
    (["cat"], {"input": "\u00e4", "encoding": "latin-1", "stdout": PIPE}),
    (["cat"], {"input": "\u00e4\n", "encoding": "utf-16", "stdout": PIPE}),
    (["cat"], {"input": "a\u20acb", "encoding": "ascii", "errors": "replace", "stdout": PIPE}),
    (["cat"], {"stdin": PIPE, "stdout": PIPE}),
    (["cat"], {"stdin": aioreap.DEVNULL, "stdout": PIPE}),
    (["true"], {"input": b"x" * 1_000_000}),
    (["cat"], {"input": b"input", "stdout": PIPE, "timeout": 60}),
    (["cat"], {"input": b"input", "stdout": PIPE, "timeout": Decimal(60)}),
    (NEWLINES, SH),
    (NEWLINES, {**SH, "text": True}),
    (NEWLINES, {"shell": True, "stdout": PIPE, "encoding": "utf-8"}),
    (NEWLINES, {**SH, "text": False, "universal_newlines": False}),
    (r"printf '\377'", {**SH, "errors": "backslashreplace"}),
    (r"printf '\377'", {**SH, "encoding": "utf-8", "errors": "surrogateescape"}),
    ("pwd; umask; echo $ONE", {**SH, "cwd": "/", "umask": 0o77, "env": {"ONE": "1"}}),
    (["name", "-c", "echo $0"], {"executable": "/bin/sh", **CAPTURE}),
]

WRONG: list[tuple[Any, dict[str, Any]]] = [
    (["/nonexistent"], {}),
    (["/nonexistent"], CAPTURE),
    (["true"], {"cwd": "/nonexistent"}),
    (["/"], {}),
    (["cat"], {"input": b"", "stdin": PIPE}),
    (["cat"], {"input": b"", "stdin": aioreap.DEVNULL}),
    (["cat"], {"capture_output": True, "stdout": PIPE}),
    (["cat"], {"capture_output": True, "stderr": aioreap.STDOUT}),
    (["cat"], {"text": True, "universal_newlines": False, **CAPTURE}),
    (["cat"], {"input": "text", **CAPTURE}),
    (["cat"], {"input": "\u20ac", "encoding": "ascii", **CAPTURE}),
    (["cat"], {"stdout": 12345}),
    (["cat"], {"nonsense": 1}),
    (1, {}),
    ([1], {}),
    (["embedded\0null"], {}),
    (r"printf 'one\377'", {**SH, "encoding": "utf-8"}),
    (Path("true"), {"shell": True}),
]


def table(rows: list[tuple[Any, dict[str, Any]]]) -> list[Any]:
    """The rows as parameters, of which every sixth runs on emulated machines too."""
    return [
        pytest.param(*row, id=str(number), marks=[pytest.mark.slow] if number % 6 else [])
        for number, row in enumerate(rows)
    ]


def told(error: BaseException) -> Any:
    if isinstance(error, subprocess.CalledProcessError):
        return error.returncode, error.cmd, error.output, error.stdout, error.stderr, str(error)
    if isinstance(error, OSError):
        return error.errno, error.filename
    return None


def of_subprocess(command: Any, options: dict[str, Any]) -> Any:
    """What subprocess.run returns, or raises for `check`."""
    # A Decimal cannot be added to its clock.
    theirs: dict[str, Any] = {
        n: float(o) if isinstance(o, Decimal) else o for n, o in options.items()
    }
    try:
        return subprocess.run(command, **theirs)  # noqa: PLW1510
    except subprocess.CalledProcessError as error:
        return error


@pytest.mark.parametrize(("command", "options"), table(SAME))
async def test_the_result_is_that_of_subprocess_run(command: Any, options: dict[str, Any]) -> None:
    expected = of_subprocess(command, options)
    if isinstance(expected, subprocess.CalledProcessError):
        with pytest.raises(subprocess.CalledProcessError) as caught:
            await run_process(command, **options)
        assert type(caught.value) is type(expected)
        assert told(caught.value) == told(expected)
        return
    result = await run_process(command, **options)
    assert isinstance(result, subprocess.CompletedProcess)
    assert type(result) is CompletedProcess
    ours = {"exit_info": result.exit_info, "truncated": False}
    assert vars(result) == {**vars(expected), **ours}
    assert result.exit_info.returncode == result.returncode
    assert repr(result) == repr(expected)


@pytest.mark.parametrize(("command", "options"), table(WRONG))
async def test_the_error_is_that_of_subprocess_run(command: Any, options: dict[str, Any]) -> None:
    with pytest.raises((Exception,)) as expected:
        subprocess.run(command, **options)  # noqa: PLW1510
    with pytest.raises(type(expected.value)) as caught:
        await run_process(command, **options)
    assert type(caught.value) is type(expected.value)
    assert told(caught.value) == told(expected.value)


async def test_files_stand_for_streams(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"input")
    with path.open("rb") as source, (tmp_path / "copy").open("w+b") as copy:
        assert (await run_process(["cat"], stdin=source, stdout=copy)).stdout is None
        copy.seek(0)
        assert copy.read() == b"input"


# What it takes, and what it says of the rest.


@pytest.mark.any_backend
@pytest.mark.parametrize("command", ["echo one", b"echo one", Path("echo")], ids=type)
async def test_a_string_needs_shell(command: Any) -> None:
    with pytest.raises(TypeError, match="without shell=True is a sequence of the program"):
        await run_process(command)


@pytest.mark.any_backend
async def test_a_sequence_is_no_command_of_a_shell() -> None:
    """subprocess.run takes it, and loses all of it but the first item."""
    with pytest.raises(TypeError, match="shell=True takes a string, not list"):
        await run_process(["echo", "one"], shell=True)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"timeout": -1}, ValueError, "timeout .*-1"),
        ({"timeout": float("nan")}, ValueError, "timeout .*nan"),
        ({"timeout": "1"}, TypeError, "'str' and 'int'"),
        ({"grace": None}, TypeError, "'NoneType' and 'int'"),
        ({"grace": -0.5}, ValueError, "grace .*-0.5"),
        ({"grace": float("nan")}, ValueError, "grace .*nan"),
        ({"drain": -1}, ValueError, "drain .*-1"),
        ({"drain": float("nan")}, ValueError, "drain .*nan"),
        ({"output_limit": -1, **CAPTURE}, ValueError, "output_limit .*-1"),
        ({"output_limit": 1.5, **CAPTURE}, TypeError, "float"),
        ({"output_limit": 1}, ValueError, "output_limit needs stdout or stderr"),
        ({"output_limit": 1, "stdout": aioreap.DEVNULL}, ValueError, "output_limit needs"),
        ({"input": b"bytes", "text": True}, TypeError, "input must be str in text mode, not bytes"),
        ({"input": "text"}, TypeError, "bytes-like object is required, not 'str'"),
        ({"errors": "nonsense"}, LookupError, "nonsense"),
        ({"encoding": "nonsense"}, LookupError, "unknown encoding: nonsense"),
        ({"encoding": "hex"}, LookupError, "not a text encoding"),
        ({"encoding": 1}, TypeError, "must be str"),
        ({"stdin": print}, AttributeError, "fileno"),
        ({"bufsize": 1}, ValueError, "bufsize must be 0"),
        ({"nonsense": 1}, TypeError, "unexpected keyword argument 'nonsense'"),
    ],
)
async def test_bad_input_is_said_before_there_is_a_child(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        await run_process(["/nonexistent"], **options)


@pytest.mark.any_backend
async def test_no_command_is_an_error() -> None:
    with pytest.raises(ValueError, match="the command is empty"):
        await run_process([])


async def test_no_task_of_ours_is_seen() -> None:
    seen: list[set[asyncio.Task[Any]]] = []

    async def consume(_line: bytes) -> None:
        await asyncio.sleep(0)
        seen.append(asyncio.all_tasks())

    await run_process(["echo"], stdout=consume, timeout=60)
    assert seen == [asyncio.all_tasks()]


async def test_the_output_is_not_kept_beside_the_result() -> None:
    """Nor is anything else, in a cycle of garbage."""
    gc.disable()
    try:
        command = ["head", "-c", "100000", "/dev/zero"]
        for options in ({}, {"timeout": 60, "drain": 60}):
            result = await run_process(command, stdout=PIPE, **options)  # type: ignore[arg-type]
            assert sys.getrefcount(result.stdout) == sys.getrefcount(bytes(100_001)) + 1
        await turns(10)
        kept = [what for what in gc.get_objects() if isinstance(what, (Capture, Child))]
        assert kept == []
    finally:
        gc.enable()


# Timeouts.


async def expired(*seen: str, command: Any, **options: Any) -> TimeoutExpired:
    """The error of a command that does not end, at a timeout when it has written all of this."""
    for timeout in (0.05 * 2**n for n in range(12)):
        with pytest.raises(TimeoutExpired) as caught:
            await run_process(command, timeout=timeout, **options)
        error = caught.value
        assert (error.timeout, error.cmd) == (timeout, command)
        output = repr([error.stdout or "", error.stderr or ""])
        if all(text in output for text in seen):
            return error
    raise AssertionError(f"it did not write {seen}")


async def test_a_timeout_keeps_the_output(latch: Latch) -> None:
    script = "echo one; echo two >&2; exec cat"
    error = await expired(
        "one", "two", command=["sh", "-c", script], stdin=latch.read_end, **CAPTURE
    )
    assert (error.stdout, error.output, error.stderr) == (b"one\n", b"one\n", b"two\n")
    assert isinstance(error, subprocess.TimeoutExpired)
    assert isinstance(error, TimeoutError)
    assert str(error).endswith(f"timed out after {error.timeout} seconds")


async def test_a_timeout_has_text_in_text_mode_as_far_as_it_can_be_decoded(latch: Latch) -> None:
    error = await expired(
        "one",
        command=r"printf 'one\r\ntwo\303'; exec cat",
        shell=True,
        stdin=latch.read_end,
        stdout=PIPE,
        encoding="utf-8",
    )
    assert error.stdout == "one\ntwo\N{REPLACEMENT CHARACTER}"
    assert error.stderr is None


async def test_what_is_written_in_the_grace_is_kept(latch: Latch) -> None:
    script = f"trap 'echo bye; exit' TERM; echo ready; {ON}"
    error = await expired(
        "ready", command=script, shell=True, stdin=latch.read_end, text=True, stdout=PIPE, grace=60
    )
    assert error.stdout == "ready\nbye\n"


async def test_who_does_not_end_in_the_grace_is_killed(latch: Latch) -> None:
    script = "trap '' TERM; echo ready; exec cat"
    for grace in (0, 0.01):
        error = await expired(
            "ready", command=script, shell=True, stdin=latch.read_end, grace=grace, **CAPTURE
        )
        assert error.stdout == b"ready\n"
        assert children() == []


async def test_a_timeout_does_not_wait_for_a_grandchild_with_the_pipe(latch: Latch) -> None:
    script = f"cat /dev/fd/{latch.read_end} & echo ready; exec cat"
    error = await expired(
        "ready",
        command=script,
        shell=True,
        stdin=latch.read_end,
        pass_fds=[latch.read_end],
        stdout=PIPE,
    )
    assert error.stdout == b"ready\n"


async def test_a_timeout_after_the_exit_ends_the_wait_for_the_pipe(latch: Latch) -> None:
    script = f"cat /dev/fd/{latch.read_end} & echo ready"
    error = await expired(
        "ready", command=script, shell=True, pass_fds=[latch.read_end], stdout=PIPE
    )
    assert error.stdout == b"ready\n"


async def test_no_time_at_all_is_a_timeout() -> None:
    with pytest.raises(TimeoutExpired):
        await run_process(["cat"], stdin=PIPE, timeout=0)


async def test_endless_times_are_endless() -> None:
    inf = float("inf")
    result = await run_process(["echo"], stdout=PIPE, timeout=inf, grace=inf, drain=inf)
    assert result.stdout == b"\n"


@pytest.mark.any_backend
async def test_the_errors_can_be_pickled() -> None:
    for error in (
        TimeoutExpired(["a"], 1.5, b"o", b"e"),
        OutputLimitExceeded(["a"], 5, b"o", b"e"),
    ):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error)
        assert vars(copy) == vars(error)
        assert (copy.stdout, str(copy)) == (b"o", str(error))


# Groups.


def has_reader(latch: Latch) -> bool:
    """Whether anybody but this process holds its read end, which is closed here."""
    if latch.read_end >= 0:
        os.close(latch.read_end)
        latch.read_end = -1
    try:
        os.write(latch.write_end, b"x")
    except BrokenPipeError:
        return False
    return True


GROUPS = [
    pytest.param({"start_new_session": True}, id="session"),
    pytest.param({"process_group": 0}, id="group", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("options", GROUPS)
async def test_a_timeout_ends_the_group_that_the_child_leads(
    latch: Latch, options: dict[str, Any]
) -> None:
    member = f"(trap 'echo bye; exit' TERM; echo one; {ON}) </dev/fd/{latch.read_end}"
    error = await expired(
        "one",
        "two",
        command=f"{member} & trap 'echo bye; exit' TERM; echo two; {ON}",
        shell=True,
        pass_fds=[latch.read_end],
        stdout=PIPE,
        grace=60,
        **options,
    )
    assert sorted((error.stdout or b"").split()) == [b"bye", b"bye", b"one", b"two"]
    assert not has_reader(latch)


@pytest.mark.skipif(not KERNEL_SIGNALS_GROUPS, reason="a group without its leader needs Linux 6.9")
@pytest.mark.parametrize("options", GROUPS)
async def test_a_timeout_after_the_exit_ends_what_is_left_of_the_group(
    latch: Latch, options: dict[str, Any]
) -> None:
    script = f"exec cat </dev/fd/{latch.read_end} & echo one"
    for timeout in (0.05 * 2**n for n in range(12)):
        try:
            result = await run_process(
                script,
                shell=True,
                pass_fds=[latch.read_end],
                stdout=PIPE,
                timeout=timeout,
                **options,
            )
        except TimeoutExpired as error:
            if error.stdout:
                break
        else:
            pytest.fail(f"it ended: {result}")
    assert not has_reader(latch)


@pytest.mark.parametrize("options", GROUPS)
async def test_a_cancellation_kills_the_group_that_the_child_leads(
    latch: Latch, options: dict[str, Any]
) -> None:
    started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    script = f"(trap '' TERM; echo one; exec cat) </dev/fd/{latch.read_end} & wait"
    running = asyncio.ensure_future(
        run_process(
            script,
            shell=True,
            pass_fds=[latch.read_end],
            stdout=lambda _: started.set_result(None),
            **options,
        )
    )
    await started
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await until(lambda: not has_reader(latch))


# A pipe that a grandchild holds.


async def test_the_end_of_a_pipe_is_waited_for_though_the_child_has_exited(latch: Latch) -> None:
    script = f"echo one; cat /dev/fd/{latch.read_end} & exit 4"
    running = asyncio.ensure_future(
        run_process(script, shell=True, pass_fds=[latch.read_end], stdout=PIPE)
    )
    await until(lambda: children() != [])
    await until(lambda: children() == [])
    await turns(100)
    assert not running.done()
    latch.release(b"two\n")
    result = await running
    assert (result.returncode, result.stdout, result.truncated) == (4, b"one\ntwo\n", False)


@pytest.mark.parametrize("drain", [0, 0.01])
async def test_a_drain_is_how_long_it_is_waited_for(latch: Latch, drain: float) -> None:
    script = f"seq 5000; echo error >&2; cat /dev/fd/{latch.read_end} & exit 4"
    result = await run_process(
        script, shell=True, pass_fds=[latch.read_end], capture_output=True, drain=drain
    )
    assert (result.returncode, result.stderr, result.truncated) == (4, b"error\n", True)
    assert list(map(int, result.stdout.split())) == list(range(1, 5001))


async def test_a_drain_cuts_a_character_that_is_not_whole(latch: Latch) -> None:
    script = rf"printf 'one\303'; cat /dev/fd/{latch.read_end} & exit 4"
    result = await run_process(
        script, shell=True, pass_fds=[latch.read_end], stdout=PIPE, drain=0, encoding="utf-8"
    )
    assert (result.stdout, result.truncated) == ("one\N{REPLACEMENT CHARACTER}", True)


async def test_what_ends_within_the_drain_is_whole() -> None:
    result = await run_process(["seq", "5000"], stdout=PIPE, drain=60)
    assert (len(result.stdout.split()), result.truncated) == (5000, False)


@pytest.mark.parametrize("drain", [0, 0.01])
async def test_a_slow_consumer_is_no_open_pipe(drain: float) -> None:
    """All that is in the pipe when the drain is over is handed on."""
    lines: list[bytes] = []

    async def consume(line: bytes) -> None:
        if not lines:
            await until(lambda: children() == [])
            await turns(100)
            await asyncio.sleep(drain)
            await turns(100)
        lines.append(line)

    result = await run_process("seq 100; seq 100", shell=True, stdout=consume, drain=drain)
    assert (len(lines), result.truncated) == (200, False)


def pipes() -> dict[int, str]:
    """What this process has open of pipes."""
    return {n: what for n, what in open_descriptors().items() if what.startswith("pipe:")}


@pytest.mark.parametrize("size", [1_000_000, 2**21])
async def test_input_that_nobody_takes_is_given_up_after_the_drain(latch: Latch, size: int) -> None:
    before = pipes()
    script = f"exec 3<&0; cat /dev/fd/{latch.read_end} <&3 >/dev/null & exit 4"
    result = await run_process(
        script, shell=True, pass_fds=[latch.read_end], input=b"x" * size, drain=0
    )
    assert (result.returncode, result.truncated) == (4, False)
    for _ in range(5):  # libuv closes what was aborted in a later turn
        await asyncio.sleep(0)
    assert pipes() == before


# Limits.


@pytest.mark.parametrize("name", ["stdout", "stderr"])
async def test_more_than_the_limit_is_an_error_with_what_there_was(name: str) -> None:
    script = "yes" if name == "stdout" else "yes >&2"
    with pytest.raises(OutputLimitExceeded, match="wrote more than 1000001 bytes") as caught:
        await run_process(script, shell=True, capture_output=True, output_limit=1_000_001)
    error = caught.value
    assert isinstance(error, subprocess.SubprocessError)
    assert (error.cmd, error.limit) == (script, 1_000_001)
    output = {"stdout": b"", "stderr": b"", name: (b"y\n" * 500_001)[:-1]}
    assert (error.stdout, error.output, error.stderr) == (
        output["stdout"],
        output["stdout"],
        output["stderr"],
    )


async def test_the_limit_itself_is_no_error() -> None:
    result = await run_process(["seq", "9"], stdout=PIPE, output_limit=18)
    assert len(result.stdout) == 18
    with pytest.raises(OutputLimitExceeded) as caught:
        await run_process(["seq", "9"], stdout=PIPE, output_limit=17, text=True)
    assert caught.value.stdout == "1\n2\n3\n4\n5\n6\n7\n8\n9"


async def test_a_limit_of_nothing_permits_nothing() -> None:
    assert (await run_process(["true"], stdout=PIPE, output_limit=0)).stdout == b""
    with pytest.raises(OutputLimitExceeded) as caught:
        await run_process(["echo"], stdout=PIPE, output_limit=0)
    assert caught.value.stdout == b""


async def test_a_limit_holds_for_lines_too() -> None:
    lines: list[bytes] = []
    with pytest.raises(OutputLimitExceeded) as caught:
        await run_process(["yes"], stdout=lines.append, output_limit=1001)
    assert caught.value.stdout is None
    assert b"".join(lines) == (b"y\n" * 501)[:1001]


@pytest.mark.slow
@pytest.mark.parametrize("loop", _LOOPS)
def test_memory_stays_within_the_limit(loop: str) -> None:
    """10 MB of `yes`: the peak of the parent's memory grows by less than 32 MiB."""
    done = run_program("limited", loop, development_mode=False)
    done.expect_no_error()
    grown, whole = done.stdout.split()
    assert (0 < int(grown) < 32, whole) == (True, "True")


# Lines to consumers.


async def test_lines_are_handed_on_with_their_ends() -> None:
    out: list[bytes] = []
    err: list[bytes] = []
    result = await run_process(
        r"printf 'one\n\ntwo\r\nthree'; printf 'four\n' >&2; exit 3",
        shell=True,
        stdout=out.append,
        stderr=err.append,
    )
    assert out == [b"one\n", b"\n", b"two\r\n", b"three"]
    assert err == [b"four\n"]
    assert (result.returncode, result.stdout, result.stderr) == (3, None, None)


async def test_lines_are_text_in_text_mode() -> None:
    lines: list[str] = []
    # The pause between its bytes has a character come in two pieces.
    script = r"printf 'one\r\ntwo\rthr\303'; read line; printf '\251\nfour\r'"
    source, sink = os.pipe()

    def consume(line: str) -> None:
        lines.append(line)
        if line == "two\n":
            os.write(sink, b"\n")

    await run_process(script, shell=True, stdin=source, stdout=consume, encoding="utf-8")
    os.close(source)
    os.close(sink)
    assert lines == ["one\n", "two\n", "thr\N{LATIN SMALL LETTER E WITH ACUTE}\n", "four\n"]


async def test_a_long_line_comes_whole() -> None:
    lines: list[bytes] = []
    await run_process("head -c 1000000 /dev/zero; echo; echo", shell=True, stdout=lines.append)
    assert lines == [bytes(1_000_000) + b"\n", b"\n"]


async def test_both_streams_can_go_to_one_consumer() -> None:
    lines: list[bytes] = []
    script = "echo one; echo two >&2; echo three"
    await run_process(script, shell=True, stdout=lines.append, stderr=aioreap.STDOUT)
    assert lines == [b"one\n", b"two\n", b"three\n"]


@pytest.mark.slow
async def test_one_stream_can_be_kept_while_the_other_is_handed_on() -> None:
    lines: list[str] = []
    script = "seq 100000 & seq 100000 >&2; wait"
    result = await run_process(script, shell=True, stdout=PIPE, stderr=lines.append, text=True)
    assert list(map(int, lines)) == list(map(int, result.stdout.split())) == [*range(1, 100_001)]


async def test_a_file_with_a_call_is_a_file(tmp_path: Path) -> None:
    class File(io.FileIO):
        def __call__(self, _line: bytes) -> None:
            raise AssertionError

    with File(tmp_path / "file", "w") as file:
        await run_process(["echo", "one"], stdout=file)
    assert (tmp_path / "file").read_bytes() == b"one\n"


@pytest.mark.parametrize("timeout", [None, 60])
async def test_a_line_is_awaited_before_the_next_is_handed_on(timeout: float | None) -> None:
    events: list[tuple[str, bytes]] = []

    async def consume(line: bytes) -> None:
        events.append(("begin", line))
        await asyncio.sleep(0)
        events.append(("end", line))

    await run_process(["seq", "3"], stdout=consume, timeout=timeout)
    lines = [b"1\n", b"2\n", b"3\n"]
    assert events == [(what, line) for line in lines for what in ("begin", "end")]


async def test_a_slow_consumer_slows_the_child_down() -> None:
    """`yes` does nothing but write, and is held up before it has written a MiB."""
    written = 0

    async def consume(_line: bytes) -> None:
        nonlocal written
        (pid,) = children()
        state = Path(f"/proc/{pid}/stat")
        await until(lambda: state.read_text().rpartition(")")[2].split()[0] == "S")
        await turns(1000)
        for line in Path(f"/proc/{pid}/io").read_text().splitlines():
            if line.startswith("wchar:"):
                written = int(line.split()[1])
        raise StopIteration

    with pytest.raises(RuntimeError, match="StopIteration"):
        await run_process(["yes"], stdout=consume)
    assert 0 < written < 2**20


class ConsumerError(Exception):
    """What a consumer raises."""


async def _raise(_line: object) -> None:
    await asyncio.sleep(0)
    raise ConsumerError


def _raise_at_once(_line: object) -> None:
    raise ConsumerError


@pytest.mark.parametrize("consume", [_raise, _raise_at_once])
@pytest.mark.parametrize(
    "script",
    [
        "yes",
        pytest.param("echo one", marks=pytest.mark.slow),
        pytest.param("echo one; exec cat", marks=pytest.mark.slow),
        pytest.param("yes & yes >&2", marks=pytest.mark.slow),
    ],
)
async def test_what_a_consumer_raises_is_raised_when_the_child_has_ended(
    consume: Any, script: str, latch: Latch
) -> None:
    with pytest.raises(ConsumerError):
        await run_process(script, shell=True, stdin=latch.read_end, stdout=consume, stderr=PIPE)
    assert children() == []


async def test_output_that_cannot_be_decoded_ends_the_child() -> None:
    lines: list[str] = []
    with pytest.raises(UnicodeDecodeError):
        await run_process(
            r"echo one; printf '\377\n'; exec yes >&2",
            shell=True,
            encoding="utf-8",
            stdout=lines.append,
            stderr=aioreap.DEVNULL,
        )
    assert children() == []


async def test_an_interrupt_in_a_consumer_leaves_no_child(backend: str) -> None:
    """KeyboardInterrupt goes through the loop: nothing can be awaited."""

    def interrupt(_line: bytes) -> None:
        raise GeneratorExit

    with pytest.raises(GeneratorExit):
        await run_process(["yes"], stdout=interrupt)
    await until(lambda: children() == [])


async def test_lines_are_handed_on_in_the_grace(latch: Latch) -> None:
    for timeout in (0.05 * 2**n for n in range(12)):
        lines: list[bytes] = []
        with pytest.raises(TimeoutExpired) as caught:
            await run_process(
                f"trap 'echo bye; exit' TERM; echo ready; {ON}",
                shell=True,
                stdin=latch.read_end,
                stdout=lines.append,
                timeout=timeout,
                grace=60,
            )
        assert caught.value.stdout is None
        if lines:
            break
    assert lines == [b"ready\n", b"bye\n"]


async def test_a_consumer_that_hangs_is_cancelled_when_timeout_and_grace_are_over() -> None:
    cancelled = []

    async def consume(line: bytes) -> None:
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            cancelled.append(line)
            raise

    for timeout in (0.05 * 2**n for n in range(12)):
        with pytest.raises(TimeoutExpired):
            await run_process(["yes"], stdout=consume, timeout=timeout, grace=0.01)
        if cancelled:
            break
    assert cancelled == [b"y\n"]
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_a_timeout_of_the_consumers_own_is_its_error() -> None:
    async def consume(_line: bytes) -> None:
        async with asyncio.timeout(0):
            await asyncio.get_running_loop().create_future()

    with pytest.raises(TimeoutError) as caught:
        await run_process(["yes"], stdout=consume, timeout=60)
    assert type(caught.value) is TimeoutError


# Cancellation.


async def _slow(_line: object) -> None:
    await asyncio.sleep(0)
    await asyncio.sleep(0)


WAYS: dict[str, dict[str, Any]] = {
    "kept": {"input": b"x" * 100_000, "capture_output": True},
    "no-pipes": {"stdin": aioreap.DEVNULL, "stdout": aioreap.DEVNULL},
    "lines": {"stdout": _slow, "stderr": _slow, "text": True, "input": "x\n" * 100},
    "timeout": {"input": b"x", "stdout": _slow, "timeout": 60, "drain": 1},
    "session": {"input": b"x", "stdout": PIPE, "start_new_session": True},
}


@pytest.mark.parametrize("again", [False, True], ids=["once", "at-each-turn"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, id=name, marks=[] if name == "lines" else pytest.mark.slow)
        for name, options in WAYS.items()
    ],
)
async def test_a_cancellation_at_any_turn_leaves_nothing(
    options: dict[str, Any], again: bool
) -> None:
    """Later and later, until the call is over before it is cancelled."""
    await run_process(["cat"], input=b"", capture_output=True)
    before = open_descriptors()
    for turn in itertools.accumulate(range(200), lambda count, _: count + 1 + count // 8):
        running = asyncio.ensure_future(
            run_process("echo one; echo two >&2; exec cat", shell=True, **options)
        )
        await turns(turn)
        running.cancel()
        while not running.done():
            await asyncio.sleep(0)
            if again:
                running.cancel()
        if not running.cancelled():
            break
        if again:  # then nobody waits for a child that dies slowly; the loop does the rest
            await until(lambda: not children() and open_descriptors() == before)
        assert children() == []
        assert open_descriptors() == before
    assert running.result().returncode == 0
    assert turn > 0


@pytest.mark.slow
async def test_a_cancellation_at_each_turn_takes_less_than_50_ms_of_processor_time() -> None:
    """As anyio's scopes cancel; what is measured is the processor's time, not the clock's."""
    for turn in (0, 1, 10, 100):
        running = asyncio.ensure_future(run_process(["sleep", "1000"], capture_output=True))
        await turns(turn)
        begin = time.thread_time()
        while not running.done():
            running.cancel()
            await asyncio.sleep(0)
        assert time.thread_time() - begin < 0.05
        await until(lambda: children() == [])


@pytest.mark.parametrize("consume", [PIPE, _slow], ids=["kept", "lines"])
async def test_a_cancelled_call_kills_at_once(consume: Any, latch: Latch) -> None:
    """A child that does not heed SIGTERM, without any grace."""
    started: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def ready(_line: bytes) -> None:
        if not started.done():
            started.set_result(None)

    running = asyncio.ensure_future(
        run_process(
            "trap '' TERM; echo ready >&2; exec cat",
            shell=True,
            stdin=latch.read_end,
            stdout=consume,
            stderr=ready,
            grace=1000,
        )
    )
    await started
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert children() == []


@pytest.mark.parametrize(
    "options",
    [
        {"stdout": PIPE, "timeout": 0.1},
        {"stdout": PIPE, "output_limit": 5},
        {"stdout": _raise},
        {"stdout": _raise_at_once},
    ],
    ids=["timeout", "limit", "consumer", "function"],
)
async def test_a_cancellation_in_the_grace_kills_at_once(
    options: dict[str, Any], latch: Latch
) -> None:
    """Whatever the child was stopped for, it gets no more time."""
    loop = asyncio.get_running_loop()
    stopped, told = os.pipe()
    script = f"trap 'echo >/dev/fd/{told}' TERM; echo ready; {ON}"
    for factor in (2**n for n in range(12)):
        if "timeout" in options:
            options = {**options, "timeout": 0.05 * factor}
        heard: asyncio.Future[Any] = loop.create_future()
        loop.add_reader(stopped, heard.cancel)
        running: asyncio.Future[Any] = asyncio.ensure_future(
            run_process(
                script, shell=True, stdin=latch.read_end, pass_fds=[told], grace=1000, **options
            )
        )
        await asyncio.wait([running, heard], return_when=asyncio.FIRST_COMPLETED)
        loop.remove_reader(stopped)
        if not running.done():
            break
        assert isinstance(running.exception(), TimeoutExpired)  # it had no trap yet
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert children() == []
    os.close(stopped)
    os.close(told)


async def test_a_call_that_is_closed_while_it_waits_leaves_nothing(latch: Latch) -> None:
    """Thrown away by whoever drives it: GeneratorExit, and nothing can be awaited."""
    call: Any = run_process(["cat"], stdin=latch.read_end, capture_output=True)
    future = call.send(None)
    while "next_chunk" not in names_of(call):
        await asyncio.wait([future])
        future = call.send(None)
    call.close()
    await until(lambda: children() == [])


def names_of(call: Any) -> list[str]:
    """The coroutines that a call consists of."""
    found = []
    while hasattr(call, "cr_await"):
        found.append(call.__name__)
        call = call.cr_await
    return found
