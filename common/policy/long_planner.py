"""What a policy asks before it places a long: over how many replicas, and how long its prefill takes there.

The answers come from a cost model: of live workers, what they measured of themselves (`live_planner.MeasuredPlanner`);
of a GPU cluster, a model of its layouts (`sequence_plan.SpPlanner`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

Layout = tuple[int, ...]
"""How many replicas of a group stand in each node, largest first: (8, 8, 4)."""


class LongPlanner(Protocol):
    def degree(self, tokens: int, kv_tokens: int, free_by_node: Sequence[int], kv_free_tokens: int) -> int:
        """Over how many replicas to spread a long of `tokens` that needs KV for `kv_tokens` in all, where nodes
        have `free_by_node` replicas to give (largest first) and each has room for `kv_free_tokens`.
        0: they are too few for its KV."""
        ...

    def prefill_s(self, tokens: int, layout: Layout) -> float:
        """Seconds its prefill takes undisturbed on a group of this layout."""
        ...
