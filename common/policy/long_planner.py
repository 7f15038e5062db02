"""What a policy asks before it places a long: over how many replicas, and how long its prefill takes there.

The answers come from a cost model: of live workers, what one measured of itself (`MeasuredPlanner`); of a GPU cluster,
a model of its layouts (`sequence_plan.SpPlanner`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from common.messages.cluster import StepCost
from common.policy.cluster import Cluster
from common.policy.costs import prefill_s
from common.policy.sp_shares import reserved_tokens

Layout = tuple[int, ...]
"""How many replicas of a group stand in each node, largest first: (8, 8, 4)."""

CHUNK_TOKENS = 512
"""Of each rank."""
RANK_GAIN = 0.6
"""What each rank after the first adds to the speed of a live group, in ranks: each waits for the others'.
(Prototypes with two ranks were 1.5 to 1.66 times as fast as one.)"""


class LongPlanner(Protocol):
    def degree(self, tokens: int, kv_tokens: int, free_by_node: Sequence[int], kv_free_tokens: int) -> int:
        """Over how many replicas to spread a long of `tokens` that needs KV for `kv_tokens` in all, where nodes
        have `free_by_node` replicas to give (largest first) and each has room for `kv_free_tokens`.
        0: they are too few for its KV."""
        ...

    def prefill_s(self, tokens: int, layout: Layout) -> float:
        """Seconds its prefill takes undisturbed on a group of this layout."""
        ...


class MeasuredPlanner:
    """Groups of live workers, from what one worker measured of itself: what a pass costs anyway (the weights are read,
    layers are launched) each rank pays; the rest, linear work and pairs of tokens, is shared out."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def degree(self, tokens: int, kv_tokens: int, free_by_node: Sequence[int], kv_free_tokens: int) -> int:
        """Enough replicas for the KV, then as many more as shorten the prefill. See `LongPlanner`."""
        free = sum(free_by_node)
        if free > 1 and not all(replica.profile.group_address for replica in self._cluster.replicas.values()):
            free = 1
        fitting = [d for d in range(1, free + 1) if kv_of_rank(kv_tokens, d) <= kv_free_tokens]
        return min(fitting, key=lambda d: self.prefill_s(tokens, (d,)), default=0)

    def prefill_s(self, tokens: int, layout: Layout) -> float:
        """See `LongPlanner`. 0 while there is no worker."""
        replica = next(iter(self._cluster.replicas.values()), None)
        if replica is None:
            return 0.0
        cost, degree = replica.profile.step_cost, sum(layout)
        speedup = 1.0 + RANK_GAIN * (degree - 1)
        shared = StepCost(pass_s=cost.pass_s, token_s=cost.token_s / speedup, pair_s=cost.pair_s / speedup)
        return prefill_s(shared, tokens, CHUNK_TOKENS * degree)


def kv_of_rank(kv_tokens: int, degree: int) -> int:
    """What each rank of a group sets aside at the most."""
    return kv_tokens if degree == 1 else reserved_tokens(kv_tokens, degree)
