"""The main job on real programs, and what a sceptic would count; ends with 1 if any of it is wrong.

Run it with ``make demo``, or ``python examples/quickstart.py``.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import resource
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Self

import aioreap

CHILDREN_AT_ONCE: Final = 300
CHILDREN_FOR_RATE: Final = 500
IN_PARALLEL: Final = 16
DESCRIPTORS: Final = 4096
DESCRIPTORS_PER_START: Final = 8  # at most, of a child with one pipe
MOST_LINES: Final = 200_000
CHUNK: Final = 65_536  # bytes
TICK: Final = 0.001  # seconds


# What is counted beside the work.


class Ticker:
    """Looks every millisecond how late the loop is, and by whose fault.

    The kernel says how long this thread was ready to run and had no processor
    (/proc/thread-self/schedstat). Only the rest of a delay is the loop being held.
    """

    def __init__(self) -> None:
        self.longest_hold = 0.0
        self.longest_delay = 0.0
        self._loop = asyncio.get_running_loop()
        self._schedstat = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        self._plan()

    def _waited_for_processor(self) -> float:
        return int(os.pread(self._schedstat, 100, 0).split()[1]) / 1e9

    def _plan(self) -> None:
        self._due = time.perf_counter() + TICK
        self._waited = self._waited_for_processor()
        self._timer = self._loop.call_later(TICK, self._tick)

    def _tick(self) -> None:
        delay = time.perf_counter() - self._due
        hold = delay - (self._waited_for_processor() - self._waited)
        self.longest_delay = max(self.longest_delay, delay)
        self.longest_hold = max(self.longest_hold, hold)
        self._plan()

    def take(self) -> str:
        """The longest since the last call, for a person."""
        hold, delay = self.longest_hold * 1e3, self.longest_delay * 1e3
        self.longest_hold = self.longest_delay = 0.0
        return f"{hold:6.1f} ms   (a timer was late by {delay:.1f} ms)"

    def close(self) -> None:
        """Stop looking."""
        self._timer.cancel()
        os.close(self._schedstat)


class ChildSignals:
    """Counts SIGCHLD with a handler of its own: the library has none."""

    def __enter__(self) -> Self:
        self.count = 0
        self._before = signal.signal(signal.SIGCHLD, self._count)
        return self

    def _count(self, _number: int, _frame: object) -> None:
        self.count += 1

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGCHLD, self._before)


def children() -> dict[int, str]:
    """The state of each child of this process by its pid; "Z" is a zombie."""
    states: dict[int, str] = {}
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            status = Path(f"/proc/{pid}/stat").read_text()
            states[int(pid)] = status.rpartition(")")[2].split()[0]
    return states


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) - 1  # less that of the listing


class Report:
    """What is printed, and whether all of it was right."""

    def __init__(self) -> None:
        self.wrong: list[str] = []

    def head(self, text: str) -> None:
        """Begin a section."""
        print(f"\n  {text}", flush=True)

    def note(self, text: str) -> None:
        """Say more about a section."""
        print(f"    {text}", flush=True)

    def line(self, what: str, found: object, *, right: bool | None = None) -> None:
        """Say what was found, and if it can be wrong, whether it is."""
        verdict = {None: "", True: "   right", False: "   WRONG"}[right]
        print(f"    {what:<36} {found!s:<{24 if verdict else 0}}{verdict}", flush=True)
        if right is False:
            self.wrong.append(f"{what}: {found}")


def allow_descriptors() -> int:
    """Raise a limit below the number wanted, as far as is allowed, and return what may be used."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return allowed


# The work.


async def stream_lines(report: Report) -> None:
    """Read a long output line by line, and count what another program saw of it."""
    report.head("A long output, line by line")
    command = f'find /usr -xdev 2>/dev/null | head -n {MOST_LINES} | tee "$1"'
    with tempfile.NamedTemporaryFile() as copy:
        begin = time.perf_counter()
        process = await aioreap.create_subprocess_exec(
            "sh", "-c", command, "sh", copy.name, stdout=aioreap.PIPE
        )
        assert process.stdout is not None
        lines = size = 0
        async for line in process.stdout:
            lines += 1
            size += len(line)
        await process.wait()
        seconds = time.perf_counter() - begin

        counter = await aioreap.create_subprocess_exec(
            "wc", "-lc", stdin=copy.file, stdout=aioreap.PIPE
        )
        counted, _ = await counter.communicate()
    report.line(
        "find /usr -xdev | head | tee copy", f"{lines:,} lines, {size:,} bytes, {seconds:.2f} s"
    )
    same = counted is not None and list(map(int, counted.split())) == [lines, size]
    report.line(
        "wc -lc of the copy says",
        " and ".join(map(str, (counted or b"").decode().split())),
        right=same and lines > 0,
    )


async def feed(file: Path, stdin: asyncio.StreamWriter) -> None:
    with file.open("rb") as source:
        while chunk := source.read(CHUNK):
            stdin.write(chunk)
            await stdin.drain()
    stdin.close()


async def pump(stdout: asyncio.StreamReader, stdin: asyncio.StreamWriter) -> int:
    moved = 0
    while chunk := await stdout.read(CHUNK):
        stdin.write(chunk)
        await stdin.drain()
        moved += len(chunk)
    stdin.close()
    return moved


async def compare(stdout: asyncio.StreamReader, file: Path) -> bool:
    same = True
    with file.open("rb") as expected:
        while chunk := await stdout.read(CHUNK):
            same = same and chunk == expected.read(len(chunk))
        return same and not expected.read(1)


def big_file() -> Path:
    """The interpreter, or the library that it mostly is."""
    library = Path(sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("LDLIBRARY"))
    candidates = [Path(sys.executable).resolve(), library.resolve()]
    return max((c for c in candidates if c.is_file()), key=lambda c: c.stat().st_size)


async def there_and_back(report: Report) -> None:
    """Push a file through two programs at once, and compare what comes out with the file."""
    report.head("A real file through gzip and back")
    file = big_file()
    pack = await aioreap.create_subprocess_exec(
        "gzip", "-c", "-3", stdin=aioreap.PIPE, stdout=aioreap.PIPE
    )
    unpack = await aioreap.create_subprocess_exec(
        "gzip", "-dc", stdin=aioreap.PIPE, stdout=aioreap.PIPE
    )
    assert pack.stdin is not None
    assert pack.stdout is not None
    assert unpack.stdin is not None
    assert unpack.stdout is not None
    _, packed, same = await asyncio.gather(
        feed(file, pack.stdin), pump(pack.stdout, unpack.stdin), compare(unpack.stdout, file)
    )
    codes = await pack.wait(), await unpack.wait()
    report.line(file.name, f"{file.stat().st_size:,} bytes")
    report.line("packed", f"{packed:,} bytes")
    report.line(
        "unpacked, compared byte by byte", "the same" if same else "not the same", right=same
    )
    report.line("exit codes", codes, right=codes == (0, 0))


async def many_at_once(report: Report) -> None:
    """Have children all alive, then tell each how to exit."""
    count = min(CHILDREN_AT_ONCE, allow_descriptors() // DESCRIPTORS_PER_START)
    report.head(f"{count} children at once")
    begin = time.perf_counter()
    processes = await asyncio.gather(
        *(
            aioreap.create_subprocess_exec("sh", "-c", "read code; exit $code", stdin=aioreap.PIPE)
            for _ in range(count)
        )
    )
    report.line("started in", f"{time.perf_counter() - begin:.2f} s")
    alive = len(children())
    report.line("alive now", alive, right=alive == count)
    expected = [number % 256 for number in range(count)]
    for process, code in zip(processes, expected, strict=True):
        assert process.stdin is not None
        process.stdin.write(b"%d\n" % code)
        process.stdin.close()
    codes = await asyncio.gather(*(process.wait() for process in processes))
    wrong = sum(code != other for code, other in zip(codes, expected, strict=True))
    report.line("told to exit with 0 to 255", f"{wrong} wrong codes", right=wrong == 0)


async def ends(report: Report) -> None:
    """Show the ways in which a child can end, or not begin."""
    report.head("How children end")
    for script, returncode, name in (
        ("exit 0", 0, None),
        ("exit 3", 3, None),
        ("kill -KILL $$", -9, "SIGKILL"),
        ("kill -USR1 $$", -signal.SIGUSR1, "SIGUSR1"),
    ):
        process = await aioreap.create_subprocess_exec("sh", "-c", script)
        exit_info = await process.wait_exit()
        died_by = exit_info.signal
        found = died_by.name if isinstance(died_by, signal.Signals) else None
        right = (exit_info.returncode, found) == (returncode, name)
        report.line(f"sh -c '{script}'", f"{exit_info.returncode:>4} {found or ''}", right=right)

    process = await aioreap.create_subprocess_exec("sleep", "60")
    process.terminate()
    code = await process.wait()
    report.line("sleep 60, then terminate()", f"{code:>4} SIGTERM", right=code == -signal.SIGTERM)

    missing = "no-such-program"
    try:
        await aioreap.create_subprocess_exec(missing)
    except FileNotFoundError as error:
        report.line(
            missing, f"FileNotFoundError: {error.filename}", right=error.filename == missing
        )
    else:
        report.line(missing, "started", right=False)


async def rate(program: str) -> float:
    """Children per second, some of them at a time."""
    room = asyncio.Semaphore(IN_PARALLEL)

    async def run() -> int:
        async with room:
            process = await aioreap.create_subprocess_exec(program)
            return await process.wait()

    begin = time.perf_counter()
    codes = await asyncio.gather(*(run() for _ in range(CHILDREN_FOR_RATE)))
    assert not any(codes), "true said false"
    return CHILDREN_FOR_RATE / (time.perf_counter() - begin)


async def settled(descriptors: int) -> int:
    """How many descriptors are open once the loop has closed the last pipes, within a second."""
    for _ in range(100):
        if open_descriptors() == descriptors:
            break
        await asyncio.sleep(0.01)
    return open_descriptors()


async def first_child() -> None:
    """Have the loop open what it keeps: libuv holds one in reserve from its first pipe on."""
    process = await aioreap.create_subprocess_exec("true", stdout=aioreap.PIPE)
    await process.communicate()
    await asyncio.sleep(0.01)  # the loop closes a pipe some turns after its end


async def main(report: Report) -> None:
    await first_child()
    before = open_descriptors()
    ticker = Ticker()
    holds: dict[str, str] = {}
    with ChildSignals() as signals:
        for what, work in (
            ("streaming lines", stream_lines),
            ("through gzip and back", there_and_back),
            ("many at once", many_at_once),
            ("exits", ends),
        ):
            await work(report)
            holds[what] = ticker.take()
        true = shutil.which("true") or "true"
        per_second = await rate(true)
        holds[f"{CHILDREN_FOR_RATE} x {true}"] = ticker.take()
    ticker.close()
    after = await settled(before)
    left = children()
    zombies = sum(state == "Z" for state in left.values())

    report.head("What a sceptic would count")
    report.line(f"children per second ({true})", f"{per_second:,.0f}, {IN_PARALLEL} at a time")
    name = aioreap.backend().name
    if name == "autoreap":
        report.line("SIGCHLDs received", signals.count, right=signals.count == 0)
    else:
        report.line(
            "SIGCHLDs received",
            f"{signals.count} from over {CHILDREN_FOR_RATE} children: on backend {name}",
        )
        report.line("", "they raise it (many count as one); none is needed")
    report.line("zombies", zombies, right=zombies == 0)
    report.line("children left", len(left), right=not left)
    report.line("descriptors before and after", f"{before} and {after}", right=before == after)
    report.head("Longest hold of the event loop")
    report.note(
        "by a 1 ms timer; the time in which the kernel had no processor for us is left out,"
    )
    report.note("and what this program itself does with the output is not")
    for what, hold in holds.items():
        report.line(what, hold)


def loops() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    found: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": aioreap.EventLoop}
    if importlib.util.find_spec("uvloop") is not None:
        found["uvloop"] = aioreap.UvloopEventLoop
    return found


if __name__ == "__main__":
    found = aioreap.backend()
    system = os.uname()
    print(f"aioreap on Linux {system.release} {system.machine}, Python {sys.version.split()[0]}")
    print(f"backend {found.name}: {found.reason}")
    whole = Report()
    for name, factory in loops().items():
        print(f"\n{name}\n{'=' * len(name)}")
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(main(whole))
    if "uvloop" not in loops():
        print("\nuvloop is not installed, so only asyncio's loop was shown.")
    print(f"\n{'WRONG: ' + '; '.join(whole.wrong) if whole.wrong else 'All of it is right.'}")
    sys.exit(1 if whole.wrong else 0)
