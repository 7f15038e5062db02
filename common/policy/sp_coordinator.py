"""The core of the SP coordinator: scheduler's orders and members' answers in, orders to members and verdicts out.

The rules of one group stand in `sp_group.py`. Here is what spans groups:

- Groups are keyed by (request, attempt). A higher attempt supersedes the lower ones: they dissolve, and their
  members are told so before the new group's members are told to load.
- Orders of an older scheduler (a lower epoch) and of an older attempt are ignored. An order that repeats
  itself, or comes after its effect, is answered again with where the group stands; the endings of the last
  groups are kept for that.
- A member that reports progress of a group nobody drives here (a former coordinator's) is told to drop it.
- Every order is answered: `FormGroup` by GroupFormed, `PauseGroup` by GroupPaused or GroupPrefillFinished,
  `ResumeGroup` by GroupResumed or GroupPrefillFinished, `GrowGroup` by GroupGrown, `PartGroup` by
  GroupParted, `SpillGroup` by GroupSpilled or
  GroupNotSpilled, `RestoreGroup` by GroupPaused, `DissolveGroup` by GroupFailed, and each of them, at any time, by the
  group's ending. An order overtaken by its opposite is answered by the opposite's answer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import assert_never

from common.messages.sp import (
    DissolveGroup,
    DropSegment,
    FormGroup,
    GroupFailed,
    GrowGroup,
    PartGroup,
    PauseGroup,
    PauseSegment,
    RanksMet,
    RestoreGroup,
    ResumeGroup,
    RunSegment,
    SegmentDropped,
    SegmentFailed,
    SegmentFinished,
    SegmentLoaded,
    SegmentNotSpilled,
    SegmentParted,
    SegmentPaused,
    SegmentPrefilled,
    SegmentRunning,
    SegmentSpilled,
    SpillGroup,
)
from common.policy.core import InvariantViolated, TimePassed
from common.policy.sp_group import (
    HOLDING_STILL,
    MOVED,
    MOVING,
    PREFILL_DONE,
    REPEATED,
    Group,
    GroupKey,
    GroupStanding,
    GroupState,
    Rank,
    RankPhase,
    why_not,
)
from common.policy.sp_growth import (
    give_up,
    grow,
    heard_of_newcomer,
    is_overdue,
    may_switch,
    met,
    overtaken,
    switch,
    take_in,
)
from common.policy.sp_io import (
    CoordinatorCommand,
    CoordinatorEvent,
    GroupEnding,
    GroupOrder,
    MemberWord,
    StopAsked,
)
from common.policy.sp_orders import load_order
from common.policy.sp_parting import let_go, part, parted
from common.policy.sp_spill import Spilling
from common.policy.sp_voice import Voice
from common.policy.timers import Timers
from common.units import Attempt, RequestId

G = GroupState
R = RankPhase

ENDINGS_KEPT = 1_000


class SpCoordinator:
    """`answer_s`: how long a rank may take to answer an order that needs at most a step of its time; `move_s`: to move
    its KV out, or back."""

    def __init__(self, answer_s: float, move_s: float = 60.0) -> None:
        self._answer_s, self._move_s = answer_s, move_s
        self._groups: dict[GroupKey, Group] = {}
        self._newest: dict[RequestId, Attempt] = {}
        """Highest attempt seen, of requests whose groups or endings are kept."""
        self._endings: OrderedDict[GroupKey, GroupEnding] = OrderedDict()
        self._timers: Timers[GroupKey] = Timers()
        self._voice = Voice()
        self._spilling = Spilling(self._voice)
        self._stopping = False

    # --- the door ---------------------------------------------------------------------------------

    def handle(self, event: CoordinatorEvent, now_s: float) -> list[CoordinatorCommand]:
        """See `Core`. Raises: InvariantViolated."""
        self._voice.begin(event, now_s)
        match event:
            case TimePassed():
                for key in list(self._timers.due(now_s)):
                    self._overdue(self._groups[key])
            case StopAsked():
                self._stopping = True
                for group in list(self._groups.values()):
                    self._dissolve(group, "the SP coordinator stops", retryable=True)
            case (
                FormGroup()
                | GrowGroup()
                | PartGroup()
                | PauseGroup()
                | ResumeGroup()
                | SpillGroup()
                | RestoreGroup()
                | DissolveGroup()
            ):
                self._order(event)
            case _:
                self._word(event)
        return self._voice.taken()

    def next_deadline_s(self) -> float | None:
        return self._timers.next_s()

    def driving(self) -> tuple[tuple[RequestId, Attempt], ...]:
        """Every group that has not ended, for the heartbeat."""
        return tuple(self._groups)

    def standings(self) -> list[GroupStanding]:
        """For the heartbeat: again what was said when each group came to where it stands. Receivers that heard
        it know it by their own state; for one that did not, the lost word costs a heartbeat, not a hang."""
        return [word for group in self._groups.values() for word in group.standing("standing")]

    def state_of(self, request_id: RequestId, attempt: Attempt) -> GroupState:
        group = self._groups.get((request_id, attempt))
        return G.GONE if group is None else group.state

    def story(self, request_id: RequestId) -> list[str]:
        """What happened to this request's groups, oldest first; bounded."""
        return self._voice.story(request_id)

    def check(self) -> None:
        """See `Core`."""
        for key, group in self._groups.items():
            group.check()
            if key in self._endings:
                raise InvariantViolated(f"group {key} has ended and is still driven")
            if group.state is not G.DISSOLVING and self._newest[key[0]] != key[1]:
                raise InvariantViolated(f"group {key} is superseded and still served")
        if len(self._newest) > len(self._groups) + len(self._endings):
            raise InvariantViolated("attempts of forgotten requests are remembered")
        waiting = sum(group.deadline_s(self._answer_s, self._move_s) is not None for group in self._groups.values())
        if waiting != len(self._timers):
            raise InvariantViolated(f"{waiting} groups wait for an answer, {len(self._timers)} have a deadline")

    # --- orders of the scheduler -----------------------------------------------------------------

    def _order(self, order: GroupOrder) -> None:
        attempt = order.spec.attempt if isinstance(order, FormGroup) else order.attempt
        request_id = order.spec.request_id if isinstance(order, FormGroup) else order.request_id
        name = type(order).__name__
        if order.epoch < self._voice.epoch:
            self._voice.note(
                request_id, f"{name} of epoch {order.epoch} ignored: epoch {self._voice.epoch} is in charge"
            )
            return
        self._voice.epoch = order.epoch
        self._voice.note(request_id, f"{name}/{attempt} {order.cause}")
        key = (request_id, attempt)
        if (ending := self._endings.get(key)) is not None:
            self._voice.say(ending)
            return
        group = self._groups.get(key)
        match order:
            case FormGroup():
                self._form(order, group)
            case _ if group is None:
                self._voice.say(self._failed(key, "no such group is driven here", retryable=True))
            case GrowGroup():
                grow(self._voice, group, order)
            case PartGroup():
                part(self._voice, group)
            case PauseGroup():
                self._pause(group)
            case ResumeGroup():
                self._resume(group)
            case SpillGroup() | RestoreGroup():
                self._spilling.obey(order, group)
            case DissolveGroup():
                self._dissolve(group, "dissolved as asked", retryable=True)
            case _:
                assert_never(order)
        if group is not None:
            self._settle(group)

    def _form(self, order: FormGroup, known: Group | None) -> None:
        spec = order.spec
        key = (spec.request_id, spec.attempt)
        if known is not None:
            self._say_where_it_stands(known)
            return
        newest = self._newest.get(spec.request_id)
        if newest is not None and newest > spec.attempt:
            self._voice.note(spec.request_id, f"attempt {spec.attempt} ignored: {newest} is known")
            return
        refusal = "the SP coordinator stops" if self._stopping else why_not(order)
        if refusal:
            self._voice.say(self._failed(key, refusal, retryable=self._stopping))
            return
        for older in [group for group in self._groups.values() if group.spec.request_id == spec.request_id]:
            self._dissolve(older, f"superseded by attempt {spec.attempt}", retryable=True)
            self._settle(older)
        group = Group(
            spec=spec,
            ranks=tuple(Rank(worker_id=member) for member in order.members),
            story=partial(self._voice.story, spec.request_id),
            scheme=order.scheme,
        )
        self._groups[key] = group
        self._newest[spec.request_id] = spec.attempt
        for number, rank in enumerate(group.ranks):
            rank.asked_s = self._voice.now_s
            self._voice.say(load_order(order, number, cause=self._voice.cause, epoch=self._voice.epoch))
        self._settle(group)

    def _pause(self, group: Group) -> None:
        match group.state:
            case G.PREFILLING | G.SWITCHING | G.RESUMING:
                group.wish_pause = True
                give_up(self._voice, group, "it is paused")
                self._voice.move(group, G.PAUSING)
                for rank in group.in_phase(R.STARTING):
                    rank.phase = R.RUNNING  # it may run or not: rank 0 begins nothing more
                self._voice.tell(group, group.leader, R.STOPPING, PauseSegment)
            case G.FORMING | G.PAUSING:
                group.wish_pause = True
            case _:
                self._say_where_it_stands(group)

    def _resume(self, group: Group) -> None:
        match group.state:
            case G.PAUSED:
                self._run(group, G.RESUMING)
            case G.FORMING | G.PAUSING:
                group.wish_pause = False
            case G.RESUMING:
                pass  # answered when the last rank runs
            case _:
                self._say_where_it_stands(group)

    def _say_where_it_stands(self, group: Group) -> None:
        for word in group.standing(self._voice.cause):
            self._voice.say(word)

    # --- words of the members --------------------------------------------------------------------

    def _word(self, word: MemberWord) -> None:
        key = (word.request_id, word.attempt)
        name = type(word).__name__
        group = self._groups.get(key)
        rank = None if group is None else group.rank_of(word.worker_id)
        if group is not None and rank is None and heard_of_newcomer(self._voice, group, word):
            self._settle(group)
            return
        if group is None or rank is None:
            self._voice.note(word.request_id, f"{name}/{word.attempt} from {word.worker_id}: not driven here")
            if not isinstance(word, SegmentDropped | SegmentFailed | SegmentFinished | RanksMet):
                self._drop_stray(word)
            return
        self._voice.note(word.request_id, f"{name}/{word.attempt} from {word.worker_id}, which was {rank.phase}")
        match word:
            case SegmentFailed(reason=reason, retryable=retryable):
                self._rank_ended(group, rank, f"failed: {reason}", retryable=retryable)
            case SegmentDropped():
                # Unless asked, a rank drops only what somebody else (the scheduler) told it to drop.
                self._rank_ended(group, rank, "dropped its segment", retryable=True)
            case _ if group.state is G.DISSOLVING:
                return  # crossed with the order to drop it
            case SegmentLoaded():
                if rank.phase is R.LOADING:
                    rank.phase = R.LOADED
            case RanksMet():
                met(self._voice, group, word)
            case SegmentRunning():
                if rank.phase is R.STARTING:
                    rank.phase = R.RUNNING
            case SegmentPaused():
                if rank.phase in (R.STOPPING, R.ENDING, R.RESTORING):
                    rank.paused(word)
            case SegmentParted():
                parted(self._voice, group, word)
            case SegmentSpilled() | SegmentNotSpilled():
                self._spilling.heard(group, rank, word)
            case SegmentPrefilled():
                self._rank_prefilled(group, rank, word)
            case SegmentFinished():
                if rank is group.leader:
                    rank.finished(word)
            case _:
                assert_never(word)
        self._settle(group)

    def _rank_prefilled(self, group: Group, rank: Rank, word: SegmentPrefilled) -> None:
        if rank.phase in PREFILL_DONE or rank.phase is R.DROPPING:
            return
        if group.state in MOVED or (rank is not group.leader and rank.phase in HOLDING_STILL):
            self._dissolve(group, f"{group.name(rank)} went on without rank 0", retryable=True)
        else:
            rank.prefilled(word)

    def _drop_stray(self, word: MemberWord) -> None:
        self._voice.say(self._voice.order_to(word.worker_id, (word.request_id, word.attempt), DropSegment))

    def _rank_ended(self, group: Group, rank: Rank, how: str, *, retryable: bool) -> None:
        """It holds nothing any more: as it should be, if the request has all its tokens."""
        if group.state is G.FINISHING and rank.phase is R.DROPPING:
            rank.phase = R.FINISHED
        elif rank.phase is not R.FINISHED:
            rank.phase = R.GONE
            self._dissolve(group, f"{group.name(rank)} {how}", retryable=retryable)

    # --- what follows ----------------------------------------------------------------------------

    def _settle(self, group: Group) -> None:
        """Take every step that the ranks' phases now allow, then set the deadline."""
        while group.state is not G.GONE and self._advance(group):
            pass
        deadline_s = None if group.state is G.GONE else group.deadline_s(self._answer_s, self._move_s)
        if deadline_s is None:
            self._timers.drop(group.key)
        else:
            self._timers.at(deadline_s, group.key)

    def _advance(self, group: Group) -> bool:
        """One transition, if one is due."""
        if group.state is G.FORMING:
            return group.all_in(R.LOADED) and self._formed(group)
        if group.state is G.DISSOLVING:
            if group.leader.phase is R.GONE:
                self._drop(group, group.followers)
            return group.all_in(R.GONE) and self._end(
                group, self._failed(group.key, group.failure, retryable=group.retryable)
            )
        if group.state is G.FINISHING:
            return group.all_in(R.FINISHED) and self._end(group, group.finished_word(self._voice.cause))
        if group.state in MOVED:
            return group.state is not G.SPILLED and self._spilling.advance(group)
        leader = group.leader
        if group.state is G.DECODING:
            over = leader.phase is R.FINISHED or leader.finish_reason is not None
            return over and self._finishing(group)
        if leader.phase in PREFILL_DONE:
            return self._prefilled(group)
        if group.state is G.PAUSING:
            return leader.phase is R.PAUSED and self._all_stand(group) and self._stopped(group)
        if group.state is G.SWITCHING:
            return leader.phase is R.PAUSED and self._all_stand(group) and self._switched(group)
        if may_switch(group):
            return switch(self._voice, group)
        if group.state in (G.PREFILLING, G.RESUMING) and leader.phase in HOLDING_STILL:
            return not group.in_phase(R.STARTING) and self._lead(group)
        if group.state is G.RESUMING and leader.phase is R.RUNNING:
            self._voice.move(group, G.PREFILLING)
            self._voice.say(group.resumed_word(self._voice.cause))
            return True
        return group.state is G.PAUSED and not group.wish_pause and self._run(group, G.RESUMING)

    def _formed(self, group: Group) -> bool:
        self._voice.say(group.formed_word(self._voice.cause))
        if group.wish_pause:
            self._voice.move(group, G.PAUSED)
            self._voice.say(group.paused_word(self._voice.cause))
            return True
        return self._run(group, G.PREFILLING)

    def _run(self, group: Group, state: GroupState) -> bool:
        """The followers first; rank 0 when they all run (`_lead`)."""
        group.wish_pause = False
        self._voice.move(group, state)
        for rank in group.followers:
            self._voice.tell(group, rank, R.STARTING, RunSegment, **group.run_terms())
        return True

    def _lead(self, group: Group) -> bool:
        self._voice.tell(group, group.leader, R.STARTING, RunSegment, **group.run_terms())
        return True

    def _prefilled(self, group: Group) -> bool:
        give_up(self._voice, group, "its prefill has ended")
        for rank in group.followers:
            rank.phase = R.PREFILLED
        if group.scheme.gathers:
            let_go(self._voice, group)
        self._voice.move(group, G.DECODING)
        self._voice.say(group.prefill_finished_word(self._voice.cause))
        return True

    def _all_stand(self, group: Group) -> bool:
        """Rank 0 does: ask the others."""
        for rank in group.in_phase(R.RUNNING):
            self._voice.tell(group, rank, R.STOPPING, PauseSegment, step=group.leader.step)
        return not group.in_phase(R.STOPPING)

    def _fell_apart(self, group: Group) -> bool:
        """Its ranks stand at different steps."""
        if not group.out_of_step():
            return False
        told = ", ".join(f"{group.name(rank)} at {rank.step}" for rank in group.ranks)
        self._dissolve(group, f"the ranks stopped at different steps: {told}", retryable=True)
        return True

    def _switched(self, group: Group) -> bool:
        if not self._fell_apart(group):
            take_in(self._voice, group)
            self._run(group, G.RESUMING)
        return True

    def _stopped(self, group: Group) -> bool:
        if self._fell_apart(group):
            return True
        # Said even if a resume was asked meanwhile: the pause happened, and is accounted for.
        self._voice.move(group, G.PAUSED)
        self._voice.say(group.paused_word(self._voice.cause))
        return True

    def _finishing(self, group: Group) -> bool:
        self._voice.move(group, G.FINISHING)
        group.leader.asked_s = self._voice.now_s
        for rank in group.followers:
            self._voice.tell(group, rank, R.DROPPING, DropSegment)
        return True

    def _dissolve(self, group: Group, reason: str, *, retryable: bool) -> None:
        """Tell every rank that may hold something to drop it; the group ends when they have confirmed."""
        if group.state is G.DISSOLVING:
            return
        group.failure, group.retryable = reason, retryable
        overtaken(group)
        leader_first = group.state is G.DECODING and group.leader.phase is not R.GONE
        self._voice.move(group, G.DISSOLVING)
        for rank in group.in_phase(R.FINISHED):
            rank.phase = R.GONE
        self._drop(group, group.ranks[:1] if leader_first else group.ranks)
        self._settle(group)

    def _drop(self, group: Group, ranks: Sequence[Rank]) -> None:
        for rank in ranks:
            if rank.phase not in (R.DROPPING, R.GONE):
                self._voice.tell(group, rank, R.DROPPING, DropSegment)

    def _overdue(self, group: Group) -> None:
        """Somebody's time is up: repeat what may be repeated, give up who is silent."""
        for rank in group.in_phase(*REPEATED):
            if not self._is_due(rank):
                continue
            if rank.phase is R.STARTING:
                self._voice.tell(group, rank, R.STARTING, RunSegment, **group.run_terms())
            else:
                self._voice.tell(group, rank, R.ENDING, PauseSegment, at_chunk_end=True)
        if is_overdue(group, self._answer_s, self._voice.now_s):
            give_up(self._voice, group, "not all ranks of the larger group have met in time")
        if group.state is G.DISSOLVING:
            self._drop(group, group.followers)
        silent = [rank for rank in group.ranks if group.owes(rank) and self._is_due(rank)]
        for rank in silent:
            self._silent(group, rank)
        self._settle(group)

    def _is_due(self, rank: Rank) -> bool:
        # The very sum that made the deadline: another order of operations would round otherwise.
        bound_s = self._move_s if rank.phase in MOVING else self._answer_s
        return rank.asked_s + bound_s <= self._voice.now_s

    def _silent(self, group: Group, rank: Rank) -> None:
        self._voice.note(group.spec.request_id, f"{group.name(rank)}, {rank.phase}, is silent")
        match group.state:
            case G.DISSOLVING:
                rank.phase = R.GONE
            case G.FINISHING:
                self._voice.tell(group, rank, R.FINISHED, DropSegment)
            case _:
                owed, silent_s = rank.phase, self._voice.now_s - rank.asked_s
                self._voice.tell(group, rank, R.GONE, DropSegment)
                self._dissolve(
                    group,
                    f"{group.name(rank)}, {owed}, has not answered for {silent_s:g} s",
                    retryable=True,
                )

    def _end(self, group: Group, ending: GroupEnding) -> bool:
        key = group.key
        self._voice.move(group, G.GONE)
        del self._groups[key]
        self._timers.drop(key)
        self._endings[key] = ending
        if len(self._endings) > ENDINGS_KEPT:
            (forgotten, attempt), _ = self._endings.popitem(last=False)
            if self._newest.get(forgotten) == attempt:
                del self._newest[forgotten]
        self._voice.say(ending)
        return True

    # --- speaking --------------------------------------------------------------------------------

    def _failed(self, key: GroupKey, reason: str, *, retryable: bool) -> GroupFailed:
        return GroupFailed(
            request_id=key[0], attempt=key[1], reason=reason, retryable=retryable, cause=self._voice.cause
        )
