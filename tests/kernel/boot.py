"""Boot a kernel that Debian packages in an emulated machine, and run a command in it.

    python3 tests/kernel/boot.py --kernel 7 -- python3 -m pytest

The guest has this machine's files as its own. The command runs as root in the
repository's folder, its output appears here, and its exit status becomes ours.
What it may change is a copy, which is lost at the end: the folder's, root's
home's and the system's own; /tmp is empty and in memory, and there is no network
but the loopback. Its environment says what the tests have to expect:
AIOREAP_TEST_BACKENDS, from kernels.toml, and AIOREAP_TEST_EMULATED.

Exit status: the command's; 69 if something that is needed cannot be had; 124
after the time limit; 255 if the guest ended without telling one (a kernel panic),
or if that was the command's.
"""

import argparse
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

from host import (
    STATUS_MISSING,
    STATUS_TIME_LIMIT,
    MissingError,
    check_debian,
    install_packages,
    lock,
    run,
    run_guest,
    say,
)
from kernels import Kernel, Series, find_kernel, read_series

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
CACHE = REPOSITORY / ".cache"

HOST_PACKAGES = ["qemu-system-x86", "busybox-static", "kmod", "udev", "strace"]
VIRTME = "virtme-ng==1.42"

STATUS_NONE = 255

WRITABLE = ["/etc", "/home", "/opt", "/root", "/srv", "/usr", "/var"]
CPUS = 2
MEMORY = "3G"
# Under emulation each of these modules costs up to a second of the boot, and none is of use.
UNUSED_MODULES = """
    aesni_intel ahci bochs button cdrom crct10dif_pclmul crc32_pclmul crc32c_intel evdev
    ghash_clmulni_intel i2c_i801 i6300esb iTCO_wdt joydev kvm kvm_amd kvm_intel libahci libata
    lpc_ich parport_pc pcspkr polyval_clmulni powernow_k8 ppdev psmouse qemu_fw_cfg serio_raw sg
    sha256_ssse3 sha512_ssse3 sr_mod
"""
# Mitigations flush the emulated TLB at each system call; the others leave out what slows the boot.
# guest.sh starts the second processor: a kernel that boots patches its own code, and what runs
# there meanwhile may keep the emulator's translation of a breakpoint for good: "Oops: int3".
KERNEL_OPTIONS = [
    "mitigations=off",
    "nokaslr",
    "audit=0",
    "lsm=capability",
    "random.trust_cpu=on",
    "tsc=reliable",
    "no_timer_check",
    "maxcpus=1",
    f"modprobe.blacklist={','.join(UNUSED_MODULES.split())}",
]


def main() -> int:
    """Read the command line, boot, and return the exit status."""
    series = read_series(HERE / "kernels.toml", "x86_64")
    arguments = _parse(series)
    try:
        _check_machine()
        with lock(CACHE / "boot.lock"):
            install_packages(HOST_PACKAGES)
            virtme = _install_virtme()
            kernel = find_kernel(series[arguments.kernel], CACHE)
        say(f"booting {kernel.version}")
        return _boot(virtme, kernel, series[arguments.kernel].backends, arguments)
    except MissingError as missing:
        say(f"cannot boot a kernel, missing: {missing}")
        return STATUS_MISSING


def _parse(series: dict[str, Series]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--kernel", choices=sorted(series), default=max(series), help="which series of kernels.toml"
    )
    parser.add_argument(
        "--root", type=Path, default=Path("/"), help="a folder with another root file system"
    )
    parser.add_argument(
        "--time-limit", type=float, default=600.0, metavar="SECONDS", help="then the guest is ended"
    )
    parser.add_argument("--verbose", action="store_true", help="show the guest's console too")
    parser.add_argument("command", nargs="+", help="the command and its arguments, after --")
    return parser.parse_args()


def _check_machine() -> None:
    check_debian()
    if platform.machine() != "x86_64":
        raise MissingError(f"an x86_64 machine, this is {platform.machine()}")


def _install_virtme() -> Path:
    """Return the folder of virtme-ng's programs, in a venv that is made if it is not there."""
    folder = CACHE / re.sub("=+", "-", VIRTME)
    done = folder / "installed"
    if not done.exists():
        say(f"installing {VIRTME}")
        try:
            venv.create(folder, clear=True, with_pip=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise MissingError(f"Python's venv and ensurepip modules ({error})") from error
        run(
            [str(folder / "bin/pip"), "install", "--quiet", VIRTME],
            f"{VIRTME} from the package index",
        )
        done.touch()
    return folder / "bin"


def _boot(
    virtme: Path, kernel: Kernel, backends: Sequence[str], arguments: argparse.Namespace
) -> int:
    environment = ["env", f"AIOREAP_TEST_BACKENDS={' '.join(backends)}", "AIOREAP_TEST_EMULATED=1"]
    with tempfile.TemporaryDirectory(prefix="boot-", dir=CACHE) as folder:
        command = Path(folder, "command")
        command.write_text(f"exec {shlex.join([*environment, *arguments.command])}\n")
        script = shlex.join(
            ["sh", str(HERE / "guest.sh"), str(REPOSITORY), str(kernel.modules), str(command)]
        )
        line = _command_line(virtme, kernel, arguments.root.resolve(), script)
        if arguments.verbose:
            line.append("--show-boot-console")
        return _run_guest(line, arguments.time_limit)


def _command_line(virtme: Path, kernel: Kernel, root: Path, script: str) -> list[str]:
    line = [
        str(virtme / "python"),
        str(HERE / "cached_root.py"),
        "--kimg",
        str(kernel.image),
        "--mods=auto",
        "--root",
        str(root),
    ]
    line += [
        "--disable-kvm",
        "--force-9p",
        "--disable-microvm",
        "--cpus",
        str(CPUS),
        "--memory",
        MEMORY,
    ]
    for option in KERNEL_OPTIONS:
        line += [f"--kopt={option}"]
    for folder in WRITABLE:
        if (root / folder[1:]).is_dir():
            line += ["--overlay-rwdir", folder]
    if root != Path("/"):
        mountpoint = root / REPOSITORY.relative_to("/")
        mountpoint.mkdir(parents=True, exist_ok=True)
        line += [f"--rodir={REPOSITORY}={REPOSITORY}"]
    return [*line, "--script-sh", script]


def _run_guest(line: Sequence[str], time_limit: float) -> int:
    """Run virtme-ng, copy its output, and return its exit status; end it after `time_limit`."""
    status = run_guest(line, time_limit, _copy)
    if status is None:
        say(f"the guest was ended after {time_limit:g} seconds")
        return STATUS_TIME_LIMIT
    if status == STATUS_NONE:
        say("exit status 255: the command's own, or the guest died without one (see --verbose)")
    return status


def _copy(output: bytes) -> None:
    sys.stdout.buffer.write(output)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
