"""The C below the binding, alone: tests/c/standalone.c spawns itself in every way there is."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.any_backend, pytest.mark.slow]

_HERE = Path(__file__).parent
_SOURCES = [_HERE / "c" / "standalone.c", _HERE.parent / "aioreap" / "_spawn.c"]
_STRICT = ("-std=c11", "-Wall", "-Wextra", "-Werror")


def _compile(program: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("no C compiler")
    return subprocess.run(
        [compiler, *_STRICT, *flags, *_SOURCES, "-o", program],
        capture_output=True,
        text=True,
        check=False,
    )


def _run(program: Path) -> None:
    done = subprocess.run(
        [program],
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"},  # its way of looking stops threads
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    bad = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert not bad, "\n".join(bad)
    assert not done.stderr
    assert done.stdout.endswith(" passed, 0 failed\n")
    assert done.returncode == 0


@pytest.mark.parametrize("level", ["-O0", "-O2", "-O3", "-Os"])
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_what_runs_in_the_child_calls_nothing_beyond(
    compiler: str, level: str, tmp_path: Path
) -> None:
    """Of a loop a compiler may make strlen(); the init of a tree has unmapped the C library."""
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    made = tmp_path / "spawn.o"
    source = str(_HERE.parent / "aioreap" / "_spawn.c")
    subprocess.run([compiler, "-std=c11", level, "-fPIC", "-c", source, "-o", made], check=True)
    undefined = set(_output_of("nm", "--undefined-only", "--format=posix", made).split()) - {"U"}
    assert "munmap" in undefined, "the parent calls it"
    relocations = _output_of("readelf", "--relocs", "--wide", made)
    _, _, of_child = relocations.partition("'.rela.text.aioreap_child'")
    named = set(of_child.partition("\n\n")[0].split())
    assert of_child
    assert not named & undefined


def _output_of(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_every_way_to_clone_works_without_python(tmp_path: Path) -> None:
    program = tmp_path / "standalone"
    if _compile(program, "-O2", "-static").returncode:
        print("no static libc here: linked dynamically")  # noqa: T201  # a reason to look
        compiled = _compile(program, "-O2")
        assert not compiled.returncode, compiled.stderr
    _run(program)


def test_it_does_so_without_optimisation(tmp_path: Path) -> None:
    program = tmp_path / "standalone"
    compiled = _compile(program, "-O0", "-fstack-protector-all")
    assert not compiled.returncode, compiled.stderr
    _run(program)


def test_it_does_so_under_sanitizers(tmp_path: Path) -> None:
    program = tmp_path / "standalone"
    compiled = _compile(program, "-g", "-fsanitize=address,undefined")
    if "cannot find" in compiled.stderr:
        pytest.skip(f"no sanitizers here: {compiled.stderr}")
    assert not compiled.returncode, compiled.stderr
    _run(program)
