"""How a group takes in more ranks while it prefills: the coordinator's part.

    PREFILLING   all ranks of the larger group meet, beside the prefill that goes on: `LoadSegment` to newcomers, which
                 reserve their share of the KV, `MeetRanks` to the others
    SWITCHING    all have met: rank 0 ends its chunk and stands, then the others are asked whether they do
    RESUMING     the ranks are those of the larger group from here on; each goes over to it with its `RunSegment`

Before RESUMING nothing of the group has changed. So whatever goes wrong or comes in between (a newcomer has no room, a
rank is not met within `answer_s`, a pause, the end of the prefill), newcomers are told to drop what they hold, and the
group goes on as it was. After that it is a group like any other, which dissolves when a rank is lost.

A group has one try at a time, and nobody is in one who has not confirmed yet that it dropped an earlier one.
Connections of one that failed stay until the next, or the end of the request.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from common.messages.groups import RANKS_MAX
from common.messages.sp import (
    DropSegment,
    GrowGroup,
    LoadSegment,
    MeetRanks,
    PauseSegment,
    RanksMet,
    SegmentDropped,
    SegmentFailed,
    SegmentLoaded,
    SegmentPart,
)
from common.policy.sp_group import Group, GroupState, Rank, RankPhase
from common.policy.sp_io import MemberWord
from common.policy.sp_shares import Mesh
from common.policy.sp_voice import Voice
from common.units import WorkerId


@dataclass(slots=True, eq=False)
class Growth:
    """One try."""

    number: int
    ranks: tuple[Rank, ...]
    """Of the larger group; those that are in it already are the group's own."""
    newcomers: tuple[Rank, ...]
    asked_s: float
    unmet: set[WorkerId] = field(default_factory=set)
    """Ranks of the group that have not met the others yet."""

    @property
    def ready(self) -> bool:
        return not self.unmet and all(rank.phase is RankPhase.LOADED for rank in self.newcomers)

    def newcomer(self, worker_id: WorkerId) -> Rank | None:
        return next((rank for rank in self.newcomers if rank.worker_id == worker_id), None)


def grow(voice: Voice, group: Group, order: GrowGroup) -> None:
    """The scheduler wants it."""
    trying = group.trying
    if trying is not None and trying.number >= order.growth:
        return  # answered when that has ended
    if group.tried >= order.growth:
        voice.say(group.grown_word(voice.cause, group.tried))
        return
    give_up(voice, group, "another try begins")
    refusal = _why_not(group, order)
    if refusal:
        group.tried = order.growth
        voice.say(group.grown_word(voice.cause, order.growth, refusal))
        return
    group.trying = trying = _begun(group, order, voice.now_s)
    for number, rank in enumerate(trying.ranks):
        if rank in trying.newcomers:
            voice.say(_load(voice, group, order, number))
        else:
            about = {"growth": order.growth, "rank": number, "addresses": order.addresses}
            voice.say(voice.order_to(rank.worker_id, group.key, MeetRanks, **about))


def _begun(group: Group, order: GrowGroup, now_s: float) -> Growth:
    known = {rank.worker_id: rank for rank in group.ranks}
    ranks = tuple(known.get(member) or Rank(worker_id=member, asked_s=now_s) for member in order.members)
    newcomers = tuple(rank for rank in ranks if rank.worker_id not in known)
    return Growth(order.growth, ranks, newcomers, now_s, unmet=set(known))


def _load(voice: Voice, group: Group, order: GrowGroup, number: int) -> LoadSegment:
    return LoadSegment(
        worker_id=order.members[number],
        spec=group.spec,
        rank=number,
        members=order.members,
        parts=(SegmentPart(start=0, tokens=group.spec.prompt.tokens),),
        addresses=order.addresses,
        scheme=group.scheme,
        growth=order.growth,
        cause=voice.cause,
        epoch=voice.epoch,
    )


def _why_not(group: Group, order: GrowGroup) -> str:
    """Why it stays as it is; empty: it may grow."""
    members, addresses, mine = order.members, order.addresses, group.members
    if group.state is not GroupState.PREFILLING or group.parts:
        return "it gives workers back" if group.parts else f"it is {group.state}"
    if group.scheme.per_node > 1:
        return f"{group.scheme.name(len(mine))}: only rings grow"
    if not len(mine) < len(set(members)) == len(members) <= RANKS_MAX:
        return f"{len(members)} members are no more than {len(mine)}, or a worker is named twice"
    if members[0] != mine[0] or tuple(member for member in members if member in mine) != mine:
        return "its ranks would change their order"
    if group.letting_go.intersection(members):  # what it still says of the last try would be taken for this one's
        return "one that is to come in still lets go of an earlier try"
    if len(addresses) != len(members) or not all(addresses):
        return "each rank must be reached by the others"
    return ""


def heard_of_newcomer(voice: Voice, group: Group, word: MemberWord) -> bool:
    """Whether it is one, or was."""
    if word.worker_id in group.letting_go:
        if isinstance(word, SegmentDropped | SegmentFailed):
            group.letting_go.discard(word.worker_id)
        return True
    rank = None if group.trying is None else group.trying.newcomer(word.worker_id)
    if rank is None:
        return False
    voice.note(group.spec.request_id, f"{type(word).__name__} from {word.worker_id}, which is to come in")
    match word:
        case SegmentLoaded():
            rank.phase = RankPhase.LOADED
        case SegmentFailed(reason=reason):
            rank.phase = RankPhase.GONE
            give_up(voice, group, f"{word.worker_id} failed: {reason}")
        case SegmentDropped():
            rank.phase = RankPhase.GONE
            give_up(voice, group, f"{word.worker_id} dropped its segment")
        case _:
            pass
    return True


def met(voice: Voice, group: Group, word: RanksMet) -> None:
    """Of a rank of the group."""
    trying = group.trying
    if trying is None or trying.number != word.growth:
        return
    if word.reason:
        give_up(voice, group, f"{word.worker_id} has not met the others: {word.reason}")
    else:
        trying.unmet.discard(word.worker_id)


def is_overdue(group: Group, answer_s: float, now_s: float) -> bool:
    """Not all have met in time."""
    trying = group.trying
    return trying is not None and group.state is GroupState.PREFILLING and trying.asked_s + answer_s <= now_s


def may_switch(group: Group) -> bool:
    runs = group.state is GroupState.PREFILLING and group.leader.phase is RankPhase.RUNNING
    return runs and group.trying is not None and group.trying.ready


def switch(voice: Voice, group: Group) -> bool:
    """Begin to."""
    voice.move(group, GroupState.SWITCHING)
    voice.tell(group, group.leader, RankPhase.ENDING, PauseSegment, at_chunk_end=True)
    return True


def take_in(voice: Voice, group: Group) -> None:
    """The group stands at the end of a chunk: from here on it is the larger one, if it may still be."""
    trying = group.trying
    if trying is None:
        return  # given up meanwhile
    refusal = _join(group, trying)
    if refusal:
        give_up(voice, group, refusal)
        return
    group.trying, group.tried = None, trying.number
    voice.say(group.grown_word(voice.cause, trying.number))


def _join(group: Group, trying: Growth) -> str:
    """Returns why not."""
    former = [group.ranks.index(rank) if rank in group.ranks else None for rank in trying.ranks]
    start, kv_tokens = group.leader.prefilled_tokens, group.spec.kv_tokens
    mesh = group.mesh.grown(start, former)
    share = mesh.reserved_tokens(kv_tokens)
    reserved = tuple(share if rank is None else group.reserved[rank] for rank in former)
    if start >= group.spec.prompt.tokens or not mesh.fits(kv_tokens, reserved):
        return "there is too little left of it"
    group.ranks, group.mesh, group.reserved = trying.ranks, mesh, reserved
    group.growth, group.grown_at_step = trying.number, group.leader.step
    for rank in trying.newcomers:
        rank.step, rank.prefilled_tokens = group.leader.step, start
    return ""


def give_up(voice: Voice, group: Group, reason: str) -> None:
    """The group stays as it is. Nothing, if it does not try to grow."""
    trying, group.trying = group.trying, None
    if trying is None:
        return
    group.tried = trying.number
    voice.note(group.spec.request_id, f"does not grow: {reason}")
    for rank in trying.newcomers:
        if rank.phase is not RankPhase.GONE:
            voice.tell(group, rank, RankPhase.DROPPING, DropSegment)
            group.letting_go.add(rank.worker_id)
    voice.say(group.grown_word(voice.cause, trying.number, reason))


def overtaken(group: Group) -> None:
    """The group dissolves, and with it those who were to come in."""
    trying, group.trying = group.trying, None
    if trying is not None:
        group.ranks += trying.newcomers
        group.reserved += (0,) * len(trying.newcomers)
        group.mesh = Mesh(len(group.ranks), 1)
