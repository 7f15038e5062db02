"""A long that filled its workers' KV is moved to memory or a file and back while shorts run, and answers as
transformers does: torch engines in fp32."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from services.engine.spill import SpillLimits
from tests.e2e.torch_cluster import torch_cluster
from tests.engine.models import reference_greedy, reference_model, tiny_model

THRESHOLD = 128
NEW_TOKENS = 8
LONG = 900
KV_TOKENS = 1_000
"""Beside the long's KV no short of 110 tokens has room."""


@pytest.mark.parametrize(("to", "workers"), [("memory", 1), ("disk", 2)])
async def test_a_long_moved_out_for_shorts_again_and_again_answers_as_transformers_does(
    to: str, workers: int, tmp_path: Path, measured
):
    folder = tiny_model(
        "llama", tmp_path / "model", vocab_size=1_000, num_hidden_layers=6, max_position_embeddings=1_024
    )
    files = tmp_path / "files"
    files.mkdir()
    reference = reference_model(folder)
    rng = random.Random(to)
    kv_tokens = KV_TOKENS if workers == 1 else LONG // workers + 60
    lengths = [LONG, *[rng.randint(110, THRESHOLD) for _ in range(8)]]
    asked = [[rng.randrange(1_000) for _ in range(length)] for length in lengths]
    expected = [reference_greedy(reference, prompt, NEW_TOKENS)[0] for prompt in asked]
    options = {"threshold_tokens": THRESHOLD, "pause_remaining_min_s": 0.0, "chunk_tokens": 16, "shorts_spare": 0.0}
    async with torch_cluster(
        folder,
        prefill=workers,
        group_max=workers,
        spill=to,
        limits=SpillLimits("disk" if to == "disk" else "memory", 2**26, str(files)),
        prefill_kv_tokens=kv_tokens,
        **options,
    ) as c:
        for prompt, tokens in zip(asked, expected, strict=True):
            c.ask(prompt, tokens)
            await asyncio.sleep(0.1)
        await c.until(lambda: c.crashed or all(answer.ended for answer in c.answers), 60.0)
        assert not c.crashed
        assert [answer.tokens for answer in c.answers] == expected
        assert c.count("interrupted") == 0
        assert c.count("spills") >= 1
        long = c.answers[0].request_id
        computed = sum(engine.computed[long][0] for engine in c.prefills)
        assert computed == (LONG + NEW_TOKENS - 1) * c.model.layers, "computed twice"
        measured(f"{c.count('spills')} moves of a long's KV to {to} and back, {workers} workers: tokens exact")
    assert not await asyncio.to_thread(lambda: list(files.iterdir()))
