"""run_process() at its work; ends with 1 if any of it is wrong.

Run it with ``python examples/run.py``.
"""

from __future__ import annotations

import asyncio
import sys
import sysconfig
import time
from typing import Final

import aioreap

SLEEP: Final = 60  # seconds
LIMIT: Final = 1_000_000  # bytes


def show(what: str, found: object, *, right: bool) -> bool:
    print(f"  {what:<44} {found!s:<30} {'right' if right else 'WRONG'}")
    return right


async def main() -> bool:
    every: list[bool] = []

    python = await aioreap.run_process(
        [sys.executable, "--version"], capture_output=True, text=True, check=True, timeout=60
    )
    version = f"Python {sys.version.split()[0]}"
    every.append(
        show("a program's output", python.stdout.strip(), right=python.stdout.strip() == version)
    )

    begin = time.perf_counter()
    try:
        await aioreap.run_process(
            f"echo begun; sleep {SLEEP}; echo done",
            shell=True,
            stdout=aioreap.PIPE,
            timeout=1,
            start_new_session=True,  # then the sleep ends with its shell
        )
    except TimeoutError as expired:
        seconds = time.perf_counter() - begin
        output = getattr(expired, "stdout", None)
        every.append(
            show("what it wrote before a timeout", output, right=output == b"begun\n")
            and show("seconds that this took", f"{seconds:.2f}", right=seconds < SLEEP)
        )

    else:
        every.append(show("the timeout", "did not come", right=False))

    try:
        await aioreap.run_process(["yes"], stdout=aioreap.PIPE, output_limit=LIMIT)
    except aioreap.OutputLimitExceeded as exceeded:
        size = len(exceeded.stdout)
        every.append(show("bytes of `yes` kept", f"{size:,}", right=size == LIMIT))

    else:
        every.append(show("the limit", "did not hold", right=False))

    # A child of the child that goes on, and holds the pipe.
    left = await aioreap.run_process(
        "echo started; sleep 5 & exit 4", shell=True, stdout=aioreap.PIPE, drain=0.1
    )
    every.append(
        show(
            "exit code and output of who left another",
            f"{left.returncode}, {left.stdout!r}",
            right=(left.returncode, left.stdout, left.truncated) == (4, b"started\n", True),
        )
    )

    sizes: list[int] = []

    async def count(line: str) -> None:
        await asyncio.sleep(0)  # to a database, say; the program waits
        sizes.append(len(line))

    folder = sysconfig.get_path("stdlib")
    listed = await aioreap.run_process(
        ["find", folder, "-name", "*.py"], stdout=count, errors="surrogateescape"
    )
    every.append(
        show(
            f"lines of find {folder}",
            f"{len(sizes):,}",
            right=bool(sizes) and not listed.returncode,
        )
    )
    return all(every)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=aioreap.EventLoop) as runner:
        sys.exit(0 if runner.run(main()) else 1)
