"""Which backend is chosen, why, and what is said of it."""

from __future__ import annotations

import errno
import json
import subprocess
import sys

import pytest

import aioreap
from aioreap import __main__ as report
from aioreap import _clone, kernel

pytestmark = pytest.mark.any_backend

KNOWN, UNKNOWN, HIDDEN = errno.EFAULT, errno.EINVAL, errno.ENOSYS


@pytest.fixture
def unforced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AIOREAP_BACKEND")
    monkeypatch.setattr(kernel, "_backend", None)
    monkeypatch.setattr(kernel, "_tracer_pid", lambda: 0)


def answer(monkeypatch: pytest.MonkeyPatch, *, clone3: int, autoreap: int, legacy: int) -> None:
    """Have the probes answered so."""

    def probe(flags: int, legacy_clone: bool, /) -> int:
        if legacy_clone:
            return legacy
        return autoreap if flags & kernel.CLONE_AUTOREAP and clone3 == KNOWN else clone3

    monkeypatch.setattr(_clone, "probe", probe)


@pytest.mark.usefixtures("unforced")
@pytest.mark.parametrize(
    ("clone3", "autoreap", "legacy", "name", "reason"),
    [
        (KNOWN, KNOWN, KNOWN, "autoreap", "this kernel has CLONE_AUTOREAP"),
        (KNOWN, UNKNOWN, KNOWN, "pidfd", "no CLONE_AUTOREAP (autoreap: no (EINVAL"),
        (HIDDEN, HIDDEN, KNOWN, "pidfd", "no CLONE_AUTOREAP (autoreap: no (ENOSYS"),
        (errno.EPERM, errno.EPERM, KNOWN, "pidfd", "(EPERM"),
        (HIDDEN, HIDDEN, HIDDEN, "popen", "clone_pidfd: no (ENOSYS"),
    ],
)
def test_the_best_that_the_kernel_shows_is_taken(
    monkeypatch: pytest.MonkeyPatch, clone3: int, autoreap: int, legacy: int, name: str, reason: str
) -> None:
    answer(monkeypatch, clone3=clone3, autoreap=autoreap, legacy=legacy)
    found = aioreap.backend()
    assert found.name == name
    assert reason in found.reason
    assert found is aioreap.backend()
    assert not found.forced


@pytest.mark.usefixtures("unforced")
def test_a_traced_server_does_not_auto_reap(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, clone3=KNOWN, autoreap=KNOWN, legacy=KNOWN)
    monkeypatch.setattr(kernel, "_tracer_pid", lambda: 4711)
    assert aioreap.backend().name == "pidfd"
    assert "4711 traces" in aioreap.backend().reason


@pytest.mark.usefixtures("unforced")
@pytest.mark.parametrize("error", [errno.EMFILE, errno.EAGAIN, errno.ENOMEM])
def test_an_answer_of_hard_times_is_not_kept(monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    real = _clone.probe
    monkeypatch.setattr(_clone, "probe", lambda flags, legacy, /: error)
    with pytest.raises(OSError, match=r".") as caught:
        aioreap.backend()
    assert caught.value.errno == error
    monkeypatch.setattr(_clone, "probe", real)
    assert aioreap.backend().name in ("autoreap", "pidfd", "popen")


@pytest.mark.usefixtures("unforced")
def test_a_forced_backend_that_cannot_be_had_names_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer(monkeypatch, clone3=KNOWN, autoreap=UNKNOWN, legacy=KNOWN)
    monkeypatch.setenv("AIOREAP_BACKEND", "autoreap")
    with pytest.raises(
        OSError, match="AIOREAP_BACKEND=autoreap cannot be had here; autoreap: no"
    ) as caught:
        aioreap.backend()
    assert caught.value.errno == errno.ENOSYS
    monkeypatch.setenv("AIOREAP_BACKEND", "fork")
    with pytest.raises(ValueError, match="must be autoreap, pidfd or popen, not 'fork'"):
        aioreap.backend()
    assert report.main([]) == 1


@pytest.mark.usefixtures("unforced")
def test_without_pidfds_there_is_no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(*arguments: object) -> int:
        raise OSError(errno.EPERM, "hidden")

    answer(monkeypatch, clone3=HIDDEN, autoreap=HIDDEN, legacy=HIDDEN)
    monkeypatch.setattr(kernel.os, "pidfd_open", hidden)
    with pytest.raises(
        OSError,
        match=r"aioreap needs pidfds \(Linux 5.4\); clone_pidfd: no .*; pidfd_open: no \(EPERM",
    ):
        aioreap.backend()


def test_probing_makes_no_process() -> None:
    script = """
import os, aioreap
aioreap.backend()
try:
    os.waitpid(-1, os.WNOHANG)
except ChildProcessError:
    print("no child", os.listdir("/proc/self/task") == [str(os.getpid())])
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "no child True\n"


def test_the_report_is_a_table_for_a_person_and_json_for_a_program(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = aioreap.backend()
    assert report.main([]) == 0
    table = capsys.readouterr().out
    assert f"backend  {found.name}\n" in table
    assert f"reason   {found.reason}\n" in table
    for name, feature in found.features.items():
        assert f"{name} " in table
        assert feature.answer in table
    assert "autokill=True " in table
    assert "autokill=tree " in table
    assert report.main(["--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["backend"] == found.name
    assert document["features"]["clone3"] == {
        "available": found.features["clone3"].available,
        "answer": found.features["clone3"].answer,
    }
    assert document["ways"]["autokill=True"]["available"]
    command = [sys.executable, "-m", "aioreap", "--json"]
    assert json.loads(subprocess.run(command, capture_output=True, check=True).stdout) == document


def test_elsewhere_than_on_linux_the_import_says_so() -> None:
    script = "import sys; sys.platform = 'darwin'; import aioreap"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert "ImportError: aioreap runs on Linux, not on darwin" in done.stderr
