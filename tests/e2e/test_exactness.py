"""What the cluster answers is what transformers answers, whatever was batched, handed over and paused meanwhile."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from common.messages.cluster import StepCost
from common.messages.requests import Prompt, RequestSpec
from common.units import RequestId, RouterId
from services.engine.convert import ensure_model
from services.engine.interface import PassResult, Segment
from services.engine.model import load_model
from services.engine.prefill import PassRun
from services.engine.torch_prefill import TorchPrefillEngine
from tests.e2e.torch_cluster import Pauser, torch_cluster
from tests.engine.models import reference_greedy, reference_model, tiny_model

PROMPTS = 50
PAUSES = 200
THRESHOLD = 128
NEW_TOKENS = 8
LOGITS_APART = 1.0
"""Logits of the embedded model lie between about -15 and 30."""
NEAR_TIE = 0.5


def prompts(vocab: int, longest: int, seed: int = 11) -> list[list[int]]:
    """Thirty shorts and twenty longs, from one token up, in random order."""
    rng = random.Random(seed)
    lengths = [rng.randint(1, THRESHOLD) for _ in range(30)] + [rng.randint(THRESHOLD + 1, longest) for _ in range(20)]
    rng.shuffle(lengths)
    return [[rng.randrange(vocab) for _ in range(length)] for length in lengths]


async def serve_and_compare(
    folder: Path, longest: int, run_s: float, within_s: float, measured: Callable[[str], None]
) -> None:
    reference = reference_model(folder)
    asked = prompts(reference.config.vocab_size, longest)
    expected = [reference_greedy(reference, prompt, NEW_TOKENS)[0] for prompt in asked]
    async with torch_cluster(folder, threshold_tokens=THRESHOLD, pause_remaining_min_s=0.0) as c:
        pauser = Pauser(c, run_s=run_s, rest_s=run_s / 10)
        pausing = asyncio.create_task(pauser.run())
        for prompt, tokens in zip(asked, expected, strict=True):
            c.ask(prompt, tokens)
            await asyncio.sleep(c.rng.uniform(0.0, run_s))
        await c.until(lambda: c.crashed or all(answer.ended for answer in c.answers), within_s)
        assert not c.crashed
        pausing.cancel()
        assert [answer.tokens for answer in c.answers] == expected
        assert [answer.error for answer in c.answers] == [None] * PROMPTS
        assert c.count("interrupted") == 0
        stopped = sum((engine.stopped_at for engine in c.prefills), start=Counter[int]())
        measured(
            f"{PROMPTS} prompts exact; {len(pauser.pauses)} pauses, {c.count('pauses')} of them for shorts; "
            f"{sum(stopped.values())} inside a pass, at {len(stopped)} different steps"
        )
        assert len(pauser.pauses) >= PAUSES
        assert len(stopped) > c.model.layers / 2, "pauses fell on few different steps"
        assert c.count("pauses") > 0, "no short paused a long"
        assert max(engine.rows_most for engine in c.prefills) > 1, "nothing shared a prefill pass"
        assert c.decoder.rows_most > 1, "nothing shared a decode step"
        for engine in c.prefills:
            for request_id, (computed, known) in engine.computed.items():
                # The last token drawn is nobody's input.
                assert computed == c.model.layers * (known - 1), f"{request_id}: computed {computed}"
        assert sum(len(engine.computed) for engine in c.prefills) == PROMPTS


async def test_fifty_prompts_served_paused_and_handed_over_answer_as_transformers_does(tmp_path, measured):
    folder = tiny_model(
        "llama",
        tmp_path,
        vocab_size=2_000,
        hidden_size=288,
        intermediate_size=768,
        num_hidden_layers=8,
        max_position_embeddings=1_024,
        initializer_range=0.05,
    )
    await serve_and_compare(folder, longest=900, run_s=0.02, within_s=200.0, measured=measured)


async def test_without_disaggregation_and_colocation_too(tmp_path, measured):
    """Shorts decode where they prefilled, several at once and beside longs, for which they had to wait alone."""
    folder = tiny_model("llama", tmp_path, vocab_size=500, num_hidden_layers=4, initializer_range=0.05)
    reference = reference_model(folder)
    rng = random.Random(5)
    lengths = [300, *(rng.randint(1, THRESHOLD) for _ in range(8)), 200, *(rng.randint(1, THRESHOLD) for _ in range(8))]
    asked = [[rng.randrange(reference.config.vocab_size) for _ in range(length)] for length in lengths]
    expected = [reference_greedy(reference, p, 60 if len(p) > THRESHOLD else 12)[0] for p in asked]
    switches = {"disaggregation": False, "colocation": False}
    async with torch_cluster(folder, threshold_tokens=THRESHOLD, prefill=1, **switches) as c:
        for prompt, tokens in zip(asked, expected, strict=True):
            answer = c.ask(prompt, tokens)
            if len(prompt) > THRESHOLD:
                await c.until(lambda answer=answer: answer.tokens, 60.0)
        await c.until(lambda: c.crashed or all(answer.ended for answer in c.answers), 60.0)
        assert not c.crashed
        assert [answer.tokens for answer in c.answers] == expected
        assert c.decoder.rows_most == 0
        (engine,) = c.prefills
        assert engine.decoded_at_once > 2, "shorts and a long never decoded in one pass"
        assert c.count("placed_exclude") > 0, "no short came where a long decoded"
        measured(f"{len(asked)} prompts exact on one worker, up to {engine.decoded_at_once} decoding at once")


@pytest.mark.skipif("not config.getoption('--nightly')", reason="several minutes of fp32 on a CPU")
async def test_the_embedded_model_too(measured):
    await serve_and_compare(ensure_model("embedded", ""), longest=700, run_s=0.06, within_s=900.0, measured=measured)


class LogitsKept(TorchPrefillEngine):
    """Remembers the logits that each pass sampled from."""

    logits: torch.Tensor | None = None  # [segments that sample, vocab]

    def _compute(self, pass_run: PassRun, *how: Any) -> PassResult:
        result = super()._compute(pass_run, *how)
        self.logits = pass_run.logits
        return result


async def paused_prefill(engine: LogitsKept, prompt: list[int], chunk: int, rng: random.Random) -> tuple[Tensor, int]:
    """Last position's logits after a prefill that is stopped again and again; and how often it was."""
    spec = RequestSpec(
        request_id=RequestId("bf16"), router_id=RouterId("r"), prompt=Prompt(tokens=len(prompt)), max_tokens=1
    )
    engine.open(spec, prompt, None)
    stops = 0
    for start in range(0, len(prompt), chunk):
        tokens = min(chunk, len(prompt) - start)
        segment = Segment(spec.request_id, start, tokens, sample=start + tokens == len(prompt))
        work = engine.run([segment])
        while True:
            running = asyncio.ensure_future(work)
            await asyncio.sleep(rng.uniform(0.0, 0.05))
            engine.stop()
            result = await running
            if result.finished:
                break
            stops += 1
            work = engine.resume(spec.request_id)
    assert engine.tokens_computed(spec.request_id) == engine.profile.layers * len(prompt)
    engine.close(spec.request_id)
    assert engine.logits is not None
    return engine.logits[0].float(), stops


async def test_bf16_logits_of_a_paused_prefill_stay_near_those_of_transformers_in_one_piece(measured):
    """In bf16 transformers disagrees with itself, so tokens are not compared, but the logits are: at most
    `LOGITS_APART` apart, and the likeliest token the same unless the two likeliest are closer than `NEAR_TIE`."""
    folder = ensure_model("embedded", "")
    # Apart: how often a prefill is stopped depends on the machine, and of random prompts one in dozens is an odd one.
    rng, moments = random.Random(7), random.Random(8)
    engine = LogitsKept(
        load_model(folder, dtype="bfloat16", device="cpu"),
        StepCost(pass_s=0, token_s=0, pair_s=0),
        kv_capacity_tokens=4_096,
    )
    one_shot = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    apart, stops = [], 0
    for length in (5, 70, 333, 700):
        prompt = [rng.randrange(40_000) for _ in range(length)]
        logits, stopped = await paused_prefill(engine, prompt, 64, moments)
        stops += stopped
        with torch.inference_mode():
            expected = one_shot(torch.tensor([prompt]), logits_to_keep=1).logits[0, -1].float()
        apart.append((logits - expected).abs().max().item())
        first, second = expected.topk(2).values.tolist()
        assert logits.argmax() == expected.argmax() or first - second < NEAR_TIE
    await engine.shutdown()
    measured(f"bf16, {stops} stops: logits at most {max(apart):.3f} apart")
    assert stops > 0
    assert max(apart) <= LOGITS_APART
