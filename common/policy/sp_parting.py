"""How rank 0 of a group goes on alone: the coordinator's part.

It takes in the KV of the others, at the end of the prompt or, if the scheduler wants the workers back sooner, with a
chunk that it computes next. It alone says that it has; from then on it is the group. The others are told to drop their
share, and whatever becomes of them changes nothing: KV that an order lost on the way leaves with them is seen in their
heartbeats, and dropped by the scheduler.
"""

from __future__ import annotations

from common.messages.sp import DropSegment, PartSegment, SegmentParted
from common.policy.sp_group import Group, GroupState, RankPhase
from common.policy.sp_growth import give_up
from common.policy.sp_voice import Voice

BEFORE_ITS_END = frozenset(GroupState) - {
    GroupState.DECODING,
    GroupState.FINISHING,
    GroupState.DISSOLVING,
    GroupState.GONE,
}


def part(voice: Voice, group: Group) -> None:
    """The scheduler wants it."""
    if group.state not in BEFORE_ITS_END or not group.followers or not group.scheme.gathers:
        voice.say(group.parted_word(voice.cause))
        return
    give_up(voice, group, "it is to give workers back")
    group.parts = True
    voice.say(voice.order_to(group.leader.worker_id, group.key, PartSegment, growth=group.growth))


def parted(voice: Voice, group: Group, word: SegmentParted) -> None:
    """Rank 0 has all KV; its prefill goes on."""
    if group.state in BEFORE_ITS_END and word.growth == group.growth:
        if group.followers:
            group.parted_at = word.prefilled_tokens
            let_go(voice, group)
        voice.say(group.parted_word(voice.cause))


def let_go(voice: Voice, group: Group) -> None:
    """Of all but rank 0."""
    give_up(voice, group, "rank 0 goes on alone")
    group.parts = False
    for rank in group.part():
        voice.tell(group, rank, RankPhase.DROPPING, DropSegment)
