"""Measures what a pass costs on this machine, for the estimates that placement and chunk sizes rest on."""

from __future__ import annotations

import statistics
import time

import torch

from common.messages.cluster import StepCost
from common.messages.requests import Prompt, RequestSpec
from common.units import RequestId, RouterId
from services.engine.batch import HeldSequence, pack
from services.engine.interface import Segment
from services.engine.kv_cache import KvShape, SequenceKv
from services.engine.model import LoadedModel
from services.engine.prefill import PassRun

_TOKENS, _PAST = 128, 1024
"""Size of the measured passes, where the context allows: large enough for the slope to stand out."""

_BUDGET_S = 1.5
"""No further repetition is begun after this."""

_LEAST_S = 1e-9
"""Slopes below it are noise."""


def measure_step_cost(model: LoadedModel, *, tokens_max: int) -> StepCost:
    """Time one token, a chunk, and a chunk with a past, and solve for `StepCost`'s three coefficients.

    The past's keys are zeros: attention costs the same. Takes about two seconds for a small model on
    a CPU, at most a few passes for a large one.
    """
    room = min(model.context_tokens, tokens_max)
    tokens = max(2, min(_TOKENS, room // 2))
    past = max(1, min(_PAST, room - tokens))
    shape = KvShape(model.layers, model.kv_heads, model.head_dim, model.dtype, model.device)
    kv = SequenceKv(shape, past + tokens)
    kv.clear()
    sizes = ((1, 0), (tokens, 0), (tokens, past))
    _timed_pass(model, kv, tokens, 0)  # first use of the weights, not counted
    seen: list[list[float]] = [[] for _ in sizes]
    begun = time.perf_counter()
    for _ in range(3):
        for at, (count, before) in enumerate(sizes):
            seen[at].append(_timed_pass(model, kv, count, before))
        if time.perf_counter() - begun > _BUDGET_S:
            break
    one_s, chunk_s, late_s = (statistics.median(times) for times in seen)
    return solve(tokens, past, one_s, chunk_s, late_s)


def solve(tokens: int, past: int, one_s: float, chunk_s: float, late_s: float) -> StepCost:
    """From the times of passes over 1 token, `tokens` tokens, and `tokens` tokens after `past`."""
    pair_s = max(_LEAST_S / 1e3, (late_s - chunk_s) / (tokens * past))
    token_s = max(_LEAST_S, (chunk_s - one_s - pair_s * (tokens * tokens - 1) / 2) / (tokens - 1))
    return StepCost(pass_s=max(_LEAST_S, one_s - token_s - pair_s / 2), token_s=token_s, pair_s=pair_s)


def _timed_pass(model: LoadedModel, kv: SequenceKv, tokens: int, past: int) -> float:
    """Seconds of one pass over `tokens` tokens after `past`, sampling one."""
    name, total = RequestId("calibration"), past + tokens
    spec = RequestSpec(request_id=name, router_id=RouterId(""), prompt=Prompt(tokens=total), max_tokens=1)
    sequence = HeldSequence(spec, [at % model.vocab for at in range(total)], kv, None)
    sequence.computed = past
    batch = pack([(sequence, Segment(name, past, tokens, sample=True))], model.device)
    begun = time.perf_counter()
    with torch.inference_mode():
        run = PassRun(model, batch)
        while not run.finished:
            run.step()
        run.settle()
    return time.perf_counter() - begun
