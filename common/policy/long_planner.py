"""What a policy asks before it places a long: over how many replicas, and how long its prefill takes there.

The answers come from a cost model: of live workers, what they measured of themselves (`live_planner.MeasuredPlanner`);
of a GPU cluster, a model of its layouts (`sequence_plan.SpPlanner`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

Layout = tuple[int, ...]
"""How many replicas of a group stand in each node, largest first: (8, 8, 4)."""


class LongPlanner(Protocol):
    @property
    def degree_max(self) -> int:
        """No group is larger, nor grows to be."""
        ...

    def degree(self, tokens: int, kv_tokens: int, free_by_node: Sequence[int], kv_free_tokens: int) -> int:
        """Over how many replicas to spread a long of `tokens` that needs KV for `kv_tokens` in all, where nodes
        have `free_by_node` replicas to give (largest first) and each has room for `kv_free_tokens`.
        0: they are too few for its KV."""
        ...

    def prefill_s(self, tokens: int, layout: Layout) -> float:
        """Seconds its prefill takes undisturbed on a group of this layout."""
        ...

    def took(self, degree: int, expected_s: float, ran_s: float) -> None:
        """A prefill by so many replicas, or what was left of it when they became so many, ran for `ran_s`, pauses not
        counted. `expected_s`: what `prefill_s` had said."""
        ...


def up_to(sizes: Iterable[int], most: int) -> list[int]:
    """The first of these, as many as come to `most`; the last of them only as far as that."""
    found: list[int] = []
    for size in sizes:
        if most <= 0:
            break
        found.append(min(size, most))
        most -= found[-1]
    return found
