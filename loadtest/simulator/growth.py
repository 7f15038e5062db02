"""A simulated group takes in newcomers at the end of a chunk, as `common.policy.sp_coordinator` does.

They hold their share of the KV from the order on. The chunk that runs is done after a part of its time (uniform); then
the larger group goes on with what is left, which takes as long as the scheduler estimates (`common.policy.elastic`). A
pause, the end of the prefill or of the group before that, and the group is what it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from common.messages.sp import GrowGroup
from common.policy.elastic import PrefillTimes, Work, remaining_s
from common.policy.long_planner import Layout
from common.policy.placement import kv_share
from common.units import WorkerId
from loadtest.simulator.replica import Replica

if TYPE_CHECKING:
    from loadtest.simulator.group import Group


class Try(NamedTuple):
    """To grow."""

    group: Group
    number: int
    members: tuple[Replica, ...]
    """Of the larger group."""

    @classmethod
    def of(cls, group: Group, order: GrowGroup, replicas: Mapping[str, Replica]) -> Try:
        return cls(group, order.growth, tuple(replicas[worker_id] for worker_id in order.members))

    @property
    def newcomers(self) -> tuple[Replica, ...]:
        return tuple(member for member in self.members if member not in self.group.members)

    def take_kv(self) -> None:
        """Of the newcomers."""
        job = self.group.job
        for member in self.newcomers:
            member.kv.reserve(job.request_id, kv_share(job.spec.kv_tokens, len(self.members)))

    def begin(self) -> None:
        """The order is there."""
        self.group.grow(self)


class Progress:
    """How many tokens of a prefill are done when so much of its time is left."""

    def __init__(self, prefill_s: PrefillTimes, tokens: int, layout: Layout) -> None:
        self._prefill_s = prefill_s
        self._tokens = tokens
        self._layout = layout
        self._base = 0.0
        """Tokens done when the group last grew."""
        self._since: Work | None = None
        """Of the tokens after these."""
        self.whole_s = prefill_s(tokens, layout)
        """From then on."""

    @property
    def has_grown(self) -> bool:
        return self._base > 0.0

    def done(self, left_s: float) -> float:
        if self._since is None:
            self._since = Work.of(self._prefill_s, self._tokens, self._layout)
        return self._base + self._since.tokens(max(0.0, self.whole_s - left_s))

    def gather(self, left_s: float) -> float:
        """One replica goes on with the KV of all. Returns how much is left now."""
        done = self.done(left_s)
        one = Work.of(self._prefill_s, self._tokens, (1,))
        self._since = Work(one.linear + 2.0 * one.square * done, one.square)
        self.whole_s = self._since.seconds(self._tokens - done)
        self._base, self._layout = done, (1,)
        return self.whole_s

    def grow(self, left_s: float, layout: Layout) -> float:
        """Returns how much is left now."""
        done, before = self.done(left_s), self._layout
        self.whole_s = remaining_s(self._prefill_s, self._tokens, done, before, layout)
        old = Work.of(self._prefill_s, self._tokens, before)
        new = Work.of(self._prefill_s, self._tokens, layout)
        self._since = Work(new.linear + 2.0 * old.square * done, new.square)
        self._base, self._layout = done, layout
        return self.whole_s


def names_of(members: tuple[Replica, ...]) -> tuple[WorkerId, ...]:
    return tuple(member.worker_id for member in members)
