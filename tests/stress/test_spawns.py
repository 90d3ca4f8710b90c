"""Very many spawns in bad company, and the spawn path under AddressSanitizer; for ``make stress``.

AIOREAP_STRESS_COUNT says how many, on each loop; 100,000 if it is not set.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import open_descriptors

import aioreap
from aioreap import _clone

pytestmark = [
    pytest.mark.any_backend,
    pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning"),
]

_COUNT = int(os.environ.get("AIOREAP_STRESS_COUNT", "100000"))
_AT_ONCE = 16
_SAMPLES = 100
# One block in a thousand, leaked, is 1.2 MiB of touched pages after 100,000 spawns.
_GROWTH_LIMIT = 1024 * 1024
_PAGE = os.sysconf("SC_PAGESIZE")


def _compile(*arguments: str | Path) -> None:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    assert compiler is not None, "no C compiler"
    done = subprocess.run([compiler, *arguments], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small program whose exit status is its argument."""
    folder = tmp_path_factory.mktemp("program")
    source = folder / "exit.c"
    source.write_text(
        "#include <stdlib.h>\nint main(int n, char **v) { return n > 1 ? atoi(v[1]) : 99; }\n"
    )
    _compile("-O2", "-static", source, "-o", folder / "exit")
    return folder / "exit"


def _allocate() -> None:
    large = [bytearray(random.randrange(1, 1 << 18)) for _ in range(8)]
    small = [bytes(random.randrange(1, 1 << 12)) for _ in range(64)]
    time.sleep(0.001)
    del large, small


def _fork() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(7)
    assert os.waitpid(pid, 0)[1] == 7 << 8
    time.sleep(0.005)


@contextmanager
def _bad_company(program: Path) -> Iterator[Callable[[], int]]:
    """Threads that allocate, fork and use subprocess; gives how many turns they have taken."""
    over = threading.Event()
    errors: list[BaseException] = []
    turns = itertools.count()

    def run_subprocess() -> None:
        assert subprocess.run([program, "5"], check=False).returncode == 5
        time.sleep(0.01)

    def run_multiprocessing() -> None:
        process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(0.02,))
        process.start()
        process.join()
        assert process.exitcode == 0
        process.close()
        time.sleep(0.05)

    def keep_on(job: Callable[[], None]) -> None:
        try:
            while not over.is_set():
                job()
                next(turns)
        except BaseException as error:  # noqa: BLE001  # raised again below
            errors.append(error)

    jobs = (_allocate, _allocate, _fork, run_subprocess, run_multiprocessing)
    threads = [threading.Thread(target=keep_on, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    try:
        yield lambda: next(turns)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


class _Ticker:
    """A timer of one millisecond; remembers the longest time that one was late, in seconds."""

    def __init__(self) -> None:
        self.count, self.latest = 0, 0.0
        self._loop = asyncio.get_running_loop()
        self._start()

    def _start(self) -> None:
        self._due = self._loop.time() + 0.001
        self._handle = self._loop.call_at(self._due, self._tick)

    def _tick(self) -> None:
        self.count += 1
        self.latest = max(self.latest, self._loop.time() - self._due)
        self._start()

    def cancel(self) -> None:
        self._handle.cancel()


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


async def test_very_many_spawns_leave_nothing_behind(program: Path, backend: str) -> None:
    numbers = iter(range(_COUNT))
    wrong: list[tuple[int, int]] = []
    resident: list[int] = []

    async def work() -> None:
        for number in numbers:
            process = await aioreap.create_subprocess_exec(program, str(number % 128))
            status = await process.wait()
            if status != number % 128:
                wrong.append((number, status))
            if number % max(_COUNT // _SAMPLES, 1) == 0:
                resident.append(_resident())

    descriptors, blocks = len(open_descriptors()), _clone.blocks()
    begin, ticker = time.monotonic(), _Ticker()
    with _bad_company(program) as turns:
        await asyncio.gather(*(work() for _ in range(_AT_ONCE)))
        others = turns()
    ticker.cancel()
    seconds = time.monotonic() - begin

    # The least of a stretch: what the threads hold comes and goes, a leak only grows.
    fifth = len(resident) // 5
    early, late = min(resident[fifth : 2 * fifth]), min(resident[-fifth:])
    print(  # noqa: T201  # the figures are half of what it is run for
        f"{_COUNT} spawns by {backend} in {seconds:.0f} s, {_COUNT / seconds:.0f} a second, amid"
        f" {ticker.count} ticks (the latest by {ticker.latest * 1000:.1f} ms) and {others} turns"
        f" of other threads; resident {early // 1024} KiB, then {late // 1024} KiB"
        f" (median {statistics.median(resident) // 1024:.0f})"
    )
    assert not wrong
    assert late - early < _GROWTH_LIMIT
    process = await aioreap.create_subprocess_exec(program, "0")  # sweeps what was parked
    assert await process.wait() == 0
    assert _clone.blocks() <= blocks
    assert len(open_descriptors()) <= descriptors


_UNDER_SANITIZER = """
import asyncio, os, sys
import aioreap
from aioreap import _clone

assert _clone.__file__ == sys.argv[1], _clone.__file__
environment = {"PATH": os.environ["PATH"]}  # without LD_PRELOAD
missing = 0

async def spawn(number, program=sys.argv[3], **options):
    global missing
    try:
        process = await aioreap.create_subprocess_exec(
            program, str(number), env=environment, **options)
    except FileNotFoundError:
        missing += 1
    else:
        assert await process.wait() == number

async def main(count):
    for _ in range(count // 40):
        await asyncio.gather(
            *(spawn(n) for n in range(16)),
            *(spawn(n, program="/nonexistent/program") for n in range(8)),
            *(spawn(n, cwd="/nonexistent") for n in range(8)),
            *(spawn(n, user=os.geteuid()) for n in range(8)),
        )

asyncio.run(main(int(sys.argv[2])))
print(missing)
"""


def test_address_sanitizer_has_nothing_to_report(program: Path, tmp_path: Path) -> None:
    count = min(_COUNT, 4000)
    package = Path(aioreap.__file__).parent
    copy = tmp_path / "aioreap"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    extension = copy / Path(_clone.__file__).name
    headers = sysconfig.get_path("include")
    _compile(
        *("-shared", "-fPIC", "-g", "-O1", "-fsanitize=address", f"-I{headers}"),
        *(copy / "_clone.c", copy / "_output.c", copy / "_spawn.c", "-o", extension),
    )
    runtime = subprocess.run(
        [os.environ.get("CC", "cc"), "-print-file-name=libasan.so"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    done = subprocess.run(
        [sys.executable, "-P", "-c", _UNDER_SANITIZER, extension, str(count), program],
        env={
            **os.environ,
            "PYTHONPATH": str(tmp_path),
            "PYTHONMALLOC": "malloc",
            "LD_PRELOAD": runtime,
            "ASAN_OPTIONS": "detect_leaks=0",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.stderr
    assert done.returncode == 0
    assert int(done.stdout) == count // 40 * 16
