"""What a simulated group asks about time: a port, filled by the SP planner's model or by a replica's alone."""

from __future__ import annotations

from typing import Protocol

from common.policy.cost_model import CostModel
from common.policy.long_planner import Layout
from common.policy.sequence_plan import SpPlanner

STEP_GRAIN_TOKENS = 4_096
"""Planning takes long, the longest step hardly changes within so many tokens of hundreds of thousands."""


class LongCosts(Protocol):
    """Of a long on a group of replicas."""

    def prefill_s(self, tokens: int, layout: Layout) -> float:
        """The whole prefill, undisturbed."""
        ...

    def step_s(self, tokens: int, layout: Layout) -> float:
        """The longest step: what a pause may have to wait for. Above 0."""
        ...

    def chunk_s(self, tokens: int, layout: Layout) -> float:
        """One chunk through all layers: where another long decodes, its steps alternate with these. Above 0."""
        ...

    def decode_step_s(self, kv_tokens: int, layout: Layout) -> float:
        """One token, the KV spread over the group."""
        ...


class ChunkedCosts(Protocol):
    """A replica that prefills longs in chunks."""

    def pass_s(self, tokens: int, past: int = 0) -> float: ...

    def step_s(self, tokens: int, past: int) -> float: ...

    def chunk_tokens(self, past: int) -> int: ...

    def shared_step_s(self, short_tokens: int, rows: int, kv_tokens: int) -> float: ...


class SoloCosts:
    """Groups of one: the replica's own chunks, as a live worker runs them (`prefill_passes.py`)."""

    def __init__(self, costs: ChunkedCosts, layers: int) -> None:
        self._costs = costs
        self._layers = layers

    def prefill_s(self, tokens: int, layout: Layout) -> float:
        """See `LongCosts`. Raises: ValueError for another layout than (1,)."""
        if layout != (1,):
            raise ValueError(f"layout {layout}: what one worker measured tells of groups of one")
        done, seconds = 0, 0.0
        while done < tokens:
            chunk = min(self._costs.chunk_tokens(done), tokens - done)
            seconds += self._costs.pass_s(chunk, done)
            done += chunk
        return seconds

    def step_s(self, tokens: int, layout: Layout) -> float:
        """See `LongCosts`."""
        return self._costs.step_s(tokens, 0)

    def chunk_s(self, tokens: int, layout: Layout) -> float:
        """See `LongCosts`."""
        return self._layers * self._costs.step_s(tokens, 0)

    def decode_step_s(self, kv_tokens: int, layout: Layout) -> float:
        """See `LongCosts`."""
        return self._costs.shared_step_s(0, 1, kv_tokens)


class SpCosts:
    """Groups of any layout, as the scheduler's own planner estimates them. (What the scheduler expects of a prefill is
    what happens in this world; how wrong estimates may be is measured live.)"""

    def __init__(self, model: CostModel, planner: SpPlanner) -> None:
        self._layers = model.shape.layers
        self._planner = planner
        self._steps: dict[tuple[int, Layout], float] = {}

    def prefill_s(self, tokens: int, layout: Layout) -> float:
        """See `LongCosts`."""
        return self._planner.prefill_s(tokens, layout)

    def step_s(self, tokens: int, layout: Layout) -> float:
        """See `LongCosts`. Of as many tokens, rounded down to a multiple of `STEP_GRAIN_TOKENS`."""
        key = (tokens - tokens % STEP_GRAIN_TOKENS or tokens, layout)
        step_s = self._steps.get(key)
        if step_s is None:
            step_s = self._steps[key] = self._planner.plan(*key).step_s
        return step_s

    def chunk_s(self, tokens: int, layout: Layout) -> float:
        """See `LongCosts`. A step in every layer."""
        return self._layers * self.step_s(tokens, layout)

    def decode_step_s(self, kv_tokens: int, layout: Layout) -> float:
        """See `LongCosts`."""
        return self._planner.decode_step_s(layout, kv_tokens)
