"""Comparing what a worker says it holds with what the books say it holds.

Messages can be lost. A heartbeat lists all that a worker holds; whatever differs, and is older than the
messages that may still be under way, is mended. So a lost message costs seconds, never a hang, and never
KV that nobody frees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from common.messages.cluster import Holding
from common.policy.cluster import HoldKey, Worker


@dataclass(slots=True)
class HoldingsDiff:
    gone: list[HoldKey] = field(default_factory=list)
    """On the books, not on the worker: free there, and lost if anybody still counts on it."""
    unknown: list[HoldKey] = field(default_factory=list)
    """On the worker, not on the books: to be dropped."""
    undropped: list[HoldKey] = field(default_factory=list)
    """Ordered to be dropped, and still there: the order was lost."""


def compare_holdings(worker: Worker, holdings: Sequence[Holding], now_s: float, grace_s: float) -> HoldingsDiff:
    """`grace_s`: younger orders may not have reached the worker when it wrote the list."""
    diff = HoldingsDiff()
    listed = {(h.request_id, h.attempt) for h in holdings}
    for key, reservation in worker.held.items():
        if now_s - reservation.ordered_s <= grace_s:
            continue
        if key not in listed:
            diff.gone.append(key)
        elif reservation.dropped:
            diff.undropped.append(key)
    diff.unknown = sorted(key for key in listed if key not in worker.held)
    return diff
