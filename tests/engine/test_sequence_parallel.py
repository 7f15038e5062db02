"""Prefill and decode of one sequence over several engines: the same tokens and logits as one alone, every token
computed once, whichever way it is cut, stopped and resumed; and what is left when a group breaks."""

from __future__ import annotations

import asyncio
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from common.messages.groups import RING, Announcement, GroupScheme
from common.units import RequestId
from services.engine.collectives import GroupBroken
from services.engine.interface import EngineError, KvFull, Segment
from services.engine.model import LoadedModel, load_model
from services.engine.sequence_parallel import GroupPass
from services.engine.torch_prefill import TorchPrefillEngine
from tests.engine.group_world import PATIENCE_S, Ranks, doors, scheme_of, spec, tokens_computed
from tests.engine.models import reference_greedy, reference_model, tiny_model
from tests.engine.torch_group import COST, Leads, generate, group_of, random_prompt, stopped_again_and_again

NEW_TOKENS = 5
LENGTHS = (1, 2, 31, 64, 331)
ULYSSES_2 = GroupScheme(per_node=2)


CASES: list[tuple[str, int, str, dict[str, Any]]] = [
    ("ring", 2, "tcp", {}),
    ("ring", 3, "memory", {}),
    ("ring", 4, "tcp", {}),
    ("ulysses", 2, "tcp", {}),
    ("ulysses", 3, "memory", {}),
    ("ulysses", 4, "tcp", {}),  # 3 KV heads
    ("ring", 3, "tcp", {"family": "llama-mha"}),
    ("ulysses", 2, "memory", {"family": "llama-mha"}),
    ("ulysses", 3, "tcp", {"family": "qwen3", "num_key_value_heads": 1}),
    ("ulysses", 3, "memory", {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}),  # one is idle
    ("ring", 2, "memory", {"family": "phi3-longrope"}),
]


@pytest.mark.parametrize(("scheme", "size", "kind", "changes"), CASES)
async def test_tokens_and_logits_equal_a_single_workers(
    scheme: str, size: int, kind: str, changes: dict[str, Any], tmp_path: Path, leads: Leads
) -> None:
    changes = dict(changes)
    at = tiny_model(changes.pop("family", "llama"), tmp_path / "model", **changes)
    reference, model = reference_model(at), load_model(at, dtype="float32", device="cpu")
    group, rng, stops = group_of(model, size, kind), random.Random(f"{scheme}{size}{changes}"), 0
    for length in LENGTHS:
        name, prompt = f"p{length}", random_prompt(rng, length)
        await group.open(name, prompt, NEW_TOKENS, scheme_of(scheme, size))
        leads.logits.clear()
        tokens, stopped = await generate(group, leads, rng, name, prompt, NEW_TOKENS, 97)
        stops += stopped
        theirs, logits = reference_greedy(reference, prompt, NEW_TOKENS)
        assert tokens == theirs, name
        assert float((torch.stack(leads.logits) - logits).abs().max()) < 1e-3, name
        # Every (layer, token) pair once, on one rank: the last drawn token has not been fed.
        computed = tokens_computed(group, name)
        assert sum(computed) == (length + NEW_TOKENS - 1) * model.layers
        parts = [each // model.layers for each in computed]
        assert max(parts[1:]) - min(parts[1:]) <= 1
        assert parts[0] - parts[-1] <= NEW_TOKENS
        group.close(name)
    assert stops >= 10  # of over a hundred in all cases
    await group.shutdown()


async def test_kv_is_reserved_by_share(llama: LoadedModel) -> None:
    group = group_of(llama, 2, "memory")
    prompt = list(range(3, 104))
    await group.open("ring", prompt, 10, RING)
    assert [rank.engine.kv_used_tokens for rank in group.ranks] == [56, 56]  # 111 halved
    await group.open("ulysses", prompt, 10, ULYSSES_2)  # 2 of 3 KV heads each: both need the second
    assert [rank.engine.kv_used_tokens for rank in group.ranks] == [56 + 74, 56 + 74]
    with pytest.raises(EngineError, match="already open"):
        await group.open("ring", prompt, 10, RING)
    for at in range(5):
        await group.open(f"n{at}", [3] * 400, 100, ULYSSES_2)
    with pytest.raises(KvFull, match="needs KV for 334 tokens"):
        await group.open("over", [3] * 400, 100, ULYSSES_2)
    await group.shutdown()


@pytest.mark.parametrize(("scheme", "size"), [("ring", 2), ("ring", 3), ("ulysses", 2)])
async def test_decode_on_the_shards_with_shorts_sharing_the_pass(
    scheme: str, size: int, llama: LoadedModel, folder: Path, leads: Leads, request: pytest.FixtureRequest
) -> None:
    """On every rank a short prefills and decodes in the passes of the long's decode."""
    group, rng = group_of(llama, size), random.Random(size)
    prompt, steps = random_prompt(rng, 150), 200 if request.config.getoption("--nightly") else 40
    await group.open("long", prompt, steps, scheme_of(scheme, size))
    drawn, _ = await generate(group, leads, rng, "long", prompt, 1, 60)
    shorts = [random_prompt(rng, 20 + 3 * at) for at in range(size)]
    fed = [0] * size
    texts: list[list[int]] = [[] for _ in range(size)]

    def company(at: int) -> list[Segment]:
        tokens = len(shorts[at]) + len(texts[at]) - fed[at]
        tokens = min(7, tokens)
        segment = Segment(RequestId(f"s{at}"), fed[at], tokens, fed[at] + tokens == len(shorts[at]) + len(texts[at]))
        fed[at] += tokens
        return [segment]

    for at, rank in enumerate(group.ranks):
        rank.engine.open(spec(f"s{at}", shorts[at], 250), shorts[at], None)
        rank.company = lambda _, at=at: company(at)
    for position in range(len(prompt), len(prompt) + steps - 1):
        row = Segment(RequestId("long"), position, 1, True)
        leads.stop_after = rng.choice([0, 0, 0, 1, 2])
        result = await group.run([*company(0), row] if position % 2 else [row, *company(0)])
        while not result.finished:
            leads.stop_after = 0
            result = await group.resume("long")
        by_name = {sampled.request_id: sampled.token_id for sampled in result.sampled}
        drawn.append(by_name[RequestId("long")])
        texts[0] += [token for name, token in by_name.items() if name == "s0"]
        for at, rank in enumerate(group.ranks[1:], 1):
            assert rank.last is not None
            texts[at] += [sampled.token_id for sampled in rank.last.sampled]
    reference = reference_model(folder)
    assert drawn == reference_greedy(reference, prompt, steps)[0]
    assert float((torch.stack(leads.logits) - reference_greedy(reference, prompt, steps)[1]).abs().max()) < 1e-3
    for at, text in enumerate(texts):
        assert len(text) > 20
        assert text == reference_greedy(reference, shorts[at], len(text))[0]
    await group.shutdown()


@pytest.mark.parametrize("size", [2, 3, 4])
async def test_no_stop_ends_in_a_deadlock(
    size: int, tmp_path: Path, leads: Leads, request: pytest.FixtureRequest
) -> None:
    wanted = 500 if request.config.getoption("--nightly") else 20
    model = load_model(
        tiny_model("llama", tmp_path / "model", num_hidden_layers=8, hidden_size=36, num_attention_heads=9),
        dtype="float32",
        device="cpu",
    )
    group, rng, stops = group_of(model, size), random.Random(size), 0
    leads.engine = group.leader  # type: ignore[assignment]
    while stops < wanted:
        name, scheme = f"p{stops}", rng.choice(["ring", "ulysses"])
        prompt = random_prompt(rng, rng.randint(1, 40))
        await group.open(name, prompt, 2, scheme_of(scheme, size))
        stops += await stopped_again_and_again(group, leads, name, len(prompt), lambda: rng.randint(1, 4))
        assert sum(tokens_computed(group, name)) == (len(prompt) + 1) * model.layers
        group.close(name)
    await group.shutdown()


class Hold:
    """One rank stands still in one layer, in its computing thread, until let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, victim: int, layer: int, error: str = "") -> None:
        self.reached = asyncio.Event()
        self.let_go = threading.Event()
        self.wanted = True
        loop, original = asyncio.get_running_loop(), GroupPass.attend

        def attend(part: GroupPass, kv: Any, at: int, *tensors: Any) -> torch.Tensor:
            if self.wanted and part.rank == victim and at == layer:
                self.wanted = False
                loop.call_soon_threadsafe(self.reached.set)
                if error:
                    raise RuntimeError(error)
                assert self.let_go.wait(PATIENCE_S)
            return original(part, kv, at, *tensors)

        monkeypatch.setattr(GroupPass, "attend", attend)


@pytest.mark.parametrize("kind", ["memory", "tcp"])
@pytest.mark.parametrize("how", ["aborts", "fails", "sockets closed", "silent"])
@pytest.mark.parametrize(("scheme", "victim"), [("ring", 0), ("ring", 2), ("ulysses", 1)])
async def test_a_lost_rank_frees_the_others_and_the_engines_live_on(
    kind: str,
    how: str,
    scheme: str,
    victim: int,
    llama: LoadedModel,
    folder: Path,
    leads: Leads,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if how == "sockets closed" and kind == "memory":
        return
    group, rng = group_of(llama, 3, kind, silence_s=0.3 if how == "silent" else 30.0), random.Random(1)
    await group.open("a", random_prompt(rng, 60), 5, scheme_of(scheme, 3))
    hold = Hold(monkeypatch, victim, 1, "out of memory" if how == "fails" else "")
    leading = asyncio.ensure_future(group.leader.run([Segment(RequestId("a"), 0, 40, False)]))
    async with asyncio.timeout(PATIENCE_S / 2):
        await hold.reached.wait()
        if how == "aborts":
            group.links[victim].abort()
        elif how == "sockets closed":
            for peer in group.links[victim]._peers.values():  # type: ignore[attr-defined]
                peer.sock.close()
        for rank in range(3):
            if rank == victim and how != "fails":
                continue  # it stands still
            await broken(group, rank, leading, "out of memory" if rank == victim else None)
        if how != "fails":
            hold.let_go.set()
            await broken(group, victim, leading, None)
    with pytest.raises(GroupBroken):
        await group.leader.run([Segment(RequestId("a"), 0, 40, False)])
    group.close("a")
    assert [rank.engine.kv_used_tokens for rank in group.ranks] == [0, 0, 0]

    prompt = random_prompt(rng, 50)
    await group.open("b", prompt, 4, scheme_of(scheme, 3))
    tokens, _ = await generate(group, leads, rng, "b", prompt, 4, 30)
    assert tokens == reference_greedy(reference_model(folder), prompt, 4)[0]
    await group.shutdown()


@pytest.mark.parametrize("kind", ["memory", "tcp"])
async def test_a_rank_lost_at_any_moment_costs_no_more_than_its_group(
    kind: str, llama: LoadedModel, folder: Path, leads: Leads, request: pytest.FixtureRequest
) -> None:
    """At random moments of prefill and decode, stops included; the next sequence is exact, nothing is left behind."""
    losses = 50 if request.config.getoption("--nightly") else 6
    group, rng, lost = group_of(llama, 3, kind, silence_s=30.0), random.Random(50), 0
    prompt = random_prompt(rng, 120)
    expected = reference_greedy(reference_model(folder), prompt, 12)[0]
    for number in range(losses):
        name, scheme = f"p{number}", rng.choice(["ring", "ulysses"])
        await group.open(name, prompt, 12, scheme_of(scheme, 3))
        serving = asyncio.ensure_future(generate(group, leads, rng, name, prompt, 12, 50))
        await asyncio.sleep(rng.uniform(0.0, 0.1))
        rng.choice(group.links).abort()
        async with asyncio.timeout(PATIENCE_S / 2):
            (ended,) = await asyncio.gather(serving, return_exceptions=True)
        if isinstance(ended, GroupBroken):
            lost += 1
        else:
            assert ended[0] == expected  # the moment came too late
        await group.settled()
        group.close(name)
        assert [rank.engine.kv_used_tokens for rank in group.ranks] == [0, 0, 0]
    assert lost > losses // 2
    await group.open("last", prompt, 12, RING)
    assert (await generate(group, leads, rng, "last", prompt, 12, 50))[0] == expected
    await group.shutdown("last")


async def broken(group: Ranks, rank: int, leading: asyncio.Future[Any], reason: str | None) -> None:
    """This rank's pass has failed: its own engine for this reason, or because the group broke (None)."""
    if rank == 0:
        error = (await asyncio.gather(leading, return_exceptions=True))[0]
    else:
        error = await group.ranks[rank].results.get()
    assert isinstance(error, EngineError)
    assert isinstance(error, GroupBroken) == (reason is None)
    assert reason is None or reason in str(error)


async def test_one_of_a_group_closes_its_sequence_while_idle(llama: LoadedModel) -> None:
    group = group_of(llama, 2)
    await group.open("a", [3] * 20, 5, RING)
    assert (await group.run([Segment(RequestId("a"), 0, 10, False)])).finished
    group.ranks[1].engine.close(RequestId("a"))
    with pytest.raises(GroupBroken):
        await group.leader.run([Segment(RequestId("a"), 10, 10, True)])
    group.close("a")
    await group.shutdown()


async def test_a_cancelled_leader_breaks_the_group_rather_than_wait_for_it(
    llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = group_of(llama, 2)
    await group.open("a", [3] * 20, 5, RING)
    hold = Hold(monkeypatch, 1, 1)
    leading = asyncio.ensure_future(group.leader.run([Segment(RequestId("a"), 0, 20, True)]))
    async with asyncio.timeout(PATIENCE_S):
        await hold.reached.wait()
        leading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leading
        hold.let_go.set()
        assert isinstance(await group.ranks[1].results.get(), GroupBroken)
    await group.shutdown()


async def test_passes_that_would_not_fit_are_refused(llama: LoadedModel) -> None:
    group = group_of(llama, 2, "memory")
    await group.open("a", [3] * 20, 5, RING)
    await group.open("b", [3] * 20, 5, RING)
    a, b = RequestId("a"), RequestId("b")
    for segments, complaint in (
        ([Segment(a, 0, 5, False), Segment(b, 0, 5, False)], "one sequence that a group shares"),
        ([Segment(a, 0, 21, True)], "neither a chunk of its prompt nor one token"),
        ([Segment(a, 1, 4, False)], "computed are 0"),
        ([Segment(a, 0, 5, True)], "draws no token"),
    ):
        with pytest.raises(EngineError, match=complaint):
            await group.leader.run(segments)
    assert (await group.run([Segment(a, 0, 20, True)])).finished  # nothing was left behind
    with pytest.raises(EngineError, match="draws no token"):
        await group.ranks[1].engine.run([Segment(a, 20, 1, True)])
    with pytest.raises(GroupBroken, match="called to None"):
        await group.ranks[1].engine.run([Segment(b, 0, 5, False)])
    with pytest.raises(GroupBroken):
        await group.leader.run([Segment(b, 0, 5, False)])
    await group.shutdown()


async def test_a_follower_cannot_stop_the_group(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    group = group_of(llama, 2)
    await group.open("a", [3] * 20, 5, ULYSSES_2)
    hold = Hold(monkeypatch, 1, 0)
    running = asyncio.ensure_future(group.run([Segment(RequestId("a"), 0, 20, True)]))
    await hold.reached.wait()
    group.ranks[1].engine.stop()
    hold.let_go.set()
    assert (await running).finished
    await group.shutdown()


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("scheme", ["ring", "ulysses"])
async def test_a_stop_during_attention_takes_effect_in_that_step(
    scheme: str, size: int, llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    group, decide, calls = group_of(llama, size), GroupPass.decide, 0

    def late(part: GroupPass) -> None:
        nonlocal calls
        if part.rank == 0:
            calls += 1
            group.leader.stop()
        decide(part)
        if part.rank == 0:
            group.ranks[0].engine.stop()  # after the first was told it is too late: all must hear the same

    monkeypatch.setattr(GroupPass, "decide", late)
    await group.open("a", [3] * 20, 5, scheme_of(scheme, size))
    result = await group.run([Segment(RequestId("a"), 0, 20, True)])
    assert (result.finished, result.steps_done) == (False, 1)
    result = await group.resume("a")
    assert (result.finished, result.steps_done) == (False, 2)
    assert calls >= 2
    # A chunk too small for all: what rank 0 said first holds, and it stands when that step is done.
    await group.open("b", [3] * 20, 5, scheme_of(scheme, size))
    result = await group.run([Segment(RequestId("b"), 0, size - 1, False)])
    assert (result.finished, result.steps_done) == ((False, 1) if size > 2 or scheme == "ulysses" else (True, 3))
    await group.shutdown("a", "b")


async def test_a_rank_is_called_with_what_rank_0_runs(llama: LoadedModel, leads: Leads) -> None:
    group = group_of(llama, 3)
    await group.open("a", [3] * 20, 5, RING)
    leads.engine, leads.stop_after = group.leader, 2  # type: ignore[assignment]
    await group.run([Segment(RequestId("a"), 0, 20, True)])
    await group.resume("a")
    await group.run([Segment(RequestId("a"), 20, 1, True)])
    expected = [
        Announcement(pass_no=1, kind="chunk", start=0, tokens=20, step=0),
        Announcement(pass_no=2, kind="chunk", start=0, tokens=20, step=1),
        Announcement(pass_no=3, kind="row", start=20, tokens=1, step=0),
    ]
    assert [rank.calls for rank in group.ranks] == [[], expected, expected]
    await group.shutdown()


@pytest.mark.parametrize(("scheme", "size"), [("ring", 2), ("ring", 3), ("ring", 4), ("ulysses", 2), ("ulysses", 3)])
async def test_eight_thousand_tokens(
    scheme: str, size: int, tmp_path: Path, leads: Leads, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--nightly"):
        pytest.skip("8,000 tokens take a minute: in the nightly run")
    at = tiny_model("llama", tmp_path / "model", max_position_embeddings=8_192)
    model = load_model(at, dtype="float32", device="cpu")
    engines = [TorchPrefillEngine(model, COST, kv_capacity_tokens=9_000) for _ in range(size)]
    group, rng = Ranks(engines, doors("tcp", size)), random.Random(8)
    prompt = random_prompt(rng, 8_000)
    await group.open("a", prompt, 3, scheme_of(scheme, size))
    tokens, stops = await generate(group, leads, rng, "a", prompt, 3, 700)
    theirs, logits = reference_greedy(reference_model(at), prompt, 3)
    assert tokens == theirs
    assert float((torch.stack(leads.logits) - logits).abs().max()) < 1e-3
    assert stops > 3
    await group.shutdown()
