"""A timed engine's part in a group: it keeps step with the other ranks, on the event loop, and sends no tensors.

Rank 0 opens every step with the word whether the pass stops after it, and ends it when all others have. Or it takes it
back, if a stop was asked for (`GroupPass.maybe_recall`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.engine.collectives import GroupLink, StepRecalled
from services.engine.interface import Segment
from services.engine.shared_sequence import SharedSequence


class TimedGroup:
    """One rank's part in one shared sequence."""

    def __init__(self, shared: SharedSequence) -> None:
        self.shared = shared

    @property
    def link(self) -> GroupLink:
        return self.shared.share.link

    @property
    def size(self) -> int:
        return self.shared.share.size

    @property
    def leads(self) -> bool:
        return self.shared.share.rank == 0

    def own(self, segment: Segment) -> range:
        """Positions that are computed here."""
        bounds, rank = self.shared.bounds(segment.start, segment.tokens), self.shared.share.rank
        return range(segment.start + bounds[rank], segment.start + bounds[rank + 1])

    @asynccontextmanager
    async def in_pass(self, segment: Segment, step: int) -> AsyncIterator[None]:
        """Around the steps of a pass, from this one on. Whatever goes wrong breaks the group. Raises: GroupBroken."""
        announcement = self.shared.agreed(segment.start, segment.tokens, step, gathers=segment.gathers)
        self.link.begin()
        try:
            await self.link.opened(announcement)
            yield
            self.link.close_pass()
        except BaseException:
            self.link.abort()  # before anybody waits for this rank
            raise
        finally:
            self.link.end()

    async def begin_step(self, step: int, stop_asked: bool, *, recallable: bool) -> bool:
        """Returns whether the pass stops after this step. Raises: StepRecalled (it stops before it), GroupBroken."""
        if not self.leads:
            try:
                return await self.link.received(0, step)
            except StepRecalled:
                await self.link.recalled(step)
                raise
        if stop_asked and recallable:
            await self.link.recalled(step)
            raise StepRecalled
        for rank in range(1, self.size):
            self.link.send(rank, step, stop=stop_asked)
        return stop_asked

    async def end_step(self, step: int) -> None:
        if not self.leads:
            self.link.send(0, step)
            return
        for rank in range(1, self.size):
            await self.link.received(rank, step)
