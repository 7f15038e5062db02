"""The SP coordinator's two closed unions: what it hears, what it says."""

from __future__ import annotations

from common.messages.base import Record
from common.messages.sp import (
    DissolveGroup,
    DropSegment,
    FormGroup,
    GroupFailed,
    GroupFinished,
    GroupFormed,
    GroupGrown,
    GroupNotSpilled,
    GroupParted,
    GroupPaused,
    GroupPrefillFinished,
    GroupResumed,
    GroupSpilled,
    GrowGroup,
    LoadSegment,
    MeetRanks,
    PartGroup,
    PartSegment,
    PauseGroup,
    PauseSegment,
    RanksMet,
    RestoreGroup,
    RestoreSegment,
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
    SpillSegment,
)
from common.policy.core import TimePassed


class StopAsked(Record, frozen=True, kw_only=True):
    """From the shell: take no new group, dissolve all."""


GroupOrder = FormGroup | GrowGroup | PartGroup | PauseGroup | ResumeGroup | SpillGroup | RestoreGroup | DissolveGroup
MemberWord = (
    SegmentLoaded
    | RanksMet
    | SegmentRunning
    | SegmentPaused
    | SegmentParted
    | SegmentSpilled
    | SegmentNotSpilled
    | SegmentPrefilled
    | SegmentFinished
    | SegmentFailed
    | SegmentDropped
)
CoordinatorHeard = GroupOrder | MemberWord
"""What others tell it."""
CoordinatorEvent = CoordinatorHeard | StopAsked | TimePassed

MemberOrder = (
    LoadSegment | MeetRanks | RunSegment | PauseSegment | PartSegment | SpillSegment | RestoreSegment | DropSegment
)
GroupEnding = GroupFinished | GroupFailed
GroupWord = (
    GroupFormed
    | GroupGrown
    | GroupParted
    | GroupPaused
    | GroupSpilled
    | GroupNotSpilled
    | GroupResumed
    | GroupPrefillFinished
    | GroupEnding
)
CoordinatorCommand = MemberOrder | GroupWord
