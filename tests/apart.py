"""Runs tests in a forked copy, for what a process cannot take back or has to be alone for."""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import traceback
import warnings
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from conftest import _LOOPS, children, open_descriptors

import aioreap
from aioreap import _clone, watcher

NOBODY = 54321  # a user that has no processes and no name

Factory = Callable[[], asyncio.AbstractEventLoop]

on_both_loops = pytest.mark.parametrize("make_loop", _LOOPS.values(), ids=_LOOPS)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def become_an_ordinary_user() -> None:
    """Give up root, for good."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def _report_of(make_loop: Factory, main: Callable[[], Coroutine[Any, Any, None]]) -> str:
    family, blocks = children(), _clone.blocks()
    before: dict[int, str] | None = None

    async def watched() -> None:
        nonlocal before
        # libuv opens /dev/null at a loop's first stream, and keeps it.
        await (await aioreap.create_subprocess_exec("true", stdin=-1)).communicate()
        before = open_descriptors()
        try:
            await main()
        except BaseException:
            # What uvloop may not warn of it does not close, and its close() waits for that.
            warnings.simplefilter("ignore", ResourceWarning)
            raise
        gc.collect()
        after = open_descriptors()
        left = {n: what for n, what in after.items() if n not in before}
        assert not left, f"descriptors left: {left}"

    try:
        with asyncio.Runner(loop_factory=make_loop) as runner:
            runner.run(watched())
        watcher.reap_orphans()
        assert children() == family
        assert _clone.blocks() <= blocks
    except BaseException:  # noqa: BLE001 - the caller raises it
        return traceback.format_exc()
    return ""


def _fail_as_a_copy(report_of: Callable[[], str]) -> None:
    read_end, write_end = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # in_thread.py has two threads
        copy = os.fork()
    if copy == 0:
        status = 1
        try:
            os.close(read_end)
            with open(write_end, "wb") as writer:
                writer.write(report_of().encode(errors="backslashreplace"))
            status = 0
        finally:
            os._exit(status)
    os.close(write_end)
    with open(read_end, encoding="utf-8") as reader:
        report = reader.read()
    assert os.waitpid(copy, 0)[1] == 0
    assert not report, report


def run_apart(make_loop: Factory, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run main() on a new loop in a forked copy: what fails there fails here.

    That no child, no descriptor and no block is left is asserted as well.
    """
    _fail_as_a_copy(lambda: _report_of(make_loop, main))


def in_a_copy(test: Callable[..., None]) -> Callable[..., None]:
    """Have a test run in a forked copy, which has one thread, and no child but the test's.

    That it leaves no child and no descriptor is asserted as well.
    """

    @functools.wraps(test)
    def run(*arguments: Any, **fixtures: Any) -> None:
        def report_of() -> str:
            try:
                before = open_descriptors()
                test(*arguments, **fixtures)
                left = {n: what for n, what in open_descriptors().items() if n not in before}
                assert not left, f"descriptors left: {left}"
                assert not children()
            except BaseException:  # noqa: BLE001 - the caller raises it
                return traceback.format_exc()
            return ""

        _fail_as_a_copy(report_of)

    return run
