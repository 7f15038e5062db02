"""One group of workers that serves one long prompt: its states, its ranks, and what follows from their words.

The rules, in sentences:

- Rank 0 leads. It alone begins passes and stops them; the others, the followers, join what it has begun, and stop in
  the very step in which it stops. So a group is paused through its leader: rank 0 is told, says at which step it
  stands, and the followers are asked to confirm that they stand there too. Different steps mean that the ranks
  disagree about what is computed: the group fails and says so.
- A group is loaded when all its ranks are. It runs, at first and again, from the followers on: rank 0 is told when all
  of them have said that they can join it, so that it does not wait in a pass for a rank that serves shorts.
- Rank 0 ends the prefill, since it draws the first token, and ends the request, since it draws the last: whatever the
  followers have said by then. They are then told to drop their share, which is their normal end.
- Where the scheme gathers, rank 0 has all KV when the prefill is done, or sooner, and is the group from then on:
  `sp_parting.py`.
- A group that decodes is dissolved from rank 0 on: the others are told when it has dropped its share, or has not
  answered for `LEADER_FIRST_S`. Else the pass that rank 0 is in would break, and what shares it begin a step anew.
- The scheduler's last wish counts. A pause asked while the group forms or resumes, a resume asked while it
  pauses, are remembered and take effect at the first moment they can; an order overtaken by its opposite
  before it took effect is void. A pause that meets the end of the prefill is void too: `GroupPrefillFinished`
  answers it. Each ordering of the two on the wire is legal.
- The KV of a group that stands may be moved out and brought back meanwhile: `sp_spill.py`.
- Which waits are bounded. `LoadSegment` (reserve, fetch the prompt, meet the other ranks), `PauseSegment` and
  `DropSegment` (end the step that runs) need at most a step of a worker's time: a rank that has not answered within
  `answer_s` is silent, fails the group, and the other ranks are told to drop it. `RunSegment` may wait behind shorts
  that came to that worker before it, and prefilling and decoding take as long as they take: they have no bound
  here. A worker lost meanwhile is noticed by the scheduler, which hears the workers' heartbeats and dissolves the
  group. So that one lost message does not stop a group for ever, an unanswered `RunSegment` is repeated
  every `answer_s`; it is idempotent.
- Once rank 0 has drawn the last token, the request has all its tokens. What happens to the ranks after that (they
  fail, are silent for `answer_s`) changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from common.messages.groups import RING, GroupScheme
from common.messages.requests import FinishReason, RequestSpec
from common.messages.sp import (
    FormGroup,
    GroupFinished,
    GroupFormed,
    GroupGrown,
    GroupNotSpilled,
    GroupParted,
    GroupPaused,
    GroupPrefillFinished,
    GroupResumed,
    GroupSpilled,
    SegmentFinished,
    SegmentPaused,
    SegmentPrefilled,
)
from common.policy.core import InvariantViolated
from common.policy.sp_shares import Mesh, kv_of_rank, misfit
from common.policy.story import Story
from common.policy.transitions import Table, require_legal
from common.units import Attempt, RequestId, WorkerId

if TYPE_CHECKING:
    from common.policy.sp_growth import Growth

LEADER_FIRST_S = 1.0
"""A step of decoding takes less."""

GroupKey = tuple[RequestId, Attempt]
GroupStanding = (
    GroupFormed | GroupGrown | GroupParted | GroupPaused | GroupSpilled | GroupResumed | GroupPrefillFinished
)


class GroupState(StrEnum):
    FORMING = "forming"
    """The ranks reserve KV and fetch their share of the prompt."""
    PREFILLING = "prefilling"
    SWITCHING = "switching"
    """It grows: rank 0 ends its chunk, the others confirm that they stand there (`sp_growth.py`)."""
    PAUSING = "pausing"
    PAUSED = "paused"
    SPILLING = "spilling"
    """It is paused, and its ranks move their KV out (`sp_spill.py`)."""
    SPILLED = "spilled"
    RESTORING = "restoring"
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
    G.PREFILLING: frozenset({G.SWITCHING, G.PAUSING, G.DECODING, G.DISSOLVING}),
    G.SWITCHING: frozenset({G.RESUMING, G.PAUSING, G.DECODING, G.DISSOLVING}),
    G.PAUSING: frozenset({G.PAUSED, G.DECODING, G.DISSOLVING}),
    G.PAUSED: frozenset({G.RESUMING, G.SPILLING, G.DECODING, G.DISSOLVING}),
    G.SPILLING: frozenset({G.SPILLED, G.RESTORING, G.PAUSED, G.DISSOLVING}),
    G.SPILLED: frozenset({G.RESTORING, G.DISSOLVING}),
    G.RESTORING: frozenset({G.PAUSED, G.DISSOLVING}),
    G.RESUMING: frozenset({G.PREFILLING, G.PAUSING, G.DECODING, G.DISSOLVING}),
    G.DECODING: frozenset({G.FINISHING, G.DISSOLVING}),
    G.FINISHING: frozenset({G.GONE, G.DISSOLVING}),
    G.DISSOLVING: frozenset({G.GONE}),
    G.GONE: frozenset(),
}
"""FORMING → PAUSED: a pause was asked before the first step. PAUSED → DECODING: a rank that said it stood
still had in truth one pass to end, and says so later. SPILLING → RESTORING: some ranks could not; → PAUSED: none could.
"""


MOVED = frozenset({G.SPILLING, G.SPILLED, G.RESTORING})
"""Parts of a pause in which KV is, or may be, elsewhere."""


class RankPhase(StrEnum):
    LOADING = "loading"
    LOADED = "loaded"
    STARTING = "starting"
    """Told to run; has not said that it does."""
    RUNNING = "running"
    ENDING = "ending"
    """Rank 0: told to stand when its chunk is done."""
    STOPPING = "stopping"
    PAUSED = "paused"
    SPILLING = "spilling"
    SPILLED = "spilled"
    RESTORING = "restoring"
    PREFILLED = "prefilled"
    FINISHED = "finished"
    DROPPING = "dropping"
    GONE = "gone"
    """Nothing is held there (failed, dropped), or nobody answers there."""


R = RankPhase

MOVING = frozenset({R.SPILLING, R.RESTORING})
BOUNDED = frozenset({R.LOADING, R.STOPPING, R.DROPPING}) | MOVING
"""A rank in one of these owes an answer within `answer_s`; one that moves its KV, within `move_s`."""

REPEATED = frozenset({R.STARTING, R.ENDING})
"""Told to, and told again every `answer_s` until it answers."""

HOLDING_STILL = frozenset({R.LOADED, R.PAUSED})
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

    def paused(self, word: SegmentPaused) -> None:
        self.phase, self.step = R.PAUSED, word.step
        self.prefilled_tokens, self.pause_latency_s = word.prefilled_tokens, word.pause_latency_s

    def prefilled(self, word: SegmentPrefilled) -> None:
        self.phase, self.step, self.compute_s = R.PREFILLED, word.steps, word.compute_s
        self.generated, self.finish_reason = 1, word.finish_reason

    def finished(self, word: SegmentFinished) -> None:
        self.phase, self.generated, self.finish_reason = R.FINISHED, word.generated, word.finish_reason


@dataclass(slots=True, eq=False)
class Group:
    spec: RequestSpec
    ranks: tuple[Rank, ...]
    state: GroupState = GroupState.FORMING
    wish_pause: bool = False
    """The scheduler's last wish."""
    not_spilled: str = ""
    """Why some rank could not move its KV out, the last time."""
    failure: str = ""
    """Why it dissolves."""
    retryable: bool = True
    story: Story = list
    """The coordinator's bounded log of this request, for the messages of exceptions."""
    scheme: GroupScheme = RING
    mesh: Mesh = field(init=False)
    """Which rank owns which tokens."""
    reserved: tuple[int, ...] = field(init=False)
    """By rank: KV set aside, in tokens (of a ring)."""
    growth: int = 0
    """The last that succeeded."""
    grown_at_step: int = 0
    tried: int = 0
    """To grow, the last that ended."""
    trying: Growth | None = None
    parts: bool = False
    """Rank 0 is told to go on alone (`sp_parting.py`)."""
    parted_at: int | None = None
    """Tokens prefilled when it did."""
    letting_go: set[WorkerId] = field(default_factory=set)
    """Were to come in, or rank 0 has gathered their KV: were told to drop it, and have not said that they did."""

    def __post_init__(self) -> None:
        size, kv_tokens = len(self.ranks), self.spec.kv_tokens
        self.mesh = Mesh.of(self.scheme, size)
        self.reserved = tuple(kv_of_rank(self.scheme, size, rank, kv_tokens, None) for rank in range(size))

    @property
    def key(self) -> GroupKey:
        return (self.spec.request_id, self.spec.attempt)

    @property
    def members(self) -> tuple[WorkerId, ...]:
        return tuple(rank.worker_id for rank in self.ranks)

    @property
    def leader(self) -> Rank:
        return self.ranks[0]

    @property
    def followers(self) -> tuple[Rank, ...]:
        return self.ranks[1:]

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

    def part(self) -> tuple[Rank, ...]:
        """Rank 0 has gathered all KV, and is the group from now on. Returns the others."""
        followers = self.followers
        self.ranks, self.reserved, self.mesh = self.ranks[:1], self.reserved[:1], Mesh(1, 1)
        self.letting_go.update(rank.worker_id for rank in followers)
        return followers

    def out_of_step(self) -> list[Rank]:
        """Of a group that stands: the followers that do not stand where rank 0 does."""
        here = self.leader.step
        return [rank for rank in self.followers if rank.phase not in HOLDING_STILL or rank.step != here]

    def run_terms(self) -> dict[str, Any]:
        """What `RunSegment` says of a group that has grown."""
        if not self.growth:
            return {}
        mesh = self.mesh
        return {"growth": self.growth, "start": mesh.base, "step": self.grown_at_step, "kept": mesh.before}

    def owes(self, rank: Rank) -> bool:
        """Whether this rank must answer within the bound."""
        return rank.phase in BOUNDED or (self.state is G.FINISHING and rank.phase is R.PREFILLED)

    def deadline_s(self, answer_s: float, move_s: float) -> float | None:
        """When the first rank that owes an answer counts as silent, or the first `RunSegment` is repeated."""
        if moving := self.in_phase(*MOVING):
            return min(rank.asked_s for rank in moving) + move_s
        asked = [rank.asked_s for rank in self.ranks if self.owes(rank) or rank.phase in REPEATED]
        if self.trying is not None and self.state is G.PREFILLING:
            asked.append(self.trying.asked_s)
        if self.state is G.DISSOLVING and self.in_phase(R.PREFILLED):
            return min(asked) + min(answer_s, LEADER_FIRST_S)
        return min(asked) + answer_s if asked else None

    def standing(self, cause: str) -> list[GroupStanding]:
        """Again what was said when it came where it stands; nothing where the next word is still to come."""
        match self.state:
            case G.PREFILLING | G.SWITCHING:
                return [*self._former_words(cause), self.resumed_word(cause)]
            case G.PAUSED:
                return [*self._former_words(cause), self.paused_word(cause)]
            case G.SPILLED:
                return [*self._former_words(cause), self.spilled_word(cause)]
            case G.DECODING:
                return [self.prefill_finished_word(cause)]
            case _:
                return []

    def formed_word(self, cause: str) -> GroupFormed:
        return GroupFormed(request_id=self.spec.request_id, attempt=self.spec.attempt, cause=cause)

    def resumed_word(self, cause: str) -> GroupResumed:
        return GroupResumed(request_id=self.spec.request_id, attempt=self.spec.attempt, cause=cause)

    def _former_words(self, cause: str) -> list[GroupStanding]:
        """Of what came before this state and goes on."""
        words: list[GroupStanding] = [self.formed_word(cause)]
        if self.tried and self.trying is None:
            words.append(self.grown_word(cause, self.tried))
        if self.parted_at is not None:
            words.append(self.parted_word(cause))
        return words

    def parted_word(self, cause: str) -> GroupParted:
        request_id, attempt = self.key
        return GroupParted(
            request_id=request_id,
            attempt=attempt,
            members=self.members,
            prefilled_tokens=self.parted_at or 0,
            cause=cause,
        )

    def grown_word(self, cause: str, growth: int, reason: str = "") -> GroupGrown:
        """Of a try that has ended."""
        request_id, attempt = self.key
        return GroupGrown(
            request_id=request_id,
            attempt=attempt,
            growth=growth,
            members=self.members,
            prefilled_tokens=self.mesh.base,
            reason=reason,
            cause=cause,
        )

    def paused_word(self, cause: str) -> GroupPaused:
        request_id, attempt = self.key
        return GroupPaused(
            request_id=request_id,
            attempt=attempt,
            step=self.leader.step,
            prefilled_tokens=self.leader.prefilled_tokens,
            pause_latency_s=max(rank.pause_latency_s for rank in self.ranks),
            cause=cause,
        )

    def spilled_word(self, cause: str) -> GroupSpilled:
        return GroupSpilled(request_id=self.spec.request_id, attempt=self.spec.attempt, cause=cause)

    def not_spilled_word(self, cause: str) -> GroupNotSpilled:
        request_id, attempt = self.key
        return GroupNotSpilled(request_id=request_id, attempt=attempt, reason=self.not_spilled, cause=cause)

    def prefill_finished_word(self, cause: str) -> GroupPrefillFinished:
        request_id, attempt = self.key
        return GroupPrefillFinished(
            request_id=request_id,
            attempt=attempt,
            compute_s=max(rank.compute_s for rank in self.ranks),
            finish_reason=self.leader.finish_reason,
            members=self.members,
            cause=cause,
        )

    def finished_word(self, cause: str) -> GroupFinished:
        request_id, attempt = self.key
        reason = self.leader.finish_reason
        assert reason is not None, "a group finishes by a rank that said why"
        return GroupFinished(
            request_id=request_id,
            attempt=attempt,
            finish_reason=reason,
            generated=self.leader.generated,
            cause=cause,
        )

    def check(self) -> None:
        """Raises: InvariantViolated."""
        self._require(bool(self.ranks), "has no rank")
        self._require(self.state is not G.GONE, "is gone and still kept")
        followers = {rank.phase for rank in self.followers}
        phases = {self.leader.phase} | followers
        self._require(
            self.leader.phase in LEADER_PHASES[self.state] and followers <= FOLLOWER_PHASES[self.state],
            f"is {self.state} with ranks {', '.join(rank.phase for rank in self.ranks)}",
        )
        waited_for = AWAITED.get(self.state)
        self._require(waited_for is None or bool(phases & waited_for), f"is {self.state} and nobody owes it an answer")
        if self.state in (G.PREFILLING, G.RESUMING) and self.leader.phase not in HOLDING_STILL:
            self._require(R.STARTING not in followers, "is led before its followers run")
        self._require(self.trying is None or self.state in (G.PREFILLING, G.SWITCHING), f"grows while {self.state}")
        self._require(len(self.reserved) == self.mesh.size, "has other ranks than its mesh")
        if self.state is G.PAUSED:
            self._require(not self.out_of_step(), "is paused at different steps")
            self._require(self.wish_pause, "is paused though nobody wishes it")

    def _require(self, holds: bool, what: str) -> None:
        if not holds:
            request_id, attempt = self.key
            raise InvariantViolated.told(f"group {request_id}/{attempt} {what}", self.story())


_DROPPED = frozenset({R.DROPPING, R.GONE})

LEADER_PHASES: dict[GroupState, frozenset[RankPhase]] = {
    G.FORMING: frozenset({R.LOADING, R.LOADED}),
    G.PREFILLING: frozenset({R.LOADED, R.STARTING, R.RUNNING}),
    G.SWITCHING: frozenset({R.ENDING, R.PAUSED}),
    G.PAUSING: frozenset({R.STOPPING, R.PAUSED}),
    G.PAUSED: HOLDING_STILL,
    G.SPILLING: frozenset({R.SPILLING, R.SPILLED, R.PAUSED}),
    G.SPILLED: frozenset({R.SPILLED}),
    G.RESTORING: frozenset({R.RESTORING, R.PAUSED}),
    G.RESUMING: frozenset({R.LOADED, R.PAUSED, R.STARTING}),
    G.DECODING: frozenset({R.PREFILLED}),
    G.FINISHING: PREFILL_DONE,
    G.DISSOLVING: _DROPPED,
    G.GONE: frozenset(),
}
"""LOADED or PAUSED while the group starts or resumes: its followers do not all run yet."""

FOLLOWER_PHASES: dict[GroupState, frozenset[RankPhase]] = {
    G.FORMING: frozenset({R.LOADING, R.LOADED}),
    G.PREFILLING: frozenset({R.STARTING, R.RUNNING, R.PREFILLED}),
    G.SWITCHING: frozenset({R.RUNNING, R.STOPPING, R.PAUSED, R.PREFILLED}),
    G.PAUSING: frozenset({R.RUNNING, R.STOPPING, R.PAUSED, R.PREFILLED}),
    G.PAUSED: HOLDING_STILL,
    G.SPILLING: frozenset({R.SPILLING, R.SPILLED, R.PAUSED}),
    G.SPILLED: frozenset({R.SPILLED}),
    G.RESTORING: frozenset({R.RESTORING, R.PAUSED}),
    G.RESUMING: frozenset({R.STARTING, R.RUNNING, R.PREFILLED}),
    G.DECODING: frozenset({R.PREFILLED}),
    G.FINISHING: frozenset({R.DROPPING, R.FINISHED}),
    G.DISSOLVING: _DROPPED | {R.PREFILLED},
    G.GONE: frozenset(),
}
"""PREFILLED before rank 0 has said so: its share of the last pass was done sooner."""

AWAITED: dict[GroupState, frozenset[RankPhase]] = {
    G.FORMING: frozenset({R.LOADING}),
    G.PREFILLING: frozenset({R.STARTING, R.RUNNING}),
    G.SWITCHING: frozenset({R.ENDING, R.STOPPING}),
    G.PAUSING: frozenset({R.STOPPING}),
    G.SPILLING: frozenset({R.SPILLING}),
    G.RESTORING: frozenset({R.RESTORING}),
    G.RESUMING: frozenset({R.STARTING}),
    G.FINISHING: frozenset({R.PREFILLED, R.DROPPING}),
    G.DISSOLVING: frozenset({R.DROPPING}),
}
"""In each of these states at least one rank is in one of these phases: no group waits for nobody."""


def why_not(order: FormGroup) -> str:
    """Why no such group can be; empty: it can."""
    if not order.members:
        return "a group needs at least one member"
    if len(set(order.members)) != len(order.members):
        return f"a worker is named twice: {', '.join(order.members)}"
    if len(order.members) > 1 and not (len(order.addresses) == len(order.members) and all(order.addresses)):
        return f"{len(order.members)} ranks, addresses {order.addresses}: each rank must be reached by the others"
    return misfit(order.scheme, len(order.members))
