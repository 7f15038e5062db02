"""What the workers do, folded from the messages that the roles send each other. Pure: a message and the time it was
heard go in, segments of lanes come out.

    RunPrefill ─▶ waiting ─PrefillFinished─▶ prefill, handoff ─KvReleased─▶ decode ─DecodeFinished─▶
    FormGroup ─▶ forming ─SegmentRunning─▶ part ─SegmentPaused─▶ pause ─SegmentRunning─▶ part ─SegmentPrefilled─▶
    long_decode ─SegmentFinished, SegmentDropped, SegmentFailed─▶

A short's prefill is drawn when it is done, as long as its worker says it took: nobody says when it begins. Messages may
be lost, or heard in another order than they were sent (three subjects): whatever comes opens what it implies and closes
what it contradicts, and once a second the scheduler's own view corrects the rest (`reconcile`). Nothing here decides
anything for anybody; a wrong segment is a blemish on a page.

Bounds: `REQUESTS_MAX` requests, `LANES_MAX` lanes, `SEGMENTS_MAX` ended segments per lane.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import assert_never

from common.messages.cluster import WorkerLeft
from common.messages.decode import DecodeBusy, DecodeFailed, DecodeFinished
from common.messages.prefill import KvReleased, PrefillFailed, PrefillFinished, RunPrefill
from common.messages.requests import LengthClass
from common.messages.scheduling import RequestSubmitted
from common.messages.sp import (
    FormGroup,
    GroupFailed,
    GroupFinished,
    GroupPrefillFinished,
    SegmentDropped,
    SegmentFailed,
    SegmentFinished,
    SegmentPaused,
    SegmentPrefilled,
    SegmentRunning,
)
from common.messages.views import ClusterView, RequestView, WorkerView
from common.units import RequestId, WorkerId
from services.router.activity_records import (
    Change,
    Kind,
    LaneRow,
    RequestRow,
    Sample,
    SegmentRow,
    Summary,
)
from services.router.activity_times import FirstTokens

Heard = (
    RequestSubmitted
    | RunPrefill
    | PrefillFinished
    | PrefillFailed
    | KvReleased
    | DecodeFinished
    | DecodeBusy
    | DecodeFailed
    | FormGroup
    | SegmentRunning
    | SegmentPaused
    | SegmentPrefilled
    | SegmentFinished
    | SegmentFailed
    | SegmentDropped
    | GroupPrefillFinished
    | GroupFinished
    | GroupFailed
    | WorkerLeft
)

KEPT_S = 60.0
"""How long what has ended is told to a new page."""
GRACE_S = 2.0
"""A segment that the scheduler's view contradicts is believed for so long: the view may be the older one."""
RESOLUTION_S = 1e-4
"""Of the times that pages are told; what is shorter is nothing, but a handoff is one however short."""
REQUESTS_MAX = 16_384
LANES_MAX = 1_024
SEGMENTS_MAX = 512
HISTORY_MAX = 600

_LONG_STATES: dict[str, Kind] = {
    "forming": "forming",
    "running": "part",
    "pausing": "part",
    "paused": "pause",
    "spilling": "pause",
    "spilled": "pause",
    "restoring": "pause",
    "resuming": "pause",
    "decoding": "long_decode",
}
_SHORT_STATES: dict[str, Kind] = {"prefilling": "waiting", "handoff": "decode", "decoding": "decode"}


@dataclass(slots=True, eq=False)
class Tracked:
    """A request as far as it was heard of."""

    number: int
    request_id: RequestId
    submitted_s: float | None = None
    length_class: LengthClass = "short"
    prompt_tokens: int = 0
    attempt: int = 0
    decode_worker_id: WorkerId | None = None
    prefilled_s: float | None = None
    """When its first token was out, in this attempt."""
    answered: bool = False
    """Its first token was counted."""
    told: bool = False
    """Pages know its row."""
    open: dict[WorkerId, Span] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Span:
    """A segment."""

    number: int
    lane: Lane
    kind: Kind
    request: Tracked
    begin_s: float
    end_s: float | None = None
    detail: int = 0


@dataclass(slots=True, eq=False)
class Lane:
    """A worker. Known by name alone until the scheduler's view names it."""

    number: int
    worker_id: WorkerId
    role: str = "prefill"
    node: str = ""
    here: bool = True
    last_s: float = 0.0
    """Last seen in a view, or last drawn on."""
    kv: tuple[int, int, int] = (0, 0, 0)
    """Reserved, capacity, tokens queued."""
    open: dict[int, Span] = field(default_factory=dict)
    ended: deque[Span] = field(default_factory=lambda: deque(maxlen=SEGMENTS_MAX))


class Activity:
    """`handle`, `reconcile` and `scheduler_lost` change it; `take_change` says what is new, `whole` what is there."""

    def __init__(self, begin_s: float) -> None:
        self._begin_s = begin_s
        self._now_s = begin_s
        self._numbers = 0
        self._lanes: dict[WorkerId, Lane] = {}
        self._requests: OrderedDict[RequestId, Tracked] = OrderedDict()
        self._changed: dict[int, Span] = {}
        self._first_tokens = FirstTokens()
        self._summary: Summary | None = None
        self._summary_is_new = False
        self.history: deque[Sample] = deque(maxlen=HISTORY_MAX)

    def __repr__(self) -> str:
        return f"Activity(lanes={len(self._lanes)}, requests={len(self._requests)}, changed={len(self._changed)})"

    @property
    def is_changed(self) -> bool:
        return bool(self._changed) or self._summary_is_new

    # --- what is heard ---------------------------------------------------------------------------

    def handle(self, message: Heard, now_s: float) -> None:
        self._now_s = now_s
        match message:
            case RequestSubmitted():
                self._submitted(message)
            case RunPrefill():
                self._ordered(message)
            case PrefillFinished():
                self._prefilled(message)
            case KvReleased():
                self._released(message)
            case DecodeFinished():
                self._decoded(message)
            case PrefillFailed() | DecodeBusy() | DecodeFailed():
                self._ended_on(message.worker_id, message.request_id)
            case WorkerLeft():
                self._left(message.worker_id)
            case GroupPrefillFinished():
                self._answered(message.request_id)
                self._decodes_on(message.request_id, message.members)
            case GroupFinished() | GroupFailed():
                self._forget(message.request_id)
            case _:
                self._of_a_long(message)

    def _of_a_long(
        self,
        message: FormGroup
        | SegmentRunning
        | SegmentPaused
        | SegmentPrefilled
        | SegmentFinished
        | SegmentFailed
        | SegmentDropped,
    ) -> None:
        match message:
            case FormGroup():
                request = self._request(message.spec.request_id)
                request.length_class, request.prompt_tokens = "long", message.spec.prompt.tokens
                for worker_id in message.members:
                    self._open(worker_id, request, "forming", self._now_s)
            case SegmentRunning():
                self._open(message.worker_id, self._long(message.request_id), "part", self._now_s)
            case SegmentPaused():
                request = self._long(message.request_id)
                self._open(message.worker_id, request, "pause", self._now_s, message.prefilled_tokens)
            case SegmentPrefilled():
                request = self._long(message.request_id)
                self._open(message.worker_id, request, "long_decode", self._now_s, request.prompt_tokens)
            case SegmentFinished() | SegmentFailed() | SegmentDropped():
                self._ended_on(message.worker_id, message.request_id)
            case _:
                assert_never(message)

    def _submitted(self, message: RequestSubmitted) -> None:
        request = self._request(message.spec.request_id)
        request.prompt_tokens = request.prompt_tokens or message.spec.prompt.tokens
        if request.submitted_s is None and not request.answered:
            request.submitted_s, request.told = self._now_s, False  # maybe heard after the order that it led to
        request.answered = request.answered or message.spec.generated_before > 0
        if message.spec.attempt > request.attempt:
            request.attempt, request.prefilled_s = message.spec.attempt, None

    def _ordered(self, message: RunPrefill) -> None:
        spec = message.spec
        request = self._request(spec.request_id)
        request.prompt_tokens, request.decode_worker_id = spec.prompt.tokens, message.decode_worker_id
        if request.prefilled_s is None:  # else its answer was heard before the order
            self._open(message.worker_id, request, "waiting", self._now_s, spec.prompt.tokens)

    def _prefilled(self, message: PrefillFinished) -> None:
        request = self._request(message.request_id)
        waiting = request.open.get(message.worker_id)
        in_pass_s = max(message.in_worker_s - message.waited_s, message.compute_s)
        started_s = max(self._now_s - in_pass_s, self._begin_s if waiting is None else waiting.begin_s)
        self._close(message.worker_id, request, started_s)
        done = self._draw(message.worker_id, request, "prefill", started_s, request.prompt_tokens)
        self._end(done, self._now_s)
        self._answered(message.request_id)
        request.prefilled_s = self._now_s
        if message.finish_reason is not None:
            self._forget(message.request_id)
        elif request.decode_worker_id == message.worker_id:
            self._open(message.worker_id, request, "decode", self._now_s)

    def _released(self, message: KvReleased) -> None:
        request = self._requests.get(message.request_id)
        if request is None:
            return
        decoder, prefilled_s = request.decode_worker_id, request.prefilled_s
        handed_over = message.attempt == request.attempt and decoder not in (None, message.worker_id)
        if not handed_over or prefilled_s is None or decoder is None or decoder in request.open:
            self._ended_on(message.worker_id, message.request_id)
            return
        to = self._lane(decoder, "decode")
        handoff = self._draw(message.worker_id, request, "handoff", prefilled_s, to.number)
        self._end(handoff, max(self._now_s, prefilled_s + RESOLUTION_S))  # both words may be heard at once
        self._open(decoder, request, "decode", self._now_s)

    def _decoded(self, message: DecodeFinished) -> None:
        request = self._requests.get(message.request_id)
        if request is None:
            return
        if not request.open and request.prefilled_s is not None:  # heard before its KV was said to be handed over
            self._lane(message.worker_id, "decode")
            self._open(message.worker_id, request, "decode", request.prefilled_s)
        self._ended_on(message.worker_id, message.request_id)
        self._forget(message.request_id)

    def _decodes_on(self, request_id: RequestId, members: Sequence[WorkerId]) -> None:
        """Rank 0 may have taken in the KV of the others."""
        request = self._requests.get(request_id)
        if request is not None and members:
            for worker_id in [open_on for open_on in request.open if open_on not in members]:
                self._close(worker_id, request, self._now_s)

    def _answered(self, request_id: RequestId) -> None:
        request = self._requests.get(request_id)
        if request is not None and not request.answered and request.submitted_s is not None:
            self._first_tokens.add(request.length_class, self._now_s, self._now_s - request.submitted_s)
        if request is not None:
            request.answered = True

    def _left(self, worker_id: WorkerId) -> None:
        lane = self._lanes.get(worker_id)
        if lane is not None:
            lane.here = False
            self._clear(lane)

    # --- what the scheduler sees -----------------------------------------------------------------

    def reconcile(self, view: ClusterView, now_s: float) -> None:
        """Lanes are the workers of the view; what it contradicts for `GRACE_S` is wrong; what was never heard of,
        because it began earlier or a message was lost, is taken from it."""
        self._now_s = now_s
        seen = {worker.profile.worker_id for worker in view.workers}
        for lane in list(self._lanes.values()):
            if lane.worker_id not in seen:
                self._missing(lane)
        for worker in view.workers:
            self._worker(worker)
        for request in view.requests:
            self._seen(request)
        self._summarize(view)

    def scheduler_lost(self, now_s: float) -> None:
        """It does not answer. What the workers say is shown all the same."""
        self._now_s = now_s
        self._summarize(None)

    def _missing(self, lane: Lane) -> None:
        if lane.here and self._now_s - lane.last_s <= GRACE_S:
            return  # heard of for the first time a moment ago
        lane.here = False
        self._clear(lane)
        if self._now_s - lane.last_s > KEPT_S:
            del self._lanes[lane.worker_id]

    def _worker(self, worker: WorkerView) -> None:
        profile = worker.profile
        lane = self._lane(profile.worker_id, profile.role)
        lane.role, lane.node, lane.here, lane.last_s = profile.role, profile.node, True, self._now_s
        lane.kv = (worker.kv_reserved_tokens, profile.kv_capacity_tokens, worker.queued_tokens)
        held = set(worker.requests)
        for span in list(lane.open.values()):
            if span.request.request_id not in held and self._now_s - span.begin_s > GRACE_S:
                self._close(profile.worker_id, span.request, self._now_s)

    def _seen(self, seen: RequestView) -> None:
        is_long = seen.length_class == "long"
        kind = (_LONG_STATES if is_long else _SHORT_STATES).get(seen.state)
        known = self._requests.get(seen.request_id)
        if kind is None or seen.age_s <= GRACE_S or (known is not None and not is_long):
            return
        request = known or self._request(seen.request_id)
        request.length_class, request.prompt_tokens = seen.length_class, seen.prompt_tokens
        if known is None:
            request.answered = True  # maybe; what began unheard is not measured
            request.attempt = seen.attempt
            request.decode_worker_id = None if is_long or not seen.workers else seen.workers[-1]
            request.prefilled_s = self._now_s if kind == "decode" else None
        for worker_id in seen.workers if is_long else seen.workers[:1] if kind == "waiting" else seen.workers[-1:]:
            span = request.open.get(worker_id)
            if span is None or (span.kind != kind and self._now_s - span.begin_s > GRACE_S):
                self._open(worker_id, request, kind, self._now_s, seen.prompt_tokens)

    def _summarize(self, view: ClusterView | None) -> None:
        sample = Sample(
            self._since(self._now_s),
            view.queued_shorts if view else None,
            view.queued_longs if view else None,
            self._first_tokens.p99_s("short", self._now_s),
            self._first_tokens.p99_s("long", self._now_s),
        )
        self.history.append(sample)
        self._summary_is_new = True
        self._summary = Summary(
            scheduler_answers=view is not None,
            coordinator_present=view is not None and view.coordinator_present,
            policy=view.policy if view else "",
            lanes=tuple(_lane_row(lane) for lane in self._lanes.values()),
            strangers=tuple((s.worker_id, s.reason) for s in view.strangers) if view else (),
            counters=dict(view.counters) if view else {},
            decision_p99_s=view.decision_p99_s if view else 0.0,
            requests_running=sum(request.state != "queued" for request in view.requests) if view else 0,
            sample=sample,
        )

    # --- what pages are told ---------------------------------------------------------------------

    def take_change(self, now_s: float) -> Change:
        """What is new since the last call."""
        spans, self._changed = list(self._changed.values()), {}
        summary = self._summary if self._summary_is_new else None
        self._summary_is_new = False
        requests: list[RequestRow] = []
        for span in spans:
            if not span.request.told:
                span.request.told = True
                requests.append(self._request_row(span.request))
        rows = tuple(self._row(span) for span in spans)
        return Change(now_s=self._since(now_s), requests=tuple(requests), segments=rows, summary=summary)

    def whole(self, now_s: float) -> Change:
        """All that goes on, and what has ended within `KEPT_S`. Pages are told before the next `take_change`."""
        spans = [span for lane in self._lanes.values() for span in (*lane.ended, *lane.open.values())]
        spans = [span for span in spans if span.end_s is None or now_s - span.end_s <= KEPT_S]
        requests = {span.request.number: span.request for span in spans}
        return Change(
            now_s=self._since(now_s),
            requests=tuple(self._request_row(request) for request in requests.values()),
            segments=tuple(self._row(span) for span in spans),
            summary=self._summary,
        )

    def _row(self, span: Span) -> SegmentRow:
        end_s = None if span.end_s is None else self._since(span.end_s)
        begin_s = self._since(span.begin_s)
        return SegmentRow(span.number, span.lane.number, span.kind, span.request.number, begin_s, end_s, span.detail)

    def _request_row(self, request: Tracked) -> RequestRow:
        submitted_s = None if request.submitted_s is None else self._since(request.submitted_s)
        return RequestRow(request.number, request.request_id, request.length_class, request.prompt_tokens, submitted_s)

    def _since(self, at_s: float) -> float:
        return round(at_s - self._begin_s, 4)

    # --- books -----------------------------------------------------------------------------------

    def _request(self, request_id: RequestId) -> Tracked:
        request = self._requests.get(request_id)
        if request is None:
            request = self._requests[request_id] = Tracked(self._number(), request_id)
            if len(self._requests) > REQUESTS_MAX:
                self._forget(next(iter(self._requests)))
        return request

    def _long(self, request_id: RequestId) -> Tracked:
        request = self._request(request_id)
        request.length_class = "long"
        return request

    def _lane(self, worker_id: WorkerId, role: str = "prefill") -> Lane:
        lane = self._lanes.get(worker_id)
        if lane is None:
            lane = self._lanes[worker_id] = Lane(self._number(), worker_id, role, last_s=self._now_s)
            if len(self._lanes) > LANES_MAX:
                self._clear(self._lanes.pop(next(iter(self._lanes))))
        return lane

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers

    def _open(self, worker_id: WorkerId, request: Tracked, kind: Kind, begin_s: float, detail: int = 0) -> None:
        """It goes on from here on; what the request did on this worker ends."""
        before = request.open.get(worker_id)
        if before is not None and before.kind == kind:
            return
        self._close(worker_id, request, begin_s)
        span = self._draw(worker_id, request, kind, begin_s, detail)
        request.open[worker_id] = span
        span.lane.open[span.number] = span

    def _draw(self, worker_id: WorkerId, request: Tracked, kind: Kind, begin_s: float, detail: int) -> Span:
        lane = self._lane(worker_id)
        lane.last_s = self._now_s
        span = Span(self._number(), lane, kind, request, begin_s, detail=detail)
        self._changed[span.number] = span
        return span

    def _close(self, worker_id: WorkerId, request: Tracked, end_s: float) -> None:
        span = request.open.pop(worker_id, None)
        if span is not None:
            del span.lane.open[span.number]
            self._end(span, end_s)

    def _end(self, span: Span, end_s: float) -> None:
        span.end_s = max(span.begin_s, end_s)
        span.lane.ended.append(span)
        self._changed[span.number] = span

    def _ended_on(self, worker_id: WorkerId, request_id: RequestId) -> None:
        request = self._requests.get(request_id)
        if request is not None:
            self._close(worker_id, request, self._now_s)

    def _clear(self, lane: Lane) -> None:
        for span in list(lane.open.values()):
            self._close(lane.worker_id, span.request, self._now_s)

    def _forget(self, request_id: RequestId) -> None:
        request = self._requests.pop(request_id, None)
        if request is not None:
            for worker_id in list(request.open):
                self._close(worker_id, request, self._now_s)


def _lane_row(lane: Lane) -> LaneRow:
    return LaneRow(lane.number, lane.worker_id, lane.role, lane.node, lane.here, *lane.kv)
