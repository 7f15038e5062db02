"""The torch decode engine against transformers: KV computed by transformers' forward goes in through
`layer_buffers`, and the tokens that come out must be those of transformers' `generate`."""

from __future__ import annotations

import asyncio
import math
import os
import random
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from common.messages.cluster import StepCost
from common.messages.requests import Prompt, RequestSpec, SamplingParams
from common.units import RequestId, RouterId
from services.engine import decode_attention
from services.engine.decode import DecodeRow, plan_runs
from services.engine.interface import EngineError, KvFull, LayerKv, Segment
from services.engine.kv_cache import KvShape
from services.engine.model import load_model
from services.engine.slots import Slot
from services.engine.torch_decode import TorchDecodeEngine
from services.engine.torch_prefill import TorchPrefillEngine
from tests.engine.models import FAMILIES, VOCAB, reference_greedy, reference_model, tiny_model

COST = StepCost(pass_s=0.001, token_s=0.0001, pair_s=0.0)
CAPACITY = 8_192
ROWS = 12


def make_engine(
    folder: Path, *, rows_max: int = ROWS, capacity: int = CAPACITY, dtype: Any = "float32", nice: int = 0
) -> Any:
    model = load_model(folder, dtype=dtype, device="cpu")
    return TorchDecodeEngine(model, kv_capacity_tokens=capacity, rows_max=rows_max, nice=nice, step_cost=COST)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return reference_model(folder)


@pytest.fixture
async def engine(folder: Path) -> AsyncIterator[TorchDecodeEngine]:
    made = make_engine(folder)
    yield made
    await made.shutdown()
    assert made.kv_used_tokens == 0


def spec_of(name: str, prompt: int, new: int, **sampling: Any) -> RequestSpec:
    return RequestSpec(
        request_id=RequestId(name),
        router_id=RouterId("router"),
        prompt=Prompt(tokens=prompt),
        max_tokens=new,
        sampling=SamplingParams(**{"temperature": 0.0, **sampling}),
    )


def prompt_of(rng: random.Random, tokens: int) -> list[int]:
    return [rng.randrange(3, VOCAB) for _ in range(tokens)]


def receive(engine: TorchDecodeEngine, model: Any, spec: RequestSpec, prompt: list[int]) -> int:
    """As a KV transfer would: reserve, fill the buffers in pieces, activate. Returns the first token."""
    cache = DynamicCache()
    with torch.no_grad():
        logits = model(torch.tensor([prompt]), past_key_values=cache, use_cache=True).logits
    name, total = spec.request_id, len(prompt)
    engine.reserve(spec)
    for layer in range(engine.profile.layers):
        held = torch.cat([cache.layers[layer].keys[0], cache.layers[layer].values[0]])  # [2 * heads, tokens, dim]
        middle = total // 2
        for start, end in ((0, middle), (middle, total)):
            if start < end:
                buffers = engine.layer_buffers(name, layer, start, end - start)
                for buffer, head in zip(buffers, held[:, start:end], strict=True):
                    buffer[:] = head.contiguous().view(torch.uint8).numpy().tobytes()
    first = int(logits[0, -1].argmax())
    engine.activate(name, first)
    return first


@pytest.mark.parametrize("family", FAMILIES)
async def test_joining_and_leaving_rows_answer_as_transformers_alone(family: str, tmp_path: Path) -> None:
    rng = random.Random(family)
    folder = tiny_model(family, tmp_path)
    model, engine = reference_model(folder), make_engine(folder)
    # Slots of 256 and 512 tokens, a prompt of one token, and one that crosses into another rope table.
    shapes = [(1, 12), (7, 20), (40, 6), (60, 15), (230, 40), (300, 9), (3, 2), (100, 3), (250, 5), (20, 30)]
    waiting = [(f"r{at}", prompt_of(rng, prompt), new) for at, (prompt, new) in enumerate(shapes)]
    if family == "phi3-longrope":  # transformers computes the prompt anew where it crosses; no engine can
        waiting = [(name, prompt, new) for name, prompt, new in waiting if not len(prompt) <= 48 < len(prompt) + new]
    expected = {name: reference_greedy(model, prompt, new)[0] for name, prompt, new in waiting}
    wanted = {name: new for name, _, new in waiting}
    got: dict[str, list[int]] = {}
    running: list[str] = []
    while waiting or running:
        for _ in range(rng.randrange(3)):
            if waiting and len(running) < 6:
                name, prompt, new = waiting.pop(0)
                got[name] = [receive(engine, model, spec_of(name, len(prompt), new), prompt)]
                running.append(name)
        rng.shuffle(running)
        batch = [name for name in running if rng.random() < 0.8]
        if batch:
            drawn = await engine.step([RequestId(name) for name in batch])
            assert [one.request_id for one in drawn] == batch
            for one in drawn:
                got[one.request_id].append(one.token_id)
        for name in [name for name in running if len(got[name]) == wanted[name]]:
            engine.release(RequestId(name))
            running.remove(name)
    assert got == expected
    await engine.shutdown()


@pytest.mark.parametrize("attend", [decode_attention.folded, decode_attention.grouped, decode_attention.products])
async def test_every_attention_gives_the_same(
    attend: decode_attention.Attention,
    engine: TorchDecodeEngine,
    reference: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine._decoder.attend = attend
    monkeypatch.setattr(decode_attention, "_FEW_TOKENS", 0)
    rng = random.Random(5)
    prompts = {f"r{at}": prompt_of(rng, tokens) for at, tokens in enumerate((3, 90, 31))}
    for name, prompt in prompts.items():
        receive(engine, reference, spec_of(name, len(prompt), 10), prompt)
    drawn = [await engine.step([RequestId(name) for name in prompts]) for _ in range(9)]
    for at, prompt in enumerate(prompts.values()):
        assert [step[at].token_id for step in drawn] == reference_greedy(reference, prompt, 10)[0][1:]


async def test_a_reused_slot_keeps_nothing_of_its_last_sequence(engine: TorchDecodeEngine, reference: Any) -> None:
    rng = random.Random(2)
    for tokens in (240, 5, 100, 1):
        prompt = prompt_of(rng, tokens)
        receive(engine, reference, spec_of("same", tokens, 8), prompt)
        assert engine._sequences[RequestId("same")].slot == Slot(256, 0)
        drawn = [(await engine.step([RequestId("same")]))[0].token_id for _ in range(7)]
        assert drawn == reference_greedy(reference, prompt, 8)[0][1:]
        engine.release(RequestId("same"))


async def test_values_that_are_no_numbers_harm_only_their_own_sequence(
    engine: TorchDecodeEngine, reference: Any
) -> None:
    rng = random.Random(3)
    sick, well, short = prompt_of(rng, 200), prompt_of(rng, 150), prompt_of(rng, 20)
    for steps in (0, 2):  # released before its first step, and after some
        receive(engine, reference, spec_of("sick", 200, 9), sick)
        receive(engine, reference, spec_of("well", 150, 9), well)
        slot = engine._sequences[RequestId("sick")].slot
        for layer in range(engine.profile.layers):
            engine._kv._slot(None, slot, layer)[:, :, 30:200] = math.nan
        names = [RequestId("sick"), RequestId("well")]
        drawn = [(await engine.step(names))[1].token_id for _ in range(steps)]
        assert drawn == reference_greedy(reference, well, 9)[0][1 : steps + 1]
        engine.release(RequestId("sick"))
        receive(engine, reference, spec_of("next", 20, 9), short)
        assert engine._sequences[RequestId("next")].slot == slot
        names = [RequestId("next"), RequestId("well")]  # of one call, 150 tokens long
        drawn = [(await engine.step(names))[0].token_id for _ in range(5)]
        assert drawn == reference_greedy(reference, short, 9)[0][1:6]
        engine.release(RequestId("next"))
        engine.release(RequestId("well"))


async def test_kv_accounting_is_exact_and_bounded(folder: Path) -> None:
    engine = make_engine(folder, capacity=1_024, rows_max=3)
    assert engine.profile.kv_capacity_tokens == 1_024
    assert engine.profile.context_tokens == 512  # the model's own
    engine.reserve(spec_of("a", 200, 57))
    assert engine.kv_used_tokens == 512
    engine.reserve(spec_of("b", 200, 56))
    assert engine.kv_used_tokens == 512 + 256
    with pytest.raises(KvFull, match="768 of 1024"):
        engine.reserve(spec_of("c", 300, 1))
    engine.reserve(spec_of("c", 1, 1))
    assert engine.kv_used_tokens == 1_024
    engine.release(RequestId("b"))
    engine.release(RequestId("b"))
    assert engine.kv_used_tokens == 768
    engine.reserve(spec_of("d", 1, 1))
    with pytest.raises(KvFull, match="rows"):
        engine.reserve(spec_of("e", 1, 1))
    await engine.shutdown()
    assert engine.kv_used_tokens == 0


async def test_a_small_pool_bounds_the_context(folder: Path) -> None:
    engine = make_engine(folder, capacity=300)
    assert (engine.profile.kv_capacity_tokens, engine.profile.context_tokens) == (256, 256)
    with pytest.raises(EngineError, match="256"):
        engine.reserve(spec_of("a", 250, 7))
    await engine.shutdown()


async def test_wrong_calls_are_refused(engine: TorchDecodeEngine, reference: Any) -> None:
    name = RequestId("a")
    for call in (
        lambda: engine.layer_buffers(name, 0, 0, 1),
        lambda: engine.activate(name, 5),
        lambda: engine.reserve(spec_of("long", 500, 13)),
    ):
        with pytest.raises(EngineError):
            call()
    with pytest.raises(EngineError):
        await engine.step([name])
    engine.reserve(spec_of("a", 10, 2))
    with pytest.raises(EngineError, match="already"):
        engine.reserve(spec_of("a", 10, 2))
    for layer, start, tokens in ((3, 0, 1), (-1, 0, 1), (0, 0, 11), (0, 10, 1), (0, -1, 2), (0, 0, 0)):
        with pytest.raises(EngineError, match="not of its prompt"):
            engine.layer_buffers(name, layer, start, tokens)
    with pytest.raises(EngineError, match="vocabulary"):
        engine.activate(name, VOCAB)
    with pytest.raises(EngineError, match="not active"):
        await engine.step([name])
    engine.activate(name, 5)
    with pytest.raises(EngineError, match="active"):
        engine.layer_buffers(name, 0, 0, 1)
    with pytest.raises(EngineError, match="once"):
        await engine.step([name, name])
    with pytest.raises(EngineError, match="once"):
        await engine.step([])


async def test_one_step_at_a_time_off_the_loop_and_cancelled_only_at_its_end(
    engine: TorchDecodeEngine, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go_on = asyncio.Event(), threading.Event()
    loop, real = asyncio.get_running_loop(), engine._decoder.step
    threads: list[str] = []

    def held(rows: Any) -> torch.Tensor:
        threads.append(threading.current_thread().name)
        loop.call_soon_threadsafe(began.set)
        assert go_on.wait(10)
        return real(rows)

    monkeypatch.setattr(engine._decoder, "step", held)
    name = RequestId("a")
    receive(engine, reference, spec_of("a", 5, 9), [3, 4, 5, 6, 7])
    stepping = asyncio.ensure_future(engine.step([name]))
    await began.wait()
    with pytest.raises(EngineError, match="one at a time"):
        await engine.step([name])
    with pytest.raises(EngineError, match="await the step"):
        engine.release(name)
    stepping.cancel()
    await asyncio.wait([stepping], timeout=0.02)
    assert not stepping.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await stepping
    assert threads == ["decode_0"]
    engine.release(name)
    assert engine.kv_used_tokens == 0


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a priority of their own on Linux only")
async def test_its_thread_is_as_nice_as_it_is_told(
    folder: Path, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(folder, nice=5)
    real, seen = engine._decoder.step, []

    def step(rows: Any) -> torch.Tensor:
        seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return real(rows)

    monkeypatch.setattr(engine._decoder, "step", step)
    receive(engine, reference, spec_of("a", 5, 9), [3, 4, 5, 6, 7])
    await engine.step([RequestId("a")])
    base = os.getpriority(os.PRIO_PROCESS, 0)
    assert seen == [min(19, base + 5)]
    engine.release(RequestId("a"))
    await engine.shutdown()


async def test_a_failed_step_is_an_engine_error_and_the_engine_goes_on(
    engine: TorchDecodeEngine, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    receive(engine, reference, spec_of("a", 2, 9), [3, 4])
    with monkeypatch.context() as patch:
        patch.setattr(engine._decoder, "attend", lambda *_: 1 / 0)
        with pytest.raises(EngineError, match="1 sequences failed"):
            await engine.step([RequestId("a")])
    engine.release(RequestId("a"))
    receive(engine, reference, spec_of("b", 2, 9), [3, 4])
    drawn = await engine.step([RequestId("b")])
    assert drawn[0].token_id == reference_greedy(reference, [3, 4], 2)[0][1]


async def test_draws_depend_on_seed_and_output_index_alone(engine: TorchDecodeEngine, reference: Any) -> None:
    prompt = [9, 8, 7, 6]
    sampling = {"temperature": 1.3, "seed": 11, "logprobs": 2}
    receive(engine, reference, spec_of("a", 4, 12, **sampling), prompt)
    receive(engine, reference, spec_of("other", 4, 12, temperature=1.0, seed=4), prompt)
    names = [RequestId("other"), RequestId("a")]
    whole = [engine._sequences[names[1]].pending, *[(await engine.step(names))[1].token_id for _ in range(9)]]
    # The same request, served again after four delivered tokens.
    resumed = spec_of("again", 8, 8, **sampling)
    resumed = RequestSpec(**{**{f: getattr(resumed, f) for f in resumed.__struct_fields__}, "generated_before": 4})
    receive(engine, reference, resumed, [*prompt, *whole[:4]])
    engine._sequences[RequestId("again")].pending = whole[4]  # which its prefill worker would have drawn
    drawn = [(await engine.step([RequestId("again")]))[0] for _ in range(5)]
    assert [one.token_id for one in drawn] == whole[5:]
    assert all(one.logprob is not None and len(one.logprob.top) == 2 for one in drawn)


async def test_bfloat16_is_as_near_to_float32_as_transformers_is(folder: Path, reference: Any) -> None:
    """Stated tolerance: 1.5 times transformers' own largest error in bf16, on the same KV rounded to bf16."""
    rng = random.Random(8)
    engine = make_engine(folder, dtype="bfloat16")
    half = reference_model(folder).to(torch.bfloat16)
    for tokens in (1, 50, 200):
        prompt, name = prompt_of(rng, tokens), RequestId(f"p{tokens}")
        first = receive(engine, half, spec_of(name, tokens, 4), prompt)
        sequence = engine._sequences[name]
        ours = engine._decoder.step([DecodeRow(sequence.slot, sequence.position, first)])[0].float()
        with torch.no_grad():
            exact = reference(torch.tensor([[*prompt, first]])).logits[0, -1]
            theirs = half(torch.tensor([[*prompt, first]])).logits[0, -1].float()
        assert (ours - exact).abs().max() <= 1.5 * (theirs - exact).abs().max() + 0.02
    await engine.shutdown()


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
async def test_a_prefill_engines_kv_is_what_the_decode_engine_takes(family: str, tmp_path: Path) -> None:
    folder = tiny_model(family, tmp_path)
    prefill = TorchPrefillEngine(load_model(folder, dtype="float32", device="cpu"), COST, kv_capacity_tokens=1_000)
    decode = make_engine(folder)
    assert prefill.profile.model_fingerprint == decode.profile.model_fingerprint
    assert prefill.profile.kv_bytes_per_token == decode.profile.kv_bytes_per_token
    prompt = prompt_of(random.Random(family), 70)
    spec = spec_of("a", 70, 12)

    def sink(kv: LayerKv) -> None:
        buffers = decode.layer_buffers(spec.request_id, kv.layer, kv.start, kv.tokens)
        for target, source in zip(buffers, kv.buffers, strict=True):
            target[:] = source

    decode.reserve(spec)
    prefill.open(spec, prompt, sink)
    await prefill.run([Segment(spec.request_id, 0, 40, sample=False)])
    (first,) = (await prefill.run([Segment(spec.request_id, 40, 30, sample=True)])).sampled
    decode.activate(spec.request_id, first.token_id)
    drawn = [first.token_id, *[(await decode.step([spec.request_id]))[0].token_id for _ in range(11)]]
    assert drawn == reference_greedy(reference_model(folder), prompt, 12)[0]
    await prefill.shutdown()
    await decode.shutdown()


async def test_weights_are_held_once(folder: Path) -> None:
    model = load_model(folder, dtype="float32", device="cpu")
    left = TorchDecodeEngine(model, kv_capacity_tokens=256, rows_max=1, step_cost=COST)
    assert not [name for name, _ in model.decoder.layers.named_parameters()]
    await left.shutdown()


async def test_step_cost_is_measured(folder: Path) -> None:
    model = load_model(folder, dtype="float32", device="cpu")
    engine = TorchDecodeEngine(model, kv_capacity_tokens=2_048, rows_max=4)
    cost = engine.profile.step_cost
    assert min(cost.pass_s, cost.token_s, cost.pair_s) > 0.0
    assert engine.kv_used_tokens == 0
    await engine.shutdown()


SHAPE = KvShape(layers=1, kv_heads=1, head_dim=4, dtype=torch.float32, device=torch.device("cpu"))


def rows_at(*places: tuple[int, int, int]) -> list[DecodeRow]:
    """From (slot size, row, position)."""
    return [DecodeRow(Slot(size, size * row), position, 0) for size, row, position in places]


def test_neighbours_share_a_call_and_gaps_are_masked() -> None:
    (run,) = plan_runs(rows_at((256, 0, 99), (256, 1, 99), (256, 3, 49)), SHAPE)
    assert (run.first, run.last, run.length, run.begin, run.end) == (0, 3, 100, 0, 3)
    assert run.places is not None
    assert run.places.tolist() == [0, 1, 3]
    assert run.mask is not None
    assert (run.mask[:, 0, 0] == 0).sum(1).tolist() == [100, 100, 100, 50]


def test_equal_neighbours_need_no_mask() -> None:
    (run,) = plan_runs(rows_at((256, 2, 9), (256, 3, 9)), SHAPE)
    assert run.mask is None
    assert run.places is None


def test_other_sizes_far_places_and_unequal_lengths_get_their_own_call() -> None:
    rows = rows_at((256, 0, 200), (256, 9, 200), (512, 5, 10), (4096, 3, 100), (4096, 4, 3000))
    assert [(run.begin, run.end) for run in plan_runs(rows, SHAPE)] == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
