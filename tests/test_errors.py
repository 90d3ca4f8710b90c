"""Bad arguments: the errors are subprocess.Popen's, and nothing is left behind."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from apart import Factory, as_root, become_an_ordinary_user, on_both_loops, run_apart
from conftest import children

import aioreap


class Case(NamedTuple):
    """A call that fails: what Popen gets, and what is different here if that is on purpose."""

    program: Any = "true"
    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] = {}  # noqa: RUF012
    differs: Exception | None = None
    because: str = ""


class NoError(Exception):
    """The call was no error."""


def fails() -> None:
    raise KeyError("of the test")


def closed_file() -> Any:
    with open(os.devnull, "rb") as file:
        pass
    return file


NOT_OPEN = 20_000
LONGEST_ARGUMENT = 32 * os.sysconf("SC_PAGESIZE")  # MAX_ARG_STRLEN
BAD_DESCRIPTOR = OSError(errno.EBADF, "Bad file descriptor")

# {here} is a directory made by tree().
CASES: dict[str, dict[str, Case]] = {
    "program": {
        "missing": Case("/nonexistent/program"),
        "missing in the path": Case("aioreap-has-no-such-program"),
        "missing as bytes": Case(b"/nonexistent/program"),
        "missing as a path": Case(Path("/nonexistent/program")),
        "missing executable": Case(options={"executable": "/nonexistent/program"}),
        "missing executable in the path": Case(
            options={"executable": "aioreap-has-no-such-program"}
        ),
        "missing in the path of env": Case(options={"env": {"PATH": "/nonexistent"}}),
        "missing with an empty path": Case("aioreap-none", options={"env": {"PATH": ""}}),
        "missing and cwd": Case("./program", options={"cwd": "/"}),
        "not executable": Case("{here}/plain"),
        "not executable in the path": Case("plain", options={"env": {"PATH": "{here}"}}),
        "a directory": Case("{here}"),
        "a directory in the path": Case("directory", options={"env": {"PATH": "{here}"}}),
        "below a file": Case("{here}/plain/program"),
        "a text file without #!": Case("{here}/text"),
        "an interpreter that is missing": Case("{here}/script"),
        "an empty file": Case("{here}/empty"),
        "a loop of links": Case("{here}/loop"),
        "a name that is too long": Case("/" + "x" * 5000),
        "an empty name": Case(""),
        "an empty name as bytes": Case(b""),
        "an empty executable": Case(options={"executable": ""}),
        "a name with NUL": Case("tr\0ue"),
        "an executable with NUL": Case(options={"executable": "tr\0ue"}),
        "a number as a program": Case(5),
        "none as a program": Case(None),
        "a list as a program": Case(["true"]),
    },
    "arguments": {
        "an argument with NUL": Case(arguments=("a\0b",)),
        "an argument with NUL as bytes": Case(arguments=(b"a\0b",)),
        "an argument that is too long": Case(arguments=("x" * LONGEST_ARGUMENT,)),
        "arguments that are too many": Case(arguments=("x" * 1000,) * 10_000),
        "a number as an argument": Case(arguments=(5,)),
        "an argument with a lone surrogate": Case(arguments=("\ud800",)),
    },
    "environment": {
        "env that is a list": Case(options={"env": [("A", "1")]}),
        "env that is a number": Case(options={"env": 5}),
        "env that is a list, and a program with a slash": Case(
            "/bin/true", options={"env": ["A=1"]}
        ),
        "an env name with =": Case(options={"env": {"A=B": "1"}}),
        "an env name with NUL": Case(options={"env": {"A\0": "1"}}),
        "an env value with NUL": Case(options={"env": {"A": "1\0"}}),
        "a number as an env name": Case(options={"env": {1: "1"}}),
        "a number as an env value": Case(options={"env": {"A": 1}}),
        "none as an env value": Case(options={"env": {"A": None}}),
        "env that is too long": Case(options={"env": {"A": "x" * LONGEST_ARGUMENT}}),
    },
    "cwd": {
        "cwd that is missing": Case(options={"cwd": "/nonexistent/cwd"}),
        "cwd that is missing, as bytes": Case(options={"cwd": b"/nonexistent/cwd"}),
        "cwd that is missing, as a path": Case(options={"cwd": Path("/nonexistent/cwd")}),
        "cwd and program that are missing": Case(
            "/nonexistent/a", options={"cwd": "/nonexistent/b"}
        ),
        "cwd that is a file": Case(options={"cwd": "{here}/plain"}),
        "cwd that is empty": Case(options={"cwd": ""}),
        "cwd with NUL": Case(options={"cwd": "/\0"}),
        "cwd that is a number": Case(options={"cwd": 5}),
        "cwd that is a list": Case(options={"cwd": ["/"]}),
    },
    "descriptors": {
        "pass_fds not open": Case(options={"pass_fds": (NOT_OPEN,)}),
        "pass_fds negative": Case(options={"pass_fds": (-1,)}),
        "pass_fds too large": Case(options={"pass_fds": (2**31,)}),
        "pass_fds far too large": Case(options={"pass_fds": (2**80,)}),
        "pass_fds a number": Case(options={"pass_fds": 5}),
        "pass_fds of strings": Case(
            options={"pass_fds": ("1",)},
            differs=TypeError("'str' object cannot be interpreted as an integer"),
            because="Popen takes whatever int() takes",
        ),
        "pass_fds of floats": Case(
            options={"pass_fds": (1.5,)},
            differs=TypeError("'float' object cannot be interpreted as an integer"),
            because="Popen takes whatever int() takes",
        ),
        "pass_fds none": Case(options={"pass_fds": None}),
        "stdin a closed file": Case(options={"stdin": closed_file()}),
        "stdout a closed file": Case(options={"stdout": closed_file()}),
        "stdin not open": Case(options={"stdin": NOT_OPEN}),
        "stdout not open": Case(options={"stdout": NOT_OPEN}),
        "stderr not open": Case(options={"stderr": NOT_OPEN, "stdin": -1, "stdout": -1}),
        "stdin a string": Case(options={"stdin": "file"}),
        "stdin a float": Case(options={"stdin": 1.5}),
        "stdin without a descriptor": Case(options={"stdin": io.BytesIO()}),
        "stdout a string after a pipe": Case(options={"stdin": -1, "stdout": "file"}),
        "stdin too large": Case(options={"stdin": 2**31}),
        "stdin STDOUT": Case(
            options={"stdin": -2},
            differs=ValueError("STDOUT can only be used for stderr"),
            because="Popen takes it for none at all before Python 3.15",
        ),
        "stdout STDOUT": Case(
            options={"stdout": -2},
            differs=ValueError("STDOUT can only be used for stderr"),
            because="Popen takes it for none at all before Python 3.13",
        ),
        "stdin negative": Case(options={"stdin": -7}),
        "stdin more negative": Case(options={"stdin": -10}),
        "stdin as negative as can be": Case(options={"stdin": -(2**31)}),
        "pipesize a string": Case(options={"stdin": -1, "pipesize": "8192"}),
        "pipesize a float": Case(options={"stdout": -1, "pipesize": 8192.0}),
        "pipesize without end": Case(options={"stdout": -1, "pipesize": 2**31}),
        "pipesize a string, and no pipe": Case(options={"pipesize": "8192"}),
    },
    "attributes": {
        "umask a string": Case(options={"umask": "022"}),
        "umask none": Case(options={"umask": None}),
        "umask over 32 bits": Case(options={"umask": 2**40}),
        "process_group a string": Case(options={"process_group": "0"}),
        "process_group negative": Case(
            options={"process_group": -1},
            differs=ValueError("process_group cannot be negative, got -1"),
            because="Popen takes it for none at all",
        ),
        "process_group over 32 bits": Case(options={"process_group": 2**40}),
        "process_group of nobody": Case(options={"process_group": 2**22 + 1}),
        "process_group in a new session": Case(
            options={"process_group": 0, "start_new_session": True}
        ),
        "user unknown": Case(options={"user": "aioreap-nobody"}),
        "user negative": Case(options={"user": -1}),
        "user too large": Case(
            options={"user": 2**32},
            differs=OverflowError("user ID is greater than maximum"),
            because="Popen speaks of uid, gid and, at times, of the minimum",
        ),
        "user the largest": Case(
            options={"user": 2**32 - 1},
            differs=OverflowError("user ID is greater than maximum"),
            because="it is -1 to the kernel: Popen would change nothing, and say nothing",
        ),
        "user over 64 bits": Case(
            options={"user": 2**64},
            differs=OverflowError("user ID is greater than maximum"),
            because="Popen speaks of uid, gid and, at times, of the minimum",
        ),
        "user a float": Case(options={"user": 1.5}),
        "user bytes": Case(options={"user": b"root"}),
        "user with NUL": Case(options={"user": "a\0b"}),
        "group unknown": Case(options={"group": "aioreap-nobody"}),
        "group negative": Case(options={"group": -1}),
        "group over 64 bits": Case(
            options={"group": 2**64},
            differs=OverflowError("group ID is greater than maximum"),
            because="Popen speaks of uid, gid and, at times, of the minimum",
        ),
        "group a float": Case(options={"group": 1.5}),
        "extra_groups a string": Case(options={"extra_groups": "root"}),
        "extra_groups a number": Case(options={"extra_groups": 5}),
        "extra_groups unknown": Case(options={"extra_groups": ["aioreap-nobody"]}),
        "extra_groups negative": Case(options={"extra_groups": [0, -1]}),
        "extra_groups too large": Case(options={"extra_groups": [2**32]}),
        "extra_groups over 64 bits": Case(options={"extra_groups": [2**64]}),
        "extra_groups of floats": Case(options={"extra_groups": [1.5]}),
        "extra_groups too many": Case(options={"extra_groups": [0] * 70_000}),
        "preexec_fn raising": Case(options={"preexec_fn": fails}),
        "preexec_fn a string": Case(options={"preexec_fn": "true"}),
        "startupinfo": Case(options={"startupinfo": 1}),
        "creationflags": Case(options={"creationflags": 1}),
    },
}

if sys.version_info[:2] == (3, 12):
    del CASES["attributes"]["process_group over 32 bits"]  # Popen takes the lower bits of it

# What Popen says from Python 3.12 or 3.13 on, and said before, as aioreap does.
REWORDED = {
    "Python int too large to convert to C int": "signed integer is greater than maximum",
    "too many extra_groups": "too many groups",
    "'list' object has no attribute 'keys'": "'list' object has no attribute 'items'",
}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with programs that cannot run."""
    path = tmp_path_factory.mktemp("programs")
    (path / "plain").write_text("#!/bin/sh\n")
    (path / "directory").mkdir()
    contents = {"text": "echo hello\n", "script": "#!/nonexistent/interpreter\n", "empty": ""}
    for name, content in contents.items():
        (path / name).write_text(content)
        (path / name).chmod(0o755)
    (path / "loop").symlink_to("loop")
    return path


def placed(value: Any, here: Path) -> Any:
    """`value` with {here} in its strings replaced."""
    if isinstance(value, str):
        return value.replace("{here}", str(here))
    if isinstance(value, dict):
        return {key: placed(item, here) for key, item in value.items()}
    return value


def seen(error: BaseException) -> dict[str, Any]:
    """What a user sees of an error, on any Python."""
    if isinstance(error, OSError):
        names = ("errno", "strerror", "filename", "filename2")
        attributes = {name: getattr(error, name) for name in names}
        if isinstance(error.filename, os.PathLike):  # from Python 3.13 on, Popen has the string
            attributes["filename"] = os.fspath(error.filename)
        return {"type": type(error), **attributes}
    return {"type": type(error), "message": REWORDED.get(str(error), str(error))}


def error_of_popen(program: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Exception:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(subprocess.Popen([program, *arguments], **options))
        except Exception as error:  # noqa: BLE001
            return error
    return NoError()


async def error_of_ours(
    program: Any, arguments: tuple[Any, ...], options: dict[str, Any]
) -> Exception:
    try:
        process = await aioreap.create_subprocess_exec(program, *arguments, **options)
    except Exception as error:  # noqa: BLE001
        return error
    await process.communicate()
    return NoError()


@pytest.mark.parametrize("topic", CASES)
async def test_the_errors_are_popens(topic: str, here: Path) -> None:
    differing = {}
    for name, case in CASES[topic].items():
        call = (placed(case.program, here), case.arguments, placed(case.options, here))
        ours = seen(await error_of_ours(*call))
        theirs = seen(case.differs or error_of_popen(*call))
        assert children() == [], name
        if ours != theirs:
            differing[name] = {"aioreap": ours, "subprocess": theirs}
    assert not differing


@pytest.mark.any_backend
def test_each_difference_from_popen_is_one_and_has_a_reason() -> None:
    for case in itertools.chain.from_iterable(topic.values() for topic in CASES.values()):
        assert bool(case.differs) == bool(case.because)
        if case.differs and "before Python" not in case.because:
            found = error_of_popen(case.program, case.arguments, case.options)
            assert seen(found) != seen(case.differs)


@pytest.mark.parametrize(
    "case",
    [
        CASES["program"]["missing"],
        CASES["arguments"]["an argument that is too long"],
        CASES["cwd"]["cwd that is missing"],
    ],
    ids=["program", "E2BIG", "cwd"],
)
async def test_pipes_are_closed_when_the_program_cannot_run(case: Case) -> None:
    pipes = {"stdin": -1, "stdout": -1, "stderr": -1}
    caught = await error_of_ours(case.program, case.arguments, {**case.options, **pipes})
    assert isinstance(caught, OSError)
    process = await aioreap.create_subprocess_exec("sh", "-c", "exit 3")
    assert await process.wait() == 3


@as_root
@on_both_loops
def test_what_an_ordinary_user_may_not_do_is_popens_error(
    make_loop: Factory, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.mkdir(mode=0o700)
    calls: list[tuple[str, dict[str, Any]]] = [
        ("true", {"cwd": secret}),
        ("true", {"cwd": str(secret / "below")}),
        (str(secret / "program"), {}),
        ("program", {"env": {"PATH": str(secret)}}),
        ("true", {"user": 0}),
        ("true", {"group": 0}),
        ("true", {"extra_groups": [0]}),
        ("true", {"user": "root"}),
        ("true", {"process_group": 1}),
        ("true", {"stdout": -1, "pipesize": 2**24}),
    ]

    async def main() -> None:
        become_an_ordinary_user()
        for program, options in calls:
            expected = seen(error_of_popen(program, (), options))
            assert expected["type"] is PermissionError
            assert (program, options, seen(await error_of_ours(program, (), options))) == (
                program,
                options,
                expected,
            )

    run_apart(make_loop, main)


@pytest.mark.parametrize(
    ("cgroup", "error"),
    [
        (
            "/nonexistent",
            FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/nonexistent"),
        ),
        ("/dev/null", NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), "/dev/null")),
        (NOT_OPEN, BAD_DESCRIPTOR),
        (-1, BAD_DESCRIPTOR),
        (1.5, None),
        ("a\0b", None),
    ],
    ids=str,
)
async def test_a_cgroup_that_cannot_be_is_an_error(cgroup: Any, error: Exception | None) -> None:
    caught = await error_of_ours("true", (), {"cgroup": cgroup, "stdin": -1})
    if error is None:
        assert isinstance(caught, TypeError | ValueError)
    else:
        assert seen(caught) == seen(error)


async def test_a_directory_that_is_no_cgroup_is_an_error(here: Path) -> None:
    assert isinstance(await error_of_ours("true", (), {"cgroup": here, "stdin": -1}), OSError)
