"""The cluster scheduler: one handler per event, the only mutator of the `Cluster`.

It keeps the books (who is there, who runs what, whose KV lies where), asks its policy for decisions and
turns them into orders. Which request goes where, and who is paused, is the policy's
(`pecsched.py`, `baselines.py`); what happens on loss, cancellation and lost messages is the same for all.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import assert_never

import msgspec

from common.messages.cluster import (
    CoordinatorHeartbeat,
    RouterHeartbeat,
    RouterLeft,
    WorkerHeartbeat,
    WorkerLeft,
    WorkerProfile,
)
from common.messages.decode import DecodeBusy, DecodeFailed, DecodeFinished, DecodeStarted, ExpectKv
from common.messages.prefill import (
    DropRequest,
    KvReleased,
    PrefillFailed,
    PrefillFinished,
    PrefillStarted,
    RunPrefill,
)
from common.messages.records import RequestRecord
from common.messages.requests import RequestSpec
from common.messages.scheduling import (
    CancelRequested,
    RefusalCode,
    RequestAccepted,
    RequestFailed,
    RequestInterrupted,
    RequestRefused,
    RequestSubmitted,
)
from common.messages.sp import (
    DissolveGroup,
    FormGroup,
    GroupFailed,
    GroupFinished,
    GroupFormed,
    GroupPaused,
    GroupPrefillFinished,
    GroupResumed,
    PauseGroup,
    ResumeGroup,
)
from common.messages.views import ClusterView
from common.policy.baselines import FifoPolicy
from common.policy.cluster import Cluster, Decoder, HoldKey, Replica, Request, SchedulerConfig
from common.policy.core import TimePassed
from common.policy.costs import decode_slot_tokens, prefill_s
from common.policy.decisions import Decision, PauseLong, PlaceLong, PlaceShort, ResumeLong, SchedulingPolicy
from common.policy.lifecycle import IN_GROUP, RequestState, require_legal
from common.policy.membership import Membership
from common.policy.pecsched import PecSchedPolicy
from common.policy.placement import bounds_of
from common.policy.preemption import PauseAccount
from common.policy.reconcile import compare_holdings
from common.policy.scheduler_io import EndBusRequest, ForgetRequest, SaveRequest, SchedulerCommand, SchedulerEvent
from common.policy.story import StoryLog
from common.policy.timers import Timers
from common.policy.view import describe
from common.units import RequestId, RouterId, WorkerId

ENDED_REMEMBERED_MAX = 10_000
HEAD_OF_QUEUE = -(10**12)
"""Orders of requests that were running before this scheduler started: ahead of every new one."""


def make_policy(config: SchedulerConfig) -> SchedulingPolicy:
    """Raises: ValueError for an unknown name."""
    if config.policy == "pecsched":
        return PecSchedPolicy(config)
    if config.policy == "fifo":
        return FifoPolicy(config)
    raise ValueError(f"unknown policy {config.policy!r}: use 'pecsched' or 'fifo'")


class Scheduler:
    """The core. `epoch`: the term of the lease under which it gives orders."""

    def __init__(self, config: SchedulerConfig, epoch: int) -> None:
        self.config = config
        self.cluster = Cluster()
        self.policy = make_policy(config)
        self.counters: Counter[str] = Counter()
        self._epoch = epoch
        self._members = Membership(config)
        self._stories = StoryLog()
        self._by_router: dict[RouterId, set[RequestId]] = {}
        self._grouped: dict[RequestId, Request] = {}
        self._ended: OrderedDict[RequestId, tuple[int, float]] = OrderedDict()
        """Attempt and time of requests that ended a while ago: late messages about them mean nothing."""
        self._awaiting: Timers[RequestId] = Timers()
        """Interrupted requests and when their routers must have answered."""
        self._out: list[SchedulerCommand] = []
        self._order = 0
        self._serial = 0
        self._cause = ""
        self._now_s = 0.0

    # --- the door --------------------------------------------------------------------------------

    def handle(self, event: SchedulerEvent, now_s: float) -> list[SchedulerCommand]:
        self._now_s = now_s
        self._serial += 1
        self._cause = f"{type(event).__name__}#{self._epoch}.{self._serial}"
        self._members.started(now_s)
        request_id = getattr(event, "request_id", None)
        if request_id is not None:
            self._stories.note(request_id, now_s, self._cause, event)
        self._dispatch(event)
        self._expire()
        while (decision := self.policy.decide(self.cluster, now_s)) is not None:
            self._apply(decision)
        out, self._out = self._out, []
        return out

    def next_deadline_s(self) -> float | None:
        deadlines = (self._members.next_deadline_s(), self._awaiting.next_s(), self.policy.next_deadline_s())
        return min((d for d in deadlines if d is not None), default=None)

    def check(self) -> None:
        """Raises: InvariantViolated."""
        self.cluster.check()
        grouped = {r for r, request in self.cluster.requests.items() if request.is_long and request.state in IN_GROUP}
        assert grouped == set(self._grouped), "the set of groups matches the states"
        owned = set().union(*self._by_router.values()) if self._by_router else set()
        assert owned == set(self.cluster.requests), "every request has its router"
        waiting = sum(r.state is RequestState.QUEUED for r in self.cluster.requests.values())
        assert waiting == self.policy.waiting_shorts() + self.policy.waiting_longs(), "what is queued waits once"

    def story(self, request_id: RequestId) -> list[str]:
        return self._stories.tell(request_id)

    def view(self, now_s: float) -> ClusterView:
        return describe(self.config, self.cluster, self.policy, sorted(self._members.routers), self.counters, now_s)

    def _dispatch(self, event: SchedulerEvent) -> None:
        match event:
            case RequestSubmitted():
                self._on_submitted(event)
            case CancelRequested():
                self._on_cancel(event)
            case RouterHeartbeat():
                self._on_router_heartbeat(event)
            case RouterLeft():
                self._lose_router(event.router_id)
            case WorkerHeartbeat():
                self._on_worker_heartbeat(event)
            case WorkerLeft():
                self._on_worker_left(event)
            case PrefillStarted():
                self.counters["prefills_started"] += 1
            case PrefillFinished():
                self._on_prefill_finished(event)
            case PrefillFailed():
                self._on_prefill_failed(event)
            case KvReleased():
                self._on_kv_released(event)
            case DecodeStarted():
                self._on_decode_started(event)
            case DecodeFinished():
                self._on_decode_finished(event)
            case DecodeBusy() | DecodeFailed():
                self._on_decode_lost(event)
            case CoordinatorHeartbeat():
                self._on_coordinator_heartbeat(event)
            case GroupFormed() | GroupPaused() | GroupResumed() | GroupPrefillFinished():
                self._on_group_moved(event)
            case GroupFinished() | GroupFailed():
                self._on_group_ended(event)
            case TimePassed():
                pass
            case _:
                assert_never(event)

    # --- requests --------------------------------------------------------------------------------

    def _on_submitted(self, event: RequestSubmitted) -> None:
        spec = event.spec
        self._stories.note(spec.request_id, self._now_s, self._cause, f"RequestSubmitted attempt={spec.attempt}")
        known = self.cluster.requests.get(spec.request_id)
        if known is None:
            self._submit_new(spec)
        elif known.spec.router_id != spec.router_id:
            self._refuse(spec, "duplicate_id", f"a request with id {spec.request_id!r} is running; use another id")
        elif spec.attempt > known.spec.attempt:
            self._resubmit(known, spec)
        elif spec.attempt == known.spec.attempt:
            self._accept(known)

    def _submit_new(self, spec: RequestSpec) -> None:
        ended = self._ended.get(spec.request_id)
        if ended is not None and spec.attempt <= ended[0] and self._now_s - ended[1] < self._grace_s:
            return  # a repeated submission that crossed its own end
        is_long = spec.prompt.tokens > self.config.threshold_tokens
        refusal = self._refusal(spec, is_long=is_long)
        if refusal is not None:
            self._refuse(spec, *refusal)
            return
        self._order += 1
        request = Request(
            spec=spec,
            length_class="long" if is_long else "short",
            order=self._order + (HEAD_OF_QUEUE if spec.attempt > 0 else 0),
            arrived_s=self._now_s,
            state_since_s=self._now_s,
        )
        self.cluster.requests[spec.request_id] = request
        self._by_router.setdefault(spec.router_id, set()).add(spec.request_id)
        self._members.router_heard(spec.router_id, self._now_s)
        self.counters["accepted"] += 1
        self._queue(request)

    def _resubmit(self, request: Request, spec: RequestSpec) -> None:
        """A later attempt supersedes the running one; the request keeps its class and its place."""
        self._abandon(request)
        request.spec = spec
        if spec.attempt > self.config.attempts_max:
            self._fail(request, f"interrupted {spec.attempt} times; the last words are in the scheduler's log", True)
            return
        if request.state is not RequestState.QUEUED:
            if request.state is not RequestState.INTERRUPTED:
                self._move(request, RequestState.INTERRUPTED)
            self._move(request, RequestState.QUEUED)
        self._awaiting.drop(request.request_id)
        self._queue(request)

    def _queue(self, request: Request) -> None:
        self._accept(request)
        self._save(request)
        self.policy.admit(request, self.cluster)

    def _refusal(self, spec: RequestSpec, *, is_long: bool) -> tuple[RefusalCode, str, float | None] | None:
        """Why a request cannot be accepted: code, sentence, seconds to wait before trying again."""
        missing = self._members.missing_role(self.cluster, self._now_s, is_long=is_long)
        if missing is not None:
            return "no_workers", f"no {missing} is running; try again later", 5.0
        prefill_max, decode_max = self.cluster.kv_max("prefill"), self.cluster.kv_max("decode")
        kv_tokens = spec.kv_tokens
        if is_long and 0 < prefill_max < kv_tokens:
            return "too_long", _too_long(spec, kv_tokens, prefill_max), None
        if not is_long and (0 < prefill_max < spec.prompt.tokens or 0 < decode_max < decode_slot_tokens(kv_tokens)):
            return "too_long", _too_long(spec, kv_tokens, min(prefill_max, decode_max)), None
        if spec.attempt == 0 and self.policy.waiting_shorts() + self.policy.waiting_longs() >= self.config.queue_max:
            return "queue_full", f"{self.config.queue_max} requests are waiting already; try again later", 1.0
        return None

    def _accept(self, request: Request) -> None:
        spec = request.spec
        self._emit(RequestAccepted(request_id=spec.request_id, attempt=spec.attempt, router_id=spec.router_id))

    def _refuse(self, spec: RequestSpec, code: RefusalCode, message: str, retry_after_s: float | None = None) -> None:
        self.counters["refused"] += 1
        self._emit(
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
        request = self.cluster.requests.get(event.request_id)
        if request is not None and request.spec.router_id == event.router_id:
            self._end(request, "cancelled")

    def _move(self, request: Request, state: RequestState) -> None:
        require_legal(request.state, state, long=request.is_long, story=self.story(request.request_id))
        request.state = state
        request.state_since_s = self._now_s
        if request.is_long:
            if state in IN_GROUP:
                self._grouped[request.request_id] = request
            else:
                self._grouped.pop(request.request_id, None)
            self.policy.long_changed(request)

    def _current(self, request_id: RequestId, attempt: int) -> Request | None:
        """The request, if this attempt of it is the running one."""
        request = self.cluster.requests.get(request_id)
        return request if request is not None and request.spec.attempt == attempt else None

    # --- ends and interruptions ------------------------------------------------------------------

    def _abandon(self, request: Request, *, withdraw: bool = True) -> None:
        """This attempt is over. `withdraw`: tell whoever works on it; without, they know by themselves. KV
        on live workers stays on the books until freed there."""
        if request.state is RequestState.QUEUED:
            self.policy.forget(request)
        elif not withdraw:
            pass
        elif request.is_long:
            self._dissolve(request)
        else:
            for worker_id in request.workers:
                self._drop_on(worker_id, request.key)
        request.prefill_worker = request.decode_worker = None
        request.members = ()
        request.pauses = None

    def _dissolve(self, request: Request) -> None:
        if request.state not in IN_GROUP:
            return
        for worker_id in request.members:
            worker = self.cluster.replicas.get(worker_id)
            if worker is not None and request.key in worker.held:
                worker.held[request.key].ordered_s = self._now_s
                worker.held[request.key].dropped = True
                if not self.cluster.can_form_groups:
                    self._drop_on(worker_id, request.key)
        self._emit(DissolveGroup(request_id=request.request_id, attempt=request.spec.attempt))
        self.cluster.unseat_long(request, decodes=False)
        for worker_id in request.members:
            self.policy.replica_eased(worker_id, self.cluster)

    def _drop_on(self, worker_id: WorkerId, key: HoldKey) -> None:
        worker = self.cluster.worker(worker_id)
        if worker is None or key not in worker.held:
            return
        self._order_drop(worker, key)
        if isinstance(worker, Replica):
            self.cluster.dequeue_short(worker_id, key)
            self.policy.replica_eased(worker_id, self.cluster)

    def _order_drop(self, worker: Replica | Decoder, key: HoldKey) -> None:
        if key in worker.held:
            worker.held[key].dropped = True
            worker.held[key].ordered_s = self._now_s
        self._emit(DropRequest(worker_id=worker.worker_id, request_id=key[0], attempt=key[1]))

    def _end(self, request: Request, how: str, *, withdraw: bool = True) -> None:
        """Off the books. `how` is counted: finished, cancelled, failed."""
        self._abandon(request, withdraw=withdraw)
        request_id = request.request_id
        del self.cluster.requests[request_id]
        self._grouped.pop(request_id, None)
        self._awaiting.drop(request_id)
        self._by_router[request.spec.router_id].discard(request_id)
        if not self._by_router[request.spec.router_id]:
            del self._by_router[request.spec.router_id]
        self._ended[request_id] = (request.spec.attempt, self._now_s)
        if len(self._ended) > ENDED_REMEMBERED_MAX:
            self._ended.popitem(last=False)
        self.counters[how] += 1
        self.counters[f"{how}_{request.length_class}"] += 1
        self._stories.note(request_id, self._now_s, self._cause, how)
        self._out.append(ForgetRequest(request_id=request_id))

    def _fail(self, request: Request, message: str, retryable: bool, *, withdraw: bool = True) -> None:
        self._end(request, "failed", withdraw=withdraw)
        self._emit(
            RequestFailed(
                request_id=request.request_id,
                attempt=request.spec.attempt,
                router_id=request.spec.router_id,
                message=message,
                retryable=retryable,
            )
        )

    def _interrupt(self, request: Request, reason: str, *, withdraw: bool = True) -> None:
        """This attempt is lost; its router knows what was delivered and submits the rest."""
        if request.state in (RequestState.QUEUED, RequestState.INTERRUPTED):
            return
        self.counters["interrupted"] += 1
        if request.spec.attempt >= self.config.attempts_max:
            message = f"given up after {request.spec.attempt + 1} attempts; the last ended with: {reason}"
            self._fail(request, message, True, withdraw=withdraw)
            return
        self._abandon(request, withdraw=withdraw)
        self._move(request, RequestState.INTERRUPTED)
        self._awaiting.at(self._now_s + self.config.lease_s, request.request_id)
        self._save(request)
        self._ask_resubmission(request.request_id, request.spec.attempt, request.spec.router_id, reason)

    def _ask_resubmission(self, request_id: RequestId, attempt: int, router_id: RouterId, reason: str) -> None:
        self._emit(RequestInterrupted(request_id=request_id, attempt=attempt, router_id=router_id, reason=reason))

    # --- shorts ----------------------------------------------------------------------------------

    def _on_prefill_finished(self, event: PrefillFinished) -> None:
        self.cluster.dequeue_short(event.worker_id, (event.request_id, event.attempt))
        self.policy.replica_eased(event.worker_id, self.cluster)
        request = self._current(event.request_id, event.attempt)
        if request is None or request.is_long or request.prefill_worker != event.worker_id:
            return
        if event.finish_reason is not None:
            self._end(request, "finished")
        elif request.state is RequestState.PREFILLING:
            self._move(request, RequestState.HANDOFF)

    def _on_prefill_failed(self, event: PrefillFailed) -> None:
        self._release(event.worker_id, (event.request_id, event.attempt))
        request = self._current(event.request_id, event.attempt)
        if request is None or request.prefill_worker != event.worker_id:
            return
        if event.retryable:
            self._interrupt(request, event.reason)
        else:
            self._fail(request, event.reason, False)

    def _on_kv_released(self, event: KvReleased) -> None:
        self._release(event.worker_id, (event.request_id, event.attempt))
        request = self._current(event.request_id, event.attempt)
        if request is not None:
            self._mind_release(request, event.worker_id)

    def _mind_release(self, request: Request, worker_id: WorkerId) -> None:
        """A running request whose KV went away where it still counted on it missed a message."""
        if request.is_long:
            if worker_id in request.members:
                self._interrupt(request, f"{worker_id} no longer holds its KV")
        elif worker_id == request.decode_worker:
            self._interrupt(request, f"{worker_id} no longer holds its KV")
        elif worker_id == request.prefill_worker and request.state is RequestState.PREFILLING:
            # Handed over: the word of the first token was lost, the decode worker's will come.
            self._move(request, RequestState.HANDOFF)

    def _on_decode_started(self, event: DecodeStarted) -> None:
        request = self._current(event.request_id, event.attempt)
        if (
            request is not None
            and request.decode_worker == event.worker_id
            and request.state in (RequestState.PREFILLING, RequestState.HANDOFF)
        ):
            self._move(request, RequestState.DECODING)

    def _on_decode_finished(self, event: DecodeFinished) -> None:
        request = self._current(event.request_id, event.attempt)
        if request is not None and request.decode_worker == event.worker_id:
            self._end(request, "finished", withdraw=False)

    def _on_decode_lost(self, event: DecodeBusy | DecodeFailed) -> None:
        self._release(event.worker_id, (event.request_id, event.attempt))
        request = self._current(event.request_id, event.attempt)
        if request is not None and request.decode_worker == event.worker_id:
            reason = event.reason if isinstance(event, DecodeFailed) else f"{event.worker_id} had no room for its KV"
            self._interrupt(request, reason)

    def _release(self, worker_id: WorkerId, key: HoldKey) -> None:
        self.cluster.release(worker_id, key)
        if worker_id in self.cluster.replicas:
            self.policy.replica_eased(worker_id, self.cluster)
        else:
            self.policy.decoder_eased()

    # --- longs -----------------------------------------------------------------------------------

    def _on_group_moved(self, event: GroupFormed | GroupPaused | GroupResumed | GroupPrefillFinished) -> None:
        request = self._current(event.request_id, event.attempt)
        if request is None or request.pauses is None:
            return
        state = request.state
        match event:
            case GroupFormed() if state is RequestState.FORMING:
                request.pauses.started_s = self._now_s
                self._move(request, RequestState.RUNNING)
            case GroupPaused() if state is RequestState.PAUSING:
                request.pauses.paused(self._now_s)
                self.counters["pauses"] += 1
                self._move(request, RequestState.PAUSED)
            case GroupResumed() if state is RequestState.RESUMING:
                request.pauses.resumed(self._now_s, bounds_of(self.config))
                self._move(request, RequestState.RUNNING)
            case GroupPrefillFinished() if state in IN_GROUP and state is not RequestState.DECODING:
                self._on_group_prefilled(request, event)

    def _on_group_prefilled(self, request: Request, event: GroupPrefillFinished) -> None:
        if request.state is RequestState.PAUSED:
            self._interrupt(request, "its prefill ended while it was paused")
            return
        assert request.pauses is not None
        request.pauses.resumed(self._now_s, bounds_of(self.config))
        self.cluster.unseat_long(request, decodes=event.finish_reason is None)
        self._move(request, RequestState.DECODING)
        for worker_id in request.members:
            self.policy.replica_eased(worker_id, self.cluster)

    def _on_group_ended(self, event: GroupFinished | GroupFailed) -> None:
        """The group is gone and its KV is free: so says the coordinator, who asked every rank."""
        key = (event.request_id, event.attempt)
        request = self._current(*key)
        if request is None or request.state not in IN_GROUP:
            for replica in [r for r in self.cluster.replicas.values() if key in r.held]:
                self._release(replica.worker_id, key)
            return
        self.cluster.unseat_long(request, decodes=False)
        for worker_id in request.members:
            self._release(worker_id, key)
        if isinstance(event, GroupFinished):
            self._end(request, "finished", withdraw=False)
        elif event.retryable:
            self._interrupt(request, event.reason, withdraw=False)
        else:
            self._fail(request, event.reason, False, withdraw=False)

    # --- membership ------------------------------------------------------------------------------

    @property
    def _grace_s(self) -> float:
        """Orders and events younger than this may not have reached the other side."""
        return 2.5 * self.config.heartbeat_s

    def _expire(self) -> None:
        lost = self._members.expired(self._now_s)
        for worker_id in lost.workers:
            self._lose_worker(worker_id, "gave no sign of life")
        for router_id in lost.routers:
            self._lose_router(router_id)
        if lost.coordinator:
            self._lose_coordinator("the SP coordinator gave no sign of life")
        for request_id in list(self._awaiting.due(self._now_s)):
            request = self.cluster.requests.get(request_id)
            if request is not None and request.state is RequestState.INTERRUPTED:
                self._fail(request, "interrupted, and its router did not submit it again", True)
        self._fail_unservable()

    def _fail_unservable(self) -> None:
        for is_long in (False, True):
            waits = self.policy.waiting_longs() if is_long else self.policy.waiting_shorts()
            missing = self._members.missing_role(self.cluster, self._now_s, is_long=is_long) if waits else None
            if missing is None:
                continue
            for request in [r for r in self.policy.waiting(self.config.queue_max) if r.is_long is is_long]:
                self._fail(request, f"no {missing} has been running for {self.config.no_worker_s:g} s", True)

    def _on_worker_heartbeat(self, event: WorkerHeartbeat) -> None:
        profile = event.profile
        worker = self.cluster.worker(profile.worker_id)
        if worker is not None and worker.profile.incarnation != profile.incarnation:
            self._lose_worker(profile.worker_id, "was restarted")
            worker = None
        self._members.worker_heard(profile.worker_id, self._now_s)
        if worker is None:
            worker = self._add_worker(profile)
        worker.heard_s = self._now_s
        diff = compare_holdings(worker, event.holdings, self._now_s, self._grace_s)
        for key in diff.unknown + diff.undropped:
            self._order_drop(worker, key)
        for key in diff.gone:
            self._release(worker.worker_id, key)
            request = self._current(*key)
            if request is not None:
                self._mind_release(request, worker.worker_id)

    def _add_worker(self, profile: WorkerProfile) -> Replica | Decoder:
        worker = self.cluster.add_worker(profile, self._now_s)
        self._members.roles_changed(self.cluster, self._now_s)
        self.policy.worker_added(profile.worker_id, self.cluster)
        return worker

    def _on_worker_left(self, event: WorkerLeft) -> None:
        worker = self.cluster.worker(event.worker_id)
        if worker is not None and worker.profile.incarnation == event.incarnation:
            self._lose_worker(event.worker_id, "was stopped")

    def _lose_worker(self, worker_id: WorkerId, why: str) -> None:
        worker = self.cluster.worker(worker_id)
        if worker is None:
            return
        touched = [request for key in list(worker.held) if (request := self._current(*key)) is not None]
        needed = [r for r in touched if r.is_long or worker_id == r.decode_worker or r.state is RequestState.PREFILLING]
        for request in needed:
            self.cluster.unseat_long(request, decodes=False)
        self.cluster.remove_worker(worker_id)
        self._members.worker_gone(worker_id)
        self._members.roles_changed(self.cluster, self._now_s)
        self.policy.worker_lost(worker_id, self.cluster)
        self.counters["workers_lost"] += 1
        for request in needed:
            self._interrupt(request, f"worker {worker_id} {why}")

    def _on_router_heartbeat(self, event: RouterHeartbeat) -> None:
        self._members.router_heard(event.router_id, self._now_s)
        waiting = dict(event.waiting)
        for request_id, attempt in waiting.items():
            self._mind_waiting(request_id, attempt, event.router_id)
        for request_id in sorted(self._by_router.get(event.router_id, set()) - waiting.keys()):
            request = self.cluster.requests[request_id]
            if self._now_s - request.arrived_s > self._grace_s:
                self._end(request, "cancelled")

    def _mind_waiting(self, request_id: RequestId, attempt: int, router_id: RouterId) -> None:
        """A router waits for it: make sure that somebody works on it."""
        request = self.cluster.requests.get(request_id)
        if request is None:
            ended = self._ended.get(request_id)
            if ended is None or self._now_s - ended[1] > self._grace_s:
                self._ask_resubmission(request_id, attempt, router_id, "unknown to the scheduler")
        elif (
            request.state is RequestState.INTERRUPTED
            and request.spec.attempt == attempt
            and self._now_s - request.state_since_s > self.config.heartbeat_s
        ):
            self._ask_resubmission(request_id, attempt, router_id, "interrupted")

    def _lose_router(self, router_id: RouterId) -> None:
        self._members.router_gone(router_id)
        for request_id in sorted(self._by_router.get(router_id, set())):
            request = self.cluster.requests[request_id]
            self._end(request, "cancelled")
            if request.spec.reply_inbox is not None:
                message = "the router that served this request was lost; send it again"
                inbox = request.spec.reply_inbox
                self._out.append(EndBusRequest(reply_inbox=inbox, request_id=request_id, message=message))

    def _on_coordinator_heartbeat(self, event: CoordinatorHeartbeat) -> None:
        if self._members.coordinator_heard(event.coordinator_id, event.incarnation, self._now_s):
            self._lose_coordinator("the SP coordinator was restarted")
        self.cluster.can_form_groups = True
        self._members.roles_changed(self.cluster, self._now_s)
        self.policy.decoder_eased()
        driving = set(event.driving)
        for request in list(self._grouped.values()):
            if self._now_s - request.state_since_s <= self._grace_s:
                continue
            if request.key not in driving:
                self._interrupt(request, "the SP coordinator lost its group")
            else:
                self._remind(request)
        for request_id, attempt in sorted(driving):
            current = self._current(request_id, attempt)
            if current is None or current.state not in IN_GROUP:
                self._emit(DissolveGroup(request_id=request_id, attempt=attempt))

    def _remind(self, request: Request) -> None:
        """An order to pause or resume, or its answer, was lost: give it again (the coordinator repeats its answer)."""
        if request.state is RequestState.PAUSING:
            self._emit(PauseGroup(request_id=request.request_id, attempt=request.spec.attempt))
        elif request.state is RequestState.RESUMING:
            self._emit(ResumeGroup(request_id=request.request_id, attempt=request.spec.attempt))

    def _lose_coordinator(self, why: str) -> None:
        self.cluster.can_form_groups = False
        self._members.coordinator_gone()
        self._members.roles_changed(self.cluster, self._now_s)
        for request in list(self._grouped.values()):
            self._interrupt(request, why)

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
                self._move(decision.request, RequestState.RESUMING)
                self._emit(ResumeGroup(request_id=decision.request.request_id, attempt=decision.request.spec.attempt))
            case _:
                assert_never(decision)

    def _place_short(self, decision: PlaceShort) -> None:
        request, key = decision.request, decision.request.key
        replica, decoder = self.cluster.replicas[decision.replica], self.cluster.decoders[decision.decoder]
        if decision.pause is not None:
            self._pause(self.cluster.requests[decision.pause])
        self._move(request, RequestState.PREFILLING)
        self.policy.forget(request)
        request.prefill_worker, request.decode_worker = replica.worker_id, decoder.worker_id
        self.cluster.reserve(replica, key, request.tokens, self._now_s)
        self.cluster.reserve(decoder, key, decode_slot_tokens(request.spec.kv_tokens), self._now_s)
        self.cluster.enqueue_short(replica, request)
        self.counters[f"placed_{decision.rule}"] += 1
        self._stories.note(request.request_id, self._now_s, self._cause, f"placed by rule {decision.rule!r}")
        self._save(request)
        self._emit(ExpectKv(worker_id=decoder.worker_id, spec=request.spec, prefill_worker_id=replica.worker_id))
        self._emit(
            RunPrefill(
                worker_id=replica.worker_id,
                spec=request.spec,
                decode_worker_id=decoder.worker_id,
                decode_address=decoder.profile.data_address,
            )
        )

    def _place_long(self, decision: PlaceLong) -> None:
        request = decision.request
        replicas = [self.cluster.replicas[w] for w in decision.members]
        cost = replicas[0].profile.step_cost
        request.pauses = PauseAccount(started_s=self._now_s, estimate_s=prefill_s(cost, request.tokens, 512))
        self.policy.forget(request)
        request.members = decision.members
        self._move(request, RequestState.FORMING)
        for replica in replicas:
            self.cluster.reserve(replica, request.key, request.spec.kv_tokens, self._now_s)
            self.cluster.seat_long(replica, request.request_id)
        self.counters["placed_long"] += 1
        self._save(request)
        self._emit(FormGroup(spec=request.spec, members=decision.members))

    def _pause(self, request: Request) -> None:
        self._move(request, RequestState.PAUSING)
        self._emit(PauseGroup(request_id=request.request_id, attempt=request.spec.attempt))

    # --- out -------------------------------------------------------------------------------------

    def _save(self, request: Request) -> None:
        record = RequestRecord(
            spec=request.spec,
            length_class=request.length_class,
            state=request.state.value,
            workers=request.workers,
            epoch=self._epoch,
        )
        self._out.append(SaveRequest(record=record))

    def _emit(
        self,
        command: RequestAccepted
        | RequestRefused
        | RequestInterrupted
        | RequestFailed
        | RunPrefill
        | ExpectKv
        | DropRequest
        | FormGroup
        | PauseGroup
        | ResumeGroup
        | DissolveGroup,
    ) -> None:
        """Stamp a message with its cause and this scheduler's epoch, and send it."""
        command = msgspec.structs.replace(command, cause=self._cause, epoch=self._epoch)
        request_id = (
            command.spec.request_id if isinstance(command, RunPrefill | ExpectKv | FormGroup) else command.request_id
        )
        self._stories.note(request_id, self._now_s, self._cause, command)
        self._out.append(command)


def _too_long(spec: RequestSpec, kv_tokens: int, kv_max: int) -> str:
    return (
        f"prompt of {spec.prompt.tokens} tokens and max_tokens {spec.max_tokens} need KV for {kv_tokens} tokens; "
        f"the largest worker holds {kv_max}: shorten the prompt or lower max_tokens"
    )
