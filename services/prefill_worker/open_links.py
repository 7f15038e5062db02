"""The links of the shares that are open on a worker: put there when a group's ranks have met, exchanged for those of a
larger group as it grows, watched for their loss."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from common.policy.prefill_events import EnterGroup, GroupLost, MeetOthers, OthersMet
from common.units import Attempt, RequestId
from services.engine.collectives import GroupLink, GroupLinks, GroupShare
from services.prefill_worker.meetings import Meetings, Spawn

LOST_AFTER_S = 0.5
"""An order takes less."""


class OpenLinks:
    """By request. `tell`: where losses, and the ends of meetings, are told."""

    def __init__(self, spawn: Spawn, tell: Callable[[GroupLost | OthersMet], None]) -> None:
        self._tell = tell
        self._links: dict[RequestId, GroupLink] = {}
        self._meetings = Meetings(spawn, tell)

    def __repr__(self) -> str:
        return f"OpenLinks({list(self._links)})"

    def get(self, request_id: RequestId) -> GroupLink | None:
        return self._links.get(request_id)

    def put(self, request_id: RequestId, link: GroupLink) -> None:
        self._links[request_id] = link

    def drop(self, request_id: RequestId) -> None:
        """Its share was not opened; the caller closes the link."""
        self._links.pop(request_id, None)

    def forget(self, request_id: RequestId) -> None:
        """The sequence is closed, and its link with it; nobody meets for it any more."""
        self._links.pop(request_id, None)
        self._meetings.forget(request_id)

    def close(self) -> None:
        for link in self._links.values():
            link.close()
        self._links.clear()
        self._meetings.close()

    # --- a group grows ---

    def meet_others(self, door: GroupLinks | None, order: MeetOthers) -> None:
        """The ranks of the larger group, beside what the smaller one computes. Ends in `OthersMet`."""
        self._meetings.begin(door, order)

    def enter(self, order: EnterGroup) -> GroupShare | None:
        """This rank's share in the larger group, whose link is the sequence's from now on. None: that group is gone,
        and that has been told. Of a newcomer, its own link is that of the larger group."""
        request_id = order.request_id
        met = self._meetings.take(request_id, order.growth)
        link = self._links.get(request_id) if met is None else met
        if link is None or link.size != order.size:
            reason = "the larger group is gone"
            self._tell(GroupLost(request_id=request_id, attempt=order.attempt, reason=reason))
            return None
        self._links[request_id] = link
        return GroupShare(order.rank, order.size, order.scheme, link, base=order.start, before=order.kept)

    # --- a group is lost ---

    def watch(self, link: GroupLink, request_id: RequestId, attempt: Attempt) -> None:
        """Tell `GroupLost`, should it break while it is the sequence's."""
        link.on_lost(partial(self._lost, link, request_id, attempt))

    def _lost(self, link: GroupLink, request_id: RequestId, attempt: Attempt, reason: str) -> None:
        """Told a little later: ranks leave at the end of a request too; then the order to drop it is on its way. And
        when a group grows, they leave the smaller one."""
        event = GroupLost(request_id=request_id, attempt=attempt, reason=reason)
        asyncio.get_running_loop().call_later(LOST_AFTER_S, self._tell_if_held, link, event)

    def _tell_if_held(self, link: GroupLink, event: GroupLost) -> None:
        if self._links.get(event.request_id) is link:
            self._tell(event)
