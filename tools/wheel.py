"""Build the sdist and one wheel into dist/, and try that wheel on each Python of this machine.

The wheel is made from the sdist, for the stable ABI, and gets the oldest manylinux tag that the
symbols of its extension permit. What is tried is the wheel as it is in dist/, in a venv of its own
and from a folder without our sources, by the commands that cibuildwheel runs too.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any, Final

import pythons

ROOT: Final = Path(__file__).resolve().parents[1]
DIST: Final = ROOT / "dist"
TOOLS: Final = Path(sys.executable).parent
IDENTIFIERS: Final = {
    f"cp311-{system}linux_{machine}"
    for system in ("many", "musl")
    for machine in ("x86_64", "aarch64")
}


def _run(*command: str | Path, cwd: Path = ROOT, path: Path = TOOLS) -> str:
    """Run a command that finds programs in `path` first, and return what it wrote; it must pass."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment["PATH"] = f"{path}:{environment['PATH']}"
    print("+", *command, flush=True)
    written = b""
    with subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE) as process:
        assert isinstance(process.stdout, io.BufferedReader)
        while chunk := process.stdout.read1():  # as it comes: where a test hangs is seen
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
            written += chunk
    if process.returncode:
        sys.exit(f"{Path(command[0]).name} failed")
    return written.decode()


def _build(work: Path, config: dict[str, Any]) -> Path:
    """Fill dist/, and return the wheel in it."""
    for old in (DIST, ROOT / "aioreap.egg-info"):  # setuptools packs again what is listed there
        shutil.rmtree(old, ignore_errors=True)
    settings = [
        f"--config-setting={name}={value}" for name, value in config["config-settings"].items()
    ]
    _run(sys.executable, "-m", "build", "--quiet", *settings, "--outdir", work, ROOT)
    (sdist,) = work.glob("*.tar.gz")
    (built,) = work.glob("*.whl")
    _run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", DIST, built)
    shutil.move(sdist, DIST)
    (wheel,) = DIST.glob("*-cp311-abi3-manylinux*.whl")
    _run(TOOLS / "abi3audit", "--strict", "--verbose", wheel)
    return wheel


def _check_cibuildwheel() -> None:
    printed = _run("cibuildwheel", "--print-build-identifiers", "--platform", "linux")
    if set(printed.split()) != IDENTIFIERS:
        sys.exit(f"cibuildwheel would not build {', '.join(sorted(IDENTIFIERS))}")


def _try(wheel: Path, python: Path, place: Path, config: dict[str, Any]) -> None:
    venv, folder = place / "venv", place / "tests"
    interpreter = venv / "bin" / "python"
    _run(python, "-m", "venv", "--without-pip", venv)
    groups = [f"--group={ROOT / 'pyproject.toml'}:{name}" for name in config["test-groups"]]
    _run(sys.executable, "-m", "pip", "--python", interpreter, "install", "--quiet", wheel, *groups)
    for name in config["test-sources"]:
        _run("cp", "-r", "--parents", name, folder)
    imported = _run(
        interpreter, "-c", "import aioreap; print(aioreap.__file__)", cwd=folder, path=venv / "bin"
    )
    if not Path(imported.strip()).is_relative_to(venv):
        sys.exit("that is not the wheel's")
    for command in config["test-command"]:
        _run("sh", "-c", command, cwd=folder, path=venv / "bin")


def main() -> None:
    """Build, and try on the Pythons named as arguments, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("versions", nargs="*", help="as 3.13; all of this machine if none is named")
    parser.add_argument("--build", action="store_true", help="build, and try it on none")
    arguments = parser.parse_args()
    found = pythons.installed()
    versions = arguments.versions or list(found)
    if missing := set(versions) - found.keys():
        sys.exit(f"there is no Python {', '.join(sorted(missing))} here")
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    _check_cibuildwheel()
    with tempfile.TemporaryDirectory() as work:
        wheel = _build(Path(work), config)
        if arguments.build:
            return
        for version in versions:
            place = Path(work, version)
            (place / "tests").mkdir(parents=True)
            _try(wheel, found[version], place, config)
    print(f"dist/{wheel.name} passed on Python {', '.join(versions)}")


if __name__ == "__main__":
    main()
