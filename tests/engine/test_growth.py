"""Groups that take in more ranks between two chunks: the same tokens and logits as one worker alone, wherever they
grow, however often, and whatever stops them; and nothing computed twice."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from common.messages.cluster import StepCost
from common.messages.groups import RING
from common.policy.sp_shares import Mesh
from common.units import RequestId
from services.engine.collectives import GroupBroken, GroupLink, GroupShare
from services.engine.interface import EngineError, PrefillEngine, Segment
from services.engine.model import LoadedModel
from services.engine.timed_language import TimedShape, expected_tokens
from services.engine.timed_prefill import TimedPrefillEngine
from tests.engine.group_world import LINK_KINDS, PATIENCE_S, Ranks, doors, joined, spec, tokens_computed
from tests.engine.models import reference_greedy, reference_model
from tests.engine.torch_group import Leads, group_of, random_prompt

NEW_TOKENS = 6
GROWTHS = [(1, 2), (2, 3), (2, 4), (1, 2, 4), (1, 3)]
TIMED = TimedShape(
    step_cost=StepCost(pass_s=0.001, token_s=1e-5, pair_s=0.0),
    layers=6,
    kv_capacity_tokens=1_000,
    context_tokens=512,
    vocab=211,
)


class Growing:
    """One sequence on the first of several ranks, which the others come to. `everyone`: all that may ever be."""

    def __init__(self, everyone: Ranks, name: str, prompt: Sequence[int]) -> None:
        self.group = everyone
        self.name, self.prompt = RequestId(name), prompt
        self.mesh = Mesh(1, 1)
        self._spec = spec(name, prompt, NEW_TOKENS)
        self._all, self._doors = list(everyone.ranks), list(everyone.doors)
        self._growth = 0

    async def open(self, size: int) -> None:
        """On one worker as any sequence."""
        self.group.ranks = self._all[:size]
        self.mesh = Mesh(size, 1)
        if size == 1:
            self.group.leader.open(self._spec, self.prompt, None)
            return
        links = await joined(self._doors[:size], self.name)
        for number, link in enumerate(links):
            self._open(number, GroupShare(number, size, RING, link))

    async def grow(self, computed: int, size: int, places: Sequence[int] = ()) -> list[GroupLink]:
        """To this size. `places`: which rank of the larger group each of the ranks is; the first ones, if not said."""
        self._growth += 1
        mine = list(places or range(len(self.group.ranks)))
        taken = iter(rank for rank in self._all if rank not in self.group.ranks)
        ranks = [self.group.ranks[mine.index(at)] if at in mine else next(taken) for at in range(size)]
        former = [mine.index(at) if at in mine else None for at in range(size)]
        self.mesh = self.mesh.grown(computed, former)
        links = await joined([self._doors[self._all.index(rank)] for rank in ranks], self.name, growth=self._growth)
        newcomers = [rank for rank in ranks if rank not in self.group.ranks]
        self.group.ranks = ranks
        for number, (rank, link) in enumerate(zip(ranks, links, strict=True)):
            share = GroupShare(number, size, RING, link)
            if rank in newcomers:
                self._open(number, share)
            later = GroupShare(number, size, RING, link, base=computed, before=self.mesh.before)
            rank.engine.regroup(self.name, later, rank.called)
        return links

    def _open(self, number: int, share: GroupShare) -> None:
        rank = self.group.ranks[number]
        rank.engine.open_share(self._spec, self.prompt, share, rank.called)

    async def serve(
        self, sizes: Mapping[int, int], boundaries: Sequence[int], before_run: Callable[[], None]
    ) -> tuple[list[int], int]:
        """The prompt in chunks that end at these boundaries, the group as large as said from each on; all tokens, and
        how often it was stopped."""
        drawn: list[int] = []
        stops = 0
        await self.open(sizes[0])
        ends = [*boundaries, *range(len(self.prompt) + 1, len(self.prompt) + NEW_TOKENS)]
        for start, end in pairwise([0, *ends]):
            if start in sizes and start:
                await self.grow(start, sizes[start])
            before_run()
            sample = end >= len(self.prompt)
            result = await self.group.run([Segment(self.name, start, end - start, sample)])
            while not result.finished:
                stops += 1
                before_run()
                result = await self.group.resume(self.name)
            drawn += [sampled.token_id for sampled in result.sampled]
        return drawn, stops


def cuts(rng: random.Random, tokens: int, count: int) -> list[int]:
    """Ends of as many chunks of random sizes."""
    return [*sorted(rng.sample(range(1, tokens), count - 1)), tokens]


@pytest.mark.parametrize("steps", GROWTHS, ids=lambda steps: "-".join(map(str, steps)))
async def test_tokens_and_logits_equal_a_single_workers(
    steps: tuple[int, ...], llama: LoadedModel, folder: Path, leads: Leads
) -> None:
    reference, rng, stops = reference_model(folder), random.Random(str(steps)), 0
    everyone = group_of(llama, steps[-1], "memory")
    leads.engine = everyone.leader  # type: ignore[assignment]
    ranks = list(everyone.ranks)

    def stop_at_random() -> None:
        leads.stop_after = rng.choice([0, 1, 2, 3])

    for length in (23, 61, 97):
        prompt = random_prompt(rng, length)
        boundaries = cuts(rng, length, 5)
        at = sorted(rng.sample(boundaries[:-1], len(steps) - 1))
        everyone.ranks = list(ranks)
        growing = Growing(everyone, f"p{length}", prompt)
        theirs, logits = reference_greedy(reference, prompt, NEW_TOKENS)
        leads.logits.clear()
        tokens, stopped = await growing.serve(dict(zip([0, *at], steps, strict=True)), boundaries, stop_at_random)
        stops += stopped
        assert tokens == theirs
        ours = leads.logits if leads.logits else [logits[0]]  # drawn while it was alone, it is not seen there
        assert float((torch.stack(ours) - logits[-len(ours) :]).abs().max()) < 1e-3
        computed = tokens_computed(everyone, f"p{length}")
        assert sum(computed) == (length + NEW_TOKENS - 1) * everyone.leader.profile.layers, "once each"
        assert min(computed) > 0 or length - at[-1] < steps[-1]
        everyone.close(f"p{length}")
    assert stops > 3
    everyone.ranks = ranks
    await everyone.shutdown()


async def test_a_newcomer_may_stand_between_two_ranks_and_over_tcp(
    llama: LoadedModel, folder: Path, leads: Leads
) -> None:
    rng = random.Random(3)
    everyone, prompt = group_of(llama, 3, "tcp"), random_prompt(rng, 50)
    ranks = list(everyone.ranks)
    growing = Growing(everyone, "a", prompt)
    await growing.open(2)
    await everyone.run([Segment(growing.name, 0, 19, False)])
    await growing.grow(19, 3, places=(0, 2))
    assert growing.mesh.before == (10, 0, 9)
    drawn = []
    for start, tokens in ((19, 20), (39, 11), *((50 + at, 1) for at in range(NEW_TOKENS - 1))):
        result = await everyone.run([Segment(growing.name, start, tokens, start + tokens >= 50)])
        drawn += [sampled.token_id for sampled in result.sampled]
    assert drawn == reference_greedy(reference_model(folder), prompt, NEW_TOKENS)[0]
    everyone.close("a")
    everyone.ranks = ranks
    await everyone.shutdown()


@pytest.mark.parametrize("kind", LINK_KINDS)
@pytest.mark.parametrize("steps", GROWTHS[:4], ids=lambda steps: "-".join(map(str, steps)))
async def test_timed_engines_grow_alike(steps: tuple[int, ...], kind: str) -> None:
    rng = random.Random(f"{steps}{kind}")
    engines = [TimedPrefillEngine(TIMED) for _ in range(steps[-1])]
    everyone = Ranks(engines, doors(kind, steps[-1]))
    ranks, prompt = list(everyone.ranks), [rng.randrange(211) for _ in range(120)]
    boundaries = cuts(rng, 120, 6)
    at = sorted(rng.sample(boundaries[:-1], len(steps) - 1))

    def stop_at_random() -> None:
        asyncio.get_running_loop().call_later(rng.choice([0.0, 0.0005, 0.001]), engines[0].stop)

    growing = Growing(everyone, "long", prompt)
    tokens, stops = await growing.serve(dict(zip([0, *at], steps, strict=True)), boundaries, stop_at_random)
    assert tokens == expected_tokens(prompt, NEW_TOKENS, 211)
    assert stops > 2
    everywhere = [position for engine in engines for position in engine.computed_tokens.elements()]
    assert sorted(everywhere) == [(growing.name, position) for position in range(120 + NEW_TOKENS - 1)]
    everyone.close("long")
    everyone.ranks = ranks
    await everyone.shutdown()


def timed_or_torch(kind: str, llama: LoadedModel) -> Ranks:
    if kind == "torch":
        return group_of(llama, 3, "memory")
    engines: list[PrefillEngine] = [TimedPrefillEngine(TIMED) for _ in range(3)]
    return Ranks(engines, doors("memory", 3))


@pytest.mark.parametrize("kind", ["timed", "torch"])
async def test_reserved_kv_stays_what_it_was_and_a_newcomer_reserves_its_share(kind: str, llama: LoadedModel) -> None:
    everyone = timed_or_torch(kind, llama)
    ranks, growing = list(everyone.ranks), Growing(everyone, "a", [3] * 54)
    await growing.open(2)
    await everyone.run([Segment(growing.name, 0, 20, False)])
    await growing.grow(20, 3)
    assert [rank.engine.kv_used_tokens for rank in ranks] == [30, 30, 20]
    assert growing.mesh.fits(60, (30, 30, 20))
    everyone.close("a")
    everyone.ranks = ranks
    await everyone.shutdown()


@pytest.mark.parametrize("kind", ["timed", "torch"])
async def test_a_group_does_not_grow_in_the_middle_of_a_chunk(kind: str, llama: LoadedModel) -> None:
    everyone = timed_or_torch(kind, llama)
    ranks, growing = list(everyone.ranks), Growing(everyone, "a", [3] * 54)
    await growing.open(1)
    await everyone.run([Segment(growing.name, 0, 20, False)])
    with pytest.raises(EngineError, match="20 tokens computed"):
        await growing.grow(19, 2)
    everyone.close("a")
    everyone.ranks = ranks
    await everyone.shutdown()


@pytest.mark.parametrize("kind", ["timed", "torch"])
async def test_the_larger_group_breaks_as_one_and_the_smaller_ones_link_is_closed(
    kind: str, llama: LoadedModel
) -> None:
    everyone = timed_or_torch(kind, llama)
    ranks, growing = list(everyone.ranks), Growing(everyone, "a", [3] * 54)
    await growing.open(2)
    await everyone.run([Segment(growing.name, 0, 20, False)])
    links = await growing.grow(20, 3)
    await everyone.run([Segment(growing.name, 20, 10, False)])
    links[2].abort()
    with pytest.raises(GroupBroken):
        async with asyncio.timeout(PATIENCE_S):
            await everyone.leader.run([Segment(growing.name, 30, 10, False)])
    everyone.close("a")
    everyone.ranks = ranks
    await everyone.shutdown()
