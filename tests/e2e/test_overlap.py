"""KV leaves while the prefill still computes: seen in the trace of one short, torch on both sides, over TCP."""

from __future__ import annotations

import asyncio
import random

from common.messages.decode import DecodeFinished
from common.messages.prefill import PrefillFinished
from services.engine.convert import ensure_model
from tests.e2e.torch_cluster import torch_cluster
from tests.engine.models import reference_greedy, reference_model


async def test_the_first_layers_kv_is_received_before_the_last_layer_is_computed(measured):
    folder = ensure_model("embedded", "")
    rng = random.Random(3)
    prompt = [rng.randrange(40_000) for _ in range(120)]
    reference = await asyncio.to_thread(lambda: reference_greedy(reference_model(folder), prompt, 4)[0])
    async with torch_cluster(folder, prefill=1) as c:
        answer = c.ask(prompt, reference)
        await c.until(lambda: answer.ended)
        (prefilled,), (decoded,) = c.told(PrefillFinished), c.told(DecodeFinished)
    # Both are readings of this host's monotonic clock: by the engine's thread, and by the receiving data plane.
    ahead_s = prefilled.last_layer_computed_s - decoded.first_layer_received_s
    after_s = decoded.last_layer_received_s - prefilled.last_layer_computed_s
    measured(
        f"first layer received {ahead_s * 1e3:.1f} ms before the last was computed "
        f"(prefill {prefilled.compute_s * 1e3:.1f} ms), last layer received {after_s * 1e3:.2f} ms after it was"
    )
    assert prefilled.compute_s > ahead_s > 0.0
    assert after_s > 0.0
