"""Groups whose nodes have several ranks: a ring between nodes, heads or weights split inside. The same tokens and
logits as one worker alone, for every mixture of schemes, every family, uneven heads and columns, and any stops."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from common.messages.groups import RING, GroupScheme, Stage
from common.units import RequestId
from services.engine.collectives import GroupBroken, GroupShare
from services.engine.interface import EngineError, Segment
from services.engine.model import LoadedModel, load_model
from services.engine.sequence_parallel import GroupPass
from services.engine.torch_prefill import TorchPrefillEngine
from tests.engine.group_world import PATIENCE_S, Ranks, doors, spec, tokens_computed
from tests.engine.models import FAMILIES, reference_greedy, reference_model, tiny_model
from tests.engine.torch_group import COST, Leads, generate, group_of, random_prompt, stopped_again_and_again

NEW_TOKENS = 4
LENGTHS = (1, 31, 64, 97)
STAGES: tuple[Stage, ...] = ("ulysses", "megatron")
MEGATRON_2 = GroupScheme(per_node=2, attention="megatron", mlp="megatron")


def mixed(per_node: int, attention: Stage, mlp: Stage) -> GroupScheme:
    return GroupScheme(per_node=per_node, attention=attention, mlp=mlp)


MIXTURES = [mixed(2, attention, mlp) for attention in STAGES for mlp in STAGES]

CASES: list[tuple[GroupScheme, int, dict[str, Any]]] = [
    *((scheme, 4, {}) for scheme in MIXTURES),
    *((scheme, 2, {}) for scheme in MIXTURES[1:]),
    *((MEGATRON_2, 2, {"family": family}) for family in ("mistral", "qwen2", "qwen3", "phi3", "phi3-longrope")),
    (MEGATRON_2, 4, {"family": "llama-mha", "attention_bias": True, "mlp_bias": True, "intermediate_size": 97}),
    (mixed(2, "megatron", "ulysses"), 4, {"family": "qwen3", "num_key_value_heads": 1}),  # a KV head on two places
    (mixed(3, "megatron", "megatron"), 3, {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}),
    (mixed(3, "ulysses", "megatron"), 6, {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}),
    (mixed(3, "megatron", "megatron"), 6, {}),
    (mixed(2, "ulysses", "megatron"), 6, {"family": "phi3"}),
]


def name_of(value: object) -> str | None:
    return value.name(value.per_node) if isinstance(value, GroupScheme) else None


@pytest.mark.parametrize(("scheme", "size", "changes"), CASES, ids=name_of)
async def test_tokens_and_logits_equal_a_single_workers(
    scheme: GroupScheme, size: int, changes: dict[str, Any], tmp_path: Path, leads: Leads
) -> None:
    changes = dict(changes)
    at = tiny_model(changes.pop("family", "llama"), tmp_path / "model", **changes)
    model = load_model(at, dtype="float32", device="cpu")
    await require_exact(group_of(model, size, "memory"), leads, at, scheme, LENGTHS)


async def test_a_mesh_over_tcp(llama: LoadedModel, folder: Path, leads: Leads) -> None:
    await require_exact(group_of(llama, 4, "tcp"), leads, folder, MEGATRON_2, (5, 131))


async def test_any_mesh(tmp_path: Path, leads: Leads, request: pytest.FixtureRequest) -> None:
    """Nodes, places, heads, columns, families and schemes at random: also more places than heads, or than tokens."""
    rng = random.Random(11)
    # Of longrope, what transformers answers changes in the middle of a generation that crosses its bound.
    families = [family for family in FAMILIES if family != "phi3-longrope"]
    for number in range(100 if request.config.getoption("--nightly") else 4):
        family, kv_heads, per_node = rng.choice(families), rng.randint(1, 4), rng.randint(2, 4)
        heads = kv_heads * rng.randint(1, 3)
        shape = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": heads * 8}
        at = tiny_model(family, tmp_path / f"{number}", **shape, intermediate_size=rng.randint(50, 70))
        model = load_model(at, dtype="float32", device="cpu")
        scheme = mixed(per_node, rng.choice(STAGES), rng.choice(STAGES))
        group = group_of(model, per_node * rng.randint(1, 3), "memory")
        await require_exact(group, leads, at, scheme, (rng.randint(1, 5), rng.randint(20, 90)), stops_min=0)


async def require_exact(
    group: Ranks, leads: Leads, at: Path, scheme: GroupScheme, lengths: tuple[int, ...], *, stops_min: int = 4
) -> None:
    reference, rng, stops = reference_model(at), random.Random(f"{scheme}{at.name}"), 0
    layers = group.leader.profile.layers
    for length in lengths:
        name, prompt = f"p{length}", random_prompt(rng, length)
        await group.open(name, prompt, NEW_TOKENS, scheme)
        leads.logits.clear()
        tokens, stopped = await generate(group, leads, rng, name, prompt, NEW_TOKENS, 47)
        stops += stopped
        theirs, logits = reference_greedy(reference, prompt, NEW_TOKENS)
        assert tokens == theirs, name
        assert float((torch.stack(leads.logits) - logits).abs().max()) < 1e-3, name
        computed = tokens_computed(group, name)
        assert sum(computed) == (length + NEW_TOKENS - 1) * layers  # every pair of layer and token once
        assert max(computed[1:]) - min(computed[1:]) <= layers
        group.close(name)
    assert stops >= stops_min
    await group.shutdown()


async def test_each_rank_reserves_its_nodes_tokens_in_its_heads(llama: LoadedModel) -> None:
    group = group_of(llama, 4, "memory")
    await group.open("a", [3] * 101, 10, MEGATRON_2)  # 56 of 111 tokens at the most; 2 of 3 KV heads
    assert [rank.engine.kv_used_tokens for rank in group.ranks] == [38, 38, 38, 38]
    await group.shutdown("a")


@pytest.mark.parametrize("scheme", [MEGATRON_2, GroupScheme(per_node=2)], ids=name_of)
async def test_shorts_share_the_steps_of_a_mesh_that_decodes(
    scheme: GroupScheme, llama: LoadedModel, folder: Path, leads: Leads, request: pytest.FixtureRequest
) -> None:
    group, rng = group_of(llama, 4, "memory"), random.Random(4)
    prompt, steps = random_prompt(rng, 90), 200 if request.config.getoption("--nightly") else 24
    await group.open("long", prompt, steps, scheme)
    drawn, _ = await generate(group, leads, rng, "long", prompt, 1, 60)
    shorts = [random_prompt(rng, 20 + at) for at in range(4)]
    for at, rank in enumerate(group.ranks):
        rank.engine.open(spec(f"s{at}", shorts[at], 2), shorts[at], None)
        whole = Segment(RequestId(f"s{at}"), 0, len(shorts[at]), True)
        rank.company = lambda call, whole=whole: [whole] if call.start == len(prompt) else []
    firsts: list[int] = []
    for position in range(len(prompt), len(prompt) + steps - 1):
        row, company = Segment(RequestId("long"), position, 1, True), []
        if position == len(prompt):
            company = [Segment(RequestId("s0"), 0, len(shorts[0]), True)]
        leads.stop_after = rng.choice([0, 0, 1, 2])
        result = await group.run([row, *company])
        while not result.finished:
            leads.stop_after = 0
            result = await group.resume("long")
        drawn.append(result.sampled[0].token_id)
        if company:
            followed = [rank.last.sampled for rank in group.ranks[1:] if rank.last is not None]
            firsts = [result.sampled[1].token_id, *(sampled.token_id for (sampled,) in followed)]
    reference = reference_model(folder)
    theirs, logits = reference_greedy(reference, prompt, steps)
    assert drawn == theirs
    assert float((torch.stack(leads.logits) - logits).abs().max()) < 1e-3
    assert firsts == [reference_greedy(reference, short, 1)[0][0] for short in shorts]
    await group.shutdown()


@pytest.mark.parametrize("scheme", MIXTURES, ids=name_of)
async def test_no_stop_of_a_mesh_ends_in_a_deadlock(
    scheme: GroupScheme, tmp_path: Path, leads: Leads, request: pytest.FixtureRequest
) -> None:
    wanted = 500 if request.config.getoption("--nightly") else 60
    at = tiny_model("llama", tmp_path / "model", num_hidden_layers=8, hidden_size=36, num_attention_heads=9)
    model = load_model(at, dtype="float32", device="cpu")
    group, rng, stops = group_of(model, 4, "memory"), random.Random(f"{scheme}"), 0
    leads.engine = group.leader  # type: ignore[assignment]
    while stops < wanted:
        name, prompt = f"p{stops}", random_prompt(rng, rng.randint(1, 20))
        await group.open(name, prompt, 2, scheme)
        stops += await stopped_again_and_again(group, leads, name, len(prompt), lambda: rng.randint(1, 3))
        assert sum(tokens_computed(group, name)) == (len(prompt) + 1) * model.layers
        group.close(name)
    await group.shutdown()


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("scheme", MIXTURES, ids=name_of)
async def test_a_stop_during_attention_takes_effect_in_that_step(
    scheme: GroupScheme, size: int, llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    group, decide = group_of(llama, size, "memory"), GroupPass.decide

    def late(part: GroupPass) -> None:
        if part.rank == 0:
            group.leader.stop()
        decide(part)

    monkeypatch.setattr(GroupPass, "decide", late)
    await group.open("a", [3] * 20, 5, scheme)
    result = await group.run([Segment(RequestId("a"), 0, 20, True)])
    assert (result.finished, result.steps_done) == (False, 1)
    assert (await group.resume("a")).steps_done == 2
    # A chunk too small for all: some have had rank 0's last word by then, and it stands when that step is done.
    await group.open("b", [3] * 20, 5, scheme)
    result = await group.run([Segment(RequestId("b"), 0, 1, False)])
    assert (result.finished, result.steps_done) == (False, 1)
    await group.shutdown("a", "b")


@pytest.mark.parametrize(
    ("scheme", "size"),
    [(scheme, size) for scheme in (RING, *MIXTURES) for size in (2, 3, 4) if size % scheme.per_node == 0],
    ids=name_of,
)
async def test_a_step_is_taken_back_once(scheme: GroupScheme, size: int, llama: LoadedModel, leads: Leads) -> None:
    """Wherever in a step a stop may still take it back, all stand before it; asked for there again, after it."""
    group = group_of(llama, size, "memory")
    leads.engine = group.leader  # type: ignore[assignment]
    for point in range(2):
        name = f"p{point}"
        await group.open(name, [3] * 40, 5, scheme)
        leads.stop_after, leads.asked, leads.recalled = 2, point, 0
        result = await group.run([Segment(RequestId(name), 0, 40, True)])
        assert (result.finished, result.steps_done, leads.recalled) == (False, 1, 1)
        leads.stop_after, leads.asked = 1, point
        result = await group.resume(name)
        assert (result.finished, result.steps_done, leads.recalled) == (False, 2, 1)
        assert (await group.resume(name)).finished
        group.close(name)
    # The first is not taken back.
    await group.open("first", [3] * 40, 5, scheme)
    leads.stop_after, leads.asked = 1, 0
    assert (await group.run([Segment(RequestId("first"), 0, 40, True)])).steps_done == 1
    await group.shutdown("first")


@pytest.mark.parametrize("scheme", MIXTURES, ids=name_of)
async def test_a_lost_rank_of_a_mesh_frees_the_others(
    scheme: GroupScheme, llama: LoadedModel, folder: Path, leads: Leads, request: pytest.FixtureRequest
) -> None:
    losses = 50 if request.config.getoption("--nightly") else 6
    group, rng, lost = group_of(llama, 4, "memory", silence_s=30.0), random.Random(6), 0
    prompt = random_prompt(rng, 120)
    expected = reference_greedy(reference_model(folder), prompt, 12)[0]
    for number in range(losses):
        await group.open(f"p{number}", prompt, 12, scheme)
        serving = asyncio.ensure_future(generate(group, leads, rng, f"p{number}", prompt, 12, 50))
        await asyncio.sleep(rng.uniform(0.0, 0.05))
        rng.choice(group.links).abort()
        async with asyncio.timeout(PATIENCE_S / 2):
            (ended,) = await asyncio.gather(serving, return_exceptions=True)
        lost += isinstance(ended, GroupBroken)
        assert isinstance(ended, GroupBroken) or ended[0] == expected  # the moment came too late
        await group.settled()
        group.close(f"p{number}")
        assert [rank.engine.kv_used_tokens for rank in group.ranks] == [0] * 4
    assert lost > losses // 2
    await group.open("last", prompt, 12, scheme)
    assert (await generate(group, leads, rng, "last", prompt, 12, 50))[0] == expected
    await group.shutdown("last")


async def test_what_cannot_be_is_refused(llama: LoadedModel) -> None:
    group = group_of(llama, 2, "memory")
    await group.open("a", [3] * 20, 5, MEGATRON_2)
    with pytest.raises(EngineError, match="3 ranks are no whole number of nodes of 2"):
        GroupShare(0, 3, MEGATRON_2, group.links[0])
    group.leader.open(spec("s", [3] * 5, 2), [3] * 5, None)
    both = [Segment(RequestId("a"), 0, 20, True), Segment(RequestId("s"), 0, 5, True)]
    with pytest.raises(EngineError, match="takes no other sequence"):
        await group.leader.run(both)
    assert (await group.run(both[:1])).finished  # nothing was left behind
    await group.shutdown("a", "s")


@pytest.mark.parametrize(("scheme", "size"), [(MEGATRON_2, 2), *((scheme, 4) for scheme in MIXTURES)], ids=name_of)
async def test_eight_thousand_tokens(
    scheme: GroupScheme, size: int, tmp_path: Path, leads: Leads, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--nightly"):
        pytest.skip("8,000 tokens take a minute: in the nightly run")
    at = tiny_model("llama", tmp_path / "model", max_position_embeddings=8_192)
    model = load_model(at, dtype="float32", device="cpu")
    engines = [TorchPrefillEngine(model, COST, kv_capacity_tokens=9_000) for _ in range(size)]
    group, rng = Ranks(engines, doors("tcp", size)), random.Random(8)
    prompt = random_prompt(rng, 8_000)
    await group.open("a", prompt, 3, scheme)
    tokens, stops = await generate(group, leads, rng, "a", prompt, 3, 700)
    theirs, logits = reference_greedy(reference_model(at), prompt, 3)
    assert tokens == theirs
    assert float((torch.stack(leads.logits) - logits).abs().max()) < 1e-3
    assert stops > 3
    await group.shutdown()
