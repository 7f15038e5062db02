"""Short prefills that ride along in the steps of a long's decode (PecSched, section 5.2).

Decode is bound by memory traffic and prefill by arithmetic, so a shared step costs little more than the
prefill alone. What the long pays is the length of its step: short tokens per step are capped, on the
worker, so that the long keeps its inter-token latency. Here the cap bounds how much a replica with a
decoding long is given at once; anything more would queue behind it.
"""

from __future__ import annotations

from common.policy.cluster import Replica


def has_room(replica: Replica, tokens: int, cap_tokens: int) -> bool:
    """Whether `tokens` more share the next step or two. An empty replica takes one short of any length: the
    worker cuts it into pieces of `cap_tokens`."""
    return replica.queued_tokens == 0 or replica.queued_tokens + tokens <= cap_tokens
