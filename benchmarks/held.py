"""A program whose exec takes as long as one likes: another process has a lease on its file.

Run as ``python -m benchmarks.held FILE SECONDS``, it says "held" when it has the
lease, and gives it up so many seconds after somebody has asked for the file.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["held"]


@contextlib.contextmanager
def held(program: str, folder: Path, seconds: float) -> Iterator[str]:
    """A copy of `program` in `folder`, whose first exec takes `seconds`.

    The holder is a process of its own: the one that waits for the exec may stand still.

    Raises:
        OSError: there are no leases in this folder's file system.
    """
    copy = str(shutil.copy(program, folder / "held"))
    command = [sys.executable, "-m", "benchmarks.held", copy, str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        if holder.stdout.readline() != "held\n":
            raise OSError("no lease can be had on a file here")
        try:
            yield copy
        finally:
            holder.kill()


def _hold(file: str, seconds: float) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    descriptor = os.open(file, os.O_RDONLY)
    fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGUSR1)
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    print("held", flush=True)
    signal.sigwait({signal.SIGUSR1})
    time.sleep(seconds)
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)


if __name__ == "__main__":
    _hold(sys.argv[1], float(sys.argv[2]))
