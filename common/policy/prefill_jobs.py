"""The requests a prefill worker has in hand, and their lives as tables.

A short is opened (prompt fetched, KV reserved), waits its turn, runs in one or more passes, and is handed over, or
decodes here (no disaggregation); what it leaves early goes through `aborting` where a stream must end first. A long
is loaded, runs, is paused and runs again, and decodes here. Both can end in every state; while an effect is under way
(opening, a pass, a stream) the end waits for the effect's own event, remembered as the job's `verdict`.

A long may be *shared*: this worker is one rank of the group that computes it. Rank 0 runs it as any other long. A
follower counts the same tokens and steps, runs what it is called to and nothing else, and draws nothing. Where rank 0
gathers all KV, the long is its own alone from then on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from common.messages.cluster import Holding, HoldingPhase, LayerShape
from common.messages.groups import RING, Announcement, GroupScheme
from common.messages.prefill import RunPrefill
from common.messages.requests import FinishReason, RequestSpec
from common.messages.sp import LoadSegment
from common.policy.prefill_events import HandoffTarget
from common.policy.sp_shares import kv_of_rank
from common.policy.story import Story
from common.policy.transitions import Table, require_legal
from common.units import Attempt, RequestId, WorkerId


class ShortState(StrEnum):
    OPENING = "opening"
    READY = "ready"
    RUNNING = "running"
    """In the pass that runs now."""
    HANDOFF = "handoff"
    """First token out; its KV is on the way."""
    DECODING = "decoding"
    """First token out; the others are drawn here."""
    ABORTING = "aborting"
    """Its stream is being ended."""
    GONE = "gone"


class LongState(StrEnum):
    LOADING = "loading"
    LOADED = "loaded"
    RUNNING = "running"
    """Its coordinator lets it run; whether a pass of it runs now is another matter."""
    PAUSING = "pausing"
    """Its pass was told to stop."""
    PAUSED = "paused"
    SPILLING = "spilling"
    """Paused, and its KV is moved out (`prefill_spill.py`)."""
    SPILLED = "spilled"
    RESTORING = "restoring"
    DECODING = "decoding"
    GATHERED = "gathered"
    """Follower: rank 0 has this share's KV, too, and goes on alone. It is to be dropped."""
    GONE = "gone"


S = ShortState
L = LongState

SHORT_TRANSITIONS: Table[ShortState] = {
    S.OPENING: frozenset({S.READY, S.GONE}),
    S.READY: frozenset({S.RUNNING, S.ABORTING, S.GONE}),
    S.RUNNING: frozenset({S.READY, S.HANDOFF, S.DECODING, S.ABORTING, S.GONE}),
    S.HANDOFF: frozenset({S.ABORTING, S.GONE}),
    S.DECODING: frozenset({S.GONE}),
    S.ABORTING: frozenset({S.GONE}),
    S.GONE: frozenset(),
}
"""RUNNING → READY: more chunks to come. RUNNING → GONE: the first token was the last one and nothing
was streamed, or the pass failed before anything was."""

LONG_TRANSITIONS: Table[LongState] = {
    L.LOADING: frozenset({L.LOADED, L.GONE}),
    L.LOADED: frozenset({L.RUNNING, L.PAUSED, L.SPILLING, L.GONE}),
    L.RUNNING: frozenset({L.PAUSING, L.PAUSED, L.DECODING, L.GATHERED, L.GONE}),
    L.PAUSING: frozenset({L.RUNNING, L.PAUSED, L.DECODING, L.GATHERED, L.GONE}),
    L.PAUSED: frozenset({L.RUNNING, L.SPILLING, L.GONE}),
    L.SPILLING: frozenset({L.SPILLED, L.PAUSED, L.GONE}),
    L.SPILLED: frozenset({L.RESTORING, L.GONE}),
    L.RESTORING: frozenset({L.PAUSED, L.GONE}),
    L.DECODING: frozenset({L.GONE}),
    L.GATHERED: frozenset({L.GONE}),
    L.GONE: frozenset(),
}
"""LOADED → PAUSED: a pause before the first step. RUNNING → PAUSED: no pass of it ran. PAUSING → DECODING:
the prefill ended before the stop was heard. PAUSING → RUNNING: told to run again meanwhile. SPILLING → PAUSED: there
was no room for it elsewhere."""

MOVING = frozenset({L.SPILLING, L.RESTORING})
"""An effect touches its KV: its end waits for that."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a job ends before its time."""

    kind: Literal["dropped", "failed", "finished"]
    reason: str = ""
    retryable: bool = True
    suspect: WorkerId | None = None
    """The other worker that is at fault: nobody answers there."""
    decoded: FinishReason | None = None
    """Of a short that finished in decoding: how."""


Asker = Literal["scheduler", "coordinator"]


@dataclass(slots=True, eq=False)
class Job:
    """What shorts and longs have in common."""

    spec: RequestSpec
    order: int
    """Place in the local queue."""
    story: Story = list
    """The worker's bounded log of this request, for the messages of exceptions."""
    verdict: Verdict | None = None
    asked: list[tuple[Asker, Attempt]] = field(default_factory=list)
    """Who waits for the word that nothing is held any more, and of which attempt."""
    successor: RunPrefill | LoadSegment | None = None
    """An order for a later attempt, taken up when this one has ended: the engine knows one at a time."""
    prefilled: int = 0
    generated: int = 0
    """Tokens drawn here."""
    compute_s: float = 0.0

    @property
    def request_id(self) -> RequestId:
        return self.spec.request_id

    @property
    def attempt(self) -> Attempt:
        return self.spec.attempt

    @property
    def name(self) -> str:
        return f"{self.request_id}/{self.attempt}"

    @property
    def remaining(self) -> int:
        return self.spec.prompt.tokens - self.prefilled

    @property
    def next_position(self) -> int:
        """Of the token that the next decode row feeds."""
        return self.spec.prompt.tokens + self.generated - 1


@dataclass(slots=True, eq=False)
class ShortJob(Job):
    handoff: HandoffTarget | None = None
    """None: its first token is its last, or it decodes here."""
    exclusive: bool = False
    """Its prefill shares no pass with the decode of a long."""
    received_s: float = 0.0
    state: ShortState = ShortState.OPENING
    ready_s: float = 0.0
    started: bool = False
    """A pass with tokens of it has begun, and with it the stream."""
    waited_s: float = 0.0
    """Until then, from its receipt."""

    @property
    def begun(self) -> bool:
        return 0 < self.prefilled < self.spec.prompt.tokens

    @property
    def kv_tokens(self) -> int:
        return self.spec.prompt.tokens if self.handoff else self.spec.kv_tokens

    def move(self, target: ShortState) -> None:
        """Raises: InvariantViolated, with the story, leaving the state as it was."""
        require_legal(SHORT_TRANSITIONS, self.state, target, who=self.name, story=self.story)
        self.state = target

    def holding(self) -> Holding:
        phase: HoldingPhase = "queued"
        if self.state is S.DECODING:
            phase = "decode"
        elif self.state in (S.HANDOFF, S.ABORTING):
            phase = "handoff"
        elif self.started:
            phase = "prefill"
        return _holding(self, phase, 0 if self.state is S.OPENING else self.kv_tokens)


@dataclass(slots=True, eq=False)
class Meeting:
    """Of the ranks of a larger group."""

    growth: int
    rank: int
    size: int
    over: bool = False
    """They have met."""


@dataclass(slots=True, eq=False)
class LongJob(Job):
    state: LongState = LongState.LOADING
    started: bool = False
    """Its first pass has begun: its place in the queue no longer matters."""
    chunk_tokens: int = 0
    """Of the chunk begun and not finished; 0: none."""
    chunk_steps: int = 0
    """Steps done of that chunk."""
    chunk_gathers: bool = False
    """When that chunk is done, rank 0 has the KV of all (`prefill_parting.py`)."""
    parts: int | None = None
    """Rank 0: told to gather with the next chunk, in the group of this growth."""
    steps: int = 0
    """Steps of finished chunks."""
    rank: int = 0
    size: int = 1
    """Of its group."""
    scheme: GroupScheme = RING
    layer: LayerShape | None = None
    """Of the model."""
    called: Announcement | None = None
    """Follower: the pass that rank 0 has begun and that has not begun here."""
    kv_size: int = 1
    """Of its group when this worker came into it: it set aside its share of that."""
    growth: int = 0
    """The last one that it is part of; 0: the group is as it was formed."""
    meets: Meeting | None = None
    """The larger group that it may go over to."""
    ends_chunk: bool = False
    """Told to pause when the chunk is done."""
    leaves: bool = False
    """Shared, being opened: the other ranks are waited for no more. Being moved: that was told to end."""
    owes_running: bool = False
    """Follower: told to run, and a short stands in the way."""
    advanced_s: float = -math.inf
    """When its last chunk ended, or row."""
    row_pass_id: int = 0
    """Shared: the last pass in which it had a row."""
    running_since_s: float | None = None
    """Start of its first pass since it was last told to run."""
    pause_received_s: float = 0.0
    last_pause_latency_s: float = 0.0
    spilled_bytes: int = 0
    """Of its KV, when it was last moved out."""

    @property
    def is_shared(self) -> bool:
        return self.size > 1

    @property
    def follows(self) -> bool:
        return self.rank > 0

    @property
    def kv_tokens(self) -> int:
        """Of this rank. (Where heads are split: of all its node's tokens in its heads, as tokens in all heads.)"""
        return kv_of_rank(self.scheme, self.kv_size, self.rank, self.spec.kv_tokens, self.layer)

    @property
    def expected(self) -> Announcement | None:
        """Follower: what it may be called to as it stands, with its own count of passes. None: to nothing."""
        if self.state is L.DECODING:
            return Announcement(pass_no=1, kind="row", start=self.next_position, tokens=1, step=0)
        if self.state in (L.LOADING, L.GATHERED, L.GONE):
            return None
        tokens = self.chunk_tokens if self.chunk_steps else self.remaining
        return Announcement(
            pass_no=1,
            kind="chunk",
            start=self.prefilled,
            tokens=tokens,
            step=self.chunk_steps,
            gathers=self.chunk_gathers,
        )

    @property
    def minds_others(self) -> bool:
        """Whether it is lost with another rank."""
        return self.is_shared and self.state is not L.GATHERED

    @property
    def steps_done(self) -> int:
        return self.steps + self.chunk_steps

    def move(self, target: LongState) -> None:
        """Raises: InvariantViolated, with the story, leaving the state as it was."""
        require_legal(LONG_TRANSITIONS, self.state, target, who=self.name, story=self.story)
        self.state = target

    def holding(self) -> Holding:
        phase: HoldingPhase = "decode" if self.state in (L.DECODING, L.GATHERED) else "prefill"
        return _holding(self, phase, 0 if self.state in (L.LOADING, L.SPILLED) else self.kv_tokens)


def finish_reason(spec: RequestSpec, token_id: int, generated: int) -> FinishReason | None:
    """Whether the token just drawn, the `generated`-th of this attempt, is the last one."""
    if token_id in spec.stop_token_ids:
        return "stop"
    return "length" if generated >= spec.max_tokens else None


def _holding(job: Job, phase: HoldingPhase, kv_tokens: int) -> Holding:
    return Holding(request_id=job.request_id, attempt=job.attempt, phase=phase, kv_tokens=kv_tokens)
