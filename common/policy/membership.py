"""Who is there, and what follows when somebody is not: heartbeats, losses, and messages that went missing."""

from __future__ import annotations

import math
from collections.abc import Sequence

from common.messages.cluster import CoordinatorHeartbeat, RouterHeartbeat, WorkerHeartbeat, WorkerLeft, WorkerProfile
from common.messages.sp import DissolveGroup, PauseGroup, ResumeGroup
from common.policy.capacity import beyond_capacity
from common.policy.cluster import Cluster, Decoder, HoldKey, Replica, Request
from common.policy.growing import order as order_growth
from common.policy.growing import part as order_parting
from common.policy.leases import Leases, Role
from common.policy.ledger import Ledger
from common.policy.lifecycle import IN_GROUP, RequestState
from common.policy.reconcile import compare_holdings
from common.policy.scheduler_io import EndBusRequest, WorkerKeptOut
from common.policy.spill_orders import remind
from common.units import RequestId, RouterId, WorkerId

STRANGERS_MAX = 100
"""How many workers that are kept out are remembered."""


def misfit_of(cluster: Cluster, profile: WorkerProfile) -> str:
    """Why this worker cannot work with those that are there: KV moves between equal models only, and a group computes
    one. Empty: it can."""
    other = next(cluster.workers(), None)
    if other is None or other.profile.model_fingerprint == profile.model_fingerprint:
        return ""
    its, theirs = (f"{each.model_id} ({each.model_fingerprint})" for each in (profile, other.profile))
    return f"its model, version or dtype, {its}, is not that of {other.worker_id}, {theirs}"


class Membership:
    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._config = ledger.config
        self._cluster = ledger.cluster
        self._policy = ledger.policy
        self._counters = ledger.counters
        self._leases = Leases(ledger.config)
        self._capacity_due_s: float | None = None
        """Workers came or went: when what waits must fit those that are there."""
        self.quiet_until_s = -math.inf
        """Before this nothing can expire: no deadline known, and none set since, each of which lies `_term_s` or more
        after the event that set it. -inf: at the first event, and while a role is not filled."""
        self._term_s = min(self._config.lease_s, self._config.no_worker_s)

    def next_deadline_s(self) -> float | None:
        deadlines = (self._leases.next_deadline_s(), self._capacity_due_s)
        return min((d for d in deadlines if d is not None), default=None)

    def routers(self) -> Sequence[RouterId]:
        return sorted(self._leases.routers)

    def router_spoke(self, router_id: RouterId) -> None:
        """Not by a heartbeat, but a sign of life all the same."""
        self._leases.router_spoke(router_id, self._ledger.now_s)

    def missing_role(self, *, is_long: bool) -> Role | None:
        """A role such a request needs and that nobody has filled for too long."""
        return self._leases.missing_role(self._ledger.now_s, is_long=is_long)

    def expire(self) -> None:
        """After each event that comes at `quiet_until_s` or later: whose time has come?"""
        now_s = self._ledger.now_s
        deadline_s = self._leases.next_deadline_s()
        if deadline_s is not None and deadline_s <= now_s:
            self._expire_leases()
        for request_id in list(self._ledger.awaiting.due(now_s)):
            request = self._cluster.requests.get(request_id)
            if request is not None and request.state is RequestState.INTERRUPTED:
                self._ledger.fail(request, "interrupted, and its router did not submit it again", True)
        if self._leases.anybody_missing:
            self._fail_unservable()
        if self._capacity_due_s is not None and self._capacity_due_s <= self._ledger.now_s:
            self._capacity_due_s = None
            self._fail_too_long()
        if self._leases.anybody_missing:
            self.quiet_until_s = -math.inf
        else:
            deadlines = (self.next_deadline_s(), self._ledger.awaiting.next_s(), now_s + self._term_s)
            self.quiet_until_s = min(d for d in deadlines if d is not None)

    def first_event(self) -> None:
        """From now on every role that is not filled is missing."""
        self._leases.started(self._ledger.now_s)

    def _roles_changed(self) -> None:
        self._leases.roles_changed(self._cluster, self._ledger.now_s)
        self.quiet_until_s = -math.inf

    def _expire_leases(self) -> None:
        lost = self._leases.expired(self._ledger.now_s)
        for worker_id in lost.workers:
            self._lose_worker(worker_id, "gave no sign of life")
        for router_id in lost.routers:
            self.lose_router(router_id)
        if lost.coordinator:
            self._lose_coordinator("the SP coordinator gave no sign of life")

    def _fail_unservable(self) -> None:
        for is_long in (False, True):
            waits = self._policy.waiting_longs() if is_long else self._policy.waiting_shorts()
            missing = self.missing_role(is_long=is_long) if waits else None
            if missing is None:
                continue
            for request in [r for r in self._policy.waiting(self._config.queue_max) if r.is_long is is_long]:
                self._ledger.fail(request, f"no {missing} has been running for {self._config.no_worker_s:g} s", True)

    def _capacity_changed(self) -> None:
        if self._capacity_due_s is None:
            self._capacity_due_s = self._ledger.now_s + self._config.no_worker_s

    def _fail_too_long(self) -> None:
        """Accepted when more workers were there, or none that could say: it would wait for ever, and others behind
        it."""
        for request in list(self._policy.waiting(len(self._cluster.requests))):
            reason = beyond_capacity(self._cluster, self._config, request.spec, is_long=request.is_long)
            if reason is not None:
                self._ledger.fail(request, reason, False)

    def on_worker_heartbeat(self, event: WorkerHeartbeat) -> None:
        profile = event.profile
        worker = self._cluster.worker(profile.worker_id)
        if worker is not None and worker.profile.incarnation != profile.incarnation:
            self._lose_worker(profile.worker_id, "was restarted")
            worker = None
        if worker is None and self._kept_out(profile):
            return
        self._leases.worker_heard(profile.worker_id, self._ledger.now_s)
        if worker is None:
            worker = self._add_worker(profile)
        worker.heard_s = self._ledger.now_s
        if worker.shunned is not event.leaving:
            self._cluster.shun(worker, event.leaving)
            self._policy.decoder_eased()
        diff = compare_holdings(worker, event.holdings, self._ledger.now_s, self._ledger.grace_s)
        for key in diff.unknown + diff.undropped:
            self._ledger.order_drop(worker, key)
        for key in diff.gone:
            self._ledger.release(worker.worker_id, key)
            request = self._ledger.current(*key)
            if request is not None:
                self._ledger.mind_release(request, worker.worker_id)
        for holding in event.holdings:
            key = (holding.request_id, holding.attempt)
            if holding.phase == "expected":
                self._mind_expected(worker.worker_id, key)
            elif holding.phase == "decode":
                self._mind_decoding(worker.worker_id, key)

    def _mind_decoding(self, worker_id: WorkerId, key: HoldKey) -> None:
        """It has its KV, whatever message said so and was lost."""
        request = self._ledger.current(*key)
        if request is not None and request.decode_worker == worker_id and request.state is RequestState.HANDOFF:
            self._ledger.move(request, RequestState.DECODING)

    def _mind_expected(self, worker_id: WorkerId, key: HoldKey) -> None:
        """KV waits on a decode worker, and nobody holds what should be sent there: the order to prefill it was
        lost. Without this the request would stand until the reservation lapses."""
        request = self._ledger.current(*key)
        if request is None or request.decode_worker != worker_id or request.state is not RequestState.HANDOFF:
            return
        sender = self._cluster.worker(request.prefill_worker) if request.prefill_worker is not None else None
        if (sender is None or key not in sender.held) and (
            self._ledger.now_s - request.state_since_s > self._ledger.grace_s
        ):
            self._ledger.interrupt(request, "its KV was lost before it was handed over")

    def _kept_out(self, profile: WorkerProfile) -> bool:
        """A worker that is new here and cannot work with those that are there. It may try again: they may go."""
        why = misfit_of(self._cluster, profile)
        strangers = self._cluster.strangers
        if not why:
            strangers.pop(profile.worker_id, None)
            return False
        if strangers.get(profile.worker_id) != (profile.incarnation, why):
            if len(strangers) >= STRANGERS_MAX:
                strangers.pop(next(iter(strangers)))
            strangers[profile.worker_id] = profile.incarnation, why
            self._counters["workers_kept_out"] += 1
            self._ledger.out.append(WorkerKeptOut(worker_id=profile.worker_id, reason=why))
        return True

    def _add_worker(self, profile: WorkerProfile) -> Replica | Decoder:
        worker = self._cluster.add_worker(profile, self._ledger.now_s)
        self._roles_changed()
        self._policy.worker_added(profile.worker_id, self._cluster)
        self._capacity_changed()
        return worker

    def on_worker_left(self, event: WorkerLeft) -> None:
        self._cluster.strangers.pop(event.worker_id, None)
        worker = self._cluster.worker(event.worker_id)
        if worker is not None and worker.profile.incarnation == event.incarnation:
            self._lose_worker(event.worker_id, "was stopped")

    def _lose_worker(self, worker_id: WorkerId, why: str) -> None:
        worker = self._cluster.worker(worker_id)
        if worker is None:
            return
        touched = [request for key in list(worker.held) if (request := self._ledger.current(*key)) is not None]
        needed = [r for r in touched if _needs(r, worker_id)]
        for request in needed:
            self._cluster.unseat_long(request, decodes=False)
        self._cluster.remove_worker(worker_id)
        self._leases.worker_gone(worker_id)
        self._roles_changed()
        self._policy.worker_lost(worker_id, self._cluster)
        self._capacity_changed()
        self._counters["workers_lost"] += 1
        for request in needed:
            self._ledger.interrupt(request, f"worker {worker_id} {why}")

    def on_router_heartbeat(self, event: RouterHeartbeat) -> None:
        self._leases.router_heard(event.router_id, self._ledger.now_s)
        waiting = dict(event.waiting)
        for request_id, attempt in waiting.items():
            self._mind_waiting(request_id, attempt, event.router_id)
        for request_id in sorted(self._ledger.by_router.get(event.router_id, set()) - waiting.keys()):
            request = self._cluster.requests[request_id]
            if self._ledger.now_s - request.arrived_s > self._ledger.grace_s:
                self._ledger.end(request, "cancelled")

    def _mind_waiting(self, request_id: RequestId, attempt: int, router_id: RouterId) -> None:
        """A router waits for it: make sure that somebody works on it."""
        request = self._cluster.requests.get(request_id)
        if request is None:
            ended = self._ledger.ended.get(request_id)
            if ended is None or self._ledger.now_s - ended[1] > self._ledger.grace_s:
                self._ledger.ask_resubmission(request_id, attempt, router_id, "unknown to the scheduler")
        elif (
            request.state is RequestState.INTERRUPTED
            and request.spec.attempt == attempt
            and self._ledger.now_s - request.state_since_s > self._config.heartbeat_s
        ):
            self._ledger.ask_resubmission(request_id, attempt, router_id, "interrupted")

    def lose_router(self, router_id: RouterId) -> None:
        self._leases.router_gone(router_id)
        for request_id in sorted(self._ledger.by_router.get(router_id, set())):
            request = self._cluster.requests[request_id]
            self._ledger.end(request, "cancelled")
            if request.spec.reply_inbox is not None:
                message = "the router that served this request was lost; send it again"
                inbox = request.spec.reply_inbox
                self._ledger.out.append(EndBusRequest(reply_inbox=inbox, request_id=request_id, message=message))

    def on_coordinator_heartbeat(self, event: CoordinatorHeartbeat) -> None:
        if self._leases.coordinator_heard(event.coordinator_id, event.incarnation, self._ledger.now_s):
            self._lose_coordinator("the SP coordinator was restarted")
        if not self._cluster.can_form_groups:
            self._cluster.can_form_groups = True
            self._cluster.room_changes += 1
        self._roles_changed()
        self._policy.decoder_eased()
        driving = set(event.driving)
        for request in list(self._ledger.grouped.values()):
            if self._ledger.now_s - request.state_since_s <= self._ledger.grace_s:
                continue
            if request.key not in driving:
                self._ledger.interrupt(request, "the SP coordinator lost its group")
            else:
                self._remind(request)
        for request_id, attempt in sorted(driving):
            current = self._ledger.current(request_id, attempt)
            if current is None or current.state not in IN_GROUP:
                self._ledger.emit(DissolveGroup(request_id=request_id, attempt=attempt))

    def _remind(self, request: Request) -> None:
        """An order, or its answer, was lost: give it again (the coordinator repeats its answer)."""
        if request.joining and self._ledger.now_s - request.growth_since_s > self._ledger.grace_s:
            order_growth(self._ledger, request)
        since_s = request.parting_since_s
        if since_s is not None and self._ledger.now_s - since_s > self._ledger.grace_s:
            order_parting(self._ledger, request)
        if request.state is RequestState.PAUSING:
            self._ledger.emit(PauseGroup(request_id=request.request_id, attempt=request.spec.attempt))
        elif request.state is RequestState.RESUMING:
            self._ledger.emit(ResumeGroup(request_id=request.request_id, attempt=request.spec.attempt))
        else:
            remind(self._ledger, request)

    def on_coordinator_left(self) -> None:
        """No group is formed until the next one reports."""
        self._lose_coordinator("the SP coordinator was stopped")

    def _lose_coordinator(self, why: str) -> None:
        self._cluster.can_form_groups = False
        self._leases.coordinator_gone()
        self._roles_changed()
        for request in list(self._ledger.grouped.values()):
            self._ledger.interrupt(request, why)


def _needs(request: Request, worker_id: WorkerId) -> bool:
    """Whether this request, of which something is held there, is lost with that worker."""
    if request.is_long:  # else it was told to drop its share: it did not come in, or has given it to rank 0
        return worker_id in request.workers
    return worker_id == request.decode_worker or request.state is RequestState.PREFILLING
