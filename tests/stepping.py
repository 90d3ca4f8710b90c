"""Cancels a call at each of its moments, until one comes too late, and looks at what is left."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import itertools
import os
import select
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from dataclasses import dataclass, replace
from types import CodeType, FrameType
from typing import Any, TypeAlias

import anyio
from conftest import EMULATED, children, open_descriptors

import aioreap

# CPU seconds that the end of a cancelled call may take. The promise is 50 ms. An emulated
# machine translates each instruction in software: an interpreter's start, 20 ms of a real
# processor, is half a second of its, and so 50 ms are more than one.
_CPU_LIMIT = 1.0 if EMULATED else 0.05
# Milliseconds until a killed process counts as one that lives on, and a descriptor as left.
_PATIENCE_MS = 60_000

Call: TypeAlias = Callable[[], Coroutine[Any, Any, None]]
Cancel: TypeAlias = Callable[[], object]
Way: TypeAlias = Callable[[Call, list[Cancel]], Coroutine[Any, Any, None]]


# The ways to cancel. Each says what cancels it, and then awaits the call.


async def _by_task(call: Call, cancel: list[Cancel]) -> None:
    task = asyncio.current_task()
    assert task is not None
    cancel.append(task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await call()


async def _by_timeout(call: Call, cancel: list[Cancel]) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(None) as timeout:
            cancel.append(lambda: timeout.reschedule(asyncio.get_running_loop().time()))
            await call()


class _SiblingError(Exception):
    pass


async def _by_group(call: Call, cancel: list[Cancel]) -> None:
    fate = asyncio.get_running_loop().create_future()

    async def sibling() -> None:
        await fate

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(sibling())
            cancel.append(lambda: fate.set_exception(_SiblingError()))
            try:
                await call()
            finally:
                if not fate.done():
                    fate.set_result(None)
    except* _SiblingError:
        pass


async def _by_scope(call: Call, cancel: list[Cancel]) -> None:
    """It cancels again at each turn of the loop."""
    with anyio.CancelScope() as scope:
        cancel.append(scope.cancel)
        await call()


WAYS: dict[str, Way] = {
    "task": _by_task,
    "timeout": _by_timeout,
    "group": _by_group,
    "scope": _by_scope,
}


# What is cancelled.


class Trial:
    """What one run of an operation is given.

    Attributes:
        process: the child that the operation is about, if it is about one.
        life: a descriptor for `pass_fds`. Whoever has a copy must not outlive the trial.
    """

    process: aioreap.Process

    def __init__(self) -> None:
        self._alive, self.life = os.pipe()

    def is_alone(self) -> bool:
        """Whether all that had a copy of `life` have ended, or do so soon."""
        if self.life >= 0:
            os.close(self.life)
            self.life = -1
        poll = select.poll()
        poll.register(self._alive, select.POLLIN)
        return bool(poll.poll(_PATIENCE_MS))

    def close(self) -> None:
        self.is_alone()
        os.close(self._alive)


@dataclass(frozen=True)
class Operation:
    """A public coroutine, in the circumstances in which it is to be cancelled.

    Attributes:
        call: makes the coroutine.
        child: starts the child that it is about.
        release: gives back what it returned.
        ends_child: whether the child has ended when the cancelled call has.
        goes_on: whether the loop may still see to the end of the child or its group then:
            the group's is looked for by timers, and who is cancelled twice does not wait long.
        error: what the call raises when it is not cancelled.
    """

    call: Callable[[Trial], Awaitable[Any]]
    child: Callable[[Trial], Awaitable[aioreap.Process]] | None = None
    release: Callable[[Any], Awaitable[object]] | None = None
    ends_child: bool = False
    goes_on: bool = False
    error: type[BaseException] | None = None


class _Course:
    """One call, and how it goes."""

    def __init__(self, operation: Operation, way: Way, trial: Trial) -> None:
        self._operation = operation
        self._trial = trial
        self._cancel: list[Cancel] = []
        self.is_over = False
        self.was_cancelled = False
        self.result: Any = None
        self.error: BaseException | None = None
        self.task = asyncio.ensure_future(way(self._run, self._cancel))

    def cancel(self, _awaited: object = None) -> None:
        """Cancel the call, if it is not over."""
        if not self.is_over and not self.was_cancelled:
            self.was_cancelled = True
            self._begin = time.thread_time()
            self._cancel[0]()

    async def _run(self) -> None:
        try:
            self.result = await self._call()
        except BaseException as error:
            self.error = error
            if not isinstance(error, self._operation.error or ()):
                raise
        finally:
            self.is_over = True
            if self.was_cancelled:
                self.cpu = time.thread_time() - self._begin

    def _call(self) -> Awaitable[Any]:
        return self._operation.call(self._trial)


class _CourseOfAwaits(_Course):
    """It is cancelled when what it awaits is there, just before it is told so."""

    def __init__(self, operation: Operation, way: Way, trial: Trial, at: int) -> None:
        super().__init__(operation, way, trial)
        self._at = at

    def _call(self) -> Awaitable[Any]:
        return _Driven(super()._call(), self._at, self.cancel)


@dataclass
class _Driven:
    """A coroutine, with `before` called when its await number `at` is over."""

    coroutine: Awaitable[Any]
    at: int
    before: Callable[..., object]

    def __await__(self) -> Generator[Any, Any, Any]:
        inner: Any = self.coroutine.__await__()
        step, argument = inner.send, None
        for count in itertools.count():
            try:
                awaited = step(argument)
            except StopIteration as stop:
                return stop.value
            if count == self.at:
                if awaited is None:
                    asyncio.get_running_loop().call_soon(self.before)
                else:
                    awaited.add_done_callback(self.before)
            try:
                step, argument = inner.send, (yield awaited)
            except BaseException as error:  # noqa: BLE001 - it is thrown where it belongs
                step, argument = inner.throw, error
        raise AssertionError


@dataclass
class _Noted:
    """A coroutine, and what its steps run: of coroutines, those that await something."""

    coroutine: Awaitable[Any]
    codes: set[CodeType]

    def __await__(self) -> Generator[Any, Any, Any]:
        inner: Any = self.coroutine.__await__()
        step, argument = inner.send, None
        while True:
            try:
                with self._noting():
                    awaited = step(argument)
            except StopIteration as stop:
                return stop.value
            waiting: Any = self.coroutine
            while inspect.iscoroutine(waiting):
                self.codes.add(waiting.cr_code)
                waiting = waiting.cr_await
            try:
                step, argument = inner.send, (yield awaited)
            except BaseException as error:  # noqa: BLE001 - it is thrown where it belongs
                step, argument = inner.throw, error

    def _note(self, frame: FrameType, _event: str, _argument: object) -> None:
        if not frame.f_code.co_flags & inspect.CO_COROUTINE:
            self.codes.add(frame.f_code)

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        before = sys.getprofile()
        sys.setprofile(self._note)
        try:
            yield
        finally:
            sys.setprofile(before)


# What is left.


class _Surroundings:
    """What there was before, but for which nothing may be there after."""

    def __init__(self) -> None:
        self._descriptors = open_descriptors()

    def descriptors_left(self) -> dict[int, str]:
        return {n: what for n, what in open_descriptors().items() if n not in self._descriptors}

    async def expect_nothing_else(self, *, at_once: bool) -> None:
        """No child, no descriptor and no task.

        A call that is cancelled again and again does not wait for a child that dies
        slowly; then the loop does the rest.
        """
        end = time.monotonic() + (0 if at_once else _PATIENCE_MS / 1000)
        while (children() or self.descriptors_left()) and time.monotonic() < end:
            await asyncio.sleep(0)
        assert not children()
        assert not (left := self.descriptors_left()), f"descriptors left: {left}"
        assert asyncio.all_tasks() == {asyncio.current_task()}


@contextlib.contextmanager
def _no_word_of_trouble() -> Iterator[_Surroundings]:
    """Nothing reaches the loop's exception handler, not even when garbage is collected."""
    surroundings = _Surroundings()
    loop = asyncio.get_running_loop()
    said: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _loop, context: said.append(context))
    try:
        yield surroundings
        gc.collect()
        assert not said, said
    finally:
        loop.set_exception_handler(None)


async def _have_libuv_open_what_it_keeps() -> None:
    await (await aioreap.create_subprocess_exec("true", stdin=aioreap.PIPE)).communicate()


async def _release_child(process: aioreap.Process) -> None:
    """End it if it runs, and its pipes."""
    if process.returncode is None:
        process.kill()
    await process.communicate()


async def _turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def _cancelled_at(
    operation: Operation,
    way: Way,
    surroundings: _Surroundings,
    *,
    turn: int | None = None,
    at: int | None = None,
) -> bool:
    """Run the operation once, and cancel it in this turn of the loop or after that await.

    False if it was over before.
    """
    trial = Trial()
    try:
        if operation.child is not None:
            trial.process = await operation.child(trial)
        if at is not None:
            course: _Course = _CourseOfAwaits(operation, way, trial, at)
        else:
            course = _Course(operation, way, trial)
            await _turns(turn or 0)
            course.cancel()
        await asyncio.wait([course.task])
        course.task.result()
        if course.was_cancelled:
            assert course.cpu < _CPU_LIMIT
        if isinstance(course.error, asyncio.CancelledError):
            if operation.ends_child and way is not _by_scope:
                assert trial.process.poll() is not None
        else:  # what cancels at a later turn came too late
            assert not course.was_cancelled or way is not _by_task, "the cancellation is lost"
            assert isinstance(course.error, operation.error or type(None))
            if operation.release is not None:
                await operation.release(course.result)
        if operation.child is not None:
            await _release_child(trial.process)
            del trial.process
        assert trial.is_alone()
    finally:
        trial.close()
    cancelled = course.was_cancelled
    del course
    at_once = way is not _by_scope and not operation.goes_on
    await surroundings.expect_nothing_else(at_once=at_once)
    return cancelled


async def cancel_at_each_turn(operation: Operation, way: Way) -> int:
    """Cancel it later and later; the number of the turns that it was cancelled in."""
    await _have_libuv_open_what_it_keeps()
    with _no_word_of_trouble() as surroundings:
        for count, turn in enumerate(
            itertools.accumulate(range(1, 200), lambda n, _: n + 1 + n // 8)
        ):
            if not await _cancelled_at(operation, way, surroundings, turn=turn):
                return count
    raise AssertionError("it is never over")


async def cancel_at_each_await(operation: Operation, way: Way) -> int:
    """Cancel it when one of its awaits is over; the number of those."""
    await _have_libuv_open_what_it_keeps()
    with _no_word_of_trouble() as surroundings:
        for at in itertools.count():
            if not await _cancelled_at(operation, way, surroundings, at=at):
                return at
    raise AssertionError


async def run_by(operation: Operation) -> set[CodeType]:
    """What an operation's call runs; of coroutines, those in which it can be cancelled."""
    codes: set[CodeType] = set()
    noted = replace(operation, call=lambda trial: _Noted(operation.call(trial), codes))
    await _have_libuv_open_what_it_keeps()
    with _no_word_of_trouble() as surroundings:
        await _cancelled_at(noted, _by_task, surroundings, at=sys.maxsize)
    return codes
