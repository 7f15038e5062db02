"""Several prefill engines in one process, each with its own computing thread, as the ranks of groups: what the
workers' cores do around them, in short. And links of both kinds."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from common.messages.groups import Announcement, GroupScheme
from common.messages.requests import Prompt, RequestSpec, SamplingParams
from common.units import Attempt, RequestId, RouterId
from services.engine.collectives import GroupKey, GroupLink, GroupLinks, GroupShare
from services.engine.collectives_door import GroupLinksFactory, open_group_links
from services.engine.collectives_memory import MemoryGroupHub
from services.engine.interface import EngineError, PassResult, PrefillEngine, Segment

PATIENCE_S = 20.0
"""Longest wait of a test for anything; nothing should come near it."""

LINK_KINDS = ("memory", "tcp")


def scheme_of(kind: str, size: int) -> GroupScheme:
    """ "ring" or "ulysses", of all ranks."""
    return GroupScheme(per_node={"ring": 1, "ulysses": size}[kind])


def doors(kind: str, count: int, *, silence_s: float = 5.0, join_s: float = 5.0, secret: str = "s") -> list[GroupLinks]:
    factory: GroupLinksFactory
    if kind == "tcp":
        factory = open_group_links(secret=secret, silence_s=silence_s, join_s=join_s)
    else:
        factory = MemoryGroupHub().links(silence_s=silence_s, join_s=join_s)
    return [factory() for _ in range(count)]


async def joined(at: Sequence[GroupLinks], name: str = "r", attempt: int = 0, growth: int = 0) -> list[GroupLink]:
    """A group of all these doors, in this order."""
    key = GroupKey(request_id=RequestId(name), attempt=Attempt(attempt), growth=growth)
    addresses = [door.address for door in at]
    return list(await asyncio.gather(*(door.join(key, rank, addresses) for rank, door in enumerate(at))))


def spec(name: str, prompt: Sequence[int], max_tokens: int) -> RequestSpec:
    return RequestSpec(
        request_id=RequestId(name),
        router_id=RouterId("r"),
        prompt=Prompt(tokens=len(prompt)),
        max_tokens=max_tokens,
        sampling=SamplingParams(temperature=0.0),
    )


@dataclass(eq=False)
class Rank:
    """One worker: its engine, and its answer to every call."""

    engine: PrefillEngine
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """The engine runs one pass at a time."""
    company: Callable[[Announcement], Sequence[Segment]] = lambda _: ()
    """Local rows that share a pass it is called to."""
    results: asyncio.Queue[PassResult | EngineError] = field(default_factory=asyncio.Queue)
    last: PassResult | None = None
    calls: list[Announcement] = field(default_factory=list)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def called(self, request_id: RequestId, announcement: Announcement) -> None:
        self.calls.append(announcement)
        task = asyncio.create_task(self._follow(request_id, announcement))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _follow(self, request_id: RequestId, announcement: Announcement) -> None:
        async with self.turn:
            try:
                self.results.put_nowait(await self._pass(request_id, announcement))
            except EngineError as error:
                self.results.put_nowait(error)

    async def _pass(self, request_id: RequestId, announcement: Announcement) -> PassResult:
        if announcement.step > 0:
            return await self.engine.resume(request_id)
        shared = Segment(request_id, announcement.start, announcement.tokens, False, announcement.gathers)
        return await self.engine.run([shared, *self.company(announcement)])


class Ranks:
    """Engines as a group, with what a test asks of it."""

    def __init__(self, engines: Sequence[PrefillEngine], at: Sequence[GroupLinks]) -> None:
        self.ranks = [Rank(engine) for engine in engines]
        self.doors = list(at)
        self.links: list[GroupLink] = []

    @property
    def leader(self) -> PrefillEngine:
        return self.ranks[0].engine

    async def open(self, name: str, prompt: Sequence[int], max_tokens: int, scheme: GroupScheme) -> None:
        self.links = await joined(self.doors, name)
        size = len(self.ranks)
        for number, (rank, link) in enumerate(zip(self.ranks, self.links, strict=True)):
            share = GroupShare(number, size, scheme, link)
            rank.engine.open_share(spec(name, prompt, max_tokens), prompt, share, rank.called)

    async def run(self, segments: Sequence[Segment]) -> PassResult:
        return await self._all_ranks(self.leader.run(segments))

    async def resume(self, name: str) -> PassResult:
        return await self._all_ranks(self.leader.resume(RequestId(name)))

    async def _all_ranks(self, leading: Awaitable[PassResult]) -> PassResult:
        """All ranks must end alike."""
        async with asyncio.timeout(PATIENCE_S), self.ranks[0].turn:
            result = await leading
            for rank in self.ranks[1:]:
                followed = await rank.results.get()
                if isinstance(followed, EngineError):
                    raise followed
                rank.last = followed
                assert (followed.finished, followed.steps_done) == (result.finished, result.steps_done)
        return result

    def close(self, name: str) -> None:
        for rank in self.ranks:
            rank.engine.close(RequestId(name))

    async def shutdown(self, *names: str) -> None:
        """Close these sequences, then everything; nothing may be left."""
        for name in names:
            self.close(name)
        for rank in self.ranks:
            await rank.engine.shutdown()
            assert rank.engine.kv_used_tokens == 0
        await self.settled()
        for door in self.doors:
            await door.close()

    async def settled(self) -> None:
        """Wait until every call has been answered, and forget the answers."""
        tasks = {task for rank in self.ranks for task in rank.tasks}
        if tasks:
            _, waiting = await asyncio.wait(tasks, timeout=PATIENCE_S)
            assert not waiting, "a call was never answered"
        for rank in self.ranks:
            while not rank.results.empty():
                rank.results.get_nowait()


def tokens_computed(group: Ranks, name: str) -> list[int]:
    """By rank: tokens put through a layer, summed over layers."""
    engines: list[Any] = [rank.engine for rank in group.ranks]
    return [engine.tokens_computed(RequestId(name)) for engine in engines]
