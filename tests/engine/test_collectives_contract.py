"""What every group link promises, over TCP and in memory; each rank with a computing thread of its own."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from common.messages.groups import Announcement
from common.units import Attempt, RequestId
from services.engine.collectives import GroupBroken, GroupKey, GroupLink, StepRecalled
from services.engine.collectives_door import open_group_links
from services.engine.collectives_memory import MemoryGroupHub
from tests.engine.group_world import LINK_KINDS, PATIENCE_S, doors, joined

LONG_S = 60.0
"""A bound on silence that no test reaches: what ends sooner was told."""

pytestmark = pytest.mark.parametrize("kind", LINK_KINDS)


@asynccontextmanager
async def group(kind: str, size: int, silence_s: float = LONG_S) -> AsyncIterator[list[GroupLink]]:
    at = doors(kind, size, silence_s=silence_s)
    links = await joined(at)
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield links
    finally:
        for link in links:
            link.close()
            link.close()
        for door in at:
            await door.close()


def call(pass_no: int, step: int = 0) -> Announcement:
    return Announcement(pass_no=pass_no, kind="chunk", start=7, tokens=5, step=step)


async def in_pass(links: list[GroupLink], announcement: Announcement, *works: Callable[[], None]) -> list[object]:
    """Every rank joins the pass when called, and does its work in a thread. Returns what they raised."""
    calls: list[asyncio.Future[Announcement]] = [asyncio.get_running_loop().create_future() for _ in links]
    for link, called in zip(links, calls, strict=True):
        link.on_call(called.set_result)
    calls[0].set_result(announcement)
    all_called = threading.Barrier(len(links))

    async def rank(link: GroupLink, called: Awaitable[Announcement], work: Callable[[], None]) -> None:
        told = await called
        assert told == announcement

        def compute() -> None:
            link.open_pass(told)
            all_called.wait(PATIENCE_S)
            work()
            link.close_pass()

        link.begin()
        try:
            await asyncio.to_thread(compute)
        except GroupBroken:
            link.abort()
            raise
        finally:
            link.end()

    ranks = [rank(*each) for each in zip(links, calls, works, strict=True)]
    return list(await asyncio.gather(*ranks, return_exceptions=True))


def buffer(size: int, seed: int = 0) -> memoryview:
    return memoryview(bytearray(random.Random(seed).randbytes(size)))


@pytest.mark.parametrize("size", [2, 3, 4])
async def test_everybody_sends_to_everybody_and_much_of_it(kind: str, size: int) -> None:
    """More at once than any socket takes, both ways: nobody may wait for the other to read first."""
    nbytes = 2_000_000
    got: dict[tuple[int, int], list[memoryview]] = {}

    def swap(link: GroupLink) -> Callable[[], None]:
        def work() -> None:
            others = [rank for rank in range(size) if rank != link.rank]
            for rank in others:
                seed = 10 * link.rank + rank
                link.send(rank, 3, [buffer(nbytes, seed), buffer(0), buffer(7, seed)])
            for rank in others:
                into = [memoryview(bytearray(nbytes)), memoryview(bytearray(7))]
                assert link.receive(rank, 3, into) is False
                got[rank, link.rank] = into

        return work

    async with group(kind, size) as links:
        assert [(link.rank, link.size) for link in links] == [(rank, size) for rank in range(size)]
        assert await in_pass(links, call(1), *(swap(link) for link in links)) == [None] * size
    for (sender, receiver), (large, small) in got.items():
        assert large == buffer(nbytes, 10 * sender + receiver)
        assert small == buffer(7, 10 * sender + receiver)
    assert len(got) == size * (size - 1)


async def test_passes_follow_each_other_and_stop_is_heard(kind: str) -> None:
    stops: list[bool] = []

    def follow(link: GroupLink) -> Callable[[], None]:
        return lambda: stops.extend(link.receive(0, step) for step in range(3))

    def lead(link: GroupLink) -> Callable[[], None]:
        def work() -> None:
            for step in range(3):
                link.send(1, step, [], stop=step == 2)

        return work

    async with group(kind, 2) as links:
        for pass_no in range(1, 4):
            works = (lead(links[0]), follow(links[1]))
            assert await in_pass(links, call(pass_no, step=pass_no - 1), *works) == [None, None]
    assert stops == [False, False, True] * 3


async def test_a_rank_is_called_when_the_one_before_has_joined(kind: str) -> None:
    called = [asyncio.Event() for _ in range(3)]
    async with group(kind, 3) as links:
        for link in links[1:]:
            link.on_call(lambda _, rank=link.rank: called[rank].set())
        links[0].begin()
        opening = asyncio.create_task(asyncio.to_thread(links[0].open_pass, call(1)))
        await called[1].wait()
        await asyncio.sleep(0.02)
        assert not called[2].is_set()
        assert not opening.done()
        links[1].begin()
        await asyncio.to_thread(links[1].open_pass, call(1))
        await opening
        await called[2].wait()


async def test_the_same_on_the_event_loop(kind: str) -> None:
    """For engines that compute nothing."""
    async with group(kind, 3) as links:
        calls: asyncio.Queue[tuple[GroupLink, Announcement]] = asyncio.Queue()
        for link in links[1:]:
            link.on_call(lambda told, link=link: calls.put_nowait((link, told)))

        async def lead() -> None:
            links[0].begin()
            await links[0].opened(call(1))
            for rank in (1, 2):
                links[0].send(rank, 0, stop=True)
                assert not await links[0].received(rank, 0)
            links[0].close_pass()
            links[0].end()

        async def follow() -> bool:
            link, told = await calls.get()
            link.begin()
            await link.opened(told)
            stop = await link.received(0, 0)
            link.send(0, 0)
            link.close_pass()
            link.end()
            return stop

        assert await asyncio.gather(lead(), follow(), follow()) == [None, True, True]


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("sent_first", [0, 1, 2])
async def test_a_step_taken_back_leaves_nothing_behind(kind: str, size: int, sent_first: int) -> None:
    """Rank 0 takes step 3 back when it has sent everybody `sent_first` messages of it; the others send theirs, as much
    as no socket takes, whether or not anybody reads it. The next pass computes that step as if nothing had been."""
    nbytes = 500_000
    heard: list[int] = []

    def hears(link: GroupLink, others: list[int]) -> bool:
        try:
            for rank in others * 3:
                link.receive(rank, 3, [buffer(nbytes)])
        except StepRecalled:
            return True
        return False

    def taken_back(link: GroupLink) -> Callable[[], None]:
        others = [rank for rank in range(size) if rank != link.rank]

        def work() -> None:
            for _ in range(sent_first if link.rank == 0 else 2):
                for rank in others:
                    link.send(rank, 3, [buffer(nbytes)])
            if link.rank == 0 or hears(link, others):
                heard.append(link.rank)
                link.recall(3)

        return work

    def done(link: GroupLink) -> Callable[[], None]:
        others = [rank for rank in range(size) if rank != link.rank]

        def work() -> None:
            for rank in others:
                link.send(rank, 3, [buffer(40, link.rank)])
            for rank in others:
                into = buffer(40, 99)
                link.receive(rank, 3, [into])
                assert into == buffer(40, rank)

        return work

    async with group(kind, size) as links:
        for pass_no in (1, 3):
            assert await in_pass(links, call(pass_no, step=3), *map(taken_back, links)) == [None] * size
            assert await in_pass(links, call(pass_no + 1, step=3), *map(done, links)) == [None] * size
    assert sorted(heard) == sorted([*range(size)] * 2)


async def test_a_follower_that_looks_hears_that_its_step_is_taken_back(kind: str) -> None:
    said, looked = threading.Event(), threading.Event()

    def lead(link: GroupLink) -> None:
        link.send(1, 2, [buffer(5)])
        link.send(1, 3, [])
        said.set()
        assert looked.wait(PATIENCE_S)
        link.recall(3)

    def follow(link: GroupLink) -> None:
        assert said.wait(PATIENCE_S)
        link.look(2)
        link.receive(0, 2, [buffer(5)])
        link.look(3)
        link.receive(0, 3)
        looked.set()
        until_s = time.monotonic() + PATIENCE_S
        try:
            while time.monotonic() < until_s:
                link.look(2)  # that one is done
                link.look(3)
        except StepRecalled:
            link.recall(3)

    async with group(kind, 2) as links:
        assert await in_pass(links, call(1), lambda: lead(links[0]), lambda: follow(links[1])) == [None, None]


@pytest.mark.parametrize("how", ["hangs", "gives up"])
async def test_who_does_not_answer_when_a_step_is_taken_back_breaks_the_group(kind: str, how: str) -> None:
    free = threading.Event()

    def lost(link: GroupLink) -> None:
        if how == "gives up":
            link.abort()
        assert free.wait(PATIENCE_S)

    def recalls(link: GroupLink) -> Callable[[], None]:
        def work() -> None:
            try:
                if link.rank:
                    with pytest.raises(StepRecalled):
                        link.receive(0, 0)
                link.recall(0)
            finally:
                free.set()

        return work

    async with group(kind, 3, silence_s=0.3 if how == "hangs" else LONG_S) as links:
        works = (recalls(links[0]), recalls(links[1]), lambda: lost(links[2]))
        raised = await in_pass(links, call(1), *works)
        assert [type(error) for error in raised[:2]] == [GroupBroken] * 2


async def test_a_step_is_taken_back_on_the_event_loop(kind: str) -> None:
    async with group(kind, 2) as links:
        told: asyncio.Future[Announcement] = asyncio.get_running_loop().create_future()
        links[1].on_call(told.set_result)

        async def lead() -> None:
            links[0].begin()
            await links[0].opened(call(1, step=2))
            await links[0].recalled(2)
            links[0].end()

        async def follow() -> None:
            announcement = await told
            links[1].begin()
            await links[1].opened(announcement)
            links[1].send(0, 2)
            with pytest.raises(StepRecalled):
                await links[1].received(0, 2)
            await links[1].recalled(2)
            links[1].end()

        await asyncio.gather(lead(), follow())


@pytest.mark.parametrize(
    ("step", "nbytes"),
    [(4, 8), (3, 7), (3, 9)],
)
async def test_who_is_out_of_step_breaks_the_group(kind: str, step: int, nbytes: int) -> None:
    def works(links: list[GroupLink]) -> list[Callable[[], None]]:
        def lead() -> None:
            for rank in (1, 2):
                links[0].send(rank, step, [buffer(nbytes)])
            links[0].receive(1, step)

        def follow(link: GroupLink) -> None:
            link.receive(0, 3, [buffer(8)])
            raise AssertionError("nothing that fits was sent")

        return [lead, lambda: follow(links[1]), lambda: follow(links[2])]

    async with group(kind, 3) as links:
        raised = await in_pass(links, call(1), *works(links))
        assert [type(error) for error in raised] == [GroupBroken] * 3
        assert any("out of step" in str(error) for error in raised)


@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("how", ["abort", "close"])
async def test_all_who_wait_in_a_circle_are_free_when_one_gives_up(kind: str, how: str, victim: int) -> None:
    async with group(kind, 3) as links:
        waiting = asyncio.create_task(
            in_pass(links, call(1), *(lambda link=link: wait_for_next(link) for link in links))  # type: ignore[misc]
        )
        await asyncio.sleep(0.05)
        assert not waiting.done()
        getattr(links[victim], how)()
        assert [type(error) for error in await waiting] == [GroupBroken] * 3
        for link in links:
            with pytest.raises(GroupBroken):
                link.begin()
            with pytest.raises(GroupBroken):
                link.send(0 if link.rank else 1, 0)
            assert "broken" in repr(link)


def wait_for_next(link: GroupLink) -> None:
    link.receive((link.rank + 1) % 3, 0)


async def test_who_is_silent_is_given_up(kind: str) -> None:
    async with group(kind, 2, silence_s=0.1) as links:
        raised = await in_pass(links, call(1), lambda: None, lambda: wait_silently(links[1]))
        assert isinstance(raised[1], GroupBroken)
        assert "silent for 0.1 s" in str(raised[1])


def wait_silently(link: GroupLink) -> None:
    link.receive(0, 0)


async def test_an_idle_rank_learns_of_the_end_at_its_next_pass(kind: str) -> None:
    async with group(kind, 3) as links:
        calls: list[Announcement] = []
        for link in links:
            link.on_call(calls.append)
        links[1].close()
        await asyncio.sleep(0.05)
        for link in links:
            with pytest.raises(GroupBroken):
                link.begin()
        assert not calls


@pytest.mark.parametrize("gone", [{0}, {1}, {2}, {0, 2}])
async def test_an_idle_rank_is_told_once_that_another_is_gone(kind: str, gone: set[int]) -> None:
    async with group(kind, 3) as links:
        lost: list[int] = []
        for link in links:
            link.on_call(lambda _: None)
            link.on_lost(lambda _, rank=link.rank: lost.append(rank))
        for rank in gone:
            links[rank].close()  # what it did itself it need not be told
        await asyncio.sleep(0.05)
        assert sorted(lost) == sorted({0, 1, 2} - gone)


async def test_between_two_passes_a_rank_hears_too(kind: str) -> None:
    async with group(kind, 2) as links:
        lost: list[int] = []
        for link in links:
            link.on_lost(lambda _, rank=link.rank: lost.append(rank))
        for pass_no in (1, 2):
            works = (lambda: links[0].send(1, 0), lambda: links[1].receive(0, 0))
            assert await in_pass(links, call(pass_no), *works) == [None, None]  # type: ignore[arg-type]
        links[1].close()
        await asyncio.sleep(0.05)
        assert lost == [0]


async def test_what_a_rank_says_in_a_pass_waits_for_who_is_not_in_it_yet(kind: str) -> None:
    """And when it goes after that, rank 0, which is in the pass, sees it."""
    async with group(kind, 3) as links:
        calls: dict[int, asyncio.Event] = {rank: asyncio.Event() for rank in range(3)}
        for link in links:
            link.on_call(lambda _, rank=link.rank: calls[rank].set())
        links[0].begin()
        opening = asyncio.create_task(asyncio.to_thread(links[0].open_pass, call(1)))
        await calls[1].wait()
        links[1].begin()
        links[1].open_pass(call(1))
        links[1].send(2, 0, [buffer(9, 1)])
        await opening
        await calls[2].wait()
        links[2].begin()
        await asyncio.to_thread(links[2].open_pass, call(1))
        into = memoryview(bytearray(9))
        await asyncio.to_thread(links[2].receive, 1, 0, [into])
        assert into == buffer(9, 1)
        links[1].close()
        with pytest.raises(GroupBroken):
            await asyncio.to_thread(links[0].receive, 1, 0)


async def test_groups_of_the_same_workers_do_not_mix(kind: str) -> None:
    at = doors(kind, 2)
    both = await asyncio.gather(joined(at, "a"), joined(at, "b"), joined(at, "a", attempt=1))
    heard: dict[int, bool] = {}
    for number, links in enumerate(both):

        def listen(links: list[GroupLink] = links, number: int = number) -> None:
            heard[number] = links[1].receive(0, number)

        def say(links: list[GroupLink] = links, number: int = number) -> None:
            links[0].send(1, number, stop=number == 1)

        assert await in_pass(links, call(1), say, listen) == [None, None]
        links[0].close()
        links[1].close()
    assert heard == {0: False, 1: True, 2: False}
    for door in at:
        await door.close()


async def test_a_group_that_is_not_complete_is_not_formed(kind: str) -> None:
    at = doors(kind, 3, join_s=0.2)
    key = GroupKey(request_id=RequestId("r"), attempt=Attempt(0))
    addresses = [door.address for door in at]
    meeting = (at[rank].join(key, rank, addresses) for rank in (0, 2))
    async with asyncio.timeout(PATIENCE_S):
        raised = await asyncio.gather(*meeting, return_exceptions=True)
    assert [type(error) for error in raised] == [GroupBroken] * 2
    with pytest.raises(GroupBroken):
        await at[0].join(key, 5, addresses)
    for link in await joined(at, "r"):  # the next try meets nobody's leftovers
        link.close()
    for door in at:
        await door.close()


@pytest.mark.parametrize("gone", [0, 1, 2])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
async def test_who_waits_for_a_group_is_told_at_once_that_a_worker_is_gone(kind: str, gone: int, when: str) -> None:
    at = doors(kind, 3, join_s=LONG_S)
    key = GroupKey(request_id=RequestId("r"), attempt=Attempt(0))
    addresses = [door.address for door in at]
    if when == "before":
        await at[gone].close()
    meeting = asyncio.gather(
        *(at[rank].join(key, rank, addresses) for rank in range(3) if rank != gone), return_exceptions=True
    )
    await asyncio.sleep(0.05)
    if when == "meanwhile":
        assert not meeting.done()
        await at[gone].close()
    async with asyncio.timeout(PATIENCE_S):
        assert [type(error) for error in await meeting] == [GroupBroken] * 2
    for door in at:
        await door.close()


async def test_a_rank_may_come_late(kind: str) -> None:
    at = doors(kind, 3)
    key = GroupKey(request_id=RequestId("r"), attempt=Attempt(0))
    addresses = [door.address for door in at]

    async def late(rank: int, delay_s: float) -> GroupLink:
        await asyncio.sleep(delay_s)
        return await at[rank].join(key, rank, addresses)

    links = await asyncio.gather(late(0, 0.1), late(1, 0.05), late(2, 0.0))
    sent: list[bool] = []
    works = (lambda: links[0].send(2, 1, stop=True), lambda: None, lambda: sent.append(links[2].receive(0, 1)))
    assert await in_pass(list(links), call(1), *works) == [None] * 3
    assert sent == [True]
    for link in links:
        link.close()
    for door in at:
        await door.close()


async def test_strangers_are_not_let_in(kind: str) -> None:
    if kind == "memory":
        hub = MemoryGroupHub()
        door = hub.links(join_s=0.1)()
        assert door.address != hub.links()().address
        return
    door, stranger = open_group_links(secret="s", join_s=0.3)(), open_group_links(secret="x", join_s=0.3)()
    key = GroupKey(request_id=RequestId("r"), attempt=Attempt(0))
    addresses = [door.address, stranger.address]
    raised = await asyncio.gather(
        door.join(key, 0, addresses), stranger.join(key, 1, addresses), return_exceptions=True
    )
    assert [type(error) for error in raised] == [GroupBroken] * 2
    assert "wrong data_secret" in str(raised[1])
    await door.close()
    await stranger.close()


async def test_nonsense_in_place_of_a_call_breaks_the_link(kind: str) -> None:
    if kind == "memory":
        return
    async with group(kind, 2) as links:
        calls: list[Announcement] = []
        links[1].on_call(calls.append)
        peer: socket.socket = links[0]._peers[1].sock  # type: ignore[attr-defined]
        peer.send(b"\x01" * 40)
        await asyncio.sleep(0.05)
        with pytest.raises(GroupBroken, match="outside of a pass"):
            links[1].begin()
        assert not calls


async def test_a_severed_worker_breaks_its_groups(kind: str) -> None:
    if kind == "tcp":
        return
    hub = MemoryGroupHub()
    at = [hub.links(silence_s=LONG_S)() for _ in range(3)]
    pair, other = await joined(at[:2], "a"), await joined(at[1:], "b")
    hub.sever(at[0].address)
    with pytest.raises(GroupBroken):
        pair[1].begin()
    other[0].begin()
