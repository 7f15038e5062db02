"""Longs over several workers answer as transformers does: torch engines in fp32, links over TCP, pauses at random."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path

import pytest

from tests.e2e.torch_cluster import Pauser, torch_cluster
from tests.engine.models import reference_greedy, reference_model, tiny_model

THRESHOLD = 128
NEW_TOKENS = 8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_model(
        "llama",
        tmp_path,
        vocab_size=1_000,
        hidden_size=144,
        intermediate_size=288,
        num_hidden_layers=6,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=1_024,
        initializer_range=0.05,
    )


@pytest.mark.parametrize("workers", [2, 3])
async def test_longs_over_several_workers_paused_at_random_answer_as_transformers_does(
    folder, workers, measured, request
):
    reference = reference_model(folder)
    rng = random.Random(workers)
    count = 20 if request.config.getoption("--nightly") else 2
    longs = [rng.randint(300, 900) for _ in range(count)]
    lengths = [length for long in longs for length in (long, *(rng.randint(1, THRESHOLD) for _ in range(3)))]
    asked = [[rng.randrange(1_000) for _ in range(length)] for length in lengths]
    expected = [reference_greedy(reference, prompt, NEW_TOKENS)[0] for prompt in asked]
    options = {"threshold_tokens": THRESHOLD, "pause_remaining_min_s": 0.0, "chunk_tokens": 32, "shorts_spare": 0.0}
    async with torch_cluster(folder, prefill=workers, group_max=workers, **options) as c:
        pauser = Pauser(c, run_s=0.02, rest_s=0.005)
        pausing = asyncio.create_task(pauser.run())
        for prompt, tokens in zip(asked, expected, strict=True):
            if len(prompt) > THRESHOLD:  # one at a time, so that each finds all workers free
                await c.until(lambda: c.crashed or all(answer.ended for answer in c.answers), 60.0)
            c.ask(prompt, tokens)
            await asyncio.sleep(c.rng.uniform(0.0, 0.1))
        await c.until(lambda: c.crashed or all(answer.ended for answer in c.answers), 60.0)
        pausing.cancel()
        assert not c.crashed
        assert [answer.tokens for answer in c.answers] == expected
        assert [answer.error for answer in c.answers] == [None] * len(asked)
        assert c.count("interrupted") == 0
        stopped = [engine.stopped_at for engine in c.prefills]
        shared = [request_id for request_id in c.prefills[0].computed if request_id in c.prefills[1].computed]
        measured(
            f"{len(shared)} longs over {workers} workers exact; {len(pauser.pauses)} pauses, "
            f"{sum(stopped[0].values())} inside a pass"
        )
        assert len(shared) == count
        assert sum(stopped[0].values()) > 2 * count
        if workers == 2:
            assert stopped[0] == stopped[1] != Counter(), "both stop at the same steps, or neither"


@pytest.mark.parametrize("phase", ["prefilling", "decoding"])
async def test_a_rank_is_killed_and_the_long_is_served_again(folder, phase):
    reference = reference_model(folder)
    rng = random.Random(9)
    prompt = [rng.randrange(1_000) for _ in range(700)]
    tokens, _ = reference_greedy(reference, prompt, 40)
    options = {"threshold_tokens": THRESHOLD, "chunk_tokens": 32, "answer_s": 5.0}
    async with torch_cluster(folder, group_max=2, **options) as c:
        answer = c.ask(prompt, tokens)
        await c.until(lambda: c.prefills[0].passes_run > 2 if phase == "prefilling" else len(answer.tokens) > 5)
        await c.kill("p1")
        await c.until(lambda: c.prefills[0].kv_used_tokens == 0, within_s=5.0)
        c.start("p1")
        await c.until(lambda: c.crashed or answer.ended)
        assert answer.error is None
        # Once more if it was formed again before the scheduler knew that the worker is a new one.
        assert c.count("interrupted") in (1, 2)
