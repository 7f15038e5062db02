"""A simulated SP group: a long that prefills and decodes on several replicas at once.

It answers the scheduler as `common.policy.sp_coordinator` and its workers do together: `GroupFormed`; `GroupPaused`
when every rank stands, which is when the step that runs has ended (uniform in the longest step), or
`GroupPrefillFinished` if the prefill ends first and the pause is void; `GroupResumed`, also while a member still
finishes a pass of shorts; `GroupGrown` (see `growth.py`); `GroupParted`, when its first member has gathered all KV (the
others' is free then); `GroupFinished`; `GroupFailed` after a `DissolveGroup`.

The prefill runs at rate 1, slower while other things decode on its members (see `replica.py`), and only while every
member computes it. A decode step takes what the model says for the layout, and longer by what the slowest
member's other work adds; it stands still while any member runs an exclusive pass.
"""

from __future__ import annotations

import math
from collections import Counter
from enum import Enum, auto

from common.messages.sp import (
    GroupFailed,
    GroupFinished,
    GroupFormed,
    GroupGrown,
    GroupParted,
    GroupPaused,
    GroupPrefillFinished,
    GroupResumed,
)
from common.policy import colocation
from common.policy.long_planner import Layout
from common.policy.scheduler_io import SchedulerEvent
from loadtest.simulator.growth import Progress, Try, names_of
from loadtest.simulator.job import Job
from loadtest.simulator.replica import Replica
from loadtest.simulator.site import Site
from loadtest.simulator.timeline import Countdown

COORDINATOR_HOPS = 2
"""Scheduler to coordinator to workers, and back."""


class State(Enum):
    RUNNING = auto()
    """It may run; it does when no member is held up by shorts."""
    PAUSING = auto()
    """Told to stop, in its last step."""
    PAUSED = auto()
    DECODING = auto()
    GONE = auto()


class Group:
    __slots__ = (
        "_blocked",
        "_decode",
        "_decode_step_s",
        "_drags",
        "_extras",
        "_gathers",
        "_parabola",
        "_parts",
        "_prefill",
        "_progress",
        "_resume_asked",
        "_since_s",
        "_site",
        "_state",
        "_step_s",
        "_trying",
        "alone_s",
        "chunk_s",
        "job",
        "kv_share",
        "members",
        "network_s",
        "runs",
        "stands",
    )

    def __init__(self, site: Site, job: Job, members: tuple[Replica, ...], *, gathers: bool = False) -> None:
        self._site = site
        self.job = job
        self._gathers = gathers
        """The first member has room for all KV."""
        self._parts = 0
        """Told to leave all KV to it, so often; 0: not, or it has."""
        self._set_members(members)
        self._progress = Progress(site.longs.prefill_s, job.tokens, layout_of(members))
        self._prefill = Countdown(site.timeline, self._progress.whole_s, self._prefilled)
        self._trying: Try | None = None
        """To grow."""
        self._decode = Countdown(site.timeline, job.output_tokens - 1, self._decoded)
        self._drags: dict[str, float] = {}
        """Members with other decodes → how long a step of those takes."""
        self._extras: dict[str, float] = {}
        """Members with other work → how much longer a decode step takes there."""
        self._blocked = 0
        """Members held up by shorts."""
        self._since_s = 0.0
        self._resume_asked = False
        self._parabola: tuple[float, float] | None = None
        self._state = State.RUNNING
        self.runs = False
        """The prefill computes now."""
        self.stands = False
        """Paused: its members are free for shorts."""

    def _set_members(self, members: tuple[Replica, ...]) -> None:
        """And what follows from them."""
        site, job, layout = self._site, self.job, layout_of(members)
        kv_tokens = job.tokens + job.output_tokens // 2
        self.members = members
        self.kv_share = kv_tokens // len(members)
        """KV on each member, on average over the decode."""
        self.chunk_s = site.longs.chunk_s(job.tokens, layout)
        self.alone_s = site.costs.shared_step_s(0, 1, self.kv_share)
        """A member's part of a decode step, alone."""
        self._step_s = site.longs.step_s(job.tokens, layout)
        self._decode_step_s = site.longs.decode_step_s(kv_tokens, layout)
        self.network_s = max(0.0, self._decode_step_s - self.alone_s)
        """What the exchange between members adds to a decode step."""

    # --- orders ----------------------------------------------------------------------------------

    def form(self) -> None:
        job = self.job
        for member in self.members:
            whole = self._gathers and member is self.members[0]
            member.kv.reserve(job.request_id, job.spec.kv_tokens // (1 if whole else len(self.members)))
            member.seat(self)
        self._since_s = self._site.timeline.now_s
        self._tell(GroupFormed(request_id=job.request_id, attempt=job.spec.attempt))
        self._let_run()

    def pause(self) -> None:
        if self._state is State.PAUSING:
            self._resume_asked = False
        if self._state is not State.RUNNING:
            return
        self._state = State.PAUSING
        self._stay_as_it_is()
        if not self.runs:
            self._stand(0.0)
            return
        latency_s = self._site.random.uniform(0.0, self._step_s)
        self._site.timeline.at(self._site.timeline.now_s + latency_s, self._stand, latency_s)

    def _stand(self, latency_s: float) -> None:
        if self._state is not State.PAUSING:
            return  # the prefill ended first
        if self.runs:
            self._halt()
            self._since_s = self._site.timeline.now_s
        self._state = State.PAUSED
        self.stands = True
        job = self.job
        job.pauses += 1
        left_s, progress = max(0.0, self._prefill.left), self._progress
        share = 1.0 - left_s / progress.whole_s
        self._tell(
            GroupPaused(
                request_id=job.request_id,
                attempt=job.spec.attempt,
                step=int(share * progress.whole_s / self._step_s),
                prefilled_tokens=int(progress.done(left_s)) if progress.has_grown else self._tokens_done(share),
                pause_latency_s=latency_s,
            )
        )
        for member in self.members:
            member.start_pass()
        if self._resume_asked:
            self.resume()

    def _tokens_done(self, share: float) -> int:
        """The length of a prompt that would take one replica that share of the time of the whole: so the scheduler
        reads it. Taken from a parabola through the times of the whole and of half of it."""
        prefill_s, tokens = self._site.longs.prefill_s, self.job.tokens
        if self._parabola is None:
            whole_s, half_s = prefill_s(tokens, (1,)), prefill_s(max(1, tokens // 2), (1,))
            square = max(0.0, 2.0 * (whole_s - 2.0 * half_s)) / tokens**2
            self._parabola = (whole_s / tokens - square * tokens, square)
        linear, square = self._parabola
        sought_s = share * (linear + square * tokens) * tokens
        if square * tokens < 1e-6 * linear:
            return int(sought_s / linear)
        return int((math.sqrt(linear * linear + 4.0 * square * sought_s) - linear) / (2.0 * square))

    def resume(self) -> None:
        if self._state is State.PAUSING:
            self._resume_asked = True
        if self._state is not State.PAUSED:
            return
        self._resume_asked = False
        self._state = State.RUNNING
        self.stands = False
        self._tell(GroupResumed(request_id=self.job.request_id, attempt=self.job.spec.attempt))
        self._let_run()

    def grow(self, tried: Try) -> None:
        """If it computes, at the end of the chunk."""
        if not self.runs or self._trying is not None:
            self._tell_grown(tried, self.members)
            return
        self._trying = tried
        timeline = self._site.timeline
        timeline.at(timeline.now_s + self._site.random.uniform(0.0, self.chunk_s), self._chunk_ended, tried)

    def _chunk_ended(self, tried: Try) -> None:
        if self._trying is not tried:
            return
        newcomers = tried.newcomers
        if not self.runs or any(member.is_held_up for member in newcomers):
            self._stay_as_it_is()
            return
        self._trying = None
        self._spans("long prefill", self._since_s)
        self._since_s = self._site.timeline.now_s
        self._prefill.set_rate(0.0)
        self._set_members(tried.members)
        self._prefill.change_to(self._progress.grow(self._prefill.left, layout_of(self.members)))
        for member in newcomers:
            member.seat(self)
            member.long_begins()
        for member in self.members:
            if member.decodes:
                member.pace()
        self._set_prefill_rate()
        self._tell_grown(tried, self.members)

    def _stay_as_it_is(self) -> None:
        """If it is about to grow."""
        tried, self._trying = self._trying, None
        if tried is not None:
            self._tell_grown(tried, self.members)

    def _tell_grown(self, tried: Try, members: tuple[Replica, ...]) -> None:
        request_id, attempt = self.job.request_id, self.job.spec.attempt
        tokens = int(self._progress.done(max(0.0, self._prefill.left)))
        self._tell(
            GroupGrown(
                request_id=request_id,
                attempt=attempt,
                growth=tried.number,
                members=names_of(members),
                prefilled_tokens=tokens,
            )
        )

    def part(self) -> None:
        """Leave all KV to the first member, with the next chunk that it computes."""
        if self._state is State.DECODING or self._state is State.GONE or not self._gathers or len(self.members) < 2:
            self._tell_parted()
            return
        self._stay_as_it_is()
        self._parts += 1
        if self.runs:
            self._gather()

    def _gather(self) -> None:
        """Once the chunk that runs is done, the next one does."""
        timeline = self._site.timeline
        rest_s = self._site.random.uniform(0.0, self.chunk_s)
        timeline.at(timeline.now_s + rest_s + self.chunk_s + self._gather_s(), self._gathered, self._parts)

    def _gather_s(self) -> float:
        """What bringing the KV adds: every token's once, as a decode step reads it, from the others."""
        return self.alone_s * (len(self.members) - 1)

    def _gathered(self, parts: int) -> None:
        if parts != self._parts or not self.runs:
            return  # it is paused, and gathers when it runs again; or its prefill has ended
        self._spans("long prefill", self._since_s)
        self._since_s = self._site.timeline.now_s
        self._prefill.set_rate(0.0)
        self._prefill.change_to(self._progress.gather(self._prefill.left))
        self._leave_to_the_first(computing=True)
        self._set_prefill_rate()
        self._tell_parted()

    def _leave_to_the_first(self, *, computing: bool) -> None:
        """The others have nothing to do with it any more."""
        self._parts = 0
        others = self.members[1:]
        self._set_members(self.members[:1])
        for member in others:
            self._drags.pop(member.worker_id, None)
            self._extras.pop(member.worker_id, None)
            member.kv.free(self.job.request_id)
            if computing:
                member.long_rests()
            member.unseat()
        for member in others:
            member.pace()
            member.start_pass()

    def _tell_parted(self) -> None:
        job = self.job
        self._tell(
            GroupParted(
                request_id=job.request_id,
                attempt=job.spec.attempt,
                members=names_of(self.members),
                prefilled_tokens=int(self._progress.done(max(0.0, self._prefill.left))),
            )
        )

    def dissolve(self) -> None:
        """Wherever it stands."""
        if self._state is State.GONE:
            return
        self._stay_as_it_is()
        if self.runs:
            self._halt()
        prefilled, self._state = self._state is State.DECODING, State.GONE
        self.stands = False
        self._set_decode_rate(0.0)
        self._leave(decoded=prefilled)
        reason = "dissolved as asked"
        self._tell(GroupFailed(request_id=self.job.request_id, attempt=self.job.spec.attempt, reason=reason))

    # --- prefill ---------------------------------------------------------------------------------

    def _let_run(self) -> None:
        self._blocked = sum(member.is_held_up for member in self.members)
        if not self._blocked:
            self._go()

    def member_free(self) -> None:
        """Nothing there is before this long any more."""
        self._blocked -= 1
        if not self._blocked and self._state is State.RUNNING:
            self._go()

    def _go(self) -> None:
        now_s = self._site.timeline.now_s
        job = self.job
        if job.prefill_started_s is None:
            job.prefill_started_s = now_s
        else:
            job.suspended_s += now_s - self._since_s
            self._spans("paused", self._since_s)
        self.runs = True
        self._since_s = now_s
        for member in self.members:
            member.long_begins()
            if member.decodes:
                member.pace()
        self._set_prefill_rate()
        if self._parts:
            self._gather()

    def _halt(self) -> None:
        """It computes no more, for now or for good."""
        self.runs = False
        self._prefill.set_rate(0.0)
        self._spans("long prefill", self._since_s)
        for member in self.members:
            member.long_rests()
            if member.decodes:
                member.pace()

    def set_drag(self, member: Replica, step_s: float) -> None:
        """Decode steps of others on a member take so long, each; 0: there are none."""
        if self._drags.get(member.worker_id, 0.0) == step_s:
            return
        if step_s:
            self._drags[member.worker_id] = step_s
        else:
            del self._drags[member.worker_id]
        if self.runs:
            self._set_prefill_rate()

    def _set_prefill_rate(self) -> None:
        drag_s = max(self._drags.values(), default=0.0)
        turn_s = self.turn_s(drag_s)
        self._prefill.set_rate(self._speed() * turn_s / (turn_s + drag_s))

    def turn_s(self, step_s: float) -> float:
        """How long it prefills between two decode steps of others that take so long each."""
        return min(self.chunk_s, colocation.turn_s(step_s, self._site.limits.long_itl_s_max))

    def _prefilled(self) -> None:
        job, now_s = self.job, self._site.timeline.now_s
        self._halt()
        self._stay_as_it_is()
        self._state = State.DECODING
        if self._gathers and len(self.members) > 1:
            self._leave_to_the_first(computing=False)
        job.first_token_s = now_s
        last = job.output_tokens <= 1
        compute_s = now_s - (job.prefill_started_s or 0.0) - job.suspended_s
        self._tell(
            GroupPrefillFinished(
                request_id=job.request_id,
                attempt=job.spec.attempt,
                compute_s=compute_s,
                finish_reason="length" if last else None,
                members=names_of(self.members),
            )
        )
        for member in self.members:
            member.unseat()
            if not last:
                member.join_decode(self)
        if last:
            self._decoded()
            return
        self._since_s = now_s
        self._set_decode_pace()
        for member in self.members:
            member.pace()
            member.start_pass()

    # --- decode ----------------------------------------------------------------------------------

    def set_extra(self, member: Replica, extra_s: float) -> None:
        """A decode step takes so much longer on this member, infinitely while it stands still."""
        extras = self._extras
        if extra_s <= 0.0:
            if extras.pop(member.worker_id, None) is None:
                return
        elif extras.get(member.worker_id) == extra_s:
            return
        else:
            extras[member.worker_id] = extra_s
        if self._state is State.DECODING:
            self._set_decode_pace()

    def speed_changed(self) -> None:
        """A member shares its core with others than before."""
        if self.runs:
            self._set_prefill_rate()
        elif self._state is State.DECODING:
            self._set_decode_pace()

    def _speed(self) -> float:
        """Of the slowest member."""
        return 1.0 if self._site.cores is None else min(member.speed for member in self.members)

    def _set_decode_pace(self) -> None:
        step_s = self._decode_step_s + max(self._extras.values(), default=0.0)
        self._set_decode_rate(0.0 if math.isinf(step_s) else self._speed() / step_s)

    def _set_decode_rate(self, rate: float) -> None:
        before = self._decode.rate
        if before == rate:
            return
        self._decode.set_rate(rate)  # first: on shared cores, a member that begins changes speeds
        if rate == 0.0:
            for member in self.members:
                member.long_rests()
        elif before == 0.0:
            for member in self.members:
                member.long_begins()

    def _decoded(self) -> None:
        job = self.job
        if job.output_tokens > 1:
            for member in self.members:
                member.long_rests()
            self._spans("long decode", self._since_s)
        self._state = State.GONE
        job.finished_s = self._site.timeline.now_s
        self._leave(decoded=job.output_tokens > 1)
        self._tell(
            GroupFinished(
                request_id=job.request_id,
                attempt=job.spec.attempt,
                finish_reason="length",
                generated=job.output_tokens,
            )
        )

    def _leave(self, *, decoded: bool) -> None:
        """Nothing of it stays on its members."""
        for member in self.members:
            member.kv.free(self.job.request_id)
            if decoded:
                member.leave_decode(self)
            else:
                member.unseat()
        for member in self.members:
            member.pace()
            member.start_pass()

    # --- words -----------------------------------------------------------------------------------

    def _tell(self, word: SchedulerEvent) -> None:
        self._site.tell(((self.job, word),), hops=COORDINATOR_HOPS)

    def _spans(self, kind: str, begin_s: float) -> None:
        recorder, now_s = self._site.recorder, self._site.timeline.now_s
        if recorder is None or now_s <= begin_s:
            return
        for member in self.members:
            lane = f"{member.worker_id} decode" if kind == "long decode" else member.worker_id
            recorder.span(lane, kind, begin_s, now_s, self.job.request_id)


def layout_of(members: tuple[Replica, ...]) -> Layout:
    """Members per node, largest first."""
    return tuple(sorted(Counter(member.node for member in members).values(), reverse=True))
