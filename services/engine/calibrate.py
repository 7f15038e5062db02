"""Measures what a pass costs on this machine, for the estimates that placement and chunk sizes rest on.

Layers cost the same, so a few steps tell what a pass takes. They are measured at several sizes with and
without a long past, because the cost is linear in neither: small chunks wait for the weights, large
ones for the multiplication, and attention to a long past is another operator than to a short one. The
coefficients are those with the least relative error over the sizes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from common.messages.cluster import StepCost
from common.messages.requests import Prompt, RequestSpec
from common.units import RequestId, RouterId
from services.engine.batch import HeldSequence, pack
from services.engine.interface import Segment
from services.engine.kv_cache import KvShape, SequenceKv
from services.engine.model import LoadedModel
from services.engine.prefill import PassRun

_TOKENS = (64, 256)
"""Chunks measured, where the context allows: about what long prefills are cut into."""

_PAST_MAX = 8192
"""Beyond it attention is linear in the past."""

_PAST_PARTS = (0, 8, 2, 1)
"""Pasts measured: none, and the longest divided by these."""

_ROUNDS = 8
"""Steps of each size."""

_WARM_UP = 3
"""Of these, how many are not counted: a process's first products are up to twice as slow as its later ones."""

_BUDGET_S = 1.5
"""No further round is begun after this, once there is one to count."""

_LEAST_S = 1e-9
"""Coefficients below it are noise."""

Size = tuple[int, int]
"""Tokens of a chunk, and tokens before it."""


def measure_step_cost(model: LoadedModel, *, tokens_max: int) -> StepCost:
    """The coefficients for passes of up to `tokens_max` tokens with their past. Takes about two seconds for
    a small model on a CPU, at most a few passes for a large one."""
    sizes = _sizes(min(model.context_tokens, tokens_max))
    layers = min(_ROUNDS, model.layers)
    shape = KvShape(layers, model.kv_heads, model.head_dim, model.dtype, model.device)
    kv = SequenceKv(shape, max(tokens + past for tokens, past in sizes))
    kv.clear()  # attention to zeros costs the same
    step_s = _steps_s(model, kv, sizes, layers)
    whole_s = [model.layers * seconds for seconds in step_s]
    # The embedding, the head and the draw, which no step in the middle has.
    ends_s = max(0.0, _pass_s(model) - whole_s[0])
    return fit(sizes, [seconds + ends_s for seconds in whole_s])


def fit(sizes: Sequence[Size], seconds: Sequence[float]) -> StepCost:
    """The cost with the least squared relative error over passes of these sizes; at least three of them."""
    terms = [[1.0, tokens, tokens * (past + tokens / 2)] for tokens, past in sizes]
    took = torch.tensor(seconds, dtype=torch.float64).unsqueeze(1)
    relative = torch.tensor(terms, dtype=torch.float64) / took
    scale = relative.norm(dim=0)
    found = torch.linalg.lstsq(relative / scale, torch.ones_like(took)).solution[:, 0] / scale
    pass_s, token_s, pair_s = found.tolist()
    return StepCost(pass_s=max(_LEAST_S, pass_s), token_s=max(_LEAST_S, token_s), pair_s=max(_LEAST_S / 1e3, pair_s))


def compute_clock(device: torch.device) -> Callable[[], float]:
    """Seconds for measurements of the machine's speed. On a CPU the thread's own time: at the start of a
    cluster all workers measure at once, on the same cores, and must not see each other."""
    return time.thread_time if device.type == "cpu" else time.perf_counter


def _sizes(room: int) -> list[Size]:
    """What fits into `room` tokens; first the single token."""
    chunks = sorted({max(2, min(tokens, room // 2)) for tokens in _TOKENS})
    longest = max(1, min(_PAST_MAX, room - chunks[-1]))
    return [(1, 0), *((tokens, longest // part if part else 0) for tokens in chunks for part in _PAST_PARTS)]


def _steps_s(model: LoadedModel, kv: SequenceKv, sizes: Sequence[Size], layers: int) -> list[float]:
    """Median seconds of a step of each size. The sizes take turns, so that a machine that slows down for a
    moment slows all of them."""
    clock = compute_clock(model.device)
    passes = [_pass(model, kv, tokens, past, sample=False) for tokens, past in sizes]
    seen: list[list[float]] = [[] for _ in sizes]
    begun = time.perf_counter()
    with torch.inference_mode():
        for at in range(layers):
            for run, times in zip(passes, seen, strict=True):
                before = clock()
                run.step()
                times.append(clock() - before)
            if at >= _WARM_UP and time.perf_counter() - begun > _BUDGET_S:
                break
    return [statistics.median(times[_WARM_UP:] or times) for times in seen]


def _pass_s(model: LoadedModel) -> float:
    """Seconds of a whole pass over one token, which it samples. The lesser of two, the first of which warms up."""
    clock = compute_clock(model.device)
    kv = SequenceKv(KvShape(model.layers, model.kv_heads, model.head_dim, model.dtype, model.device), 1)
    taken = []
    with torch.inference_mode():
        for _ in range(2):
            before = clock()
            run = _pass(model, kv, 1, 0, sample=True)
            while not run.finished:
                run.step()
            run.settle()
            taken.append(clock() - before)
    return min(taken)


def _pass(model: LoadedModel, kv: SequenceKv, tokens: int, past: int, *, sample: bool) -> PassRun:
    name, total = RequestId("calibration"), past + tokens
    spec = RequestSpec(request_id=name, router_id=RouterId(""), prompt=Prompt(tokens=total), max_tokens=1)
    sequence = HeldSequence(spec, [at % model.vocab for at in range(total)], kv, None)
    sequence.computed = past
    return PassRun(model, pack([(sequence, Segment(name, past, tokens, sample=sample))], model.device))
