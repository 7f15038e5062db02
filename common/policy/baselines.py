"""What PecSched is compared with, behind the same interface.

`fifo` is vLLM's rule as the paper runs it: a request is bound at arrival to the replica with the fewest
queued tokens and served there in order of arrival, longs and shorts alike; nobody is paused. Shorts
decode on the decode workers and share steps with a long that decodes, as under PecSched, so that the
two differ in scheduling alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice

from common.policy.cluster import Cluster, Replica, Request, SchedulerConfig
from common.policy.costs import decode_slot_tokens
from common.policy.decisions import Decision, PlaceLong, PlaceShort
from common.policy.lifecycle import RequestState
from common.policy.load_index import LoadIndex
from common.policy.placement import decoder_for
from common.units import RequestId, WorkerId


class FifoPolicy:
    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._bound: dict[WorkerId, deque[Request]] = {}
        """Per replica, in order of arrival: bound to it and not yet sent."""
        self._backlog: dict[WorkerId, dict[RequestId, int]] = {}
        """Per replica, tokens bound or sent and not yet prefilled."""
        self._load = LoadIndex()
        self._homeless: deque[Request] = deque()
        """Waiting for any replica to appear."""
        self._home: dict[RequestId, WorkerId] = {}
        self._try: dict[WorkerId, None] = {}
        """Replicas whose head may fit now."""

    # --- what happened ---------------------------------------------------------------------------

    def admit(self, request: Request, cluster: Cluster) -> None:
        worker_id = next(self._load.least(1), None)
        if worker_id is None:
            self._homeless.append(request)
            return
        line = self._bound[worker_id]
        place = next((i for i, other in enumerate(line) if other.order > request.order), len(line))
        line.insert(place, request)
        self._home[request.request_id] = worker_id
        self._set_backlog(worker_id, request.request_id, request.tokens)
        self._try[worker_id] = None

    def forget(self, request: Request) -> None:
        if request in self._homeless:
            self._homeless.remove(request)
        worker_id = self._home.get(request.request_id)
        if worker_id is None or request not in self._bound[worker_id]:
            return
        self._bound[worker_id].remove(request)
        if request.state is RequestState.QUEUED:  # cancelled or failed, not placed
            self._done(request.request_id)
        self._try[worker_id] = None

    def worker_added(self, worker_id: WorkerId, cluster: Cluster) -> None:
        if worker_id in cluster.replicas and worker_id not in self._bound:
            self._bound[worker_id] = deque()
            self._backlog[worker_id] = {}
            self._load.set(worker_id, 0)
            homeless, self._homeless = self._homeless, deque()
            for request in homeless:
                self.admit(request, cluster)
        self.decoder_eased()

    def worker_lost(self, worker_id: WorkerId, cluster: Cluster) -> None:
        if worker_id not in self._bound:
            return
        line = self._bound.pop(worker_id)
        for request_id in self._backlog.pop(worker_id):
            self._home.pop(request_id, None)
        self._load.discard(worker_id)
        self._try.pop(worker_id, None)
        for request in line:
            self.admit(request, cluster)

    def replica_eased(self, worker_id: WorkerId, cluster: Cluster) -> None:
        if worker_id not in self._bound:
            return
        replica = cluster.replicas.get(worker_id)
        if replica is not None:
            waiting = {request.request_id for request in self._bound[worker_id]}
            sent = {request_id for request_id, _ in replica.queued} | {replica.long}
            for request_id in [r for r in self._backlog[worker_id] if r not in waiting and r not in sent]:
                self._done(request_id)
        self._try[worker_id] = None

    def decoder_eased(self) -> None:
        self._try.update(dict.fromkeys(self._bound))

    def long_changed(self, request: Request) -> None:
        for worker_id in request.members:
            if worker_id in self._bound:
                self._try[worker_id] = None
        if request.state is RequestState.DECODING:
            self._done(request.request_id)

    def _set_backlog(self, worker_id: WorkerId, request_id: RequestId, tokens: int) -> None:
        self._backlog[worker_id][request_id] = tokens
        self._load.set(worker_id, sum(self._backlog[worker_id].values()))

    def _done(self, request_id: RequestId) -> None:
        """Its prefill is over: it weighs on its replica no more."""
        worker_id = self._home.pop(request_id, None)
        if worker_id is not None and self._backlog[worker_id].pop(request_id, None) is not None:
            self._load.set(worker_id, sum(self._backlog[worker_id].values()))

    # --- decisions -------------------------------------------------------------------------------

    def decide(self, cluster: Cluster, now_s: float) -> Decision | None:
        while self._try:
            worker_id = next(iter(self._try))
            line = self._bound.get(worker_id)
            decision = self._place(cluster, cluster.replicas[worker_id], line[0]) if line else None
            if decision is not None:
                return decision
            self._try.pop(worker_id, None)
        return None

    def _place(self, cluster: Cluster, replica: Replica, request: Request) -> Decision | None:
        if request.is_long:
            fits = cluster.can_form_groups and replica.long is None and replica.kv_free >= request.spec.kv_tokens
            return PlaceLong(request, (replica.worker_id,)) if fits else None
        forming = replica.long is not None and cluster.requests[replica.long].state is RequestState.FORMING
        if forming or replica.kv_free < request.tokens:
            # A long on its way must not be overtaken: it takes one hop more than a short.
            return None
        if replica.queued_tokens and replica.queued_tokens + request.tokens > self._config.batch_tokens_max:
            return None
        decoder = decoder_for(cluster, decode_slot_tokens(request.spec.kv_tokens))
        return PlaceShort(request, replica.worker_id, decoder.worker_id, "fifo") if decoder else None

    def next_deadline_s(self) -> float | None:
        return None

    # --- for people ------------------------------------------------------------------------------

    def _all_waiting(self) -> Iterator[Request]:
        yield from self._homeless
        for line in self._bound.values():
            yield from line

    def waiting(self, count: int) -> Iterator[Request]:
        return islice(self._all_waiting(), count)

    def waiting_shorts(self) -> int:
        return sum(not request.is_long for request in self._all_waiting())

    def waiting_longs(self) -> int:
        return sum(request.is_long for request in self._all_waiting())

    def waiting_tokens(self) -> int:
        return sum(request.tokens for request in self._all_waiting())
