"""The cluster scheduler: one handler per event, the only mutator of the `Cluster`.

It keeps the books (who is there, who runs what, whose KV lies where), asks its policy for decisions and
turns them into orders. Which request goes where, and who is paused, is the policy's (`pecsched.py`, `fifo.py`,
`reservation.py`, `priority.py`); what happens on loss, cancellation and lost messages is the same for all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import assert_never

import msgspec

from common.messages.cluster import (
    CoordinatorHeartbeat,
    CoordinatorLeft,
    RouterHeartbeat,
    RouterLeft,
    WorkerHeartbeat,
    WorkerLeft,
)
from common.messages.decode import DecodeBusy, DecodeFailed, DecodeFinished, ExpectKv
from common.messages.groups import GATHERED_RING, RING
from common.messages.prefill import (
    KvReleased,
    PrefillFailed,
    PrefillFinished,
    RunPrefill,
)
from common.messages.requests import LengthClass, RequestSpec
from common.messages.scheduling import (
    CancelRequested,
    RefusalCode,
    RequestRefused,
    RequestSubmitted,
)
from common.messages.sp import (
    FormGroup,
    GroupFailed,
    GroupFinished,
    GroupFormed,
    GroupGrown,
    GroupNotSpilled,
    GroupParted,
    GroupPaused,
    GroupPrefillFinished,
    GroupResumed,
    GroupSpilled,
    PauseGroup,
    ResumeGroup,
)
from common.messages.views import ClusterView
from common.policy.capacity import beyond_capacity
from common.policy.cluster import Cluster, Decoder, Replica, Request
from common.policy.core import TimePassed
from common.policy.decisions import (
    Decision,
    GrowLong,
    PartLong,
    PauseLong,
    PlaceLong,
    PlaceShort,
    RestoreLong,
    ResumeLong,
    SpillLong,
)
from common.policy.growing import give_back, grow, grown, let_go, part, parted, tell_planner
from common.policy.ledger import Ledger
from common.policy.lifecycle import HANDING_OVER, IN_GROUP, MOVED_LONG, PREFILLING_LONG, RequestState
from common.policy.live_planner import GroupPlan, Rank, plan_group
from common.policy.long_planner import LongPlanner
from common.policy.membership import Membership
from common.policy.placement import bounds_of, in_rank_order, kv_share, layout_of
from common.policy.preemption import PauseAccount
from common.policy.scheduler_config import SchedulerConfig
from common.policy.scheduler_io import SchedulerCommand, SchedulerEvent
from common.policy.spill_orders import SpillOrders
from common.policy.view import describe
from common.units import RequestId

HEAD_OF_QUEUE = -(10**12)
"""Orders of requests that were running before this scheduler started: ahead of every new one."""


class Scheduler:
    """The core. `epoch`: the term of the lease under which it gives orders. `planner`: how longs are spread over
    replicas; None: each on one, by what workers measured of themselves."""

    def __init__(self, config: SchedulerConfig, epoch: int, planner: LongPlanner | None = None) -> None:
        self._ledger = Ledger(config, epoch, planner)
        self._membership = Membership(self._ledger)
        self._spill_orders = SpillOrders(self._ledger)
        self._config = config
        self._cluster = self._ledger.cluster
        self._policy = self._ledger.policy
        self._counters = self._ledger.counters
        self._bounds = bounds_of(config)
        self._order = 0
        self._serial = 0

    @property
    def cluster(self) -> Cluster:
        """The books, to be read."""
        return self._cluster

    @property
    def counters(self) -> Counter[str]:
        """What happened how often since its start, to be read."""
        return self._counters

    def tally(self) -> Counter[tuple[LengthClass, RequestState]]:
        """How many requests are in which state."""
        return Counter((request.length_class, request.state) for request in self._cluster.requests.values())

    # --- the door --------------------------------------------------------------------------------

    def handle(self, event: SchedulerEvent, now_s: float) -> list[SchedulerCommand]:
        ledger = self._ledger
        self._serial += 1
        ledger.now_s = now_s
        ledger.cause = f"{type(event).__name__}#{ledger.epoch}.{self._serial}"
        if self._serial == 1:
            self._membership.first_event()
        request_id = getattr(event, "request_id", None)
        if request_id is not None:
            ledger.stories.note(request_id, now_s, ledger.cause, event)
        self._dispatch(event)
        if now_s >= self._membership.quiet_until_s:
            self._membership.expire()
        while (decision := self._policy.decide(self._cluster, now_s)) is not None:
            self._apply(decision)
        return ledger.take_out()

    def next_deadline_s(self) -> float | None:
        deadlines = (
            self._membership.next_deadline_s(),
            self._ledger.awaiting.next_s(),
            self._policy.next_deadline_s(),
        )
        return min((d for d in deadlines if d is not None), default=None)

    def check(self) -> None:
        """Raises: InvariantViolated."""
        self._ledger.check()

    def story(self, request_id: RequestId) -> list[str]:
        """What happened to a request, oldest first."""
        return self._ledger.stories.tell(request_id)

    def view(self, now_s: float) -> ClusterView:
        routers = self._membership.routers()
        return describe(self._config, self._cluster, self._policy, routers, self._counters, now_s)

    def _dispatch(self, event: SchedulerEvent) -> None:
        match event:
            # The most frequent first: each case costs what those before it cost.
            case RequestSubmitted():
                self._on_submitted(event)
            case KvReleased():
                self._on_kv_released(event)
            case PrefillFinished():
                self._on_prefill_finished(event)
            case DecodeFinished():
                self._on_decode_finished(event)
            case GroupFormed() | GroupPaused() | GroupResumed() | GroupPrefillFinished() | GroupGrown() | GroupParted():
                self._on_group_moved(event)
            case GroupSpilled() | GroupNotSpilled():
                self._spill_orders.answered(event)
            case GroupFinished() | GroupFailed():
                self._on_group_ended(event)
            case WorkerHeartbeat():
                self._membership.on_worker_heartbeat(event)
            case RouterHeartbeat():
                self._membership.on_router_heartbeat(event)
            case CoordinatorHeartbeat():
                self._membership.on_coordinator_heartbeat(event)
            case CancelRequested():
                self._on_cancel(event)
            case PrefillFailed():
                self._on_prefill_failed(event)
            case DecodeBusy() | DecodeFailed():
                self._on_decode_lost(event)
            case RouterLeft():
                self._membership.lose_router(event.router_id)
            case WorkerLeft():
                self._membership.on_worker_left(event)
            case CoordinatorLeft():
                self._membership.on_coordinator_left()
            case TimePassed():
                pass
            case _:
                assert_never(event)

    # --- requests --------------------------------------------------------------------------------

    def _on_submitted(self, event: RequestSubmitted) -> None:
        spec = event.spec
        self._ledger.stories.note(
            spec.request_id, self._ledger.now_s, self._ledger.cause, f"RequestSubmitted attempt={spec.attempt}"
        )
        known = self._cluster.requests.get(spec.request_id)
        if known is None:
            self._submit_new(spec)
        elif known.spec.router_id != spec.router_id:
            self._refuse(spec, "duplicate_id", f"a request with id {spec.request_id!r} is running; use another id")
        elif spec.attempt > known.spec.attempt:
            self._resubmit(known, spec)
        elif spec.attempt == known.spec.attempt:
            self._ledger.accept(known)

    def _submit_new(self, spec: RequestSpec) -> None:
        ended = self._ledger.ended.get(spec.request_id)
        if ended is not None and spec.attempt <= ended[0] and self._ledger.now_s - ended[1] < self._ledger.grace_s:
            return  # a repeated submission that crossed its own end
        is_long = spec.prompt.tokens > self._config.threshold_tokens
        refusal = self._refusal(spec, is_long=is_long)
        if refusal is not None:
            self._refuse(spec, *refusal)
            return
        self._order += 1
        request = Request(
            spec=spec,
            length_class="long" if is_long else "short",
            order=self._order + (HEAD_OF_QUEUE if spec.attempt > 0 else 0),
            arrived_s=self._ledger.now_s,
            state_since_s=self._ledger.now_s,
        )
        self._cluster.requests[spec.request_id] = request
        self._ledger.by_router[spec.router_id].add(spec.request_id)
        self._membership.router_spoke(spec.router_id)
        self._counters["accepted"] += 1
        self._queue(request)

    def _resubmit(self, request: Request, spec: RequestSpec) -> None:
        """A later attempt supersedes the running one; the request keeps its class and its place."""
        self._ledger.abandon(request)
        request.take(spec)
        if spec.attempt > self._config.attempts_max:
            times = f"interrupted {spec.attempt} times, which is more than attempts_max allows"
            self._ledger.fail(request, f"{times}; try again later", True)
            return
        if request.state is not RequestState.QUEUED:
            if request.state is not RequestState.INTERRUPTED:
                self._ledger.move(request, RequestState.INTERRUPTED)
            self._ledger.move(request, RequestState.QUEUED)
        self._ledger.awaiting.drop(request.request_id)
        self._queue(request)

    def _queue(self, request: Request) -> None:
        self._ledger.accept(request)
        self._ledger.save(request)
        self._policy.admit(request, self._cluster)

    def _refusal(self, spec: RequestSpec, *, is_long: bool) -> tuple[RefusalCode, str, float | None] | None:
        """Why a request cannot be accepted: code, sentence, seconds to wait before trying again."""
        missing = self._membership.missing_role(is_long=is_long)
        if missing is not None:
            return "no_workers", f"no {missing} is running; try again later", 5.0
        too_long = beyond_capacity(self._cluster, self._config, spec, is_long=is_long)
        if too_long is not None:
            return "too_long", too_long, None
        if spec.attempt == 0 and self._is_full():
            return "queue_full", f"{self._config.queue_max} requests are waiting already; try again later", 1.0
        return None

    def _is_full(self) -> bool:
        queue_max = self._config.queue_max
        if len(self._cluster.requests) < queue_max:  # who waits is one of them: mostly that is all there is to ask
            return False
        return self._policy.waiting_shorts() + self._policy.waiting_longs() >= queue_max

    def _refuse(self, spec: RequestSpec, code: RefusalCode, message: str, retry_after_s: float | None = None) -> None:
        self._counters["refused"] += 1
        self._ledger.emit(
            RequestRefused(
                request_id=spec.request_id,
                attempt=spec.attempt,
                router_id=spec.router_id,
                code=code,
                message=message,
                retry_after_s=retry_after_s,
            )
        )

    def _on_cancel(self, event: CancelRequested) -> None:
        request = self._cluster.requests.get(event.request_id)
        if request is not None and request.spec.router_id == event.router_id:
            self._ledger.end(request, "cancelled")

    # --- shorts ----------------------------------------------------------------------------------

    def _on_prefill_finished(self, event: PrefillFinished) -> None:
        request = self._ledger.current(event.request_id, event.attempt)
        stays = request is not None and request.decode_worker == event.worker_id
        self._cluster.dequeue_short(event.worker_id, (event.request_id, event.attempt), stays=stays)
        self._policy.replica_eased(event.worker_id, self._cluster)
        if request is None or request.is_long or request.prefill_worker != event.worker_id:
            return
        request.first_step_s = self._ledger.now_s - event.in_worker_s + event.waited_s
        if event.finish_reason is not None:
            self._ledger.end(request, "finished")
        elif request.state is RequestState.PREFILLING:
            self._ledger.move(request, RequestState.DECODING if stays else RequestState.HANDOFF)

    def _on_prefill_failed(self, event: PrefillFailed) -> None:
        self._ledger.release(event.worker_id, (event.request_id, event.attempt))
        if event.suspect_worker_id is not None:
            suspect = self._cluster.decoders.get(event.suspect_worker_id)
            if suspect is not None:
                self._cluster.shun(suspect, True)
        request = self._ledger.current(event.request_id, event.attempt)
        if request is None or request.prefill_worker != event.worker_id:
            return
        if event.retryable:
            self._ledger.interrupt(request, event.reason)
        else:
            self._ledger.fail(request, event.reason, False)

    def _on_kv_released(self, event: KvReleased) -> None:
        self._ledger.release(event.worker_id, (event.request_id, event.attempt))
        request = self._ledger.current(event.request_id, event.attempt)
        if request is None:
            return
        if event.worker_id == request.prefill_worker != request.decode_worker and request.state in HANDING_OVER:
            self._ledger.move(request, RequestState.DECODING)
        else:
            self._ledger.mind_release(request, event.worker_id)

    def _on_decode_finished(self, event: DecodeFinished) -> None:
        self._ledger.release(event.worker_id, (event.request_id, event.attempt))
        request = self._ledger.current(event.request_id, event.attempt)
        if request is not None and request.decode_worker == event.worker_id:
            self._ledger.end(request, "finished", withdraw=False)

    def _on_decode_lost(self, event: DecodeBusy | DecodeFailed) -> None:
        self._ledger.release(event.worker_id, (event.request_id, event.attempt))
        request = self._ledger.current(event.request_id, event.attempt)
        if request is not None and request.decode_worker == event.worker_id:
            reason = event.reason if isinstance(event, DecodeFailed) else f"{event.worker_id} had no room for its KV"
            self._ledger.interrupt(request, reason)

    # --- longs -----------------------------------------------------------------------------------

    def _on_group_moved(
        self, event: GroupFormed | GroupPaused | GroupResumed | GroupPrefillFinished | GroupGrown | GroupParted
    ) -> None:
        request = self._ledger.current(event.request_id, event.attempt)
        if request is None or request.pauses is None:
            return
        state = request.state
        match event:
            case GroupFormed() if state is RequestState.FORMING:
                request.pauses.started_s = self._ledger.now_s
                self._ledger.move(request, RequestState.RUNNING)
            case GroupPaused() if state is RequestState.PAUSING:
                request.pauses.paused(self._ledger.now_s, self._ledger.done_share(request, event.prefilled_tokens))
                self._counters["pauses"] += 1
                self._ledger.move(request, RequestState.PAUSED)
            case GroupPaused() if state is RequestState.RESTORING:
                self._ledger.move(request, RequestState.PAUSED)
            case GroupResumed() if state is RequestState.RESUMING:
                request.pauses.resumed(self._ledger.now_s, self._bounds)
                self._ledger.move(request, RequestState.RUNNING)
            case GroupPrefillFinished() if state in IN_GROUP and state is not RequestState.DECODING:
                self._on_group_prefilled(request, event)
            case GroupGrown():
                grown(self._ledger, request, event)
            case GroupParted() if state in PREFILLING_LONG:
                parted(self._ledger, request, event)
            case _:
                pass  # it has been heard, or was overtaken

    def _on_group_prefilled(self, request: Request, event: GroupPrefillFinished) -> None:
        if request.state is RequestState.PAUSED or request.state in MOVED_LONG:
            self._ledger.interrupt(request, "its prefill ended while it was paused")
            return
        assert request.pauses is not None
        request.pauses.resumed(self._ledger.now_s, self._bounds)
        tell_planner(self._ledger, request)
        give_back(self._ledger, request, "the prefill ended first")
        if event.members and (leaving := tuple(m for m in request.members if m not in event.members)):
            let_go(self._ledger, request, leaving)
        self._cluster.unseat_long(request, decodes=event.finish_reason is None)
        self._ledger.move(request, RequestState.DECODING)
        for worker_id in request.members:
            self._policy.replica_eased(worker_id, self._cluster)

    def _on_group_ended(self, event: GroupFinished | GroupFailed) -> None:
        """The group is gone and its KV is free: so says the coordinator, who asked every rank."""
        key = (event.request_id, event.attempt)
        request = self._ledger.current(*key)
        if request is None or request.state not in IN_GROUP:
            for replica in [r for r in self._cluster.replicas.values() if key in r.held]:
                self._ledger.release(replica.worker_id, key)
            return
        self._cluster.unseat_long(request, decodes=False)
        self._cluster.release_long(request)
        for worker_id in request.workers:
            self._policy.replica_eased(worker_id, self._cluster)
        if isinstance(event, GroupFinished):
            self._ledger.end(request, "finished", withdraw=False)
        elif event.retryable:
            self._ledger.interrupt(request, event.reason, withdraw=False)
        else:
            self._ledger.fail(request, event.reason, False, withdraw=False)

    # --- decisions -------------------------------------------------------------------------------

    def _apply(self, decision: Decision) -> None:
        match decision:
            case PlaceShort():
                self._place_short(decision)
            case PlaceLong():
                self._place_long(decision)
            case PauseLong():
                self._pause(decision.request)
            case ResumeLong():
                self._ledger.move(decision.request, RequestState.RESUMING)
                self._ledger.emit(
                    ResumeGroup(request_id=decision.request.request_id, attempt=decision.request.spec.attempt)
                )
            case GrowLong():
                grow(self._ledger, decision)
            case PartLong():
                part(self._ledger, decision.request)
            case SpillLong():
                self._spill_orders.spill(decision.request)
            case RestoreLong():
                self._spill_orders.restore(decision.request)
            case _:
                assert_never(decision)

    def _place_short(self, decision: PlaceShort) -> None:
        request, key = decision.request, decision.request.key
        replica = self._cluster.replicas[decision.replica]
        if decision.pause is not None:
            self._pause(self._cluster.requests[decision.pause])
        self._ledger.move(request, RequestState.PREFILLING)
        self._policy.forget(request)
        request.prefill_worker, request.decode_worker = decision.replica, decision.decoder
        stays = decision.replica == decision.decoder
        self._cluster.reserve(replica, key, request.spec.kv_tokens if stays else request.tokens, self._ledger.now_s)
        self._cluster.enqueue_short(replica, request)
        self._counters[f"placed_{decision.rule}"] += 1
        if decision.rule == "exclude":
            self._counters["decode_pauses"] += 1
        self._ledger.note(request.request_id, f"placed by rule {decision.rule!r}")
        self._ledger.save(request)
        address = "" if stays else self._reserve_decode(request, self._cluster.decoders[decision.decoder])
        self._ledger.emit(
            RunPrefill(
                worker_id=replica.worker_id,
                spec=request.spec,
                decode_worker_id=decision.decoder,
                decode_address=address,
                exclusive=not self._config.colocation,
            )
        )

    def _reserve_decode(self, request: Request, decoder: Decoder) -> str:
        """Announces the request there. Returns the address its KV goes to."""
        self._cluster.reserve(decoder, request.key, request.slot_tokens, self._ledger.now_s)
        assert request.prefill_worker is not None
        self._ledger.emit(
            ExpectKv(worker_id=decoder.worker_id, spec=request.spec, prefill_worker_id=request.prefill_worker)
        )
        return decoder.profile.data_address

    def _place_long(self, decision: PlaceLong) -> None:
        request, (members, addresses) = decision.request, in_rank_order(self._cluster, decision.members)
        replicas = [self._cluster.replicas[w] for w in members]
        plan = self._plan_of(request, replicas, live=bool(addresses))
        request.pauses = PauseAccount(started_s=self._ledger.now_s, estimate_s=plan.prefill_s)
        self._policy.forget(request)
        request.members, request.scheme = members, plan.scheme
        request.sizes = (len(members),) * len(members)
        self._ledger.move(request, RequestState.FORMING)
        self._cluster.reserve_long(replicas, request.key, plan.reserved, self._ledger.now_s)
        self._cluster.seat_long(replicas, request.request_id)
        self._counters["placed_long"] += 1
        self._ledger.save(request)
        self._ledger.emit(
            FormGroup(spec=request.spec, members=members, addresses=addresses, scheme=plan.scheme, why=plan.why)
        )

    def _plan_of(self, request: Request, replicas: Sequence[Replica], *, live: bool) -> GroupPlan:
        """Live groups by what their members measured. Of others (simulated, or of one, which may grow) only matters
        whether the first has room for all KV."""
        kv_tokens = request.spec.kv_tokens
        layout = layout_of(self._cluster, tuple(replica.worker_id for replica in replicas))
        prefill_s = self._ledger.planner.prefill_s(request.tokens, layout)
        if live:
            ranks = [Rank(replica.profile, replica.kv_free) for replica in replicas]
            plan = plan_group(request.tokens, kv_tokens, ranks, self._config)
            return msgspec.structs.replace(plan, prefill_s=prefill_s)  # as such groups have done lately
        share = kv_share(kv_tokens, len(replicas))
        if self._config.group_gathers and kv_tokens <= replicas[0].kv_free:
            scheme, first = GATHERED_RING, kv_tokens
        else:
            scheme, first = RING, share
        reserved = (first, *(share,) * (len(replicas) - 1))
        return GroupPlan(scheme=scheme, reserved=reserved, prefill_s=prefill_s)

    def _pause(self, request: Request) -> None:
        self._ledger.move(request, RequestState.PAUSING)
        self._ledger.emit(PauseGroup(request_id=request.request_id, attempt=request.spec.attempt))
