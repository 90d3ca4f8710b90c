"""Debian's kernels, fetched beside the machine's own packages and unpacked into a cache folder."""

import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


class MissingError(Exception):
    """Something that booting a kernel needs is not there and could not be had."""


@dataclass(frozen=True)
class Series:
    """One table of kernels.toml: which versions, where Debian keeps them, what runs."""

    name: str
    good: str
    newest: str
    packages: Sequence[str]
    suites: Sequence[str]
    backends: Sequence[str]


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel: its version, its bootable image and the folder of its modules."""

    version: str
    image: Path
    modules: Path


def read_series(file: Path) -> dict[str, Series]:
    """Return the series that `file` names, by name."""
    with file.open("rb") as stream:
        return {name: Series(name=name, **table) for name, table in tomllib.load(stream).items()}


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


def find_kernel(series: Series, cache: Path) -> Kernel:
    """Return the kernel of `series` to boot: the good one, another from `cache`, or a fresh one."""
    wanted = [series.good, *sorted(_cached(series, cache), key=_numbers, reverse=True)]
    for version in wanted:
        folder = cache / "kernels" / version
        if folder.is_dir():
            return _unpacked(version, folder)
    return _download(series, cache)


def _cached(series: Series, cache: Path) -> list[str]:
    return [
        path.name
        for path in (cache / "kernels").glob("*")
        if re.fullmatch(series.newest, path.name)
    ]


def _numbers(version: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", version)]


def _unpacked(version: str, folder: Path) -> Kernel:
    base = folder / "usr" if (folder / "usr/lib/modules").is_dir() else folder
    modules = base / "lib/modules" / version
    images = [modules / "vmlinuz", folder / f"boot/vmlinuz-{version}"]
    for image in images:
        if image.is_file():
            return Kernel(version, image, modules)
    raise MissingError(f"a bootable image in {folder}: remove that folder and try again")


def _download(series: Series, cache: Path) -> Kernel:
    environ = {"APT_CONFIG": str(_apt_configuration(series, cache))}
    run(
        ["apt-get", "update"],
        f"the package lists of Debian {', '.join(series.suites)}",
        env=environ,
    )
    names = run(["apt-cache", "pkgnames", "linux-"], "apt-cache", env=environ).split()
    version = _choose(series, set(names))
    packages = [package.format(version) for package in series.packages]
    print(f"boot.py: downloading {' '.join(packages)}", flush=True)
    parts = cache / f"unpacking-{version}"
    shutil.rmtree(parts, ignore_errors=True)
    (parts / "tree").mkdir(parents=True)
    run(["apt-get", "download", *packages], f"Debian's kernel {version}", env=environ, cwd=parts)
    for package in parts.glob("*.deb"):
        run(["dpkg", "-x", str(package), str(parts / "tree")], f"room to unpack {package.name}")
    modules = _unpacked(version, parts / "tree").modules
    run(["depmod", "-b", str(modules.parents[2]), version], "depmod")
    folder = cache / "kernels" / version
    folder.parent.mkdir(exist_ok=True)
    (parts / "tree").rename(folder)
    shutil.rmtree(parts)
    return _unpacked(version, folder)


def _choose(series: Series, names: set[str]) -> str:
    found = {
        name.removeprefix(prefix) for prefix in [series.packages[0].format("")] for name in names
    }
    versions = [
        version
        for version in found
        if version == series.good or re.fullmatch(series.newest, version)
    ]
    whole = [
        version
        for version in versions
        if names.issuperset(p.format(version) for p in series.packages)
    ]
    if not whole:
        raise MissingError(
            f"a kernel {series.name} in Debian {', '.join(series.suites)} (is there a network?)"
        )
    return series.good if series.good in whole else max(whole, key=_numbers)


def _apt_configuration(series: Series, cache: Path) -> Path:
    folder = cache / "apt" / series.name
    (folder / "lists/partial").mkdir(parents=True, exist_ok=True)
    (folder / "cache/archives/partial").mkdir(parents=True, exist_ok=True)
    mirror = _mirror()
    lines = [f"deb [signed-by={KEYRING}] {mirror} {suite} main\n" for suite in series.suites]
    (folder / "sources.list").write_text("".join(lines))
    settings = {
        "Dir::Etc::sourcelist": str(folder / "sources.list"),
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": str(folder / "lists"),
        "Dir::Cache": str(folder / "cache"),
        "Acquire::Languages": "none",
        "APT::Sandbox::User": "root",
    }
    (folder / "apt.conf").write_text(
        "".join(f'{name} "{value}";\n' for name, value in settings.items())
    )
    return folder / "apt.conf"


def _mirror() -> str:
    """Return the address that this machine takes Debian from, whatever format its sources have."""
    printed = run(["apt-get", "update", "--print-uris"], "apt sources that can be read")
    found = re.findall(r"^'(\S+)/dists/([^/']+)/InRelease'", printed, re.MULTILINE)
    for address, suite in found:
        if not re.search(r"security|updates|backports", suite) and Path(address).name.startswith(
            "debian"
        ):
            return str(address)
    raise MissingError("a Debian mirror in this machine's apt sources")
