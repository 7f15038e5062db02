"""The scheduler's ledger: the cluster's books, and what may be done to a request, each with all it entails.

A request moves, is interrupted, fails, ends: here each of these keeps the books, the policy, the record in
the store and the owners informed, so that a handler says only *what* happens. Messages gather in `out`.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from msgspec.structs import force_setattr

from common.messages.base import Record
from common.messages.decode import ExpectKv
from common.messages.prefill import DropRequest, RunPrefill
from common.messages.records import RequestRecord
from common.messages.scheduling import RequestAccepted, RequestFailed, RequestInterrupted, RequestRefused
from common.messages.sp import (
    DissolveGroup,
    FormGroup,
    GrowGroup,
    PartGroup,
    PauseGroup,
    RestoreGroup,
    ResumeGroup,
    SpillGroup,
)
from common.policy.cluster import Cluster, Decoder, HoldKey, Replica, Request
from common.policy.core import require
from common.policy.decisions import SchedulingPolicy
from common.policy.fifo import FifoPolicy
from common.policy.invariants import check_books
from common.policy.lifecycle import (
    IN_GROUP,
    LONG_TRANSITIONS,
    SHORT_TRANSITIONS,
    STANDING_LONG,
    RequestState,
)
from common.policy.live_planner import MeasuredPlanner
from common.policy.long_planner import LongPlanner
from common.policy.pecsched import PecSchedPolicy
from common.policy.priority import PriorityPolicy
from common.policy.reservation import ReservationPolicy
from common.policy.scheduler_config import SchedulerConfig
from common.policy.scheduler_io import PHASES_MAX, ForgetRequest, RequestLife, SaveRequest, SchedulerCommand
from common.policy.story import StoryLog
from common.policy.timers import Timers
from common.policy.transitions import require_legal
from common.units import RequestId, RouterId, WorkerId

ENDED_REMEMBERED_MAX = 10_000

WITH_SPEC: Final = (RunPrefill, ExpectKv, FormGroup)
"""Orders that carry the request itself."""


PolicyClass = Callable[[SchedulerConfig, LongPlanner], SchedulingPolicy]

POLICIES: Mapping[str, PolicyClass] = {
    "pecsched": PecSchedPolicy,
    "fifo": FifoPolicy,
    "reservation": ReservationPolicy,
    "priority": PriorityPolicy,
}


def make_policy(config: SchedulerConfig, planner: LongPlanner) -> SchedulingPolicy:
    """Raises: ValueError for an unknown name."""
    try:
        return POLICIES[config.policy](config, planner)
    except KeyError:
        raise ValueError(f"unknown policy {config.policy!r}: use one of {', '.join(POLICIES)}") from None


class Ledger:
    """Shared by the scheduler's handlers; `now_s` and `cause` are those of the event being handled."""

    def __init__(self, config: SchedulerConfig, epoch: int, planner: LongPlanner | None = None) -> None:
        self.config = config
        self.epoch = epoch
        self.cluster = Cluster()
        self.planner = MeasuredPlanner(self.cluster, config) if planner is None else planner
        self.policy = make_policy(config, self.planner)
        self.counters: Counter[str] = Counter()
        self.stories = StoryLog()
        self.by_router: defaultdict[RouterId, set[RequestId]] = defaultdict(set)
        self.grouped: dict[RequestId, Request] = {}
        """Longs that have a group."""
        self.ended: OrderedDict[RequestId, tuple[int, float]] = OrderedDict()
        """Attempt and time of requests that ended a while ago: late messages about them mean nothing."""
        self.awaiting: Timers[RequestId] = Timers()
        """Interrupted requests and when their routers must have answered."""
        self.out: list[SchedulerCommand] = []
        self._unsaved: dict[RequestId, Request] = {}
        """Requests whose records are out of date."""
        self.now_s = 0.0
        self.cause = ""

    @property
    def grace_s(self) -> float:
        """Orders and events younger than this may not have reached the other side."""
        return 2.5 * self.config.heartbeat_s

    def check(self) -> None:
        """Raises: InvariantViolated."""
        check_books(self.cluster, self.policy, self.config, self.by_router)
        grouped = {r for r, request in self.cluster.requests.items() if request.is_long and request.state in IN_GROUP}
        require(grouped == set(self.grouped), "the set of groups matches the states")

    def note(self, request_id: RequestId, what: Record | str) -> None:
        """Into the request's story."""
        self.stories.note(request_id, self.now_s, self.cause, what)

    def move(self, request: Request, state: RequestState) -> None:
        long, former = request.is_long, request.state
        table = LONG_TRANSITIONS if long else SHORT_TRANSITIONS
        if state not in table[former]:
            require_legal(
                table, former, state, who=request.request_id, story=partial(self.stories.tell, request.request_id)
            )
        request.state = state
        request.state_since_s = self.now_s
        if len(request.phases) < PHASES_MAX:
            request.phases.append((state, self.now_s))
        if long:
            if state in IN_GROUP:
                self.grouped[request.request_id] = request
            else:
                self.grouped.pop(request.request_id, None)
            if (former in STANDING_LONG) != (state in STANDING_LONG):
                self.cluster.group_moved(request.request_id, stands=state in STANDING_LONG)
            self.policy.long_changed(request)

    def current(self, request_id: RequestId, attempt: int) -> Request | None:
        """The request, if this attempt of it is the running one."""
        request = self.cluster.requests.get(request_id)
        return request if request is not None and request.spec.attempt == attempt else None

    # --- ends and interruptions ------------------------------------------------------------------

    def abandon(self, request: Request, *, withdraw: bool = True) -> None:
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
                self.drop_on(worker_id, request.key)
        request.prefill_worker = request.decode_worker = None
        request.members = request.joining = request.parted = request.sizes = ()
        request.growth, request.parting_since_s = 0, None
        request.pauses = None

    def _dissolve(self, request: Request) -> None:
        if request.state not in IN_GROUP:
            return
        for worker_id in request.workers:
            worker = self.cluster.replicas.get(worker_id)
            if worker is not None and request.key in worker.held:
                worker.held[request.key].ordered_s = self.now_s
                worker.held[request.key].dropped = True
                if not self.cluster.can_form_groups:
                    self.drop_on(worker_id, request.key)
        self.emit(DissolveGroup(request_id=request.request_id, attempt=request.spec.attempt))
        self.cluster.unseat_long(request, decodes=False)
        for worker_id in request.workers:
            self.policy.replica_eased(worker_id, self.cluster)

    def drop_on(self, worker_id: WorkerId, key: HoldKey) -> None:
        worker = self.cluster.worker(worker_id)
        if worker is None or key not in worker.held:
            return
        self.order_drop(worker, key)
        if isinstance(worker, Replica):
            self.cluster.dequeue_short(worker_id, key)
            self.policy.replica_eased(worker_id, self.cluster)

    def order_drop(self, worker: Replica | Decoder, key: HoldKey) -> None:
        if key in worker.held:
            worker.held[key].dropped = True
            worker.held[key].ordered_s = self.now_s
        self.emit(DropRequest(worker_id=worker.worker_id, request_id=key[0], attempt=key[1]))

    def end(self, request: Request, how: str, *, withdraw: bool = True) -> None:
        """Off the books. `how` is counted: finished, cancelled, failed."""
        life = self._life_of(request, how)
        self.abandon(request, withdraw=withdraw)
        request_id = request.request_id
        del self.cluster.requests[request_id]
        self.grouped.pop(request_id, None)
        self.awaiting.drop(request_id)
        siblings = self.by_router[request.spec.router_id]
        siblings.discard(request_id)
        if not siblings:
            del self.by_router[request.spec.router_id]
        self.ended[request_id] = (request.spec.attempt, self.now_s)
        if len(self.ended) > ENDED_REMEMBERED_MAX:
            self.ended.popitem(last=False)
        self.counters[how] += 1
        self.counters[f"{how}_{request.length_class}"] += 1
        self.note(request_id, how)
        self._unsaved.pop(request_id, None)
        self.out.append(ForgetRequest(request_id=request_id, life=life))

    def _life_of(self, request: Request, how: str) -> RequestLife:
        """To be told when it ends, while it still has its workers."""
        ranks = len(request.members) + len(request.parted)
        return RequestLife(
            attempt=request.spec.attempt,
            length_class=request.length_class,
            how=how,
            traceparent=request.spec.traceparent,
            arrived_s=request.arrived_s,
            phases=tuple(request.phases),
            ended_s=self.now_s,
            first_step_s=request.first_step_s,
            workers=request.workers + request.parted,
            scheme=request.scheme.name(ranks) if request.members else "",
        )

    def fail(self, request: Request, message: str, retryable: bool, *, withdraw: bool = True) -> None:
        self.end(request, "failed", withdraw=withdraw)
        self.emit(
            RequestFailed(
                request_id=request.request_id,
                attempt=request.spec.attempt,
                router_id=request.spec.router_id,
                message=message,
                retryable=retryable,
            )
        )

    def interrupt(self, request: Request, reason: str, *, withdraw: bool = True) -> None:
        """This attempt is lost; its router knows what was delivered and submits the rest."""
        if request.state in (RequestState.QUEUED, RequestState.INTERRUPTED):
            return
        self.counters["interrupted"] += 1
        self.counters["groups_lost"] += request.is_long
        if request.spec.attempt >= self.config.attempts_max:
            message = f"given up after {request.spec.attempt + 1} attempts; the last ended with: {reason}"
            self.fail(request, message, True, withdraw=withdraw)
            return
        self.abandon(request, withdraw=withdraw)
        self.move(request, RequestState.INTERRUPTED)
        self.awaiting.at(self.now_s + self.config.lease_s, request.request_id)
        self.save(request)
        self.ask_resubmission(request.request_id, request.spec.attempt, request.spec.router_id, reason)

    def ask_resubmission(self, request_id: RequestId, attempt: int, router_id: RouterId, reason: str) -> None:
        self.emit(RequestInterrupted(request_id=request_id, attempt=attempt, router_id=router_id, reason=reason))

    def release(self, worker_id: WorkerId, key: HoldKey) -> None:
        self.cluster.release(worker_id, key)
        if worker_id in self.cluster.replicas:
            self.policy.replica_eased(worker_id, self.cluster)
        else:
            self.policy.decoder_eased()

    # --- out -------------------------------------------------------------------------------------

    def take_out(self) -> list[SchedulerCommand]:
        """All that gathered, and the records that are out of date."""
        out, self.out = self.out, []
        if self._unsaved:
            out += map(self._record_of, self._unsaved.values())
            self._unsaved.clear()
        return out

    def save(self, request: Request) -> None:
        self._unsaved[request.request_id] = request

    def _record_of(self, request: Request) -> SaveRequest:
        return SaveRequest(
            record=RequestRecord(
                spec=request.spec,
                length_class=request.length_class,
                state=str(request.state),
                workers=request.workers,
                epoch=self.epoch,
            )
        )

    def emit(
        self,
        command: RequestAccepted
        | RequestRefused
        | RequestInterrupted
        | RequestFailed
        | RunPrefill
        | ExpectKv
        | DropRequest
        | FormGroup
        | GrowGroup
        | PartGroup
        | PauseGroup
        | ResumeGroup
        | SpillGroup
        | RestoreGroup
        | DissolveGroup,
    ) -> None:
        """Stamp a message with its cause and this scheduler's epoch, and send it."""
        # In place, though it is frozen: it was made for this call, and nobody else has seen it yet.
        cause = self.cause
        force_setattr(command, "cause", cause)
        force_setattr(command, "epoch", self.epoch)
        request_id = command.spec.request_id if isinstance(command, WITH_SPEC) else command.request_id
        self.stories.note(request_id, self.now_s, cause, command)
        self.out.append(command)

    def done_share(self, request: Request, prefilled_tokens: int) -> float:
        """Of a long's work; 0: nothing yet, or unknown."""
        if prefilled_tokens <= 0:
            return 0.0
        whole_s = self.planner.prefill_s(request.tokens, (1,))
        return self.planner.prefill_s(prefilled_tokens, (1,)) / whole_s if whole_s > 0.0 else 0.0

    def accept(self, request: Request) -> None:
        spec = request.spec
        self.emit(
            RequestAccepted(
                request_id=spec.request_id,
                attempt=spec.attempt,
                router_id=spec.router_id,
                length_class=request.length_class,
            )
        )

    def mind_release(self, request: Request, worker_id: WorkerId) -> None:
        """A running request whose KV went away where it still counted on it missed a message."""
        if request.is_long:
            if worker_id in request.workers:
                self.interrupt(request, f"{worker_id} no longer holds its KV")
        elif worker_id == request.decode_worker:
            self.interrupt(request, f"{worker_id} no longer holds its KV")
        elif worker_id == request.prefill_worker and request.state is RequestState.PREFILLING:
            # Handed over: what was said of it was lost. Its decode worker's heartbeats will tell.
            self.move(request, RequestState.HANDOFF)
