"""One group of workers that serves one long prompt: its states, its ranks, and what follows from their words.

The rules, in sentences:

- A group is loaded when all its ranks are, runs again when all run, and is paused when all stand at the
  *same* step; ranks that have prefilled their share have nothing left to stop. Different steps mean that
  the ranks disagree about what is computed: the group fails and says so.
- The scheduler's last wish counts. A pause asked while the group forms or resumes, a resume asked while it
  pauses, are remembered and take effect at the first moment they can; an order overtaken by its opposite
  before it took effect is void. A pause that meets the end of the prefill is void too: `GroupPrefillFinished`
  answers it. Each ordering of the two on the wire is legal.
- Which waits are bounded. `LoadSegment` (reserve, fetch the prompt), `PauseSegment` and `DropSegment` (end the
  step that runs) need at most a step of a worker's time: a rank that has not answered within `answer_s` is
  silent, fails the group, and the other ranks are told to drop it. `RunSegment` may wait behind shorts that
  came to that worker before it, and prefilling and decoding take as long as they take: they have no bound
  here. A worker lost meanwhile is noticed by the scheduler, which hears the workers' heartbeats and dissolves the
  group. So that one lost message does not stop a group for ever, an unanswered `RunSegment` is repeated
  every `answer_s`; it is idempotent.
- Once the first rank has finished, the request has all its tokens: the others have `answer_s` to follow, and
  are told to drop what they hold if they do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from common.messages.requests import FinishReason, RequestSpec
from common.messages.sp import GroupFinished, GroupFormed, GroupPaused, GroupPrefillFinished, GroupResumed, SegmentPart
from common.policy.core import InvariantViolated
from common.policy.story import Story
from common.policy.transitions import Table, require_legal
from common.units import Attempt, RequestId, WorkerId

GroupKey = tuple[RequestId, Attempt]
GroupStanding = GroupFormed | GroupPaused | GroupResumed | GroupPrefillFinished


class GroupState(StrEnum):
    FORMING = "forming"
    """The ranks reserve KV and fetch their share of the prompt."""
    PREFILLING = "prefilling"
    PAUSING = "pausing"
    PAUSED = "paused"
    RESUMING = "resuming"
    DECODING = "decoding"
    FINISHING = "finishing"
    """The last token is out; some ranks still free their KV."""
    DISSOLVING = "dissolving"
    """The ranks were told to drop it; some have not confirmed."""
    GONE = "gone"


G = GroupState

TRANSITIONS: Table[GroupState] = {
    G.FORMING: frozenset({G.PREFILLING, G.PAUSED, G.DISSOLVING}),
    G.PREFILLING: frozenset({G.PAUSING, G.DECODING, G.DISSOLVING}),
    G.PAUSING: frozenset({G.PAUSED, G.DECODING, G.DISSOLVING}),
    G.PAUSED: frozenset({G.RESUMING, G.DECODING, G.DISSOLVING}),
    G.RESUMING: frozenset({G.PREFILLING, G.PAUSING, G.DECODING, G.DISSOLVING}),
    G.DECODING: frozenset({G.FINISHING, G.DISSOLVING}),
    G.FINISHING: frozenset({G.GONE, G.DISSOLVING}),
    G.DISSOLVING: frozenset({G.GONE}),
    G.GONE: frozenset(),
}
"""FORMING → PAUSED: a pause was asked before the first step. PAUSED → DECODING: a rank that said it stood
still had in truth one pass to end, and says so later."""


class RankPhase(StrEnum):
    LOADING = "loading"
    LOADED = "loaded"
    STARTING = "starting"
    """Told to run; has not said that it does."""
    RUNNING = "running"
    STOPPING = "stopping"
    PAUSED = "paused"
    PREFILLED = "prefilled"
    FINISHED = "finished"
    DROPPING = "dropping"
    GONE = "gone"
    """Nothing is held there (failed, dropped), or nobody answers there."""


R = RankPhase

BOUNDED = frozenset({R.LOADING, R.STOPPING, R.DROPPING})
"""A rank in one of these owes an answer within `answer_s`."""

HOLDING_STILL = frozenset({R.LOADED, R.PAUSED, R.PREFILLED, R.FINISHED})
PREFILL_DONE = frozenset({R.PREFILLED, R.FINISHED})


@dataclass(slots=True, eq=False)
class Rank:
    """What one member said last."""

    worker_id: WorkerId
    phase: RankPhase = RankPhase.LOADING
    step: int = 0
    prefilled_tokens: int = 0
    pause_latency_s: float = 0.0
    compute_s: float = 0.0
    finish_reason: FinishReason | None = None
    generated: int = 0
    asked_s: float = 0.0
    """When it was last asked for what it owes."""


@dataclass(slots=True, eq=False)
class Group:
    spec: RequestSpec
    ranks: tuple[Rank, ...]
    state: GroupState = GroupState.FORMING
    wish_pause: bool = False
    """The scheduler's last wish."""
    failure: str = ""
    """Why it dissolves."""
    retryable: bool = True
    story: Story = list
    """The coordinator's bounded log of this request, for the messages of exceptions."""

    @property
    def key(self) -> GroupKey:
        return (self.spec.request_id, self.spec.attempt)

    @property
    def members(self) -> tuple[WorkerId, ...]:
        return tuple(rank.worker_id for rank in self.ranks)

    def rank_of(self, worker_id: WorkerId) -> Rank | None:
        return next((rank for rank in self.ranks if rank.worker_id == worker_id), None)

    def all_in(self, *phases: RankPhase) -> bool:
        return all(rank.phase in phases for rank in self.ranks)

    def in_phase(self, *phases: RankPhase) -> list[Rank]:
        return [rank for rank in self.ranks if rank.phase in phases]

    def name(self, rank: Rank) -> str:
        return f"rank {self.ranks.index(rank)} ({rank.worker_id})"

    def move(self, target: GroupState) -> None:
        """Raises: InvariantViolated, with the story, leaving the state as it was."""
        request_id, attempt = self.key
        require_legal(TRANSITIONS, self.state, target, who=f"group {request_id}/{attempt}", story=self.story)
        self.state = target

    def steps_paused_at(self) -> set[int]:
        return {rank.step for rank in self.ranks if rank.phase in (R.LOADED, R.PAUSED)}

    def owes(self, rank: Rank) -> bool:
        """Whether this rank must answer within the bound."""
        return rank.phase in BOUNDED or (self.state is G.FINISHING and rank.phase is R.PREFILLED)

    def deadline_s(self, answer_s: float) -> float | None:
        """When the first rank that owes an answer counts as silent, or the first `RunSegment` is repeated."""
        asked = [rank.asked_s for rank in self.ranks if self.owes(rank) or rank.phase is R.STARTING]
        return min(asked) + answer_s if asked else None

    def standing(self, cause: str) -> list[GroupStanding]:
        """Again what was said when it came where it stands; nothing where the next word is still to come."""
        match self.state:
            case G.PREFILLING:
                return [self.formed_word(cause), self.resumed_word(cause)]
            case G.PAUSED:
                return [self.formed_word(cause), self.paused_word(cause)]
            case G.DECODING:
                return [self.prefill_finished_word(cause)]
            case _:
                return []

    def formed_word(self, cause: str) -> GroupFormed:
        return GroupFormed(request_id=self.spec.request_id, attempt=self.spec.attempt, cause=cause)

    def resumed_word(self, cause: str) -> GroupResumed:
        return GroupResumed(request_id=self.spec.request_id, attempt=self.spec.attempt, cause=cause)

    def paused_word(self, cause: str) -> GroupPaused:
        request_id, attempt = self.key
        return GroupPaused(
            request_id=request_id,
            attempt=attempt,
            step=max(rank.step for rank in self.ranks),
            prefilled_tokens=sum(rank.prefilled_tokens for rank in self.ranks),
            pause_latency_s=max(rank.pause_latency_s for rank in self.ranks),
            cause=cause,
        )

    def prefill_finished_word(self, cause: str) -> GroupPrefillFinished:
        request_id, attempt = self.key
        return GroupPrefillFinished(
            request_id=request_id,
            attempt=attempt,
            compute_s=max(rank.compute_s for rank in self.ranks),
            finish_reason=self._finish_reason(),
            cause=cause,
        )

    def finished_word(self, cause: str) -> GroupFinished:
        request_id, attempt = self.key
        reason = self._finish_reason()
        assert reason is not None, "a group finishes by a rank that said why"
        return GroupFinished(
            request_id=request_id,
            attempt=attempt,
            finish_reason=reason,
            generated=max(rank.generated for rank in self.ranks),
            cause=cause,
        )

    def _finish_reason(self) -> FinishReason | None:
        return next((rank.finish_reason for rank in self.ranks if rank.finish_reason is not None), None)

    def check(self) -> None:
        """Raises: InvariantViolated."""
        self._require(bool(self.ranks), "has no rank")
        self._require(self.state is not G.GONE, "is gone and still kept")
        phases = {rank.phase for rank in self.ranks}
        allowed = ALLOWED_PHASES[self.state]
        self._require(phases <= allowed, f"is {self.state} with ranks {sorted(phases)}")
        waited_for = AWAITED.get(self.state)
        self._require(waited_for is None or bool(phases & waited_for), f"is {self.state} and nobody owes it an answer")
        if self.state is G.PAUSED:
            self._require(len(self.steps_paused_at()) <= 1, "is paused at different steps")
            self._require(self.wish_pause, "is paused though nobody wishes it")

    def _require(self, holds: bool, what: str) -> None:
        if not holds:
            request_id, attempt = self.key
            raise InvariantViolated.told(f"group {request_id}/{attempt} {what}", self.story())


ALLOWED_PHASES: dict[GroupState, frozenset[RankPhase]] = {
    G.FORMING: frozenset({R.LOADING, R.LOADED}),
    G.PREFILLING: frozenset({R.STARTING, R.RUNNING, R.PREFILLED, R.FINISHED}),
    G.PAUSING: frozenset({R.STOPPING, R.PAUSED, R.PREFILLED, R.FINISHED}),
    G.PAUSED: HOLDING_STILL,
    G.RESUMING: frozenset({R.STARTING, R.RUNNING, R.PREFILLED, R.FINISHED}),
    G.DECODING: frozenset({R.PREFILLED}),
    G.FINISHING: PREFILL_DONE,
    G.DISSOLVING: frozenset({R.DROPPING, R.GONE}),
    G.GONE: frozenset(),
}

AWAITED: dict[GroupState, frozenset[RankPhase]] = {
    G.FORMING: frozenset({R.LOADING}),
    G.PREFILLING: frozenset({R.STARTING, R.RUNNING}),
    G.PAUSING: frozenset({R.STOPPING}),
    G.RESUMING: frozenset({R.STARTING}),
    G.FINISHING: frozenset({R.PREFILLED}),
    G.DISSOLVING: frozenset({R.DROPPING}),
}
"""In each of these states at least one rank is in one of these phases: no group waits for nobody."""


def split_evenly(tokens: int, ranks: int) -> list[tuple[SegmentPart, ...]]:
    """A contiguous share of the prompt for each rank; the first ones take the remainder. A rank without
    tokens has no part."""
    shares: list[tuple[SegmentPart, ...]] = []
    start = 0
    for rank in range(ranks):
        share = tokens // ranks + (1 if rank < tokens % ranks else 0)
        shares.append((SegmentPart(start=start, tokens=share),) if share else ())
        start += share
    return shares
