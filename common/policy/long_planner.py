"""What a policy asks before it places a long: over how many replicas, and how long its prefill takes there.

The answers come from a cost model. A live worker that measured only itself answers for a group of one
(`SingleReplicaPlanner`); a model of a GPU cluster answers for any layout (`sequence_plan.SpPlanner`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from common.policy.cluster import Cluster
from common.policy.costs import prefill_s

Layout = tuple[int, ...]
"""How many replicas of a group stand in each node, largest first: (8, 8, 4)."""

CHUNK_TOKENS = 512


class LongPlanner(Protocol):
    def degree(self, tokens: int, kv_tokens: int, free_by_node: Sequence[int], kv_free_tokens: int) -> int:
        """Over how many replicas to spread a long of `tokens` that needs KV for `kv_tokens` in all, where nodes
        have `free_by_node` replicas to give (largest first) and each has room for `kv_free_tokens`.
        0: they are too few for its KV."""
        ...

    def prefill_s(self, tokens: int, layout: Layout) -> float:
        """Seconds its prefill takes undisturbed on a group of this layout."""
        ...


class SingleReplicaPlanner:
    """Groups of one, from what the workers measured of themselves."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def degree(self, tokens: int, kv_tokens: int, free_by_node: Sequence[int], kv_free_tokens: int) -> int:
        """See `LongPlanner`."""
        return 1 if free_by_node and kv_tokens <= kv_free_tokens else 0

    def prefill_s(self, tokens: int, layout: Layout) -> float:
        """See `LongPlanner`. 0 while there is no worker."""
        replica = next(iter(self._cluster.replicas.values()), None)
        return prefill_s(replica.profile.step_cost, tokens, CHUNK_TOKENS) if replica else 0.0
