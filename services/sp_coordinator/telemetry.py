"""What the SP coordinator measures: pauses, from what it says of its groups."""

from __future__ import annotations

from collections.abc import Callable

from common.messages.sp import GroupFailed, GroupFinished, GroupPaused, GroupPrefillFinished, GroupResumed
from common.metrics import COORDINATOR_ACTIVE, GROUPS, PAUSE_LATENCY, PAUSE_TIME, PAUSES, Metrics
from common.policy.sp_group import GroupKey
from common.policy.sp_io import CoordinatorCommand


class CoordinatorTelemetry:
    """`driving`: how many groups, asked at every scrape; None: another process has the lease."""

    def __init__(self, metrics: Metrics, driving: Callable[[], int | None]) -> None:
        self._pauses = metrics.counter(PAUSES)
        self._length_s = metrics.histogram(PAUSE_TIME)
        self._latency_s = metrics.histogram(PAUSE_LATENCY)
        self._paused_s: dict[GroupKey, float] = {}
        """Groups that stand, and since when."""
        metrics.read(COORDINATOR_ACTIVE, lambda: {(): driving() is not None})
        metrics.read(GROUPS, lambda: {(): driving() or 0})

    def said(self, word: CoordinatorCommand, now_s: float) -> None:
        """To the scheduler. A word may be said again; it counts once."""
        match word:
            case GroupPaused():
                self._paused(word, now_s)
            case GroupResumed() | GroupPrefillFinished() | GroupFinished() | GroupFailed():
                since_s = self._paused_s.pop((word.request_id, word.attempt), None)
                if since_s is not None:
                    self._length_s.observe(now_s - since_s)
            case _:
                pass

    def _paused(self, word: GroupPaused, now_s: float) -> None:
        key = (word.request_id, word.attempt)
        if key not in self._paused_s:
            self._paused_s[key] = now_s
            self._pauses.inc()
            self._latency_s.observe(word.pause_latency_s)
