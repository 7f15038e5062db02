"""Meeting the ranks of a larger group while a smaller one computes: the links of a group that may grow.

One meeting per sequence, under way or over. A later one, and the end of the sequence, end it: whoever waits waits no
more, and a link that nobody took is closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Protocol

from common.policy.prefill_events import MeetOthers, OthersMet
from common.runtime.supervisor import Supervisor
from common.units import RequestId
from services.engine.collectives import GroupBroken, GroupKey, GroupLink, GroupLinks


class Spawn(Protocol):
    def __call__(self, work: Coroutine[None, None, None], *, name: str) -> None: ...


class Meetings:
    """`tell`: where their ends are told."""

    def __init__(self, spawn: Spawn, tell: Callable[[OthersMet], None]) -> None:
        self._spawn = spawn
        self._tell = tell
        self._meetings: dict[RequestId, _Meeting] = {}

    def begin(self, door: GroupLinks | None, order: MeetOthers) -> None:
        self.forget(order.request_id)
        meeting = self._meetings[order.request_id] = _Meeting(order.growth)
        self._spawn(self._meet(door, order, meeting), name=f"meeting for {order.request_id}")

    def take(self, request_id: RequestId, growth: int) -> GroupLink | None:
        """The link, the caller's from now on. None: they have not met."""
        meeting = self._meetings.get(request_id)
        if meeting is None or meeting.growth != growth or meeting.link is None:
            return None
        link, meeting.link = meeting.link, None
        return link

    def forget(self, request_id: RequestId) -> None:
        meeting = self._meetings.pop(request_id, None)
        if meeting is not None:
            meeting.end()

    def close(self) -> None:
        for request_id in list(self._meetings):
            self.forget(request_id)

    async def _meet(self, door: GroupLinks | None, order: MeetOthers, meeting: _Meeting) -> None:
        async with Supervisor() as tasks:
            joining = tasks.spawn(_join(door, order), name="joining")
            leaving = tasks.spawn(meeting.over.wait(), name="leaving")
            await asyncio.wait([joining, leaving], return_when=asyncio.FIRST_COMPLETED)
        if joining.cancelled():
            return
        came = joining.result()
        if meeting.over.is_set():
            if not isinstance(came, str):
                came.close()
            return
        reason = came if isinstance(came, str) else ""
        meeting.link = None if isinstance(came, str) else came
        self._tell(OthersMet(request_id=order.request_id, attempt=order.attempt, growth=order.growth, reason=reason))


class _Meeting:
    def __init__(self, growth: int) -> None:
        self.growth = growth
        self.over = asyncio.Event()
        """Nobody wants it any more."""
        self.link: GroupLink | None = None

    def end(self) -> None:
        self.over.set()
        if self.link is not None:
            self.link.close()
            self.link = None


async def _join(door: GroupLinks | None, order: MeetOthers) -> GroupLink | str:
    """Or why not."""
    if door is None:
        return "this worker serves longs alone"
    key = GroupKey(request_id=order.request_id, attempt=order.attempt, growth=order.growth)
    try:
        return await door.join(key, order.rank, order.addresses)
    except GroupBroken as error:
        return str(error)
