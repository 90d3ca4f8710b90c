"""One reader for all children of a loop: nobody is forgotten, in whatever order they are told."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import select
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Never

import pytest
from test_copies import in_a_copy, in_a_copy_by_c

from aioreap import _clone, epollset, spawn
from aioreap.epollset import EpollSet
from aioreap.spawn import Spawned, SpawnPlan
from aioreap.watcher import Child


class Ear:
    """A pipe whose read end is a member, and who is told of it."""

    def __init__(self) -> None:
        self.fd, self._write_end = os.pipe()
        os.set_blocking(self.fd, False)
        self.told = 0
        self.act: Callable[[], object] = self.read

    def ready(self) -> None:
        self.told += 1
        self.act()

    def say(self) -> None:
        os.write(self._write_end, b"x")

    def read(self) -> None:
        os.read(self.fd, 1)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        os.close(self._write_end)


@pytest.fixture
async def epoll_set() -> AsyncIterator[EpollSet]:
    loop = asyncio.get_running_loop()
    made = EpollSet(loop)
    yield made
    loop.remove_reader(made._epoll.fileno())
    made._epoll.close()
    epollset._sets.discard(made)


@pytest.fixture
def ears(epoll_set: EpollSet) -> Iterator[list[Ear]]:
    made = [Ear() for _ in range(3 * epollset.TOLD_IN_A_TURN)]
    for ear in made:
        epoll_set.add(ear.fd, ear)
    yield made
    for ear in made:
        epoll_set.remove(ear.fd)
        ear.close()


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def told_in_one_turn(epoll_set: EpollSet, ears: list[Ear]) -> int:
    """How many of these are told in one turn, if all have something to read."""
    for ear in ears:
        ear.told = 0
        ear.say()
    epoll_set._tell()
    return sum(ear.told for ear in ears)


@pytest.mark.any_backend
async def test_a_member_is_told_as_long_as_there_is_something_to_read(
    epoll_set: EpollSet, ears: list[Ear]
) -> None:
    ear = ears[0]
    ear.act = int
    ear.say()
    await turns()
    assert ear.told > 1
    ear.act = ear.read
    await turns()
    ear.told = 0
    await turns()
    assert ear.told == 0
    ear.say()
    epoll_set.remove(ear.fd)
    await turns()
    assert ear.told == 0


@pytest.mark.any_backend
async def test_who_removes_another_is_told_again(epoll_set: EpollSet, ears: list[Ear]) -> None:
    ears[0].act = lambda: epoll_set.remove(ears[1].fd)
    ears[0].say()
    epoll_set._tell()
    ears[0].act = ears[0].read
    await turns()
    assert ears[0].told == 2


@pytest.fixture
def held(ears: list[Ear]) -> Iterator[None]:
    """Somebody else holds open what the first one reads."""
    copy = os.dup(ears[0].fd)
    yield
    os.close(copy)


def heard(epoll_set: EpollSet, ear: Ear) -> list[tuple[int, int]]:
    """What the set tells of once `ear` is closed, though it is readable and held open."""
    os.dup2(ear._write_end, ear.fd)  # closed, for the set; the fixture closes it once more
    ear.say()
    return epoll_set._epoll.poll(0)


@pytest.mark.any_backend
@pytest.mark.usefixtures("held")
async def test_what_was_told_of_and_is_held_open_is_not_heard_of(
    epoll_set: EpollSet, ears: list[Ear]
) -> None:
    ear = ears[0]
    ear.act = lambda: epoll_set.remove(ear.fd)
    ear.say()
    epoll_set._tell()
    assert heard(epoll_set, ear) == []


@pytest.mark.any_backend
@pytest.mark.usefixtures("held")
async def test_nor_is_what_was_told_of_by_edges(epoll_set: EpollSet, ears: list[Ear]) -> None:
    ear = ears[0]
    ear.act = lambda: epoll_set.remove(ear.fd)
    epoll_set.tell_of_edges(ear.fd)
    ear.say()
    epoll_set._tell()
    assert heard(epoll_set, ear) == []


@pytest.mark.any_backend
@pytest.mark.usefixtures("held")
async def test_nor_is_what_is_removed_in_another_turn(epoll_set: EpollSet, ears: list[Ear]) -> None:
    ears[0].say()
    epoll_set._tell()
    epoll_set.remove(ears[0].fd)
    assert heard(epoll_set, ears[0]) == []


@pytest.mark.any_backend
@pytest.mark.usefixtures("held")
async def test_nor_is_it_in_a_copy_that_is_made_while_it_is_told_of(
    epoll_set: EpollSet, ears: list[Ear]
) -> None:
    def remove() -> None:
        epoll_set.remove(ear.fd)
        os._exit(10 + len(heard(epoll_set, ear)))

    def act() -> None:
        statuses.append(in_a_copy(remove))
        ear.read()

    statuses: list[int] = []
    ear = ears[0]
    ear.act = act
    ear.say()
    epoll_set._tell()
    assert statuses == [10]


@pytest.mark.any_backend
async def test_who_is_paused_is_told_of_nothing_and_can_be_told_of_edges(
    epoll_set: EpollSet, ears: list[Ear]
) -> None:
    ear = ears[0]
    epoll_set.tell_of_edges(ear.fd)
    epoll_set.pause(ear.fd)
    ear.say()
    await turns()
    assert ear.told == 0
    assert not epoll_set.tells_of_edges(ear.fd)
    epoll_set.tell_of_edges(ear.fd)
    await turns()
    assert ear.told == 1


@pytest.mark.any_backend
async def test_who_asks_for_edges_while_it_is_told_is_told_once_more(
    epoll_set: EpollSet, ears: list[Ear]
) -> None:
    def act() -> None:
        if not epoll_set.tells_of_edges(ear.fd):
            epoll_set.tell_of_edges(ear.fd)

    ear = ears[0]
    ear.act = act
    ear.say()
    await turns()
    assert ear.told == 2


@pytest.mark.any_backend
async def test_a_turn_of_the_loop_tells_so_many_and_the_next_ones_the_others(
    ears: list[Ear], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(epollset, "ONE_MORE_NS", 10**18)
    for ear in ears:
        ear.say()
    told = [0]
    while told[-1] < len(ears):
        await asyncio.sleep(0)
        told.append(sum(ear.told for ear in ears))
        assert told[-1] - told[-2] <= epollset.TOLD_IN_A_TURN
    assert [ear.told for ear in ears] == [1] * len(ears)


@pytest.mark.any_backend
async def test_a_turn_that_follows_a_long_one_tells_more(
    ears: list[Ear], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(epollset, "ONE_MORE_NS", 1)  # any turn is long
    for ear in ears:
        ear.say()
    told = [0]
    while told[-1] < len(ears):
        await asyncio.sleep(0)
        told.append(sum(ear.told for ear in ears))
    assert [more for more in told if more][:2] == [epollset.TOLD_IN_A_TURN, len(ears)]


@pytest.mark.any_backend
async def test_a_turn_after_a_sleep_tells_no_more(
    epoll_set: EpollSet, ears: list[Ear], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(epollset, "ONE_MORE_NS", 1)
    for ear in ears[: epollset.TOLD_IN_A_TURN]:
        ear.say()
    await turns()
    assert told_in_one_turn(epoll_set, ears) == epollset.TOLD_IN_A_TURN


@pytest.mark.any_backend
async def test_after_a_sleep_no_more_are_told_for_one_that_was_left_and_removed(
    epoll_set: EpollSet, ears: list[Ear], monkeypatch: pytest.MonkeyPatch
) -> None:
    def remove() -> None:
        for ear in first:
            epoll_set.remove(ear.fd)

    monkeypatch.setattr(epollset, "ONE_MORE_NS", 1)
    first, others = ears[: epollset.TOLD_IN_A_TURN + 1], ears[epollset.TOLD_IN_A_TURN + 1 :]
    for ear in first:
        ear.act = remove
        ear.say()
    await turns()
    assert sum(ear.told for ear in first) == 1
    assert told_in_one_turn(epoll_set, others) == epollset.TOLD_IN_A_TURN


@pytest.mark.any_backend
async def test_after_a_sleep_no_more_are_told_for_what_was_removed_between_the_turns(
    epoll_set: EpollSet, ears: list[Ear], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(epollset, "ONE_MORE_NS", 1)
    first, others = ears[: epollset.TOLD_IN_A_TURN + 1], ears[epollset.TOLD_IN_A_TURN + 1 :]
    told_in_one_turn(epoll_set, first)
    for ear in first:
        epoll_set.remove(ear.fd)
    assert told_in_one_turn(epoll_set, others) == epollset.TOLD_IN_A_TURN


@pytest.mark.any_backend
async def test_a_turn_that_follows_a_short_one_tells_no_more(
    epoll_set: EpollSet, ears: list[Ear], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(epollset, "ONE_MORE_NS", 1)
    monkeypatch.setattr(epollset.time, "monotonic_ns", lambda: 10**18)
    told_in_one_turn(epoll_set, ears)
    epoll_set._tell()
    assert sum(ear.told for ear in ears) == 2 * epollset.TOLD_IN_A_TURN


@pytest.mark.any_backend
async def test_turns_tell_more_as_long_as_there_are_more(
    ears: list[Ear], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(epollset, "TOLD_IN_A_TURN", 1)
    monkeypatch.setattr(epollset, "MOST_MORE", 2)
    monkeypatch.setattr(epollset, "ONE_MORE_NS", 1)
    told = [0]

    async def tell() -> None:
        await asyncio.sleep(0)
        told.append(sum(ear.told for ear in ears))

    for ear in ears[:2]:
        ear.say()
    while told[-1] < 1:
        await tell()
    for ear in ears[2:]:  # behind the one that was left
        ear.say()
    while told[-1] < len(ears):
        await tell()
    in_turns = [now - before for before, now in itertools.pairwise(told) if now > before]
    assert in_turns[0] == 1
    assert min(in_turns[1:-1]) > 1


@pytest.mark.any_backend
async def test_nobody_is_passed_over_for_those_that_come_after(
    ears: list[Ear], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(epollset, "ONE_MORE_NS", 10**18)
    waiting = ears[: 2 * (epollset.TOLD_IN_A_TURN + 1)]
    for ear in waiting:
        ear.act = int  # and is ready once more
        ear.say()
    await turns(100)
    told = [ear.told for ear in waiting]
    assert max(told) - min(told) <= 1


@pytest.mark.any_backend
async def test_what_is_one_too_many_and_told_of_by_edges_is_not_lost(
    epoll_set: EpollSet, ears: list[Ear], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(epollset, "ONE_MORE_NS", 10**18)
    for ear in ears:
        epoll_set.tell_of_edges(ear.fd)
        ear.say()
    await turns()
    assert [ear.told for ear in ears] == [1] * len(ears)


@pytest.mark.any_backend
async def test_by_edges_a_member_is_told_once_of_what_it_leaves(
    epoll_set: EpollSet, ears: list[Ear]
) -> None:
    ear = ears[0]
    ear.act = int
    epoll_set.tell_of_edges(ear.fd)
    ear.say()
    await turns()
    assert ear.told == 1
    ear.say()
    await turns()
    assert ear.told == 2


@pytest.mark.any_backend
@pytest.mark.parametrize("edges", [False, True])
async def test_an_interrupted_turn_loses_none_of_the_others(
    epoll_set: EpollSet, ears: list[Ear], edges: bool
) -> None:
    def interrupted() -> None:
        for other in both:
            other.act = other.read
        raise KeyboardInterrupt

    both = ears[:2]
    for ear in both:
        ear.act = interrupted
        if edges:
            epoll_set.tell_of_edges(ear.fd)
        ear.say()
    with pytest.raises(KeyboardInterrupt):
        epoll_set._tell()
    assert sum(ear.told for ear in both) == 1
    await turns()
    for ear in both:
        with pytest.raises(BlockingIOError):
            ear.read()


@pytest.mark.any_backend
async def test_an_interrupted_turn_leaves_edges_what_they_are(
    epoll_set: EpollSet, ears: list[Ear]
) -> None:
    def interrupted() -> None:
        ear.act = int
        raise KeyboardInterrupt

    ear = ears[0]
    ear.act = interrupted
    epoll_set.tell_of_edges(ear.fd)
    for told in (2, 3):
        ear.say()
        with contextlib.suppress(KeyboardInterrupt):
            epoll_set._tell()
        await turns()
        assert ear.told == told


@pytest.mark.any_backend
async def test_what_the_kernel_has_told_of_and_an_interrupt_has_lost_is_told_of_again(
    epoll_set: EpollSet, ears: list[Ear]
) -> None:
    class Interrupted:
        """An epoll set whose poll() is interrupted at its return."""

        def poll(self, *arguments: int) -> Never:
            real.poll(*arguments)
            raise KeyboardInterrupt

    real = epoll_set._epoll
    ears[0].say()
    epoll_set._epoll = Interrupted()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        epoll_set._tell()
    epoll_set._epoll = real
    await turns()
    assert ears[0].told == 1


@pytest.mark.any_backend
async def test_what_is_nobodys_is_not_looked_at_again_and_again(
    epoll_set: EpollSet, ears: list[Ear]
) -> None:
    for ear in ears[:2]:
        ear.say()
    del epoll_set.members[ears[0].fd]  # as an interrupted add() leaves it
    await turns()
    ready = [descriptor for descriptor, _ in epoll_set._epoll.poll(0)]
    assert ready == []
    assert [ear.told for ear in ears[:2]] == [0, 1]


@pytest.mark.any_backend
async def test_who_has_a_number_anew_is_not_told_of_what_it_was(
    epoll_set: EpollSet, ears: list[Ear]
) -> None:
    def replaced() -> None:
        (other,) = (ear for ear in both if not ear.told)
        epoll_set.remove(other.fd)
        os.dup2(newcomer.fd, other.fd)
        epoll_set.add(other.fd, newcomer)

    both, newcomer = ears[:2], Ear()
    for ear in both:
        ear.act = replaced
        ear.say()
    epoll_set._tell()
    assert sum(ear.told for ear in both) == 1
    assert newcomer.told == 0
    newcomer.close()


@pytest.mark.any_backend
@pytest.mark.parametrize("copied", [in_a_copy, in_a_copy_by_c])
@pytest.mark.parametrize(
    "give_up",
    [
        lambda epoll_set, ear: epoll_set.remove(ear.fd),
        lambda epoll_set, ear: epoll_set.close(ear, "fd"),
    ],
    ids=["remove", "close"],
)
async def test_a_copy_that_gives_a_member_up_leaves_the_parents(
    epoll_set: EpollSet,
    ears: list[Ear],
    give_up: Callable[[EpollSet, Ear], object],
    copied: Callable[[Callable[[], object]], object],
) -> None:
    copied(lambda: give_up(epoll_set, ears[0]))
    ears[0].say()
    await turns()
    assert ears[0].told == 1


@pytest.mark.any_backend
@pytest.mark.parametrize("edges", [False, True])
async def test_what_is_closed_and_held_open_is_not_heard_of(
    epoll_set: EpollSet, edges: bool
) -> None:
    ear = Ear()
    number, held = ear.fd, os.dup(ear.fd)
    epoll_set.add(number, ear)
    if edges:
        epoll_set.tell_of_edges(number)
    epoll_set.close(ear, "fd")
    assert ear.fd == -1
    assert epoll_set.members == {}
    assert not epoll_set.tells_of_edges(number)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
    ear.say()
    assert epoll_set._epoll.poll(0) == []
    epoll_set.close(ear, "fd")  # there is nothing to close any more
    ear.close()
    os.close(held)


@pytest.mark.any_backend
async def test_who_is_left_to_the_next_turn_and_closed_is_not_told_in_it(
    epoll_set: EpollSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(epollset, "TOLD_IN_A_TURN", 1)
    both = [Ear(), Ear()]
    for ear in both:
        epoll_set.add(ear.fd, ear)
        ear.say()
    epoll_set._tell()
    told, left = sorted(both, key=lambda ear: -ear.told)
    number = left.fd
    epoll_set.close(left, "fd")
    newcomer = Ear()
    assert newcomer.fd == number
    epoll_set.add(number, newcomer)
    await turns()
    assert (told.told, left.told, newcomer.told) == (1, 0, 0)
    epoll_set.remove(number)
    epoll_set.remove(told.fd)
    for ear in (*both, newcomer):
        ear.close()


@pytest.mark.any_backend
async def test_what_is_not_in_the_set_is_closed_too(epoll_set: EpollSet) -> None:
    ear = Ear()
    number = ear.fd
    epoll_set.close(ear, "fd")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
    ear.close()


@pytest.fixture
def spawned() -> Iterator[Spawned]:
    """A child whose block nobody has taken."""
    made = SpawnPlan.of(("true",), (None, None, None), {}, shell=False).clone()
    yield made
    spawn.in_flight.discard(made)
    Child(made.pid, made.pidfd, made.reap, made.started_ns).destroy()
    os.close(made.pipe)
    assert made.block is not None
    _clone.outcome(made.block, True)
    made.block = None  # pytest keeps the other reference to it for a while


def is_in(epoll: select.epoll, descriptor: int) -> bool:
    try:
        epoll.modify(descriptor, select.EPOLLIN)
    except FileNotFoundError:
        return False
    return True


@pytest.mark.clone_backends
@pytest.mark.parametrize("there", ["pidfd", "pipe", None])
def test_a_child_is_taken_over_with_both_of_its_descriptors_in_the_set_or_none(
    spawned: Spawned, there: str | None
) -> None:
    assert spawned.block is not None
    with select.epoll() as epoll:
        if there is not None:
            epoll.register(getattr(spawned, there), select.EPOLLIN)
            with pytest.raises(FileExistsError):
                _clone.take(spawned.block, epoll.fileno())
        else:
            _clone.take(spawned.block, epoll.fileno())
        found = {name for name in ("pidfd", "pipe") if is_in(epoll, getattr(spawned, name))}
    assert found == ({"pidfd", "pipe"} if there is None else {there})


@pytest.mark.any_backend
async def test_a_copy_by_c_that_takes_a_turn_of_the_loop_leaves_the_parents(
    epoll_set: EpollSet, ears: list[Ear]
) -> None:
    ears[0].act = lambda: os._exit(0)
    ears[0].say()
    in_a_copy_by_c(epoll_set._tell)
    ears[0].act = ears[0].read
    await turns()
    assert ears[0].told == 1


@pytest.mark.any_backend
async def test_a_copy_is_told_as_the_parent_is(epoll_set: EpollSet, ears: list[Ear]) -> None:
    def look() -> None:
        for _ in range(3):
            epoll_set._tell()
        ears[1].say()
        epoll_set._tell()
        os._exit(10 * ears[0].told + ears[1].told)

    for ear in ears[:2]:
        ear.act = int
        ear.say()
    epoll_set.tell_of_edges(ears[1].fd)
    assert in_a_copy(look) == 42


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "add",
    [
        lambda epoll_set, ear: epoll_set.add(ear.fd, ear),
        lambda epoll_set, ear: epoll_set.take(None, ear.fd, ear, ear.fd, ear),
    ],
    ids=["add", "take"],
)
async def test_a_copy_without_descriptors_leaves_the_parents_members_too(
    epoll_set: EpollSet,
    ears: list[Ear],
    monkeypatch: pytest.MonkeyPatch,
    add: Callable[[EpollSet, Ear], object],
) -> None:
    def refused() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def act() -> None:
        epoll_set.remove(ears[0].fd)
        try:
            add(epoll_set, ears[0])
        except OSError as error:
            os._exit(error.errno or 0)

    with monkeypatch.context() as patch:
        patch.setattr(select, "epoll", refused)
        assert in_a_copy(act) == errno.EMFILE
    ears[0].say()
    await turns()
    assert ears[0].told == 1
