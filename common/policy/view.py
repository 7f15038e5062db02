"""A snapshot of the scheduler for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

from common.messages.views import ClusterView, RequestView, StrangerView, WorkerView
from common.policy.cluster import Cluster, Decoder, Replica, Request
from common.policy.decisions import SchedulingPolicy
from common.policy.lifecycle import RequestState
from common.policy.scheduler_config import SchedulerConfig
from common.units import RouterId

REQUESTS_SHOWN_MAX = 1_000
WAITING_SHOWN_MAX = 100


def describe(
    config: SchedulerConfig,
    cluster: Cluster,
    policy: SchedulingPolicy,
    routers: Sequence[RouterId],
    counters: Mapping[str, int],
    now_s: float,
) -> ClusterView:
    running = (r for r in cluster.requests.values() if r.state is not RequestState.QUEUED)
    shown = list(islice(running, REQUESTS_SHOWN_MAX)) + list(policy.waiting(WAITING_SHOWN_MAX))
    return ClusterView(
        policy=config.policy,
        workers=tuple(_worker(worker, now_s) for worker in cluster.workers()),
        routers=tuple(routers),
        coordinator_present=cluster.can_form_groups,
        queued_shorts=policy.waiting_shorts(),
        queued_longs=policy.waiting_longs(),
        queued_tokens=policy.waiting_tokens(),
        requests=tuple(_request(request, now_s) for request in shown),
        counters=dict(counters),
        strangers=tuple(StrangerView(worker_id=name, reason=why) for name, (_, why) in cluster.strangers.items()),
    )


def _worker(worker: Replica | Decoder, now_s: float) -> WorkerView:
    return WorkerView(
        profile=worker.profile,
        requests=tuple(request_id for request_id, _ in worker.held),
        queued_tokens=worker.queued_tokens if isinstance(worker, Replica) else 0,
        kv_reserved_tokens=worker.kv_reserved,
        silent_s=max(0.0, now_s - worker.heard_s),
    )


def _request(request: Request, now_s: float) -> RequestView:
    return RequestView(
        request_id=request.request_id,
        attempt=request.spec.attempt,
        length_class=request.length_class,
        state=request.state.value,
        prompt_tokens=request.tokens,
        age_s=max(0.0, now_s - request.arrived_s),
        workers=request.workers,
    )
