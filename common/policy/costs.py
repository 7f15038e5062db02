"""Time of a pass, from the coefficients a worker measured of itself (`StepCost`).

A pass over n new tokens with p before them takes `pass_s + token_s·n + pair_s·n·(p + n/2)`: a fixed
part (weights and launches), the linear layers, and causal attention, which sees each pair of tokens
once.
"""

from __future__ import annotations

import math
from functools import lru_cache

from common.messages.cluster import StepCost

CHUNK_GRAIN_TOKENS = 32
"""Chunks are multiples of this: matmuls like round sizes."""


def pass_s(cost: StepCost, tokens: int, past: int = 0) -> float:
    """Seconds of one pass over `tokens` new tokens with `past` tokens of KV before them."""
    return cost.pass_s + cost.token_s * tokens + cost.pair_s * tokens * (past + tokens / 2)


def prefill_s(cost: StepCost, tokens: int, chunk_tokens: int) -> float:
    """Seconds to prefill a whole prompt in chunks."""
    chunks = max(1, math.ceil(tokens / chunk_tokens))
    return cost.pass_s * chunks + cost.token_s * tokens + cost.pair_s * tokens * tokens / 2


def shorts_s(cost: StepCost, tokens: int, batch_tokens: int) -> float:
    """Seconds to prefill a queue of shorts, packed into batches; their mutual attention is none, their
    own is small."""
    if tokens == 0:
        return 0.0
    return cost.pass_s * -(-tokens // batch_tokens) + cost.token_s * tokens


def chunk_tokens(cost: StepCost, layers: int, past: int, *, step_s_max: float, tokens_max: int) -> int:
    """The largest chunk whose every step (one layer) stays below `step_s_max`; at least one grain.

    Solves `(pass_s + token_s·n + pair_s·n·(past + n/2)) / layers = step_s_max` for n: as the past grows, the chunk
    shrinks, and steps stay equal in time.
    """
    tokens = tokens_within(cost, step_s_max * layers - cost.pass_s, past, tokens_max)
    if tokens >= CHUNK_GRAIN_TOKENS:
        return tokens - tokens % CHUNK_GRAIN_TOKENS
    return min(CHUNK_GRAIN_TOKENS, tokens_max)


def tokens_within(cost: StepCost, budget_s: float, past: int, tokens_max: int) -> int:
    """Of how many new tokens, with `past` tokens before them, the linear layers and the attention take no longer than
    `budget_s`; 0 … `tokens_max`."""
    linear = cost.token_s + cost.pair_s * past
    if cost.pair_s > 0:
        fit = (math.sqrt(linear * linear + 2 * cost.pair_s * max(budget_s, 0.0)) - linear) / cost.pair_s
    elif linear > 0:
        fit = max(budget_s, 0.0) / linear
    else:
        fit = float(tokens_max)
    return min(int(fit), tokens_max)


def row_s(cost: StepCost, past: int, size: int = 1) -> float:
    """Seconds that the row of one drawn token adds to a pass, on one worker of a group of `size`."""
    return cost.token_s + cost.pair_s * past / size


@lru_cache(maxsize=4096)
def decode_slot_tokens(kv_tokens: int) -> int:
    """What a decode worker reserves for a sequence: the next power of two, at least 256 (its slots come
    in these sizes)."""
    return max(256, 1 << max(0, kv_tokens - 1).bit_length())
