"""What suites.py calls wrong: suites that cannot fail would show nothing."""

from __future__ import annotations

import asyncio
import os
import subprocess
import types
import unittest

import pytest
from apart import in_a_copy
from suites import Outcome, Record, Spawns, judge

import aioreap

pytestmark = pytest.mark.any_backend

LISTS = {
    "fails": [{"names": ["Case.test_failing"], "error": "ZeroDivisionError", "loops": ["uvloop"]}],
    "spawns_nothing": [{"names": ["Case.test_silent"], "pythons": ["3.11"]}],
}


@pytest.mark.parametrize(
    ("name", "outcome"),
    [
        ("some", Outcome("passed", through=1)),
        ("silent", Outcome("passed")),
        ("failing", Outcome("failed", "ZeroDivisionError: words", through=1)),
    ],
)
def test_what_is_as_listed_is_right(name: str, outcome: Outcome) -> None:
    verdict = judge({f"Case.test_{name}": outcome}, LISTS, "uvloop", "3.11")
    assert not verdict.wrong
    assert verdict.passed == (outcome.result == "passed")
    assert verdict.failed == [f"Case.test_{name}"] * (outcome.result == "failed")
    assert verdict.needed == [f"Case.test_{name}"] * (name != "some")


@pytest.mark.parametrize(
    ("name", "outcome", "words"),
    [
        ("some", Outcome("failed", "its traceback", through=1), "its traceback"),
        ("some", Outcome("skipped", "its reason"), "its reason"),
        ("some", Outcome(), "without a result"),
        ("some", Outcome("passed"), "0 children of it were made by aioreap"),
        ("some", Outcome("passed", through=1, past=2), "2 of its children were not made"),
        ("some", Outcome("passed", through=1, left_something=True), "left children"),
        ("silent", Outcome("passed", through=1), "1 children of it were made by aioreap"),
        ("failing", Outcome("passed", through=1), "passed, should have failed"),
        ("failing", Outcome("failed", "TypeError", through=1), "not with 'ZeroDivisionError'"),
        ("failing", Outcome("failed", "ZeroDivisionError"), "0 children"),
    ],
)
def test_what_is_not_as_listed_is_wrong(name: str, outcome: Outcome, words: str) -> None:
    verdict = judge({f"Case.test_{name}": outcome}, LISTS, "uvloop", "3.11")
    assert words in verdict.wrong[f"Case.test_{name}"]
    assert not verdict.passed
    assert not verdict.failed


def test_what_is_listed_for_another_loop_or_python_is_not_excused() -> None:
    failing = {"Case.test_failing": Outcome("failed", "ZeroDivisionError", through=1)}
    assert judge(failing, LISTS, "asyncio", "3.11").wrong
    silent = {"Case.test_silent": Outcome("passed")}
    assert judge(silent, LISTS, "uvloop", "3.12").wrong


class _Case(unittest.TestCase):
    __test__ = False  # pytest's word for: not one of mine

    def _spawn(self, loop: asyncio.AbstractEventLoop) -> None:
        async def main() -> None:
            process = await asyncio.create_subprocess_exec("true")
            assert not await process.wait()

        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(main())

    def test_aioreap(self) -> None:
        self._spawn(aioreap.EventLoop())

    def test_aioreap_in_a_copy(self) -> None:
        copy = os.fork()
        if copy == 0:
            self._spawn(aioreap.EventLoop())
            os._exit(0)
        assert os.waitpid(copy, 0)[1] == 0

    def test_asyncio(self) -> None:
        self._spawn(asyncio.SelectorEventLoop())

    def test_both(self) -> None:
        self._spawn(aioreap.EventLoop())
        subprocess.run(["true"], check=True)

    def test_nothing(self) -> None:
        pass

    def test_error(self) -> None:
        raise ZeroDivisionError

    @unittest.skip("its reason")
    def test_skipped(self) -> None:
        pass

    def test_subtests(self) -> None:
        with self.subTest():
            self.fail("in a subtest")


@in_a_copy
def test_children_of_each_test_are_counted_by_who_made_them() -> None:
    record = Record(Spawns(), types.SimpleNamespace())
    unittest.defaultTestLoader.loadTestsFromTestCase(_Case).run(record)
    found = {
        name.removeprefix("_Case.test_"): (outcome.result, outcome.through, outcome.past)
        for name, outcome in record.outcomes.items()
    }
    assert found == {
        "aioreap": ("passed", 1, 0),
        "aioreap_in_a_copy": ("passed", 1, 0),
        "asyncio": ("passed", 0, 1),
        "both": ("passed", 1, 1),
        "nothing": ("passed", 0, 0),
        "error": ("failed", 0, 0),
        "skipped": ("skipped", 0, 0),
        "subtests": ("failed", 0, 0),
    }
    assert record.outcomes["_Case.test_skipped"].words == "its reason"
    assert "in a subtest" in record.outcomes["_Case.test_subtests"].words
