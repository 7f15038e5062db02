"""The torch prefill engine against transformers: same tokens, same KV, however the work is cut up."""

from __future__ import annotations

import asyncio
import os
import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from common.messages.cluster import StepCost
from common.messages.requests import Prompt, RequestSpec, SamplingParams
from common.units import RequestId, RouterId
from services.engine import attention_kernels
from services.engine.attention import CAUSAL_BLOCK
from services.engine.interface import EngineError, KvFull, LayerKv, PassResult, Segment
from services.engine.model import LoadedModel, load_model
from services.engine.prefill import PassRun
from services.engine.torch_prefill import TorchPrefillEngine
from tests.engine.models import FAMILIES, VOCAB, reference_greedy, reference_model, tiny_model

COST = StepCost(pass_s=0.001, token_s=0.0001, pair_s=0.0)
CAPACITY = 2_000
NEW_TOKENS = 8


@pytest.fixture
async def engine(llama: LoadedModel) -> Any:
    made = TorchPrefillEngine(llama, COST, kv_capacity_tokens=CAPACITY)
    yield made
    await made.shutdown()


class Hook:
    """Sees every step in the thread that runs it, and can stop the engine there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine: TorchPrefillEngine | None = None
        self.stop_after = 0
        """Ask for a stop during the step with this number, counted from now; 0: never."""
        self.steps = 0
        self.threads: list[str] = []
        self.niceness: list[int] = []
        self.logits: dict[str, list[torch.Tensor]] = {}
        """Of every token drawn, by request."""
        self.began = asyncio.Event()
        """A held step has begun."""
        self.go_on = threading.Event()
        self.go_on.set()
        self._hold_at = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        original = PassRun.step

        def step(run: PassRun) -> bool:
            self.steps += 1
            self.threads.append(threading.current_thread().name)
            self.niceness.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
            if self.steps == self._hold_at and self._loop is not None:
                self._loop.call_soon_threadsafe(self.began.set)
                assert self.go_on.wait(10)
            if self.steps == self.stop_after and self.engine is not None:
                self.engine.stop()
            done = original(run)
            if run.logits is not None:
                for row, logits in zip(run.batch.sampled, run.logits, strict=True):
                    self.logits.setdefault(row.sequence.spec.request_id, []).append(logits.clone())
            return done

        monkeypatch.setattr(PassRun, "step", step)

    def stop_in(self, steps: int) -> None:
        self.steps, self.stop_after = 0, steps

    def hold_at(self, step: int) -> None:
        """Let that step, counted from now, wait for `go_on`."""
        self.steps, self._hold_at, self._loop = 0, step, asyncio.get_running_loop()
        self.go_on.clear()


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hook]:
    made = Hook(monkeypatch)
    yield made
    made.go_on.set()


def spec(name: str, prompt: list[int], max_tokens: int = NEW_TOKENS, **sampling: Any) -> RequestSpec:
    return RequestSpec(
        request_id=RequestId(name),
        router_id=RouterId("r"),
        prompt=Prompt(tokens=len(prompt)),
        max_tokens=max_tokens,
        sampling=SamplingParams(**{"temperature": 0.0, **sampling}),
    )


def segment(name: str, start: int, tokens: int, *, sample: bool = False) -> Segment:
    return Segment(RequestId(name), start, tokens, sample)


def random_prompt(rng: random.Random, tokens: int) -> list[int]:
    return [rng.randrange(3, VOCAB) for _ in range(tokens)]


class Patchwork:
    """Serves sequences by passes cut at random: chunks of random size, random company, stops at random
    steps, other passes in between."""

    def __init__(self, engine: TorchPrefillEngine, hook: Hook, rng: random.Random) -> None:
        self.engine, self.hook, self.rng = engine, hook, rng
        self.tokens: dict[str, list[int]] = {}
        self.prompts: dict[str, list[int]] = {}
        self.wanted: dict[str, int] = {}
        self.pieces: dict[str, list[LayerKv]] = {}
        self.computed: dict[str, int] = {}
        self.stopped: list[list[Segment]] = []
        self.stops = self.shared_decodes = 0
        hook.engine = engine

    def open(self, name: str, prompt: list[int], *, handed_over: bool) -> None:
        self.prompts[name], self.tokens[name], self.computed[name] = prompt, [], 0
        self.wanted[name] = 1 if handed_over else NEW_TOKENS
        self.pieces[name] = []
        self.engine.open(spec(name, prompt), prompt, self.pieces[name].append if handed_over else None)

    async def serve(self) -> None:
        while any(len(self.tokens[name]) < self.wanted[name] for name in self.tokens):
            free = self._free()
            if self.stopped and (not free or self.rng.random() < 0.4):
                segments = self.stopped.pop(self.rng.randrange(len(self.stopped)))
                await self._advance(segments, resume=True)
            else:
                some = self.rng.sample(free, self.rng.randint(1, min(4, len(free))))
                await self._advance([self._next_segment(name) for name in some], resume=False)

    def _free(self) -> list[str]:
        busy = {part.request_id for segments in self.stopped for part in segments}
        return [n for n in self.tokens if n not in busy and len(self.tokens[n]) < self.wanted[n]]

    def _next_segment(self, name: str) -> Segment:
        known = len(self.prompts[name]) + len(self.tokens[name])
        left = known - self.computed[name]
        size = self.rng.randint(1, left)
        return segment(name, self.computed[name], size, sample=size == left)

    async def _advance(self, segments: list[Segment], *, resume: bool) -> None:
        self.hook.stop_in(self.rng.choice([0, 1, 2]))
        if resume:
            result = await self.engine.resume(self.rng.choice(segments).request_id)
        else:
            result = await self.engine.run(segments)
        if not result.finished:
            self.stops += 1
            self.stopped.append(segments)
            return
        assert [s.request_id for s in result.sampled] == [s.request_id for s in segments if s.sample]
        self.shared_decodes += len(segments) > 1 and any(self.tokens[s.request_id] for s in segments)
        for part in segments:
            self.computed[part.request_id] = part.start + part.tokens
        for drawn in result.sampled:
            self.tokens[drawn.request_id].append(drawn.token_id)


LENGTHS = (1, 2, 7, 33, 64, 90)


@pytest.mark.parametrize("family", FAMILIES)
async def test_greedy_tokens_equal_transformers(family: str, tmp_path: Path, hook: Hook) -> None:
    folder = tiny_model(family, tmp_path / "model")
    reference = reference_model(folder)
    model = load_model(folder, dtype="float32", device="cpu")
    engine = TorchPrefillEngine(model, COST, kv_capacity_tokens=CAPACITY)
    rng = random.Random(family)
    work = Patchwork(engine, hook, rng)
    for at, length in enumerate(LENGTHS):
        for handed_over in (False, True):
            work.open(f"{'short' if handed_over else 'long'}-{at}", random_prompt(rng, length), handed_over=handed_over)
    reserved = sum(2 * length + NEW_TOKENS for length in LENGTHS)
    assert engine.kv_used_tokens == reserved
    await work.serve()

    for name, tokens in work.tokens.items():
        theirs, logits = reference_greedy(reference, work.prompts[name], work.wanted[name])
        assert tokens == theirs, name
        assert float((torch.stack(hook.logits[name]) - logits).abs().max()) < 1e-4, name
        # Every (layer, token) pair once: the last drawn token has not been fed.
        fed = len(work.prompts[name]) + work.wanted[name] - 1
        assert engine.tokens_computed(RequestId(name)) == fed * model.layers
    assert work.stops > 10
    assert work.shared_decodes > 5
    for name in work.tokens:
        engine.close(RequestId(name))
    assert engine.kv_used_tokens == 0
    await engine.shutdown()


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
async def test_kv_handed_over_is_what_transformers_caches(family: str, tmp_path: Path, hook: Hook) -> None:
    folder = tiny_model(family, tmp_path / "model")
    model = load_model(folder, dtype="float32", device="cpu")
    engine = TorchPrefillEngine(model, COST, kv_capacity_tokens=CAPACITY)
    work = Patchwork(engine, hook, random.Random(7))
    reference = reference_model(folder)
    for at, length in enumerate((1, 19, 70)):
        work.open(f"s-{at}", random_prompt(work.rng, length), handed_over=True)
    await work.serve()
    for name, prompt in work.prompts.items():
        with torch.no_grad():
            cache = reference(torch.tensor([prompt]), use_cache=True).past_key_values
        ours = assemble(work.pieces[name], model, len(prompt))
        for layer in range(model.layers):
            theirs = torch.stack([cache.layers[layer].keys[0], cache.layers[layer].values[0]])
            torch.testing.assert_close(ours[layer], theirs, atol=1e-4, rtol=1e-4)
    await engine.shutdown()


def assemble(pieces: list[LayerKv], model: LoadedModel, tokens: int) -> torch.Tensor:
    """[layers, 2, kv_heads, tokens, head_dim] from what the sink got; every element exactly once."""
    out = torch.full((model.layers, 2, model.kv_heads, tokens, model.head_dim), float("nan"))
    done = dict.fromkeys(range(model.layers), 0)
    for piece in pieces:
        assert piece.start == done[piece.layer], "tokens of a layer come in order"
        done[piece.layer] += piece.tokens
        assert len(piece.buffers) == 2 * model.kv_heads
        for at, buffer in enumerate(piece.buffers):
            head = torch.frombuffer(buffer, dtype=torch.float32).view(piece.tokens, model.head_dim)
            out[piece.layer, at // model.kv_heads, at % model.kv_heads, piece.start : piece.start + piece.tokens] = head
    assert set(done.values()) == {tokens}
    return out


@pytest.mark.parametrize("attention", attention_kernels.UNMASKED)
async def test_a_chunk_longer_than_the_causal_block(
    engine: TorchPrefillEngine,
    hook: Hook,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    attention: attention_kernels.Attention,
) -> None:
    calls: list[int] = []

    def counted(query: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(query.shape[2])
        return attention(query, *args)

    monkeypatch.setattr(attention_kernels, "_FEW_KEYS", 1)
    monkeypatch.setattr(attention_kernels, "trial", lambda *_: (counted, counted))
    tokens = 30 + 2 * CAUSAL_BLOCK // 3 + CAUSAL_BLOCK
    prompt = random_prompt(random.Random(4), tokens)
    engine.open(spec("a", prompt, 1), prompt, None)
    await engine.run([segment("a", 0, 30)])
    await engine.run([segment("a", 30, tokens - 30, sample=True)])
    logits = reference_greedy(reference_model(folder), prompt, 1)[1][0]
    assert float((hook.logits["a"][0] - logits).abs().max()) < 1e-4
    assert calls == [CAUSAL_BLOCK, tokens - 30 - CAUSAL_BLOCK] * engine.profile.layers


async def test_layers_reach_the_sink_in_order_while_computing(
    engine: TorchPrefillEngine, hook: Hook, llama: LoadedModel
) -> None:
    prompt = random_prompt(random.Random(1), 20)
    seen: list[int] = []
    first_came = asyncio.Event()

    def sink(kv: LayerKv) -> None:
        assert threading.current_thread() is threading.main_thread()
        seen.append(kv.layer)
        first_came.set()

    engine.open(spec("a", prompt), prompt, sink)
    hook.hold_at(2)
    running = asyncio.ensure_future(engine.run([segment("a", 0, 20, sample=True)]))
    await first_came.wait()  # while the second layer waits
    assert not running.done()
    assert seen == [0]
    hook.go_on.set()
    await running
    assert seen == list(range(llama.layers))


async def test_a_stop_lets_the_step_end_and_no_other_begin(engine: TorchPrefillEngine, hook: Hook) -> None:
    prompt = random_prompt(random.Random(2), 40)
    engine.open(spec("a", prompt), prompt, None)
    hook.hold_at(1)
    running = asyncio.ensure_future(engine.run([segment("a", 0, 40, sample=True)]))
    await hook.began.wait()
    engine.stop()  # from the loop, in the middle of the first step
    hook.go_on.set()
    result = await running
    assert (result.finished, result.steps_done, hook.steps, result.sampled) == (False, 1, 1, ())
    assert engine.tokens_computed(RequestId("a")) == 40
    engine.stop()  # none runs: no effect on what follows
    again = await engine.resume(RequestId("a"))
    assert again.finished
    assert again.steps_done == engine.profile.layers
    assert again.compute_s > 0


async def test_accounting_is_exact_and_full_is_full(engine: TorchPrefillEngine) -> None:
    prompt = list(range(3, 103))
    for at in range(4):
        engine.open(spec(f"long-{at}", prompt, 300), prompt, None)
    engine.open(spec("short", prompt, 300), prompt, lambda _: None)
    assert engine.kv_used_tokens == 4 * 400 + 100
    with pytest.raises(KvFull, match="300 of 2000 are free"):
        engine.open(spec("too-much", prompt, 201), prompt, None)
    assert engine.kv_used_tokens == 1_700
    engine.open(spec("fits", prompt, 200), prompt, None)
    assert engine.kv_used_tokens == CAPACITY
    for name in ("long-0", "long-1", "long-2", "long-3", "short", "fits"):
        engine.close(RequestId(name))
        engine.close(RequestId(name))
    assert engine.kv_used_tokens == 0


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "complaint"),
    [
        ([], 4, "empty prompt"),
        ([3, VOCAB], 4, "outside the vocabulary"),
        ([3, -1], 4, "outside the vocabulary"),
        ([3] * 500, 13, "exceed the context"),
    ],
)
async def test_open_refuses(engine: TorchPrefillEngine, prompt: list[int], max_tokens: int, complaint: str) -> None:
    with pytest.raises(EngineError, match=complaint):
        engine.open(spec("a", prompt, max_tokens), prompt, None)
    assert engine.kv_used_tokens == 0


async def test_open_twice_is_refused(engine: TorchPrefillEngine) -> None:
    engine.open(spec("a", [3, 4]), [3, 4], None)
    with pytest.raises(EngineError, match="already open"):
        engine.open(spec("a", [3, 4]), [3, 4], None)
    assert engine.kv_used_tokens == 2 + NEW_TOKENS


@pytest.mark.parametrize(
    ("segments", "complaint"),
    [
        ([], "at least one segment"),
        ([segment("nobody", 0, 1)], "not open"),
        ([segment("a", 1, 2)], "starts at 1, computed are 0"),
        ([segment("a", 0, 0)], r"no tokens \[0, 0\)"),
        ([segment("a", 0, 5)], r"no tokens \[0, 5\)"),
        ([segment("a", 0, 2), segment("a", 0, 2)], "already part of a pass"),
        ([segment("a", 0, 3, sample=True)], "there is none to draw"),
    ],
)
async def test_impossible_passes_are_refused(
    engine: TorchPrefillEngine, segments: list[Segment], complaint: str
) -> None:
    engine.open(spec("a", [3, 4, 5, 6]), [3, 4, 5, 6], None)
    with pytest.raises(EngineError, match=complaint):
        await engine.run(segments)
    assert (await engine.run([segment("a", 0, 4, sample=True)])).finished  # nothing was left behind


async def test_a_stopped_pass_keeps_its_sequences_to_itself(engine: TorchPrefillEngine, hook: Hook) -> None:
    hook.engine = engine
    engine.open(spec("a", [3, 4]), [3, 4], None)
    with pytest.raises(EngineError, match="in no stopped pass"):
        await engine.resume(RequestId("a"))
    hook.stop_in(1)
    await engine.run([segment("a", 0, 2, sample=True)])
    with pytest.raises(EngineError, match="already part of a pass"):
        await engine.run([segment("a", 0, 2, sample=True)])
    assert (await engine.resume(RequestId("a"))).finished


async def test_closing_one_of_a_stopped_pass_leaves_the_others_exact(
    engine: TorchPrefillEngine, hook: Hook, folder: Path
) -> None:
    rng = random.Random(3)
    prompts = {name: random_prompt(rng, size) for name, size in (("a", 30), ("b", 12), ("c", 25))}
    for name, prompt in prompts.items():
        engine.open(spec(name, prompt), prompt, None)
    hook.engine = engine
    hook.stop_in(2)
    stopped = await engine.run([segment(name, 0, len(prompt), sample=True) for name, prompt in prompts.items()])
    assert stopped.steps_done == 2
    engine.close(RequestId("b"))
    assert engine.kv_used_tokens == 30 + 25 + 2 * NEW_TOKENS
    result = await engine.resume(RequestId("c"))
    reference = reference_model(folder)
    assert [s.request_id for s in result.sampled] == ["a", "c"]
    for drawn in result.sampled:
        theirs, logits = reference_greedy(reference, prompts[drawn.request_id], 1)
        assert [drawn.token_id] == theirs
        assert float((hook.logits[drawn.request_id][0] - logits[0]).abs().max()) < 1e-4
    engine.close(RequestId("a"))
    engine.close(RequestId("c"))
    assert engine.kv_used_tokens == 0


async def test_closing_the_only_one_forgets_the_pass(engine: TorchPrefillEngine, hook: Hook) -> None:
    hook.engine = engine
    engine.open(spec("a", [3, 4]), [3, 4], None)
    hook.stop_in(1)
    await engine.run([segment("a", 0, 2, sample=True)])
    engine.close(RequestId("a"))
    assert engine.kv_used_tokens == 0
    engine.open(spec("a", [5, 6, 7]), [5, 6, 7], None)
    assert (await engine.run([segment("a", 0, 3, sample=True)])).finished


async def test_one_pass_at_a_time_and_no_closing_under_it(engine: TorchPrefillEngine, hook: Hook) -> None:
    for name in ("a", "b"):
        engine.open(spec(name, [3, 4]), [3, 4], None)
    hook.hold_at(1)
    running = asyncio.ensure_future(engine.run([segment("a", 0, 2)]))
    await hook.began.wait()
    with pytest.raises(EngineError, match="one at a time"):
        await engine.run([segment("b", 0, 2)])
    with pytest.raises(EngineError, match="stop the pass"):
        engine.close(RequestId("a"))
    engine.close(RequestId("b"))
    hook.go_on.set()
    assert (await running).finished


async def test_a_cancelled_caller_stops_the_pass_and_leaves_it_resumable(
    engine: TorchPrefillEngine, hook: Hook
) -> None:
    engine.open(spec("a", [3, 4]), [3, 4], None)
    hook.hold_at(1)
    running = asyncio.ensure_future(engine.run([segment("a", 0, 2, sample=True)]))
    await hook.began.wait()
    running.cancel()
    await asyncio.sleep(0)
    running.cancel()  # the second must not let go of the thread either
    await asyncio.sleep(0)
    assert not running.done()
    hook.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert hook.steps == 1
    result: PassResult = await engine.resume(RequestId("a"))
    assert result.finished
    assert hook.steps == engine.profile.layers


async def test_a_failed_pass_is_an_engine_error_and_lets_go(
    engine: TorchPrefillEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.open(spec("a", [3, 4]), [3, 4], None)
    with monkeypatch.context() as patch:

        def fail(_: PassRun) -> None:
            raise RuntimeError("out of memory")

        patch.setattr(PassRun, "step", fail)
        with pytest.raises(EngineError, match="out of memory"):
            await engine.run([segment("a", 0, 2)])
    assert (await engine.run([segment("a", 0, 2, sample=True)])).finished


async def test_a_pass_runs_in_the_background_if_told_to(engine: TorchPrefillEngine, hook: Hook) -> None:
    engine.open(spec("long", [3] * 20), [3] * 20, None)
    engine.open(spec("short", [4] * 20), [4] * 20, lambda _: None)

    async def thread_of(*segments: Segment, background: bool) -> str:
        hook.threads.clear()
        await engine.run(segments, background=background)
        (name,) = {thread.rsplit("_", 1)[0] for thread in hook.threads}
        return name

    assert await thread_of(segment("long", 0, 10), background=True) == "prefill-long"
    assert await thread_of(segment("long", 10, 5), segment("short", 0, 10), background=False) == "prefill"
    assert await thread_of(segment("short", 10, 10, sample=True), background=False) == "prefill"
    assert await thread_of(segment("long", 15, 5, sample=True), background=True) == "prefill-long"
    assert await thread_of(segment("long", 20, 1, sample=True), background=False) == "prefill"


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a priority of their own on Linux only")
async def test_the_background_thread_is_niced_and_the_other_is_not(llama: LoadedModel, hook: Hook) -> None:
    engine = TorchPrefillEngine(llama, COST, kv_capacity_tokens=CAPACITY, long_nice=3)
    engine.open(spec("long", [3] * 20), [3] * 20, None)
    engine.open(spec("short", [4] * 20), [4] * 20, lambda _: None)
    await engine.run([segment("long", 0, 20)], background=True)
    await engine.run([segment("short", 0, 20)])
    base = os.getpriority(os.PRIO_PROCESS, 0)
    assert (hook.niceness[0], hook.niceness[-1]) == (min(19, base + 3), base)
    await engine.shutdown()


async def test_draws_depend_on_seed_and_index_not_on_company(engine: TorchPrefillEngine) -> None:
    prompt = random_prompt(random.Random(5), 10)
    alone = await draw_all(engine, [spec("x", prompt, temperature=1.0, seed=11)], prompt)
    both = await draw_all(
        engine,
        [spec("y", prompt, temperature=1.0, seed=12), spec("x", prompt, temperature=1.0, seed=11)],
        prompt,
    )
    assert both["x"] == alone["x"]
    assert both["y"] != alone["x"]
    # Served again after two tokens were delivered: the rest is the same.
    again = [*prompt, *alone["x"][:2]]
    restarted = RequestSpec(
        request_id=RequestId("x"),
        attempt=1,
        router_id=RouterId("r"),
        prompt=Prompt(tokens=len(again)),
        max_tokens=NEW_TOKENS - 2,
        sampling=SamplingParams(temperature=1.0, seed=11),
        generated_before=2,
    )
    assert (await draw_all(engine, [restarted], again))["x"] == alone["x"][2:]


async def draw_all(engine: TorchPrefillEngine, specs: list[RequestSpec], prompt: list[int]) -> dict[str, list[int]]:
    drawn: dict[str, list[int]] = {s.request_id: [] for s in specs}
    for each in specs:
        engine.open(each, prompt, None)
    segments = [segment(s.request_id, 0, len(prompt), sample=True) for s in specs]
    for at in range(specs[0].max_tokens):
        for token in (await engine.run(segments)).sampled:
            drawn[token.request_id].append(token.token_id)
        segments = [segment(s.request_id, len(prompt) + at, 1, sample=True) for s in specs]
    for each in specs:
        engine.close(each.request_id)
    return drawn


async def test_bf16_stays_near_float32(folder: Path, hook: Hook) -> None:
    model = load_model(folder, dtype="bfloat16", device="cpu")
    engine = TorchPrefillEngine(model, COST, kv_capacity_tokens=CAPACITY)
    pieces: list[LayerKv] = []
    prompt = random_prompt(random.Random(9), 60)
    engine.open(spec("a", prompt), prompt, pieces.append)
    for start in range(0, 60, 20):
        await engine.run([segment("a", start, 20, sample=start == 40)])
    theirs = reference_greedy(reference_model(folder), prompt, 1)[1][0]
    ours = hook.logits["a"][0].float()
    assert float((ours - theirs).abs().max()) < 0.05 * float(theirs.abs().max())
    assert all(len(b) == 20 * model.head_dim * 2 for piece in pieces for b in piece.buffers)
    await engine.shutdown()
