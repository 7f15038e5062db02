"""A paused group's KV moved out and brought back, by the coordinator: on all ranks, or on none.

- `SpillGroup` to a group that stands: every rank is told at once. When all have moved their share, the group is
  spilled. If one could not, those that have bring theirs back, and the group stands as before, with the reason.
- `RestoreGroup` to a group that is spilled: every rank is told at once; when all stand where they stood, it is paused.
- Moving takes as long as the share is large: a rank has `move_s` for it, not `answer_s`. To drop a share while it is
  moved takes no longer than to drop any other.
- An order that is repeated, or comes after its effect, is answered again by where the group stands.
"""

from __future__ import annotations

from common.messages.sp import (
    RestoreGroup,
    RestoreSegment,
    SegmentNotSpilled,
    SegmentSpilled,
    SpillGroup,
    SpillSegment,
)
from common.policy.sp_group import MOVING, Group, GroupState, Rank, RankPhase
from common.policy.sp_voice import Voice

G = GroupState
R = RankPhase


class Spilling:
    def __init__(self, voice: Voice) -> None:
        self._voice = voice

    def obey(self, order: SpillGroup | RestoreGroup, group: Group) -> None:
        if isinstance(order, SpillGroup) and group.state is G.PAUSED:
            if group.trying is not None:
                group.not_spilled = "others join it"
                self._voice.say(group.not_spilled_word(self._voice.cause))
                return
            group.not_spilled = ""
            self._voice.move(group, G.SPILLING)
            for rank in group.ranks:
                self._voice.tell(group, rank, R.SPILLING, SpillSegment)
        elif isinstance(order, RestoreGroup) and group.state is G.SPILLED:
            self._bring_back(group)
        else:
            self._say_where_it_stands(group)

    def heard(self, group: Group, rank: Rank, word: SegmentSpilled | SegmentNotSpilled) -> None:
        if rank.phase is not R.SPILLING:
            return
        if isinstance(word, SegmentSpilled):
            rank.phase = R.SPILLED
        else:
            rank.phase = R.PAUSED
            group.not_spilled = group.not_spilled or f"{group.name(rank)}: {word.reason}"

    def advance(self, group: Group) -> bool:
        """Of a group that spills or restores: one transition, if one is due."""
        if group.in_phase(*MOVING):
            return False
        if group.all_in(R.SPILLED):
            self._voice.move(group, G.SPILLED)
            self._say_where_it_stands(group)
        elif group.in_phase(R.SPILLED):
            self._bring_back(group)
        else:
            self._stands_again(group)
        return True

    def _bring_back(self, group: Group) -> None:
        self._voice.move(group, G.RESTORING)
        for rank in group.in_phase(R.SPILLED):
            self._voice.tell(group, rank, R.RESTORING, RestoreSegment)

    def _stands_again(self, group: Group) -> None:
        self._voice.move(group, G.PAUSED)
        if group.not_spilled:
            self._voice.say(group.not_spilled_word(self._voice.cause))
        else:
            self._say_where_it_stands(group)

    def _say_where_it_stands(self, group: Group) -> None:
        for word in group.standing(self._voice.cause):
            self._voice.say(word)
