"""Debian's kernels, fetched beside the machine's own packages and unpacked into a cache folder."""

import re
import shutil
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from host import MissingError, run, say

# Debian's name for each architecture that a kernel is taken for.
DEBIAN_NAMES = {"x86_64": "amd64", "aarch64": "arm64", "riscv64": "riscv64"}
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


@dataclass(frozen=True)
class Series:
    """One table of kernels.toml: which versions, where Debian keeps them, what runs."""

    name: str
    architecture: str
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


def read_series(file: Path, architecture: str) -> dict[str, Series]:
    """Return the series that `file` names for `architecture` (uname's word), by name."""
    with file.open("rb") as stream:
        tables = tomllib.load(stream)
    return {
        name: Series(name=name, architecture=architecture, **table[architecture])
        for name, table in tables.items()
        if architecture in table
    }


def find_kernel(series: Series, cache: Path) -> Kernel:
    """Return the kernel of `series` to boot: the good one, or the best that can be had.

    Where Debian cannot be asked, that is the newest in `cache`.
    """
    good = cache / "kernels" / series.good
    if good.is_dir():
        return _unpacked(series.good, good)
    try:
        return _download(series, cache)
    except MissingError:
        cached = max(_cached(series, cache), key=_numbers, default=None)
        if cached is None:
            raise
        return _unpacked(cached, cache / "kernels" / cached)


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
    folder = cache / "kernels" / version
    if folder.is_dir():
        return _unpacked(version, folder)
    packages = [package.format(version) for package in series.packages]
    say(f"downloading {' '.join(packages)}")
    parts = cache / f"unpacking-{version}"
    shutil.rmtree(parts, ignore_errors=True)
    (parts / "tree").mkdir(parents=True)
    run(["apt-get", "download", *packages], f"Debian's kernel {version}", env=environ, cwd=parts)
    for package in parts.glob("*.deb"):
        run(["dpkg", "-x", str(package), str(parts / "tree")], f"room to unpack {package.name}")
    modules = _unpacked(version, parts / "tree").modules
    run(["depmod", "-b", str(modules.parents[2]), version], "depmod")
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
    debian_name = DEBIAN_NAMES[series.architecture]
    folder = cache / "apt" / f"{series.name}-{debian_name}"
    (folder / "lists/partial").mkdir(parents=True, exist_ok=True)
    (folder / "cache/archives/partial").mkdir(parents=True, exist_ok=True)
    mirror = debian_mirror()
    lines = [f"deb [signed-by={KEYRING}] {mirror} {suite} main\n" for suite in series.suites]
    (folder / "sources.list").write_text("".join(lines))
    settings = {
        "Dir::Etc::sourcelist": str(folder / "sources.list"),
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": str(folder / "lists"),
        "Dir::Cache": str(folder / "cache"),
        "Acquire::Languages": "none",
        "APT::Sandbox::User": "root",
        "APT::Architecture": debian_name,
        "APT::Architectures::": debian_name,
    }
    (folder / "apt.conf").write_text(
        "".join(f'{name} "{value}";\n' for name, value in settings.items())
    )
    return folder / "apt.conf"


def debian_mirror() -> str:
    """Return the address that this machine takes Debian from, whatever format its sources have."""
    printed = run(["apt-get", "update", "--print-uris"], "apt sources that can be read")
    found = re.findall(r"^'(\S+)/dists/([^/']+)/InRelease'", printed, re.MULTILINE)
    for address, suite in found:
        if not re.search(r"security|updates|backports", suite) and Path(address).name.startswith(
            "debian"
        ):
            return str(address)
    raise MissingError("a Debian mirror in this machine's apt sources")
