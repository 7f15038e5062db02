"""What workers measure of themselves, read from engine and core when somebody scrapes."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Sequence
from typing import get_args

from common.messages.cluster import Holding, HoldingPhase
from common.metrics import HELD, KV_CAPACITY, KV_IN_FLIGHT, KV_USAGE, KV_USED, Metrics, Values
from common.units import WorkerId
from services.engine.interface import DecodeEngine, PrefillEngine

IN_FLIGHT = ("handoff", "expected")
"""Phases in which KV is being sent, or awaited."""


def watch_worker(
    metrics: Metrics,
    worker_id: WorkerId,
    engine: PrefillEngine | DecodeEngine,
    holdings: Callable[[], Sequence[Holding]],
) -> None:
    """Let scrapes read this worker's KV and what it has in hand."""
    capacity = engine.profile.kv_capacity_tokens

    def in_flight() -> Values:
        return {(worker_id,): sum(each.kv_tokens for each in holdings() if each.phase in IN_FLIGHT)}

    def held() -> Values:
        tally = Tally(each.phase for each in holdings())
        return {(worker_id, phase): tally[phase] for phase in get_args(HoldingPhase)}

    metrics.read(KV_CAPACITY, lambda: {(worker_id,): capacity})
    metrics.read(KV_USED, lambda: {(worker_id,): engine.kv_used_tokens})
    metrics.read(KV_USAGE, lambda: {(worker_id,): engine.kv_used_tokens / capacity})
    metrics.read(KV_IN_FLIGHT, in_flight)
    metrics.read(HELD, held)
