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
    GroupPaused,
    GroupPrefillFinished,
    GroupResumed,
    GroupSpilled,
    GrowGroup,
    LoadSegment,
    MeetRanks,
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


GroupOrder = FormGroup | GrowGroup | PauseGroup | ResumeGroup | SpillGroup | RestoreGroup | DissolveGroup
MemberWord = (
    SegmentLoaded
    | RanksMet
    | SegmentRunning
    | SegmentPaused
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

MemberOrder = LoadSegment | MeetRanks | RunSegment | PauseSegment | SpillSegment | RestoreSegment | DropSegment
GroupEnding = GroupFinished | GroupFailed
GroupWord = (
    GroupFormed
    | GroupGrown
    | GroupPaused
    | GroupSpilled
    | GroupNotSpilled
    | GroupResumed
    | GroupPrefillFinished
    | GroupEnding
)
CoordinatorCommand = MemberOrder | GroupWord
