"""Run the suites of suites.py on each Python, loop and kernel, and print a table of what came out.

    python3 tests/public/table.py

Python 3.11 to 3.13 are those of this machine, 3.14 and 3.15 come from Debian forky: as a
chroot on this machine's kernel, and as the root of a guest that boots Linux 7. One
wheel of aioreap is for all of them.

Exit status: 1 if anything is not as exceptions.toml has it, 69 if something that is
needed cannot be had.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import forky
import pythons
from host import STATUS_MISSING, MissingError, check_debian, lock, run, say
from kernels import Series, read_series
from suites import EXCEPTIONS, LOOPS, REPORT

REPOSITORY: Final = Path(__file__).resolve().parents[2]
CACHE: Final = REPOSITORY / ".cache"
WHEELS: Final = CACHE / "wheels"
KERNEL_TESTS: Final = REPOSITORY / "tests/kernel"
SUITES: Final = Path(__file__).with_name("suites.py")

HERE: Final = ("3.11", "3.12", "3.13")
GUEST: Final = "7"

# In seconds, for what the limit of suites.py has not ended.
CELL_TIME_LIMIT: Final = 900.0
GUEST_TIME_LIMIT: Final = 1800.0
AT_ONCE: Final = 2

_MODULES: Final = ", ".join(
    f"test.test_asyncio.test_{name}" for name in ("subprocess", "events", "unix_events")
)


@dataclass(frozen=True)
class Python:
    """One of the Pythons, with a venv of its own in the cache."""

    version: str
    executable: str
    root: Path | None = None

    @property
    def venv(self) -> Path:
        return CACHE / f"venv-{self.version}"

    def command(self, *words: str) -> list[str]:
        """The command that runs those words where this Python is."""
        return forky.enter(self.root, REPOSITORY, words) if self.root else list(words)

    def suites(self, loop: str) -> list[str]:
        """The words that run the suites."""
        return [str(self.venv / "bin/python"), str(SUITES), loop]


@dataclass(frozen=True)
class Cell:
    """One cell of the table; `release` is a pattern of the kernel's."""

    python: Python
    loop: str
    kernel: str
    release: str
    backends: Sequence[str]

    def is_of(self, report: dict[str, Any]) -> bool:
        """Whether the report is this cell's."""
        return (
            report["python"].startswith(f"{self.python.version}.")
            and report["loop"] == self.loop
            and re.fullmatch(self.release, report["kernel"]) is not None
            and report["backend"] in self.backends
        )


def main() -> int:
    """Prepare it all, run it, print the table, and return the exit status."""
    try:
        check_debian()
        with lock(CACHE / "boot.lock"):
            found = list(_pythons())
            _prepare(found)
    except MissingError as missing:
        say(f"cannot run the suites, missing: {missing}")
        return STATUS_MISSING
    series = read_series(KERNEL_TESTS / "kernels.toml", "x86_64")[GUEST]
    cells = list(_cells(found, series))
    reports = [*_run_here(found), *_run_in_guest([python for python in found if python.root])]
    return _print_table(cells, reports)


def _cells(found: Sequence[Python], series: Series) -> Iterator[Cell]:
    release = os.uname().release
    here = release, re.escape(release), series.backends
    yield from (Cell(python, loop, *here) for python in found for loop in LOOPS)
    guest = f"{series.name}.x", series.newest, series.backends[:1]
    yield from (Cell(python, loop, *guest) for python in found if python.root for loop in LOOPS)


# What is needed.


def _pythons() -> Iterator[Python]:
    here = pythons.installed()
    for version in HERE:
        if version not in here:
            raise MissingError(f"Python {version}, on PATH or among those of pyenv")
        yield Python(version, str(here[version]))
    root = forky.find_root(CACHE)
    for version in forky.PYTHONS:
        yield Python(version, f"/usr/bin/python{version}", root)


def _prepare(found: Sequence[Python]) -> None:
    """Make each Python's venv, and install the same wheel of aioreap and a uvloop in it."""
    WHEELS.mkdir(exist_ok=True)
    for python in found:
        need = f"the test package of Python {python.version} (Debian: libpython3.x-testsuite)"
        run(python.command(python.executable, "-c", f"import {_MODULES}"), need)
        _make_venv(python)
    pip = str(found[0].venv / "bin/pip")
    wheel = _build_wheel()
    for python in found:
        _fetch_uvloop(pip, python)
        install = ["install", "--quiet", "--no-index", "--find-links", str(WHEELS)]
        install += ["--force-reinstall", "--no-deps", str(wheel), "uvloop"]
        _pip(python, install, f"aioreap and uvloop for Python {python.version}")


def _make_venv(python: Python) -> None:
    show = "import sys, pip; print(sys.version)"
    need = f"Python {python.version} with venv and ensurepip"
    version = run(python.command(python.executable, "-c", "import sys; print(sys.version)"), need)
    try:
        if run(python.command(str(python.venv / "bin/python"), "-c", show), need) == version:
            return
    except MissingError:  # not made yet, or of a Python that is gone
        pass
    run(python.command(python.executable, "-m", "venv", "--clear", str(python.venv)), need)


def _pip(python: Python, words: Sequence[str], need: str) -> None:
    run(python.command(str(python.venv / "bin/python"), "-m", "pip", *words), need)


def _build_wheel() -> Path:
    """Have it built and repaired, and keep a copy where each Python finds it."""
    for old in WHEELS.glob("aioreap-*.whl"):
        old.unlink()
    command = [sys.executable, str(REPOSITORY / "tools/wheel.py"), "--build"]
    run(command, "a compiler and the package index, for a wheel of aioreap")
    (wheel,) = (REPOSITORY / "dist").glob("aioreap-*.whl")
    return Path(shutil.copy(wheel, WHEELS))


def _fetch_uvloop(pip: str, python: Python) -> None:
    tag = f"cp{python.version.replace('.', '')}"
    if not any(WHEELS.glob(f"uvloop-*-{tag}-{tag}-*.whl")):
        download = [pip, "download", "--quiet", "--only-binary=:all:", "--dest", str(WHEELS)]
        need = f"a wheel of uvloop for Python {python.version}, from the package index"
        run([*download, "--python-version", python.version, "uvloop"], need)


# What is run.


def _environment() -> dict[str, str]:
    """This process's, without what would have something else tested."""
    ours = ("PYTHON", "AIOREAP_", "UVLOOP_")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


def _output(command: Sequence[str], time_limit: float) -> str:
    try:
        done = subprocess.run(
            command,
            check=False,
            env=_environment(),
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=time_limit,
        )
    except subprocess.TimeoutExpired as expired:
        return f"{(expired.output or b'').decode(errors='replace')}\ntook more than {time_limit} s"
    return done.stdout.decode(errors="replace")


def _reports(output: str) -> list[dict[str, Any]]:
    """The reports in the output, which is printed if one says that something was wrong."""
    lines = output.splitlines()
    found = [json.loads(line.removeprefix(REPORT)) for line in lines if line.startswith(REPORT)]
    if not found or any(report["wrong"] for report in found):
        print("\n".join(line for line in lines if not line.startswith(REPORT)), flush=True)
    return found


def _run_here(found: Sequence[Python]) -> list[dict[str, Any]]:
    say(f"running the suites on Linux {os.uname().release}")
    commands = [python.command(*python.suites(loop)) for python in found for loop in LOOPS]
    with ThreadPoolExecutor(AT_ONCE) as executor:
        outputs = executor.map(lambda command: _output(command, CELL_TIME_LIMIT), commands)
        return [report for output in outputs for report in _reports(output)]


def _run_in_guest(found: Sequence[Python]) -> list[dict[str, Any]]:
    """Run them on the emulated kernel, in the root that those Pythons have, side by side."""
    rows = ("; ".join(shlex.join(python.suites(loop)) for loop in LOOPS) for python in found)
    script = "".join(f"{{ {row}; }} & " for row in rows) + "wait"
    boot = [sys.executable, str(KERNEL_TESTS / "boot.py"), "--kernel", GUEST]
    boot += ["--root", str(found[0].root), "--time-limit", str(GUEST_TIME_LIMIT)]
    return _reports(_output([*boot, "--", "sh", "-c", script], GUEST_TIME_LIMIT + 600))


# What came out.


def _print_table(cells: Sequence[Cell], reports: Sequence[dict[str, Any]]) -> int:
    """Print a row for each cell, what failed as it may, and a closing line; return the status."""
    exceptions = tomllib.loads(EXCEPTIONS.read_text())
    of_cell = [next(filter(cell.is_of, reports), None) for cell in cells]
    bad = 0
    form = "{:<8} {:<8} {:<22} {:<9} {:>6} {:>8} {:>5}"
    print(form.format("Python", "loop", "Linux", "backend", "passed", "excepted", "wrong"))
    for cell, report in zip(cells, of_cell, strict=True):
        if report is None:
            print(form.format(cell.python.version, cell.loop, cell.kernel, "", "no", "report", ""))
        else:
            words = [report[key] for key in ("python", "loop", "kernel", "backend", "passed")]
            print(form.format(*words, len(report["failed"]), len(report["wrong"])))
        bad += report is None or not report["passed"] or bool(report["wrong"])
    had = [report for report in of_cell if report is not None]
    needed = {name for report in had for name in report["needed"]}
    for kind, table, name in _entries(exceptions):
        if name not in needed:
            bad += 1
            print(f"{name}: no Python needed what exceptions.toml has about it in {kind}")
        elif kind != "spawns_nothing":
            print(f"{name} {kind}: {table['reason']}")
    if bad:
        print(f"aioreap public suites: {bad} of {len(cells)} cells and exceptions are wrong")
        return 1
    print(
        f"aioreap public suites: {len(cells)} cells as expected, "
        f"{sum(report['passed'] for report in had)} tests passed: "
        f"Python {_each(had, 'python')}; {_each(had, 'loop')}; Linux {_each(had, 'kernel')}"
    )
    return 0


def _entries(exceptions: dict[str, Any]) -> Iterable[tuple[str, dict[str, Any], str]]:
    return (
        (kind, table, name)
        for kind, tables in exceptions.items()
        for table in tables
        for name in table["names"]
    )


def _each(reports: Sequence[dict[str, Any]], key: str) -> str:
    return ", ".join(dict.fromkeys(report[key] for report in reports))


if __name__ == "__main__":
    sys.exit(main())
