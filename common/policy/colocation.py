"""Short prefills that ride along in the steps of a long's decode (PecSched, section 5.2).

Decode is bound by memory traffic and prefill by arithmetic, so a shared step costs little more than the
prefill alone. What the long pays is the length of its step: short tokens per step are capped, on the
worker, so that the long keeps its inter-token latency (`tokens_beside`). For the scheduler the cap bounds how much a
replica with a decoding long is given at once (`has_room`); anything more would queue behind it.
"""

from __future__ import annotations

from common.messages.cluster import StepCost
from common.policy.cluster import Replica
from common.policy.costs import CHUNK_GRAIN_TOKENS, tokens_within


def tokens_beside(
    cost: StepCost, rows_s: float, *, itl_s_max: float, passes: int, past: int = 0, tokens_max: int
) -> int:
    """How many short tokens may share a pass on this worker with the rows of longs that decode, so that each long's
    next token comes within `itl_s_max`.

    From one token to the next a long waits for `passes` passes at most: for one, in which all ranks of its group take
    part, as often as groups take turns; for passes without its rank 0 as often as it has ranks, since that calls the
    others one after another, and each may just have begun one. Each of these passes may so take `itl_s_max / passes`:
    its fixed part, its rows (`rows_s`), and what is returned. By every member's own measured cost: together they are as
    fast as the slowest. Never less than a grain: where the bound cannot be kept, shorts come first.

    `past`: computed tokens of the short that comes first."""
    budget_s = itl_s_max / passes - cost.pass_s - rows_s
    return max(tokens_within(cost, budget_s, past, tokens_max), min(CHUNK_GRAIN_TOKENS, tokens_max))


def turn_s(step_s: float, itl_s_max: float) -> float:
    """How long a chunk of a long runs between two steps, of `step_s` each, of what decodes on the same worker: what
    these leave of the bound, and as long as a step at the least, so that neither side gets less than half."""
    return max(itl_s_max - step_s, step_s)


def has_room(replica: Replica, tokens: int, cap_tokens: int) -> bool:
    """Whether `tokens` more share the next step or two. An empty replica takes one short of any length: the
    worker cuts it into pieces of `cap_tokens`."""
    return replica.queued_tokens == 0 or replica.queued_tokens + tokens <= cap_tokens
