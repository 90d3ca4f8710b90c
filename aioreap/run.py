"""run_process(): subprocess.run for asyncio."""

from __future__ import annotations

import asyncio
import operator
import os
import subprocess
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeAlias, Unpack

from aioreap.completed import CompletedProcess, OutputLimitExceeded, TimeoutExpired
from aioreap.lines import LineCutter
from aioreap.options import Options, Stdio, StrOrBytesPath
from aioreap.process import PIPE, subprocess_exec, subprocess_shell
from aioreap.running import Run
from aioreap.stopping import DEFAULT_GRACE, seconds
from aioreap.text import TextCodec
from aioreap.transport import LONGEST_TIMER

__all__ = ["RunOptions", "run_process"]

_OUTPUTS: Final = ((1, "stdout"), (2, "stderr"))

Output: TypeAlias = Stdio | Callable[[Any], object]


class RunOptions(Options, total=False):
    """What run_process() takes by keyword beside its own: subprocess.run's.

    Attributes:
        input: what stdin reads: bytes, or a str in text mode.
        capture_output: the same as PIPE for both stdout and stderr.
        stdin: as for create_subprocess_exec(); PIPE without `input` is an empty one.
        stdout: as there; or a callable, called with each line.
        stderr: the same.
        check: raise subprocess.CalledProcessError for a returncode other than 0.
        timeout: how many seconds all of it may take, the start of the program too.
        text: output is str, with universal newlines, and so is `input`.
        universal_newlines: the older name of `text`.
        encoding: that of the text, None for the locale's; turns text mode on.
        errors: how to treat what cannot be decoded or encoded; turns text mode on.
    """

    input: str | bytes | bytearray | memoryview | None
    capture_output: bool
    stdin: Stdio
    stdout: Output
    stderr: Output
    check: bool
    timeout: float | None
    text: bool | None
    universal_newlines: bool | None
    encoding: str | None
    errors: str | None


def _seconds(name: str, given: float) -> float:
    return float(min(seconds(name, given), LONGEST_TIMER))


def _seconds_or_none(name: str, given: float | None) -> float | None:
    return None if given is None else _seconds(name, given)


def _take_codec(options: dict[str, Any]) -> TextCodec | None:
    text, newlines = options.pop("text", None), options.pop("universal_newlines", None)
    encoding, errors = options.pop("encoding", None), options.pop("errors", None)
    if text is not None and newlines is not None and bool(text) != bool(newlines):
        raise subprocess.SubprocessError(
            "text and universal_newlines are two names of one thing, and differ"
        )
    return TextCodec(encoding, errors) if text or newlines or encoding or errors else None


def _encoded(given: Any, codec: TextCodec | None) -> bytes | memoryview | None:
    if given is None:
        return None
    if codec is None:
        return given if type(given) is bytes else memoryview(given).cast("B")
    if not isinstance(given, str):
        raise TypeError(f"input must be str in text mode, not {type(given).__name__}")
    return codec.encode(given)


def _words(command: Any, *, shell: bool) -> Sequence[Any]:
    """The command in the form in which it is spawned."""
    if shell:
        if not isinstance(command, (str, bytes)):
            raise TypeError(
                f"shell=True takes a string, not {type(command).__name__}: what follows the "
                "first item of a sequence would not reach the command"
            )
        return (command,)
    if isinstance(command, (str, bytes, os.PathLike)):
        raise TypeError(
            "a command without shell=True is a sequence of the program and its arguments, "
            f"not {type(command).__name__}"
        )
    words = tuple(command)
    if not words:
        raise ValueError("the command is empty")
    return words


def _take_input(options: dict[str, Any], codec: TextCodec | None) -> bytes | memoryview | None:
    given = options.pop("input", None)
    if given is not None:
        if options.get("stdin") is not None:
            raise ValueError("stdin and input arguments may not both be used.")
        options["stdin"] = PIPE
    return _encoded(given, codec)


def _take_outputs(options: dict[str, Any]) -> dict[int, Callable[[Any], object]]:
    """The consumers, by descriptor; there are pipes in their place."""
    given = {fd: options.get(name) for fd, name in _OUTPUTS}
    if options.pop("capture_output", False):
        if any(output is not None for output in given.values()):
            raise ValueError("stdout and stderr arguments may not be used with capture_output.")
        given = dict.fromkeys(given, PIPE)
    consumers = {
        fd: output
        for fd, output in given.items()
        if callable(output) and not hasattr(output, "fileno")
    }
    for fd, name in _OUTPUTS:
        options[name] = PIPE if fd in consumers else given[fd]
    return consumers


def _check_limit(limit: int | None, *, has_output: bool) -> None:
    if limit is None:
        return
    if operator.index(limit) < 0:
        raise ValueError(f"output_limit must be a number of bytes, not negative, got {limit}")
    if not has_output:
        raise ValueError("output_limit needs stdout or stderr to be PIPE or a callable")


async def run_process(
    command: StrOrBytesPath | Iterable[StrOrBytesPath],
    *,
    shell: bool = False,
    grace: float = DEFAULT_GRACE,
    drain: float | None = None,
    output_limit: int | None = None,
    **rest: Unpack[RunOptions],
) -> CompletedProcess[Any]:
    """Run a command to its end: subprocess.run, with the same arguments and more.

    `command` is a sequence of the program and its arguments, or with `shell` a
    string for /bin/sh; for `rest` see RunOptions. Output is collected as bytes, or as
    str in text mode, of each stream that is PIPE.

    stdout and stderr can also be a callable, which is called with each line (its
    end included, that the last can lack). What it returns is awaited if it can be.
    Only then the next line is read: a slow consumer slows the child down. There is
    one call at a time, for both streams.

    When `timeout` seconds have gone by, the child is stopped: SIGTERM, and SIGKILL if it
    has not ended `grace` seconds later, both to its process group if it leads one.
    What it still writes is collected or passed on, but a callable that is still
    awaited at that time is cancelled.

    `output_limit` is how many bytes each stream may bring: of more, no more is
    read, and the child is stopped.

    A child of the child can hold a pipe open after the exit. Its end is waited for
    as long as `drain` seconds (None: without limit, as subprocess.run does). Then the
    result has what was written by then, and is ``truncated``. When the child was
    stopped, that is not waited for.

    Cancelled, it kills the child (its group if it leads one), waits until that is
    gone and raises CancelledError.

    Raises:
        subprocess.CalledProcessError: with `check`, the returncode is not 0.
        TimeoutExpired: the time is over; it is a subprocess.TimeoutExpired and a TimeoutError.
        OutputLimitExceeded: see above. These three have all output up to there.
        ExitStatusLost: nobody can know how the child ended.
        MemoryError: there is no memory for the output; the child was stopped.
        UnicodeError: text mode cannot decode the output or encode the input.
        Exception: what a callable raised, after the child was stopped.
        OSError, ValueError, TypeError, LookupError, subprocess.SubprocessError: as
            create_subprocess_exec() and subprocess.run.
    """
    options: dict[str, Any] = {**rest}
    words = _words(command, shell=shell)
    codec = _take_codec(options)
    check = options.pop("check", False)
    timeout = _seconds_or_none("timeout", given := options.pop("timeout", None))
    data = _take_input(options, codec)
    consumers = _take_outputs(options)
    kept = [fd for fd, name in _OUTPUTS if options[name] == PIPE and fd not in consumers]
    _check_limit(output_limit, has_output=bool(kept or consumers))
    run = Run(
        asyncio.get_running_loop(),
        timeout=timeout,
        grace=_seconds("grace", grace),
        drain=_seconds_or_none("drain", drain),
        limit=output_limit,
        kept=kept,
        lines={fd: LineCutter(consumer, codec) for fd, consumer in consumers.items()},
    )
    await run.start(subprocess_shell if shell else subprocess_exec, *words, **options)
    exit_info = await run.finish(data)
    capture = run.capture
    cut = run.timed_out or capture.exceeded or capture.truncated
    outputs: list[Any] = [capture.take_output(fd) for fd, _ in _OUTPUTS]
    if codec is not None:
        outputs = [None if o is None else codec.decode(o, cut=cut) for o in outputs]
    if run.timed_out:
        raise TimeoutExpired(command, given, *outputs)
    if capture.exceeded:
        assert output_limit is not None
        raise OutputLimitExceeded(command, output_limit, *outputs)
    assert exit_info is not None
    result = CompletedProcess(
        command,
        exit_info.returncode,
        *outputs,
        exit_info=exit_info,
        truncated=capture.truncated,
    )
    if check:
        result.check_returncode()
    return result
