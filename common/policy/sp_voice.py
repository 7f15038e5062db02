"""How the SP coordinator speaks: what it orders and says while it handles one event, each with its cause and in the
request's story."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from common.messages.sp import (
    DropSegment,
    LoadSegment,
    MeetRanks,
    PartSegment,
    PauseSegment,
    RestoreSegment,
    RunSegment,
    SpillSegment,
)
from common.policy.sp_group import Group, GroupKey, GroupState, Rank, RankPhase
from common.policy.sp_io import CoordinatorCommand
from common.policy.story import StoryLog
from common.units import RequestId, WorkerId

StandingOrder = MeetRanks | RunSegment | PauseSegment | PartSegment | SpillSegment | RestoreSegment | DropSegment

STORIES_KEPT = 1_000
STORY_LINES_MAX = 200


class Voice:
    def __init__(self) -> None:
        self.epoch = 0
        """Of the scheduler in charge."""
        self.cause = ""
        self.now_s = 0.0
        """These two, and what is said, are of the event that is handled."""
        self._events = 0
        self._out: list[CoordinatorCommand] = []
        self._stories = StoryLog(STORIES_KEPT, STORY_LINES_MAX)

    def begin(self, event: object, now_s: float) -> None:
        """To handle it."""
        self.now_s = now_s
        self._events += 1
        self.cause = f"sp.{self._events}.{type(event).__name__}"
        self._out = []

    def taken(self) -> list[CoordinatorCommand]:
        """All that was said."""
        return self._out

    def say(self, command: CoordinatorCommand) -> None:
        self._out.append(command)
        request_id = command.spec.request_id if isinstance(command, LoadSegment) else command.request_id
        self.note(request_id, f"→ {type(command).__name__}")

    def tell(
        self, group: Group, rank: Rank, phase: RankPhase, order: Callable[..., StandingOrder], **more: Any
    ) -> None:
        """Give a rank an order, and remember what it owes."""
        rank.phase, rank.asked_s = phase, self.now_s
        self.say(self.order_to(rank.worker_id, group.key, order, **more))

    def order_to(
        self, worker_id: WorkerId, key: GroupKey, order: Callable[..., StandingOrder], **more: Any
    ) -> StandingOrder:
        about = {"worker_id": worker_id, "request_id": key[0], "attempt": key[1], "cause": self.cause}
        return order(**about, epoch=self.epoch, **more)

    def move(self, group: Group, target: GroupState) -> None:
        before = group.state
        group.move(target)
        self.note(group.spec.request_id, f"{before} → {target}")

    def note(self, request_id: RequestId, what: str) -> None:
        self._stories.note(request_id, self.now_s, self.cause, what)

    def story(self, request_id: RequestId) -> list[str]:
        """Oldest first; bounded."""
        return self._stories.tell(request_id)
