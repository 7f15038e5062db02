"""Spilled longs in the scheduler's books: orders to move their KV, and what their groups answer.

A member that has moved the KV out keeps the long (its seat, its place, an entry of no tokens among what is held), and
what its KV took is free. The room is reserved again before the order to bring it back.
"""

from __future__ import annotations

import math

from common.messages.sp import GroupNotSpilled, GroupSpilled, RestoreGroup, SpillGroup
from common.policy.cluster import Request
from common.policy.ledger import Ledger
from common.policy.lifecycle import RequestState


class SpillOrders:
    """Used by the scheduler alone."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._cluster = ledger.cluster

    def spill(self, request: Request) -> None:
        self._ledger.move(request, RequestState.SPILLING)
        self._ledger.emit(SpillGroup(request_id=request.request_id, attempt=request.spec.attempt))

    def answered(self, event: GroupSpilled | GroupNotSpilled) -> None:
        request = self._ledger.current(event.request_id, event.attempt)
        if request is None or request.state is not RequestState.SPILLING:
            return
        if isinstance(event, GroupSpilled):
            self._spilled(request)
        else:
            self._refused(request)

    def _spilled(self, request: Request) -> None:
        """Every member has: its room is free."""
        assert request.pauses is not None
        now_s = self._ledger.now_s
        took_s = now_s - request.state_since_s
        replicas = [self._cluster.replicas[worker_id] for worker_id in request.members]
        reserved = tuple(replica.held[request.key].tokens for replica in replicas)
        self._cluster.reserve_long(replicas, request.key, (0,) * len(replicas), now_s)
        request.pauses.moved_out(now_s, took_s, reserved)
        self._cluster.spill_token_s = took_s / max(1, *reserved)
        self._ledger.counters["spills"] += 1
        self._ledger.move(request, RequestState.SPILLED)

    def _refused(self, request: Request) -> None:
        """Some member could not. Its KV only grows, so it is not asked again."""
        assert request.pauses is not None
        request.pauses.spills_from_s = math.inf
        self._ledger.counters["spills_refused"] += 1
        self._ledger.move(request, RequestState.PAUSED)

    def restore(self, request: Request) -> None:
        """There is room on all members."""
        assert request.pauses is not None
        replicas = [self._cluster.replicas[worker_id] for worker_id in request.members]
        self._cluster.reserve_long(replicas, request.key, request.pauses.spilled, self._ledger.now_s)
        request.pauses.spilled = ()
        self._ledger.move(request, RequestState.RESTORING)
        self._ledger.emit(RestoreGroup(request_id=request.request_id, attempt=request.spec.attempt))


def remind(ledger: Ledger, request: Request) -> None:
    """An order, or its answer, was lost: give it again (the coordinator repeats its answer)."""
    if request.state is RequestState.SPILLING:
        ledger.emit(SpillGroup(request_id=request.request_id, attempt=request.spec.attempt))
    elif request.state is RequestState.RESTORING:
        ledger.emit(RestoreGroup(request_id=request.request_id, attempt=request.spec.attempt))
