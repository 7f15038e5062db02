"""What every engine promises, run against the timed and the torch ones: `EngineKit` is one of each kind that fit.

Only the interface is used. What a test needs to know of the language (which tokens follow a prompt) the kit says.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from common.messages.cluster import StepCost
from common.messages.requests import Prompt, RequestSpec, SamplingParams
from common.units import RequestId, RouterId
from services.engine.interface import DecodeEngine, EngineError, KvFull, LayerKv, PassResult, PrefillEngine, Segment
from services.engine.timed_decode import TimedDecodeEngine
from services.engine.timed_language import TimedShape, expected_tokens
from services.engine.timed_prefill import TimedPrefillEngine

COST = StepCost(pass_s=0.002, token_s=1e-6, pair_s=0.0)
CAPACITY = 2_048
ROWS = 4


@dataclass(eq=False)
class EngineKit:
    """A prefill and a decode engine of the same model."""

    prefill: PrefillEngine
    decode: DecodeEngine
    vocab: int
    follow: Callable[[Sequence[int], int], list[int]]
    """The greedy continuation of a prompt."""


def timed_kit(_: Path) -> EngineKit:
    shape = TimedShape(
        step_cost=COST,
        layers=3,
        kv_heads=2,
        kv_capacity_tokens=CAPACITY,
        context_tokens=512,
        vocab=211,
        rows_max=ROWS,
    )
    return EngineKit(
        prefill=TimedPrefillEngine(shape),
        decode=TimedDecodeEngine(shape),
        vocab=shape.vocab,
        follow=lambda prompt, count: expected_tokens(prompt, count, shape.vocab),
    )


def torch_kit(folder: Path) -> EngineKit:
    from services.engine.model import load_model
    from services.engine.torch_decode import TorchDecodeEngine
    from services.engine.torch_prefill import TorchPrefillEngine
    from tests.engine.models import VOCAB, reference_greedy, reference_model, tiny_model

    if not (folder / "config.json").exists():
        # Many layers: a stop asked for at the start must find some of them left, on a busy machine too.
        tiny_model("llama", folder, num_hidden_layers=24)
    reference = reference_model(folder)
    return EngineKit(
        prefill=TorchPrefillEngine(
            load_model(folder, dtype="float32", device="cpu"), COST, kv_capacity_tokens=CAPACITY
        ),
        # Its own copy of the model: a decode engine takes the weights out.
        decode=TorchDecodeEngine(
            load_model(folder, dtype="float32", device="cpu"),
            kv_capacity_tokens=CAPACITY,
            rows_max=ROWS,
            step_cost=COST,
        ),
        vocab=VOCAB,
        follow=lambda prompt, count: reference_greedy(reference, prompt, count)[0],
    )


KITS = {"timed": timed_kit, "torch": torch_kit}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("contract-model")


@pytest.fixture(params=sorted(KITS))
async def kit(request: pytest.FixtureRequest, model_folder: Path) -> AsyncIterator[EngineKit]:
    made = KITS[request.param](model_folder)
    yield made
    await made.prefill.shutdown()
    await made.decode.shutdown()


def prompt_of(kit: EngineKit, name: str, tokens: int) -> list[int]:
    dice = random.Random(name)
    return [dice.randrange(kit.vocab) for _ in range(tokens)]


def spec_of(name: str, tokens: int, *, max_tokens: int = 8) -> RequestSpec:
    return RequestSpec(
        request_id=RequestId(name),
        router_id=RouterId("r"),
        prompt=Prompt(tokens=tokens, inline=b""),
        max_tokens=max_tokens,
        sampling=SamplingParams(temperature=0.0),
    )


def opened(kit: EngineKit, name: str, tokens: int, sink: list[LayerKv] | None = None, max_tokens: int = 8) -> list[int]:
    prompt = prompt_of(kit, name, tokens)
    spec = spec_of(name, tokens, max_tokens=max_tokens)
    kit.prefill.open(spec, prompt, None if sink is None else sink.append)
    return prompt


def segment(name: str, start: int, tokens: int, *, sample: bool = True) -> Segment:
    return Segment(request_id=RequestId(name), start=start, tokens=tokens, sample=sample)


def tokens_of(result: PassResult) -> list[int]:
    assert result.finished
    return [drawn.token_id for drawn in result.sampled]


async def stopped_pass(kit: EngineKit, segments: list[Segment]) -> PassResult:
    """Run a pass and stop it as soon as it has begun."""
    running = asyncio.ensure_future(kit.prefill.run(segments))
    await asyncio.sleep(0)
    kit.prefill.stop()
    return await running


# --- prefill ---


async def test_a_ragged_pass_samples_in_segment_order(kit: EngineKit):
    prompts = {name: opened(kit, name, tokens) for name, tokens in [("a", 5), ("b", 40), ("c", 17)]}
    order = ["c", "a", "b"]
    result = await kit.prefill.run([segment(name, 0, len(prompts[name])) for name in order])
    assert [drawn.request_id for drawn in result.sampled] == order
    assert tokens_of(result) == [kit.follow(prompts[name], 1)[0] for name in order]
    assert result.steps_done == kit.prefill.profile.layers
    assert result.compute_s > 0


async def test_chunks_and_decode_rows_continue_one_sequence(kit: EngineKit):
    prompt = opened(kit, "a", 50)
    first = await kit.prefill.run([segment("a", 0, 20, sample=False)])
    assert tokens_of(first) == []
    tokens = tokens_of(await kit.prefill.run([segment("a", 20, 30)]))
    for position in range(50, 54):
        tokens += tokens_of(await kit.prefill.run([segment("a", position, 1)]))
    assert tokens == kit.follow(prompt, 5)


async def test_a_decode_row_shares_a_pass_with_a_prompt(kit: EngineKit):
    long, short = opened(kit, "long", 30), opened(kit, "short", 12)
    first = tokens_of(await kit.prefill.run([segment("long", 0, 30)]))
    second = tokens_of(await kit.prefill.run([segment("long", 30, 1), segment("short", 0, 12)]))
    assert first + second[:1] == kit.follow(long, 2)
    assert second[1:] == kit.follow(short, 1)


async def test_a_stopped_pass_goes_on_where_it_stood_after_others_ran(kit: EngineKit):
    prompt, other = opened(kit, "a", 60), opened(kit, "b", 10)
    result = await stopped_pass(kit, [segment("a", 0, 60)])
    assert not result.finished
    assert 0 < result.steps_done < kit.prefill.profile.layers
    assert result.sampled == ()
    assert tokens_of(await kit.prefill.run([segment("b", 0, 10)])) == kit.follow(other, 1)
    resumed = await kit.prefill.resume(RequestId("a"))
    assert resumed.steps_done == kit.prefill.profile.layers, "counted from the start of the pass"
    assert tokens_of(resumed) == kit.follow(prompt, 1)


async def test_a_stop_before_a_pass_does_not_touch_it(kit: EngineKit):
    opened(kit, "a", 5)
    kit.prefill.stop()
    assert (await kit.prefill.run([segment("a", 0, 5)])).finished


async def test_a_stopped_sequence_takes_part_in_no_other_pass(kit: EngineKit):
    opened(kit, "a", 30)
    await stopped_pass(kit, [segment("a", 0, 30)])
    with pytest.raises(EngineError):
        await kit.prefill.run([segment("a", 0, 30)])
    assert (await kit.prefill.resume(RequestId("a"))).finished


async def test_one_pass_at_a_time(kit: EngineKit):
    opened(kit, "a", 30)
    opened(kit, "b", 30)
    running = asyncio.ensure_future(kit.prefill.run([segment("a", 0, 30)]))
    await asyncio.sleep(0)
    with pytest.raises(EngineError):
        await kit.prefill.run([segment("b", 0, 30)])
    assert (await running).finished


async def test_kv_is_delivered_layer_by_layer_in_order(kit: EngineKit):
    pieces: list[LayerKv] = []
    opened(kit, "a", 20, pieces)
    opened(kit, "quiet", 6)
    await kit.prefill.run([segment("a", 0, 12, sample=False), segment("quiet", 0, 6)])
    await kit.prefill.run([segment("a", 12, 8)])
    layers = range(kit.prefill.profile.layers)
    assert [(kv.layer, kv.start, kv.tokens) for kv in pieces] == [(layer, 0, 12) for layer in layers] + [
        (layer, 12, 8) for layer in layers
    ]
    for kv in pieces:
        size = sum(buffer.nbytes for buffer in kv.buffers)
        assert size * len(layers) == kv.tokens * kit.prefill.profile.kv_bytes_per_token
        assert all(buffer.contiguous for buffer in kv.buffers)


async def test_the_prefill_accounts_kv_exactly(kit: EngineKit):
    opened(kit, "streamed", 100, [])
    assert kit.prefill.kv_used_tokens == 100, "it decodes elsewhere: its prompt alone"
    opened(kit, "kept", 100, max_tokens=30)
    assert kit.prefill.kv_used_tokens == 230
    kit.prefill.close(RequestId("streamed"))
    kit.prefill.close(RequestId("streamed"))
    kit.prefill.close(RequestId("never opened"))
    assert kit.prefill.kv_used_tokens == 130


async def test_a_full_prefill_engine_refuses_and_is_unchanged(kit: EngineKit):
    count = CAPACITY // 408
    for number in range(count):
        opened(kit, f"s{number}", 400)
    used = kit.prefill.kv_used_tokens
    with pytest.raises(KvFull):
        opened(kit, f"s{count}", 400)
    assert kit.prefill.kv_used_tokens == used == 408 * count
    with pytest.raises(EngineError):
        await kit.prefill.run([segment(f"s{count}", 0, 400)])
    kit.prefill.close(RequestId("s0"))
    opened(kit, "again", 400)
    assert kit.prefill.kv_used_tokens == used


async def test_closing_frees_a_stopped_pass(kit: EngineKit):
    opened(kit, "a", 30)
    await stopped_pass(kit, [segment("a", 0, 30)])
    kit.prefill.close(RequestId("a"))
    assert kit.prefill.kv_used_tokens == 0
    with pytest.raises(EngineError):
        await kit.prefill.resume(RequestId("a"))
    prompt = opened(kit, "a", 30)
    assert tokens_of(await kit.prefill.run([segment("a", 0, 30)])) == kit.follow(prompt, 1)


async def test_closing_one_of_a_stopped_pass_leaves_the_others(kit: EngineKit):
    opened(kit, "a", 30)
    prompt = opened(kit, "b", 20)
    await stopped_pass(kit, [segment("a", 0, 30), segment("b", 0, 20)])
    kit.prefill.close(RequestId("a"))
    result = await kit.prefill.resume(RequestId("b"))
    assert [drawn.request_id for drawn in result.sampled] == ["b"]
    assert tokens_of(result) == kit.follow(prompt, 1)


@pytest.mark.parametrize(
    "segments",
    [
        [],
        [segment("unknown", 0, 5)],
        [segment("a", 1, 5, sample=False)],
        [segment("a", 0, 11)],
        [segment("a", 0, 0)],
        [segment("a", 0, 5, sample=False), segment("a", 5, 5)],
    ],
    ids=["empty", "unknown", "gap", "beyond the prompt", "no tokens", "twice"],
)
async def test_senseless_passes_are_refused(kit: EngineKit, segments: list[Segment]):
    prompt = opened(kit, "a", 10)
    with pytest.raises(EngineError):
        await kit.prefill.run(segments)
    assert tokens_of(await kit.prefill.run([segment("a", 0, 10)])) == kit.follow(prompt, 1), "and harm nothing"


async def test_senseless_prompts_are_refused(kit: EngineKit):
    for ids in ([], [kit.vocab], [-1]):
        with pytest.raises(EngineError):
            kit.prefill.open(spec_of("a", max(1, len(ids))), ids, None)
    opened(kit, "a", 3)
    with pytest.raises(EngineError):
        opened(kit, "a", 3)
    assert kit.prefill.kv_used_tokens == 11


# --- decode ---


async def handed_over(kit: EngineKit, name: str, tokens: int, cuts: Sequence[int] = ()) -> tuple[list[int], int]:
    """Prefill a prompt in pieces and bring its KV to the decode engine, reserved and not yet active. Returns the
    prompt and its first token."""
    pieces: list[LayerKv] = []
    prompt = opened(kit, name, tokens, pieces)
    kit.decode.reserve(spec_of(name, tokens))
    edges = [0, *cuts, tokens]
    for start, end in pairwise(edges):
        result = await kit.prefill.run([segment(name, start, end - start, sample=end == tokens)])
    for kv in pieces:
        into = kit.decode.layer_buffers(RequestId(name), kv.layer, kv.start, kv.tokens)
        assert [view.nbytes for view in into] == [view.nbytes for view in kv.buffers]
        for view, data in zip(into, kv.buffers, strict=True):
            view.cast("B")[:] = data.cast("B")
    kit.prefill.close(RequestId(name))
    return prompt, tokens_of(result)[0]


async def test_decode_continues_what_prefill_began(kit: EngineKit):
    prompt, first = await handed_over(kit, "a", 33, cuts=[16])
    kit.decode.activate(RequestId("a"), first)
    tokens = [first]
    for _ in range(4):
        tokens += [drawn.token_id for drawn in await kit.decode.step([RequestId("a")])]
    assert tokens == kit.follow(prompt, 5)


async def test_a_batch_steps_in_the_order_asked_and_rows_come_and_go(kit: EngineKit):
    said: dict[str, list[int]] = {}
    prompts: dict[str, list[int]] = {}
    for name, tokens in [("a", 9), ("b", 30), ("c", 21)]:
        prompts[name], first = await handed_over(kit, name, tokens)
        kit.decode.activate(RequestId(name), first)
        said[name] = [first]
    for batch in (["a", "b", "c"], ["c", "a"], ["b"], ["c", "b", "a"]):
        drawn = await kit.decode.step([RequestId(name) for name in batch])
        assert [one.request_id for one in drawn] == batch
        for one in drawn:
            said[one.request_id].append(one.token_id)
    for name, tokens_said in said.items():
        assert tokens_said == kit.follow(prompts[name], len(tokens_said)), name


async def test_garbage_kv_is_not_decoded_as_if_it_were_right(kit: EngineKit):
    """A corrupt prefix must show, so that tests of the transfer would notice it."""
    prompt, first = await handed_over(kit, "a", 24)
    for layer in range(kit.decode.profile.layers):
        for view in kit.decode.layer_buffers(RequestId("a"), layer, 0, 24):
            data = view.cast("B")
            data[:] = bytes(reversed(bytes(data)))
    kit.decode.activate(RequestId("a"), first)
    tokens = [first]
    for _ in range(4):
        tokens += [drawn.token_id for drawn in await kit.decode.step([RequestId("a")])]
    assert tokens != kit.follow(prompt, 5)


async def test_decode_accounts_kv_and_frees_it(kit: EngineKit):
    kit.decode.reserve(spec_of("a", 100))
    assert kit.decode.kv_used_tokens >= 108
    kit.decode.release(RequestId("a"))
    kit.decode.release(RequestId("a"))
    assert kit.decode.kv_used_tokens == 0


async def test_a_full_decode_engine_refuses_and_is_unchanged(kit: EngineKit):
    for number in range(ROWS):
        kit.decode.reserve(spec_of(f"s{number}", 10))
    used = kit.decode.kv_used_tokens
    with pytest.raises(KvFull):
        kit.decode.reserve(spec_of("more", 10))
    assert kit.decode.kv_used_tokens == used
    kit.decode.release(RequestId("s0"))
    kit.decode.reserve(spec_of("more", 10))


async def test_senseless_decode_calls_are_refused(kit: EngineKit):
    kit.decode.reserve(spec_of("a", 10))
    with pytest.raises(EngineError):
        kit.decode.reserve(spec_of("a", 10))
    with pytest.raises(EngineError):
        await kit.decode.step([RequestId("a")])  # not active
    with pytest.raises(EngineError):
        await kit.decode.step([])
    with pytest.raises(EngineError):
        kit.decode.layer_buffers(RequestId("a"), 0, 5, 6)
    with pytest.raises(EngineError):
        kit.decode.layer_buffers(RequestId("a"), kit.decode.profile.layers, 0, 5)
    with pytest.raises(EngineError):
        kit.decode.activate(RequestId("unknown"), 1)
