"""The machine that boots kernels: its packages, its cache folder's lock, a guest's process."""

import fcntl
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

STATUS_MISSING = 69
STATUS_TIME_LIMIT = 124


class MissingError(Exception):
    """Something that booting a kernel needs is not there and could not be had."""


def say(words: str) -> None:
    """Print `words` to stderr, behind the program's name."""
    print(f"{Path(sys.argv[0]).name}: {words}", file=sys.stderr, flush=True)


def run(
    command: Sequence[str], need: str, *, env: dict[str, str] | None = None, cwd: Path | None = None
) -> str:
    """Run `command` and return its output; if it fails, raise MissingError with `need`."""
    try:
        done = subprocess.run(
            command,
            check=False,
            env=os.environ | (env or {}),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
    except OSError as error:
        raise MissingError(f"{need} ({error})") from error
    if done.returncode:
        words = (
            done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}"
        ).splitlines()
        raise MissingError(f"{need} ({command[0]}: {words[-1]})")
    return done.stdout


@contextmanager
def lock(file: Path) -> Iterator[None]:
    """Let one program at a time change the cache folder."""
    file.parent.mkdir(exist_ok=True)
    with file.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def check_debian() -> None:
    """Raise MissingError where packages cannot be installed."""
    if os.geteuid() != 0:
        raise MissingError("root, to install packages and to read all files for the guest")
    for tool in ("apt-get", "dpkg-query"):
        if shutil.which(tool) is None:
            raise MissingError(f"{tool}: this needs a Debian machine")


def install_packages(packages: Sequence[str]) -> None:
    """Install the Debian packages that are not there; of "new|old" the first that Debian has."""
    absent = _absent(packages)
    if not absent:
        return
    run(["apt-get", "update"], f"the Debian packages {' '.join(absent)}")
    absent = _absent(packages)
    need = f"the Debian packages {' '.join(absent)}"
    say(f"installing {' '.join(absent)}")
    wait = ["-o", "DPkg::Lock::Timeout=300"]  # seconds, for another program that installs
    install = ["apt-get", *wait, "install", "--yes", "--no-install-recommends", *absent]
    run(install, need, env={"DEBIAN_FRONTEND": "noninteractive"})


def _absent(packages: Sequence[str]) -> list[str]:
    listing = run(
        ["dpkg-query", "-W", "-f", r"${Package} ${db:Status-Status}\n"], "dpkg's list of packages"
    )
    installed = {line.split()[0] for line in listing.splitlines() if line.endswith(" installed")}
    chosen = [_first_known(names.split("|")) for names in packages]
    return [package for package in chosen if package not in installed]


def _first_known(names: Sequence[str]) -> str:
    for name in names[:-1]:
        if name in run(["apt-cache", "pkgnames", name], "apt's list of packages").splitlines():
            return name
    return names[-1]


def run_guest(
    line: Sequence[str], time_limit: float, copy: Callable[[bytes], object]
) -> int | None:
    """Run the command `line` of a guest and give its output to `copy`, as it comes.

    Returns its exit status, or None if it was ended after `time_limit` seconds.
    """
    # qemu opens its output anew and truncates it: a file would lose what was there, a pipe not.
    # timeout(1) is for the day when we are killed ourselves: no qemu may spin on for ever.
    guest = subprocess.Popen(
        ["timeout", "--signal=KILL", str(time_limit + 10), *line],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return guest.wait() if _copy_output(guest, time_limit, copy) else None
    finally:
        _end(guest)


def _copy_output(
    guest: subprocess.Popen[bytes], time_limit: float, copy: Callable[[bytes], object]
) -> bool:
    """Copy the guest's output until its end, and say whether that came before the time limit."""
    assert guest.stdout is not None
    deadline = time.monotonic() + time_limit
    while select.select([guest.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
        output = os.read(guest.stdout.fileno(), 65536)
        if not output:
            return True
        copy(output)
    return False


def _end(guest: subprocess.Popen[bytes]) -> None:
    """Kill what `guest` started, too: one session, one process group."""
    with suppress(ProcessLookupError):
        os.killpg(guest.pid, signal.SIGKILL)
    guest.wait()
