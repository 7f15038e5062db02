"""A group that breaks in a pass which has other sequences in it: these are computed all the same, exactly, and what
they send is sent once."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from common.messages.cluster import StepCost
from common.messages.groups import RING
from common.units import RequestId
from services.engine.collectives import GroupBroken
from services.engine.interface import LayerKv, PassResult, PrefillEngine, Segment
from services.engine.model import LoadedModel
from services.engine.sequence_parallel import GroupPass
from services.engine.timed_language import TimedShape, expected_tokens
from services.engine.timed_prefill import TimedPrefillEngine
from services.engine.torch_prefill import TorchPrefillEngine
from tests.engine.group_world import PATIENCE_S, Ranks, doors, scheme_of, spec
from tests.engine.models import VOCAB, reference_greedy, reference_model

LONG = RequestId("long")
COST = StepCost(pass_s=0.006, token_s=0.0001, pair_s=0.0)
LAYERS = 3


class Company:
    """On every rank a short that prefills, with a sink, and one that decodes."""

    def __init__(self, group: Ranks, rng: random.Random, vocab: int) -> None:
        self.group = group
        self.prompts = [[rng.randrange(3, vocab) for _ in range(20 + 3 * at)] for at in range(len(group.ranks))]
        self.sent: list[list[LayerKv]] = [[] for _ in group.ranks]
        for at, rank in enumerate(group.ranks):
            rank.engine.open(spec(f"s{at}", self.prompts[at], 8), self.prompts[at], self.sent[at].append)
            rank.engine.open(spec(f"d{at}", self.prompts[at], 8), self.prompts[at], None)
            rank.company = lambda _, at=at: self.segments(at)

    async def warm(self) -> list[int]:
        """Prefill what decodes. Returns the tokens drawn."""
        drawn = []
        for at, rank in enumerate(self.group.ranks):
            tokens = len(self.prompts[at])
            result = await rank.engine.run([Segment(RequestId(f"d{at}"), 0, tokens, True)])
            drawn.append(result.sampled[0].token_id)
        return drawn

    def segments(self, at: int) -> list[Segment]:
        tokens = len(self.prompts[at])
        return [Segment(RequestId(f"d{at}"), tokens, 1, True), Segment(RequestId(f"s{at}"), 0, tokens, True)]


async def break_in_a_row(
    group: Ranks, company: Company, prompt: Sequence[int], breaks: Callable[[], None]
) -> list[PassResult]:
    """Prefill the long; then its row and the company in one pass, in which the group breaks. By rank."""
    assert (await group.run([Segment(LONG, 0, len(prompt), True)])).finished
    for at, rank in enumerate(group.ranks):
        rank.company = lambda _, at=at: company.segments(at)
    breaks()
    row = Segment(LONG, len(prompt), 1, True)
    own = company.segments(0)
    async with asyncio.timeout(PATIENCE_S):
        results: list[PassResult] = [await group.leader.run([own[0], row, own[1]])]
        for rank in group.ranks[1:]:
            followed = await rank.results.get()
            assert isinstance(followed, PassResult)
            results.append(followed)
    return results


def require_right(company: Company, warmed: list[int], results: list[PassResult], expected: list[list[int]]) -> None:
    for at, result in enumerate(results):
        assert result.finished
        drawn = {sampled.request_id: sampled.token_id for sampled in result.sampled}
        assert [warmed[at], drawn[RequestId(f"d{at}")]] == expected[at]
        assert drawn[RequestId(f"s{at}")] == expected[at][0]
        assert [(piece.layer, piece.start, piece.tokens) for piece in company.sent[at]] == [
            (layer, 0, len(company.prompts[at])) for layer in range(LAYERS)
        ]


@pytest.mark.parametrize("scheme", ["ring", "ulysses"])
@pytest.mark.parametrize(("victim", "layer"), [(0, 0), (2, 0), (1, 1), (0, LAYERS - 1), (1, LAYERS - 1)])
async def test_rows_that_share_the_pass_are_exact(
    scheme: str, victim: int, layer: int, llama: LoadedModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert llama.layers == LAYERS
    engines: list[PrefillEngine] = [TorchPrefillEngine(llama, COST, kv_capacity_tokens=2_000) for _ in range(3)]
    group, rng = Ranks(engines, doors("tcp", 3, silence_s=30.0)), random.Random(layer)
    prompt = [rng.randrange(3, VOCAB) for _ in range(50)]
    await group.open(LONG, prompt, 5, scheme_of(scheme, 3))
    company = Company(group, rng, VOCAB)
    for rank in group.ranks:
        rank.company = lambda _: ()
    warmed = await company.warm()
    original = GroupPass.attend

    def breaks() -> None:
        def attend(part: GroupPass, kv: object, at: int, *tensors: object) -> object:
            if part.rank == victim and at == layer:
                part.link.abort()
            return original(part, kv, at, *tensors)  # type: ignore[arg-type]

        monkeypatch.setattr(GroupPass, "attend", attend)

    results = await break_in_a_row(group, company, prompt, breaks)
    reference = reference_model(folder)
    expected = [reference_greedy(reference, each, 2)[0] for each in company.prompts]
    require_right(company, warmed, results, expected)
    # A rank that had sent and received all of its last step may have ended the pass before it could know.
    assert sum(result.broken_off is not None for result in results) >= 2
    assert {result.broken_off.request_id for result in results if result.broken_off} == {LONG}
    with pytest.raises(GroupBroken):
        await group.leader.run([Segment(LONG, len(prompt), 1, True)])
    await group.shutdown(LONG, *(f"{kind}{at}" for at in range(3) for kind in "sd"))


async def test_a_pass_begins_without_a_group_that_broke_before_it(llama: LoadedModel, folder: Path) -> None:
    engines: list[PrefillEngine] = [TorchPrefillEngine(llama, COST, kv_capacity_tokens=2_000) for _ in range(2)]
    group, rng = Ranks(engines, doors("memory", 2)), random.Random(3)
    prompt = [rng.randrange(3, VOCAB) for _ in range(30)]
    await group.open(LONG, prompt, 5, RING)
    short = [rng.randrange(3, VOCAB) for _ in range(20)]
    group.leader.open(spec("s", short, 3), short, None)
    assert (await group.run([Segment(LONG, 0, 30, True)])).finished
    group.links[1].abort()
    result = await group.leader.run([Segment(LONG, 30, 1, True), Segment(RequestId("s"), 0, 20, True)])
    assert result.broken_off is not None
    assert result.broken_off.request_id == LONG
    assert [drawn.token_id for drawn in result.sampled] == reference_greedy(reference_model(folder), short, 1)[0]
    await group.shutdown(LONG, "s")


@pytest.mark.parametrize("victim", [0, 1])
async def test_a_timed_engine_does_the_same(victim: int) -> None:
    shape = TimedShape(step_cost=COST, layers=LAYERS, kv_capacity_tokens=2_000, context_tokens=512, vocab=211)
    group, rng = Ranks([TimedPrefillEngine(shape) for _ in range(2)], doors("memory", 2)), random.Random(4)
    prompt = [rng.randrange(211) for _ in range(50)]
    await group.open(LONG, prompt, 5, RING)
    company = Company(group, rng, 211)
    for rank in group.ranks:
        rank.company = lambda _: ()
    warmed = await company.warm()

    def breaks() -> None:
        asyncio.get_running_loop().call_later(0.004, group.links[victim].abort)

    results = await break_in_a_row(group, company, prompt, breaks)
    require_right(company, warmed, results, [expected_tokens(each, 2, 211) for each in company.prompts])
    assert all(result.broken_off is not None for result in results)
    await group.shutdown(LONG, *(f"{kind}{at}" for at in range(2) for kind in "sd"))
