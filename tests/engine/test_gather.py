"""A ring that gathers its KV on rank 0, with the prompt's last chunk or one before: the same tokens and logits as a
single worker's, the other ranks free at once, wherever that pass was stopped, also of a group that has grown."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from common.messages.groups import GATHERED_RING, RING, GroupScheme
from common.policy.sp_shares import misfit
from common.units import RequestId
from services.engine.collectives import GroupShare
from services.engine.interface import EngineError, Segment
from services.engine.model import LoadedModel, load_model
from tests.engine.group_world import Ranks, joined, spec, tokens_computed
from tests.engine.models import reference_greedy, reference_model, tiny_model
from tests.engine.torch_group import Leads, generate, group_of, random_prompt

NEW_TOKENS = 6


async def alone(group: Ranks, name: str, prompt: list[int], tokens: int) -> list[int]:
    """The other ranks let go of it; rank 0 draws so many tokens, with another sequence in its passes."""
    leader, short = group.leader, [5, 6, 7, 8, 9]
    for rank in group.ranks[1:]:
        rank.engine.close(RequestId(name))
        assert rank.engine.kv_used_tokens == 0
    leader.open(spec("short", short, tokens), short, None)
    drawn: list[int] = []
    for number in range(tokens):
        beside = Segment(RequestId("short"), *((0, len(short)) if number == 0 else (len(short) + number - 1, 1)), True)
        row = Segment(RequestId(name), len(prompt) + number, 1, True)
        result = await leader.run([beside, row])
        assert result.broken_off is None
        drawn.append(next(token.token_id for token in result.sampled if token.request_id == name))
    leader.close(RequestId("short"))
    return drawn


@pytest.mark.parametrize(
    ("size", "kind", "changes"),
    [(2, "tcp", {}), (3, "memory", {}), (4, "tcp", {}), (3, "tcp", {"family": "llama-mha"})],
)
async def test_tokens_equal_a_single_workers(
    size: int, kind: str, changes: dict[str, Any], tmp_path: Path, leads: Leads
) -> None:
    changes = dict(changes)
    at = tiny_model(changes.pop("family", "llama"), tmp_path / "model", **changes)
    reference, model = reference_model(at), load_model(at, dtype="float32", device="cpu")
    group, rng, stops = group_of(model, size, kind), random.Random(f"{size}{changes}"), 0
    for length in (1, 2, 31, 64, 331):
        name, prompt = f"p{length}", random_prompt(rng, length)
        await group.open(name, prompt, NEW_TOKENS, GATHERED_RING)
        kv_tokens = length + NEW_TOKENS
        shares = [-(-kv_tokens // size)] * (size - 1)
        assert [rank.engine.kv_used_tokens for rank in group.ranks] == [kv_tokens, *shares]
        leads.logits.clear()
        tokens, stopped = await generate(group, leads, rng, name, prompt, 1, 97, gathers=True)
        stops += stopped
        theirs, logits = reference_greedy(reference, prompt, NEW_TOKENS)
        assert float((torch.stack(leads.logits) - logits[:1]).abs().max()) < 1e-3
        assert sum(tokens_computed(group, name)) == length * model.layers
        tokens += await alone(group, name, prompt, NEW_TOKENS - 1)
        assert tokens == theirs, name
        group.close(name)
        assert group.leader.kv_used_tokens == 0
    assert stops >= 2
    await group.shutdown()


@pytest.mark.parametrize("stop_after", range(1, 5))
@pytest.mark.parametrize("point", range(4))
async def test_the_last_pass_may_be_stopped_anywhere(
    stop_after: int, point: int, llama: LoadedModel, folder: Path, leads: Leads
) -> None:
    """At each of three points in a step, and after it."""
    group, prompt = group_of(llama, 2), random_prompt(random.Random(stop_after), 80)
    leads.engine = group.leader  # type: ignore[assignment]
    await group.open("p", prompt, NEW_TOKENS, GATHERED_RING)
    await group.run([Segment(RequestId("p"), 0, 50, False)])
    leads.stop_after, leads.asked = stop_after, point
    result = await group.run([Segment(RequestId("p"), 50, 30, True, gathers=True)])
    assert result.finished == (stop_after > llama.layers or (stop_after == llama.layers and point == 3))
    if not result.finished:
        result = await group.resume("p")
    tokens = [result.sampled[0].token_id, *await alone(group, "p", prompt, NEW_TOKENS - 1)]
    assert tokens == reference_greedy(reference_model(folder), prompt, NEW_TOKENS)[0]
    await group.shutdown("p")


@pytest.mark.parametrize("size", [1, 2])
async def test_a_group_that_has_grown_gathers_what_lies_where_it_was_dealt_out(
    size: int, llama: LoadedModel, folder: Path, leads: Leads
) -> None:
    """From one worker, or two, to three."""
    everyone, prompt = group_of(llama, 3), random_prompt(random.Random(size), 120)
    request, ranks = spec("p", prompt, NEW_TOKENS), list(everyone.ranks)
    everyone.ranks = ranks[:size]
    if size == 1:
        everyone.leader.open(request, prompt, None)
    else:
        for number, link in enumerate(await joined(everyone.doors[:size], "p")):
            share = GroupShare(number, size, GATHERED_RING, link)
            ranks[number].engine.open_share(request, prompt, share, ranks[number].called)
    await everyone.run([Segment(RequestId("p"), 0, 50, False)])
    before = (*((50 - rank + size - 1) // size for rank in range(size)), *[0] * (3 - size))
    for number, link in enumerate(await joined(everyone.doors, "p", growth=1)):
        if number >= size:
            share = GroupShare(number, 3, GATHERED_RING, link)
            ranks[number].engine.open_share(request, prompt, share, ranks[number].called)
        share = GroupShare(number, 3, GATHERED_RING, link, base=50, before=before)
        ranks[number].engine.regroup(RequestId("p"), share, ranks[number].called)
    everyone.ranks = ranks
    await everyone.run([Segment(RequestId("p"), 50, 40, False)])
    result = await everyone.run([Segment(RequestId("p"), 90, 30, True, gathers=True)])
    tokens = [result.sampled[0].token_id, *await alone(everyone, "p", prompt, NEW_TOKENS - 1)]
    assert tokens == reference_greedy(reference_model(folder), prompt, NEW_TOKENS)[0]
    await everyone.shutdown("p")


@pytest.mark.parametrize("then", ["alone", "with others"])
async def test_a_group_may_part_in_the_middle_of_the_prompt(
    then: str, llama: LoadedModel, folder: Path, leads: Leads
) -> None:
    """Rank 0 goes on alone; or takes in others again."""
    group, prompt = group_of(llama, 3), random_prompt(random.Random(then), 140)
    request, ranks = spec("p", prompt, NEW_TOKENS), list(group.ranks)
    await group.open("p", prompt, NEW_TOKENS, GATHERED_RING)
    await group.run([Segment(RequestId("p"), 0, 50, False)])
    await group.run([Segment(RequestId("p"), 50, 30, False, gathers=True)])
    for rank in ranks[1:]:
        rank.engine.close(RequestId("p"))
    group.ranks = ranks[:1]
    await group.run([Segment(RequestId("p"), 80, 20, False)])
    last = Segment(RequestId("p"), 100, 40, True)
    if then == "with others":
        group.ranks = ranks[:2]
        for number, link in enumerate(await joined(group.doors[:2], "p", growth=1)):
            share = GroupShare(number, 2, GATHERED_RING, link)
            if number:
                ranks[number].engine.open_share(request, prompt, share, ranks[number].called)
            share = GroupShare(number, 2, GATHERED_RING, link, base=100, before=(100, 0))
            ranks[number].engine.regroup(RequestId("p"), share, ranks[number].called)
        last = Segment(RequestId("p"), 100, 40, True, gathers=True)
    result = await group.run([last])
    tokens = [result.sampled[0].token_id, *await alone(group, "p", prompt, NEW_TOKENS - 1)]
    assert tokens == reference_greedy(reference_model(folder), prompt, NEW_TOKENS)[0]
    group.ranks = ranks
    await group.shutdown("p")


async def test_what_cannot_gather_is_refused(llama: LoadedModel) -> None:
    group, prompt = group_of(llama, 2, "memory"), random_prompt(random.Random(1), 40)
    await group.open("ring", prompt, 4, RING)
    with pytest.raises(EngineError, match="no room for all KV"):
        await group.leader.run([Segment(RequestId("ring"), 0, 40, True, gathers=True)])
    group.leader.open(spec("alone", prompt, 4), prompt, None)
    with pytest.raises(EngineError, match="nothing to gather"):
        await group.leader.run([Segment(RequestId("alone"), 0, 40, True, gathers=True)])
    await group.shutdown("ring", "alone")


def test_only_a_ring_gathers() -> None:
    assert "only a ring gathers" in misfit(GroupScheme(per_node=2, gathers=True), 4)
    assert not misfit(GATHERED_RING, 4)
