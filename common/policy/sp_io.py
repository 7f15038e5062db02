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
    GroupPaused,
    GroupPrefillFinished,
    GroupResumed,
    GrowGroup,
    LoadSegment,
    MeetRanks,
    PauseGroup,
    PauseSegment,
    RanksMet,
    ResumeGroup,
    RunSegment,
    SegmentDropped,
    SegmentFailed,
    SegmentFinished,
    SegmentLoaded,
    SegmentPaused,
    SegmentPrefilled,
    SegmentRunning,
)
from common.policy.core import TimePassed


class StopAsked(Record, frozen=True, kw_only=True):
    """From the shell: take no new group, dissolve all."""


GroupOrder = FormGroup | GrowGroup | PauseGroup | ResumeGroup | DissolveGroup
MemberWord = (
    SegmentLoaded
    | RanksMet
    | SegmentRunning
    | SegmentPaused
    | SegmentPrefilled
    | SegmentFinished
    | SegmentFailed
    | SegmentDropped
)
CoordinatorHeard = GroupOrder | MemberWord
"""What others tell it."""
CoordinatorEvent = CoordinatorHeard | StopAsked | TimePassed

MemberOrder = LoadSegment | MeetRanks | RunSegment | PauseSegment | DropSegment
GroupEnding = GroupFinished | GroupFailed
GroupWord = GroupFormed | GroupGrown | GroupPaused | GroupResumed | GroupPrefillFinished | GroupEnding
CoordinatorCommand = MemberOrder | GroupWord
