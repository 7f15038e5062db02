"""Timed engines as the ranks of a group: they promise what torch engines do, without tensors, also in virtual time."""

from __future__ import annotations

import asyncio
import random

import pytest

from common.messages.cluster import StepCost
from common.messages.groups import RING, GroupScheme
from common.runtime.virtual_time import run_virtual
from common.units import RequestId
from services.engine.collectives import GroupBroken
from services.engine.interface import EngineError, Segment
from services.engine.timed_language import TimedShape, expected_tokens
from services.engine.timed_prefill import TimedPrefillEngine
from tests.engine.group_world import LINK_KINDS, Ranks, doors

SHAPE = TimedShape(
    step_cost=StepCost(pass_s=0.001, token_s=1e-5, pair_s=0.0),
    layers=6,
    kv_capacity_tokens=1_000,
    context_tokens=512,
    vocab=211,
)
LONG = RequestId("long")


def group_of(size: int, kind: str = "memory", *, silence_s: float = 5.0) -> Ranks:
    return Ranks([TimedPrefillEngine(SHAPE) for _ in range(size)], doors(kind, size, silence_s=silence_s))


@pytest.mark.parametrize("kind", LINK_KINDS)
@pytest.mark.parametrize("size", [2, 3])
async def test_chunks_stops_and_rows(kind: str, size: int) -> None:
    group, rng = group_of(size, kind), random.Random(size)
    engines: list[TimedPrefillEngine] = [rank.engine for rank in group.ranks]  # type: ignore[misc]
    prompt = [rng.randrange(211) for _ in range(100)]
    await group.open("long", prompt, 10, RING)
    assert {engine.kv_used_tokens for engine in engines} == {-(-110 // size)}
    drawn: list[int] = []
    stops = 0
    for start, tokens in ((0, 37), (37, 63), *((100 + at, 1) for at in range(9))):
        asyncio.get_running_loop().call_later(rng.choice([0.0, 0.0005, 0.001]), engines[0].stop)
        result = await group.run([Segment(LONG, start, tokens, start >= 37)])
        while not result.finished:
            stops += 1
            assert 0 < result.steps_done < SHAPE.layers
            result = await group.resume("long")
        drawn += [sampled.token_id for sampled in result.sampled]
    assert drawn == expected_tokens(prompt, 10, 211)
    assert stops > 3
    everywhere = [position for engine in engines for position in engine.computed_tokens.elements()]
    assert sorted(everywhere) == [(LONG, position) for position in range(109)]  # once, on one rank
    await group.shutdown("long")


def test_a_chunk_takes_its_share_of_the_time_in_virtual_time() -> None:
    async def seconds(size: int) -> float:
        group = group_of(size)
        await group.open("long", [1] * 200, 1, GroupScheme(per_node=size))
        begun = asyncio.get_running_loop().time()
        await group.run([Segment(LONG, 0, 200, True)])
        return asyncio.get_running_loop().time() - begun

    alone_s = 0.001 + 200 * 1e-5
    for size in (2, 4):
        assert run_virtual(seconds(size)) == pytest.approx(0.001 + 200 * 1e-5 / size, rel=1e-6)
        assert run_virtual(seconds(size)) < alone_s


def test_a_silent_rank_is_given_up_in_virtual_time() -> None:
    async def scene() -> None:
        group = group_of(2, silence_s=7.0)
        await group.open("long", [1] * 20, 1, RING)
        group.ranks[1].called = lambda *_: None  # type: ignore[method-assign]
        group.links[1].on_call(lambda _: None)
        begun = asyncio.get_running_loop().time()
        with pytest.raises(GroupBroken, match="silent"):
            await group.leader.run([Segment(LONG, 0, 20, True)])
        assert asyncio.get_running_loop().time() - begun >= 7.0
        await group.shutdown("long")

    run_virtual(scene())


@pytest.mark.parametrize("kind", LINK_KINDS)
async def test_a_lost_rank_frees_the_others(kind: str) -> None:
    group = group_of(3, kind, silence_s=30.0)
    await group.open("long", [1] * 20, 1, RING)
    leading = asyncio.ensure_future(group.leader.run([Segment(LONG, 0, 20, True)]))
    await asyncio.sleep(0)
    group.links[2].abort()
    async with asyncio.timeout(10):
        assert isinstance((await asyncio.gather(leading, return_exceptions=True))[0], GroupBroken)
    await group.settled()
    group.close("long")
    await group.open("again", [1] * 20, 1, RING)
    assert (await group.run([Segment(RequestId("again"), 0, 20, True)])).finished
    await group.shutdown("again")


async def test_two_shared_sequences_in_a_pass_are_refused() -> None:
    group = group_of(2)
    await group.open("a", [1] * 20, 1, RING)
    await group.open("b", [1] * 20, 1, RING)
    with pytest.raises(EngineError, match="one sequence that a group shares"):
        await group.leader.run([Segment(RequestId("a"), 0, 20, True), Segment(RequestId("b"), 0, 20, True)])
    with pytest.raises(EngineError, match="known tokens"):
        await group.ranks[1].engine.run([Segment(RequestId("a"), 0, 20, True)])
    await group.shutdown("a", "b")
