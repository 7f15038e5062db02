"""What the workers did, out of messages overheard on the bus.

Everything the roles tell each other of a request's life passes by here; the times are those at which it was heard
(tenths of a millisecond late), except where a worker says how long something took. The lanes have the names and kinds
of the simulator's (`simulator/result.py`), so that one report draws both.

The live page folds the same messages (`services/router/activity.py`), but shows the last minute of a cluster that it
corrects by the scheduler's views; here nothing is forgotten, and what counts is the life of each request.

A long's prefill stands still from the word of a worker that it stopped to its word that it runs again; the long itself
from the first to the last of its group, as the scheduler counts it (`GroupPaused` to `GroupResumed`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from common.messages.base import Message
from common.messages.decode import DecodeFailed, DecodeFinished
from common.messages.prefill import PrefillFailed, PrefillFinished, RunPrefill
from common.messages.sp import (
    FormGroup,
    GroupFailed,
    GroupFinished,
    GroupPaused,
    GroupPrefillFinished,
    GroupResumed,
    SegmentDropped,
    SegmentFailed,
    SegmentFinished,
    SegmentPaused,
    SegmentPrefilled,
    SegmentRunning,
)
from common.runtime import subjects
from common.units import RequestId, WorkerId
from loadtest.simulator.result import Span

SUBJECTS = (subjects.SCHEDULER, subjects.COORDINATOR, subjects.worker(WorkerId("*")))
KINDS: tuple[type[Message], ...] = (
    *(RunPrefill, PrefillFinished, PrefillFailed, DecodeFinished, DecodeFailed),
    *(FormGroup, GroupPaused, GroupResumed, GroupPrefillFinished, GroupFinished, GroupFailed),
    *(SegmentRunning, SegmentPaused, SegmentPrefilled, SegmentFinished, SegmentFailed, SegmentDropped),
)
SPANS_MAX = 2_000_000
"""Kept; further ones are counted."""


@dataclass(slots=True)
class Life:
    """Of one request, what was heard. Times of the listener's clock."""

    started_s: float | None = None
    """Its prefill began."""
    pauses: int = 0
    suspended_s: float = 0.0
    paused_since_s: float | None = None
    members: tuple[WorkerId, ...] = ()
    """Of its group; empty: a short, or not heard."""
    running: set[WorkerId] = field(default_factory=set)
    """Of its members, who have said that they run."""


class Lanes:
    """Fed with messages in the order in which they were heard; pure."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.lives: dict[RequestId, Life] = {}
        self.dropped = 0
        """Spans beyond the limit."""
        self.ordered_s: dict[tuple[RequestId, WorkerId], float] = {}
        """When a prefill was ordered."""
        self._decoding_s: dict[RequestId, float] = {}
        """Shorts: since when they decode."""
        self._doing: dict[tuple[RequestId, WorkerId], tuple[str, float]] = {}
        """Longs: what a member does, and since when."""

    def hear(self, at_s: float, message: Message) -> None:
        """Take one in."""
        match message:
            case RunPrefill(spec=spec, worker_id=worker_id):
                self.ordered_s[spec.request_id, worker_id] = at_s
            case PrefillFinished():
                self._prefilled(at_s, message)
            case PrefillFailed(request_id=name, worker_id=worker_id):
                self.ordered_s.pop((name, worker_id), None)
            case (
                DecodeFinished(request_id=name, worker_id=worker_id)
                | DecodeFailed(request_id=name, worker_id=worker_id)
            ):
                if (since_s := self._decoding_s.pop(name, None)) is not None:
                    self._span(f"{worker_id} decode", "short decode", since_s, at_s, name)
            case _:
                self._hear_of_group(at_s, message)

    def close(self, at_s: float) -> None:
        """End what is open: the run is over."""
        for name, worker_id in list(self._doing):
            self._turn(at_s, name, worker_id, None)
        for life in self.lives.values():
            _resumed(life, at_s)

    def _prefilled(self, at_s: float, message: PrefillFinished) -> None:
        name, worker_id = message.request_id, message.worker_id
        ordered_s = self.ordered_s.pop((name, worker_id), at_s - message.in_worker_s)
        begun_s = min(ordered_s + message.waited_s, at_s)
        life = self._life(name)
        life.started_s = begun_s if life.started_s is None else life.started_s
        self._span(worker_id, "short prefill", begun_s, at_s, name)
        if message.finish_reason is None:
            self._decoding_s[name] = at_s

    def _hear_of_group(self, at_s: float, message: Message) -> None:
        match message:
            case FormGroup(spec=spec, members=members):
                self._life(spec.request_id).members = members
            case GroupPaused(request_id=name):
                life = self._life(name)
                if life.paused_since_s is None:  # else said again: by a heartbeat, or its KV was elsewhere meanwhile
                    life.pauses += 1
                    life.paused_since_s = at_s
            case GroupResumed(request_id=name):
                _resumed(self._life(name), at_s)
            case GroupPrefillFinished(request_id=name, members=members):
                _resumed(self._life(name), at_s)
                for worker_id in self._members_at_work(name):
                    decodes = not members or worker_id in members
                    self._turn(at_s, name, worker_id, "long decode" if decodes else None)
            case GroupFinished(request_id=name) | GroupFailed(request_id=name):
                _resumed(self._life(name), at_s)
                for worker_id in self._members_at_work(name):
                    self._turn(at_s, name, worker_id, None)
            case SegmentRunning(request_id=name, worker_id=worker_id):
                self._runs(at_s, name, worker_id)
            case SegmentPaused(request_id=name, worker_id=worker_id):
                self._turn(at_s, name, worker_id, "paused")
            case SegmentPrefilled(request_id=name, worker_id=worker_id):
                self._turn(at_s, name, worker_id, "long decode")
            case (
                SegmentFinished(request_id=name, worker_id=worker_id)
                | SegmentFailed(request_id=name, worker_id=worker_id)
                | SegmentDropped(request_id=name, worker_id=worker_id)
            ):
                self._turn(at_s, name, worker_id, None)
            case _:
                pass

    def _runs(self, at_s: float, name: RequestId, worker_id: WorkerId) -> None:
        self._turn(at_s, name, worker_id, "long prefill")
        life = self._life(name)
        life.running.add(worker_id)
        if life.started_s is None and life.running >= set(life.members):
            life.started_s = at_s

    def _turn(self, at_s: float, name: RequestId, worker_id: WorkerId, doing: str | None) -> None:
        """From now on this member does that for the long."""
        before = self._doing.pop((name, worker_id), None)
        if before is not None:
            self._span(worker_id, before[0], before[1], at_s, name)
        if doing is not None:
            self._doing[name, worker_id] = (doing, at_s)

    def _members_at_work(self, name: RequestId) -> list[WorkerId]:
        return [worker_id for other, worker_id in self._doing if other == name]

    def _span(self, lane: str, kind: str, begin_s: float, end_s: float, name: RequestId) -> None:
        if len(self.spans) >= SPANS_MAX:
            self.dropped += 1
            return
        self.spans.append(Span(lane, kind, begin_s, end_s, name))

    def _life(self, name: RequestId) -> Life:
        return self.lives.setdefault(name, Life())


def shifted(spans: list[Span], zero_s: float) -> list[Span]:
    """The same, after time zero; what ended before is left out."""
    return [
        span._replace(begin_s=span.begin_s - zero_s, end_s=span.end_s - zero_s) for span in spans if span.end_s > zero_s
    ]


def life_of(lives: Mapping[RequestId, Life], name: str) -> Life:
    """An empty one, if nothing was heard of the request."""
    return lives.get(RequestId(name), Life())


def _resumed(life: Life, at_s: float) -> None:
    if life.paused_since_s is not None:
        life.suspended_s += at_s - life.paused_since_s
        life.paused_since_s = None
