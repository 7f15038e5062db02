"""What one rank knows of a sequence that a group of workers computes: its share, and the passes it is called to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.messages.groups import Announcement
from common.policy.sp_shares import HeadShare
from common.units import RequestId
from services.engine.collectives import GroupBroken, GroupShare, OnCalled

if TYPE_CHECKING:
    from services.engine.weight_shares import WeightShares


@dataclass(slots=True, eq=False)
class SharedSequence:
    """On the event loop's thread, but for what never changes."""

    share: GroupShare
    prompt_tokens: int
    kv_tokens: int
    """Prompt and new tokens, at most; of the whole sequence."""
    heads: tuple[HeadShare, ...] = ()
    """By place in a node."""
    weights: WeightShares | None = None
    """Of the model, for schemes that split weights."""
    passes: int = 0
    """Rank 0: passes begun or resumed."""
    called: Announcement | None = None
    """Follower: the pass it was called to and has not begun."""

    def listen(self, request_id: RequestId, on_called: OnCalled) -> None:
        """From now on tell of rank 0's calls."""

        def heard(announcement: Announcement) -> None:
            self.called = announcement
            on_called(request_id, announcement)

        self.share.link.on_call(heard)

    def bounds(self, start: int, tokens: int) -> tuple[int, ...]:
        """Who computes which of these tokens, counted from `start`: a part of the prompt each, or rank 0 the one
        token drawn."""
        if start >= self.prompt_tokens:
            return (0, *[tokens] * self.share.size)
        return self.share.mesh.bounds(start, tokens)

    def agreed(self, start: int, tokens: int, step: int, *, gathers: bool) -> Announcement:
        """A pass of these tokens begins, or goes on from this step: what rank 0 announces, or has announced.
        Raises: GroupBroken (this follower was called to another)."""
        if self.share.rank == 0:
            self.passes += 1
            return Announcement(
                pass_no=self.passes,
                kind="chunk" if start < self.prompt_tokens else "row",
                start=start,
                tokens=tokens,
                step=step,
                gathers=gathers,
            )
        called, self.called = self.called, None
        mine = (start, tokens, step, gathers)
        if called is None or (called.start, called.tokens, called.step, called.gathers) != mine:
            self.share.link.abort()
            to = f"tokens [{start}, {start + tokens}) from step {step}{', to gather' if gathers else ''}"
            raise GroupBroken(f"called to {called}, not to {to}")
        return called
