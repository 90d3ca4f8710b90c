"""Runs this interpreter's own suites about child processes, of its test package, on aioreap.

    python suites.py asyncio
    python suites.py uvloop

The suites get a loop of aioreap, and so does whoever asks asyncio for a new one.
Each test has to pass and to make its children through aioreap; what cannot be so
is in exceptions.toml. A test that skips itself shows nothing, so it counts as wrong.

The last line begins with ``suites: `` and goes on with a JSON object; what went
wrong is printed before it. Exit status: 1 if something did.
"""

from __future__ import annotations

import asyncio
import faulthandler
import importlib
import json
import mmap
import os
import platform
import sys
import tomllib
import traceback
import unittest
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import aioreap
from aioreap.spawn import SpawnPlan

EXCEPTIONS: Final = Path(__file__).with_name("exceptions.toml")
LOOPS: Final = {"asyncio": "EventLoop", "uvloop": "UvloopEventLoop"}
REPORT: Final = "suites: "

# In seconds. They take some 10, and 250 on a busy emulated machine.
_TIME_LIMIT: Final = 800.0

# Who may make a child: both report it as subprocess.Popen does.
_MAKERS: Final = {"aioreap.spawn", "aioreap.forking"}

_LoopClass = type[asyncio.AbstractEventLoop]
_Error = tuple[type[BaseException], BaseException, TracebackType] | tuple[None, None, None]


@dataclass
class Outcome:
    """What one test did, `through` and `past` being the children it made with aioreap and not."""

    result: str = "without a result"
    words: str = ""
    through: int = 0
    past: int = 0
    left_something: bool = False


@dataclass
class Verdict:
    """How many passed, which failed as they may, which entries of exceptions.toml were needed."""

    passed: int = 0
    failed: list[str] = field(default_factory=list)
    needed: list[str] = field(default_factory=list)
    wrong: dict[str, str] = field(default_factory=dict)


class Spawns:
    """Counts the children that are made through aioreap and past it, in forked copies too."""

    def __init__(self) -> None:
        self._counts = memoryview(mmap.mmap(-1, 16)).cast("q")  # one memory for all copies
        clone = SpawnPlan.clone

        def counted_clone(plan: SpawnPlan) -> Any:
            spawned = clone(plan)
            self._counts[0] += 1
            return spawned

        SpawnPlan.clone = counted_clone  # type: ignore[assignment, method-assign]
        sys.addaudithook(self._audit)

    def _audit(self, event: str, _arguments: tuple[Any, ...]) -> None:
        if event == "subprocess.Popen" and _caller() not in _MAKERS:
            self._counts[1] += 1

    def take(self) -> tuple[int, int]:
        """The two counts since the last call."""
        through, past = self._counts
        self._counts[0] = self._counts[1] = 0
        return through, past


def _caller() -> str:
    """The module that made the child, in person or by subprocess.Popen."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals["__name__"] == "subprocess":
        frame = frame.f_back
    return str(frame.f_globals["__name__"])


class Record(unittest.TestResult):
    """Notes the outcome of each test; `support` is the test package's module of that name."""

    def __init__(self, spawns: Spawns, support: Any) -> None:
        super().__init__()
        self.outcomes: dict[str, Outcome] = {}
        self._spawns = spawns
        self._support = support

    def _of(self, test: unittest.TestCase) -> Outcome:
        return self.outcomes.setdefault(".".join(test.id().split(".")[-2:]), Outcome())

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self._support.environment_altered = False
        self._spawns.take()

    def stopTest(self, test: unittest.TestCase) -> None:
        outcome = self._of(test)
        outcome.through, outcome.past = self._spawns.take()
        outcome.left_something = self._support.environment_altered
        super().stopTest(test)

    def addSuccess(self, test: unittest.TestCase) -> None:
        self._of(test).result = "passed"

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        self._of(test).result, self._of(test).words = "skipped", reason

    def addError(self, test: unittest.TestCase, err: _Error) -> None:
        self._of(test).result = "failed"
        self._of(test).words += "".join(traceback.format_exception(*err))

    addFailure = addError

    def addSubTest(
        self, test: unittest.TestCase, subtest: unittest.TestCase, err: _Error | None
    ) -> None:
        super().addSubTest(test, subtest, err)
        if err is not None:
            self.addError(test, err)


def judge(
    outcomes: dict[str, Outcome], exceptions: dict[str, Any], loop: str, python: str
) -> Verdict:
    """Hold what the tests did against the lists."""
    fails = _listed(exceptions, "fails", loop, python)
    silent = _listed(exceptions, "spawns_nothing", loop, python)
    verdict = Verdict()
    for name, outcome in outcomes.items():
        verdict.needed += [name for listed in (fails, silent) if name in listed]
        wrong = _wrong(outcome, fails.get(name), spawns=name not in silent)
        if wrong:
            verdict.wrong[name] = wrong
        elif name in fails:
            verdict.failed.append(name)
        else:
            verdict.passed += 1
    return verdict


def _listed(exceptions: dict[str, Any], kind: str, loop: str, python: str) -> dict[str, Any]:
    """The tables of that kind by test, or class, as far as they are for this loop and Python."""
    return {
        name: table
        for table in exceptions[kind]
        for name in table["names"]
        if loop in table.get("loops", [loop]) and python in table.get("pythons", [python])
    }


def _wrong(outcome: Outcome, failure: dict[str, str] | None, *, spawns: bool) -> str:
    """What is wrong with it, given the failure that is expected of it; nothing if all is well."""
    expected = "failed" if failure else "passed"
    if outcome.result != expected:
        return f"{outcome.result}, should have {expected}\n{outcome.words}"
    if failure and failure["error"] not in outcome.words:
        return f"failed, but not with {failure['error']!r}\n{outcome.words}"
    if outcome.past:
        return f"{outcome.past} of its children were not made by aioreap"
    if bool(outcome.through) is not spawns:
        return f"{expected}, but {outcome.through} children of it were made by aioreap"
    if outcome.left_something:
        return "left children or threads behind"
    return ""


def _classes(loop_class: _LoopClass) -> Iterator[tuple[str, type[unittest.TestCase] | None]]:
    """The suites' classes on such loops, None for one that this Python does not have."""
    subprocess, events, unix_events, utils = (
        importlib.import_module(f"test.test_asyncio.{name}")
        for name in ("test_subprocess", "test_events", "test_unix_events", "utils")
    )

    def set_up(case: Any) -> None:
        utils.TestCase.setUp(case)
        case.loop = loop_class()
        # The suites' own way to close a loop looks into what only asyncio's have.
        case.set_event_loop(case.loop, cleanup=False)
        case.addCleanup(case.loop.close)

    for mixin in (subprocess.SubprocessMixin, events.SubprocessTestsMixin):
        name = mixin.__name__
        yield name, type(name, (mixin, utils.TestCase), {"setUp": set_up})
    yield "TestFork", getattr(unix_events, "TestFork", None)


def _make_default(loop_class: _LoopClass) -> None:
    """Have asyncio.run() and its like use such loops, in forked copies too."""
    events: Any = asyncio.events
    get_policy = getattr(events, "_get_event_loop_policy", None) or events.get_event_loop_policy
    type(get_policy())._loop_factory = staticmethod(loop_class)
    with asyncio.Runner() as runner:
        assert type(runner.get_loop()) is loop_class


def run(loop_class: _LoopClass, loop: str) -> Verdict:
    """Run the suites on loops of that class, which the lists know as `loop`."""
    exceptions = tomllib.loads(EXCEPTIONS.read_text())
    python = ".".join(platform.python_version_tuple()[:2])
    absent = _listed(exceptions, "absent", loop, python)
    record = Record(Spawns(), importlib.import_module("test.support"))
    _make_default(loop_class)
    wrong = {}
    for name, case in _classes(loop_class):
        if (case is None) is not (name in absent):
            wrong[name] = "is not in the suites" if case is None else "is in the suites by now"
        if case is not None:
            unittest.defaultTestLoader.loadTestsFromTestCase(case).run(record)
    verdict = judge(record.outcomes, exceptions, loop, python)
    verdict.needed += absent
    verdict.wrong |= wrong
    return verdict


def main() -> int:
    """Run them on the loop that the command line names, and print what came out."""
    loop = sys.argv[1]
    faulthandler.dump_traceback_later(_TIME_LIMIT, exit=True)
    verdict = run(getattr(aioreap, LOOPS[loop]), loop)
    for name, words in verdict.wrong.items():
        print(f"{name}, {loop}, {platform.python_version()}: {words}", flush=True)
    report = {
        "python": platform.python_version(),
        "loop": loop,
        "kernel": os.uname().release,
        "backend": aioreap.backend().name,
        **asdict(verdict),
        "wrong": list(verdict.wrong),
    }
    print(f"{REPORT}{json.dumps(report)}", flush=True)
    return 1 if verdict.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
