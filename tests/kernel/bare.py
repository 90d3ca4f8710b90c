"""Boot a kernel that Debian packages for some processor, with nothing but our C in it.

    python3 tests/kernel/bare.py --architecture aarch64 --kernel 7

tests/c/standalone.c is cross-compiled together with aioreap/_spawn.c into a static
program. It is the only file of an emulated machine, where it runs as init.

Exit status: 0 if every check passed; 1 if one failed, if a way to clone that this
kernel should have was not offered, or if the program did not come to its end; 69 if
something that is needed cannot be had; 124 after the time limit.
"""

import argparse
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from host import (
    STATUS_MISSING,
    STATUS_TIME_LIMIT,
    MissingError,
    check_debian,
    install_packages,
    lock,
    run_guest,
    say,
)
from kernels import DEBIAN_NAMES, Kernel, Series, find_kernel, read_series

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
CACHE = REPOSITORY / ".cache"

SOURCES = [REPOSITORY / "tests/c/standalone.c", REPOSITORY / "aioreap/_spawn.c"]
COMPILER_FLAGS = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-static"]

KERNEL_OPTIONS = ["quiet", "loglevel=1", "panic=-1", "mitigations=off", "nokaslr", "audit=0"]
# Two, so that parent and child run at once.
QEMU_OPTIONS = ["-smp", "2", "-m", "512M", "-nodefaults", "-no-user-config", "-no-reboot"]
CONSOLE_OPTIONS = ["-display", "none", "-serial", "stdio"]
TAIL = 20  # lines of a guest's output that are shown if it did not come to its end


@dataclass(frozen=True)
class Machine:
    """How qemu emulates one processor: its packages, its board and what the kernel is told."""

    packages: Sequence[str]
    board: Sequence[str]
    kernel_options: Sequence[str]


MACHINES = {
    # A newer core, with its page tables isolated, takes two and a half times as long.
    "aarch64": Machine(
        ["qemu-system-arm"],
        ["-machine", "virt", "-cpu", "cortex-a53"],
        ["console=ttyAMA0", "kpti=0"],
    ),
    "riscv64": Machine(
        ["qemu-system-riscv|qemu-system-misc", "opensbi"], ["-machine", "virt"], ["console=ttyS0"]
    ),
    "x86_64": Machine(
        ["qemu-system-x86"],
        ["-machine", "q35", "-cpu", "max"],
        ["console=ttyS0", "tsc=reliable", "no_timer_check"],
    ),
}


def main() -> int:
    """Read the command line, compile, boot, and return the exit status."""
    arguments = _parse()
    architecture = arguments.architecture
    try:
        check_debian()
        series = _series(architecture, arguments.kernel)
        kernel, emulator = _set_up(series)
    except MissingError as missing:
        say(f"cannot boot a kernel, missing: {missing}")
        return STATUS_MISSING
    with tempfile.TemporaryDirectory(prefix="bare-", dir=CACHE) as folder:
        program, archive = Path(folder, "init"), Path(folder, "initramfs")
        if not _compile(architecture, program):
            return 1
        archive.write_bytes(_initramfs(program.read_bytes()))
        line = [emulator, *_qemu_options(MACHINES[architecture], kernel, archive)]
        return _boot(line, series, kernel, arguments)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--architecture", choices=sorted(MACHINES), default="aarch64", help="uname's word for it"
    )
    parser.add_argument("--kernel", default="7", help="which series of kernels.toml")
    parser.add_argument(
        "--time-limit", type=float, default=600.0, metavar="SECONDS", help="then the guest is ended"
    )
    parser.add_argument("--verbose", action="store_true", help="show each check")
    return parser.parse_args()


def _series(architecture: str, name: str) -> Series:
    series = read_series(HERE / "kernels.toml", architecture)
    if name not in series:
        raise MissingError(f"a kernel {name} for {architecture} (there is {', '.join(series)})")
    return series[name]


def _set_up(series: Series) -> tuple[Kernel, str]:
    """Return the kernel and the path of the emulator, which are had first if they are not there."""
    machine = MACHINES[series.architecture]
    with lock(CACHE / "boot.lock"):
        install_packages(["kmod", *_compiler_packages(series.architecture), *machine.packages])
        kernel = find_kernel(series, CACHE)
    name = f"qemu-system-{series.architecture}"
    emulator = shutil.which(name)
    if emulator is None:
        raise MissingError(name)
    return kernel, emulator


def _compiler_packages(architecture: str) -> list[str]:
    if architecture == platform.machine():
        return ["gcc", "libc6-dev"]
    return [
        f"gcc-{architecture.replace('_', '-')}-linux-gnu",
        f"libc6-dev-{DEBIAN_NAMES[architecture]}-cross",
    ]


def _compile(architecture: str, program: Path) -> bool:
    compiler = f"{architecture}-linux-gnu-gcc"
    return subprocess.call([compiler, *COMPILER_FLAGS, *SOURCES, "-o", program]) == 0


def _initramfs(program: bytes) -> bytes:
    """Return an archive in cpio's "newc" format that holds `program` as /init."""
    return _entry("init", 0o100755, program) + _entry("TRAILER!!!", 0, b"")


def _entry(name: str, file_mode: int, content: bytes) -> bytes:
    inode = uid = gid = mtime = device = 0
    links = 1
    path = name.encode() + b"\0"
    fields = [inode, file_mode, uid, gid, links, mtime, len(content)]
    fields += [device] * 4 + [len(path), 0]
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + path
    return _padded(head) + _padded(content)


def _padded(part: bytes) -> bytes:
    return part + bytes(-len(part) % 4)


def _qemu_options(machine: Machine, kernel: Kernel, archive: Path) -> list[str]:
    told = " ".join([*KERNEL_OPTIONS, *machine.kernel_options])
    files = ["-kernel", str(kernel.image), "-initrd", str(archive), "-append", told]
    return [*machine.board, *QEMU_OPTIONS, *CONSOLE_OPTIONS, *files]


def _boot(
    line: Sequence[str], series: Series, kernel: Kernel, arguments: argparse.Namespace
) -> int:
    output = bytearray()

    def copy(part: bytes) -> None:
        output.extend(part)
        if arguments.verbose:
            sys.stdout.buffer.write(part)
            sys.stdout.buffer.flush()

    say(f"booting {kernel.version}")
    status = run_guest(line, arguments.time_limit, copy)
    lines = output.decode(errors="replace").splitlines()
    passed, problems = _judge(lines, series)
    if status is None:
        problems.append(f"the guest was ended after {arguments.time_limit:g} seconds")
    elif status:
        problems.append(f"qemu's exit status was {status}")
    for problem in problems:
        say(problem)
    if status is None:
        return STATUS_TIME_LIMIT
    if problems:
        return 1
    for words in dict.fromkeys(_not_offered(lines)):
        print(words)
    print(f"aioreap tests: C alone, {series.architecture}, Linux {kernel.version}: passed {passed}")
    return 0


def _judge(lines: Sequence[str], series: Series) -> tuple[int, list[str]]:
    """Return how many checks passed, and what else the output shows that must not be."""
    problems = [words for words in lines if words.startswith("FAILED")]
    not_expected = [] if "autoreap" in series.backends else ["AUTOREAP"]
    problems += [
        words for words in _not_offered(lines) if not any(flag in words for flag in not_expected)
    ]
    closing = [
        found for found in (re.fullmatch(r"(\d+) passed, (\d+) failed", x) for x in lines) if found
    ]
    if len(closing) != 1:
        last = "\n".join(lines[-TAIL:])
        return 0, [*problems, f"the program did not come to its end, the last lines are:\n{last}"]
    passed, failed = int(closing[0][1]), int(closing[0][2])
    if failed:
        problems.append(f"checks that failed: {failed}")
    if not passed:
        problems.append("no check passed")
    return passed, problems


def _not_offered(lines: Sequence[str]) -> list[str]:
    return [
        words for words in lines if words.startswith("-") and words.endswith("not offered here")
    ]


if __name__ == "__main__":
    sys.exit(main())
