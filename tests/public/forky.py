"""A root of Debian forky, for the Pythons that the machine's own Debian does not have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from host import install_packages, run, say
from kernels import debian_mirror

PYTHONS: Final = ("3.14", "3.15")

# A guest that has this root needs kmod and udev to boot.
_PACKAGES: Final = (
    *(f"python{version}{part}" for version in PYTHONS for part in ("", "-venv")),
    *(f"libpython{version}-testsuite" for version in PYTHONS),
    *("kmod", "udev"),
)
_ENTER: Final = Path(__file__).with_name("enter.sh")


def find_root(cache: Path) -> Path:
    """Return the root, made anew if its packages are others by now."""
    folder, packages = cache / "forky", ",".join(_PACKAGES)
    root, contents = folder / "root", folder / "packages"
    if contents.is_file() and contents.read_text() == packages:
        return root
    install_packages(["mmdebstrap"])
    say("making a root of Debian forky")
    run(["rm", "-rf", "--one-file-system", str(folder)], f"{folder} to be removed")
    folder.mkdir()
    command = ["mmdebstrap", "--variant=minbase", f"--include={packages}"]
    # A snapshot of an archive may be older than it says it is good for.
    command += ['--aptopt=Acquire::Check-Valid-Until "false"', "forky", str(root), debian_mirror()]
    run(command, f"Debian forky with {packages}")
    contents.write_text(packages)
    return root


def enter(root: Path, repository: Path, command: Sequence[str]) -> list[str]:
    """Return the command that runs `command` in `root`, with the repository where it is here."""
    return ["unshare", "--mount", "sh", str(_ENTER), str(root), str(repository), *command]
