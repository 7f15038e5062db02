"""When a long that prefills takes in workers that have become idle (elastic degree; LoongServe, Tetris).

At the end of a chunk a group of one or more may go on with more ranks. What they compute from there on is dealt out
over all of them; KV stays where it lies, and queries travel to it. So of the work that is left, of m tokens behind b,

- linear work and the attention of the m tokens to each other are shared by all: a·m + s·m² by a group of that size;
- their attention to the b tokens before is done where these lie, by those who were there: 2·s'·b·m at the old size.

The coefficients are those of a parabola through the planner's times of the whole prompt and of half of it. The gain is
partial, and the less the later: half way through a prompt of which attention is nearly all, twice the ranks save a
sixth of the rest. It must be worth a few seconds of somebody's time to be worth the trouble, each rank must do
`EFFICIENCY_MIN` of what it did before, nobody else may be waiting, and the workers must have been idle for a while.

What makes a group give ranks back stands in `parting.py`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from common.policy.cluster import Cluster, Request
from common.policy.decisions import GrowLong
from common.policy.lifecycle import RequestState
from common.policy.long_planner import Layout, LongPlanner
from common.policy.placement import kv_share, layout_of
from common.policy.scheduler_config import SchedulerConfig
from common.units import RequestId, WorkerId

EFFICIENCY_MIN = 0.5
"""What the ranks of a larger group do each, at the least, of what those of the smaller one would."""
GAIN_MIN_S = 0.5
"""It must be done so much sooner: taking in a rank means to meet it, and a stop of a few milliseconds."""
IDLE_S = 0.5
"""So long must workers have been idle: what comes next may want them."""
TRY_AGAIN_S = 5.0
"""From one try of a group to its next, whatever came of it."""
LOOKS_MAX = 4
"""Groups that are looked at for one decision."""
LOOK_EVERY_S = 0.1
"""From one look to the next. In a large cluster something begins or ends in every millisecond, and each time others are
idle; to weigh a group costs as much as ten decisions do, and one that grows a little later loses next to nothing."""
SOON_S = 0.002
"""Nor in the very event from which it follows that one may be worth it: a request waits for what that is about."""
SIZES = (32, 16, 8, 4, 2, 1)
"""Numbers of newcomers that are weighed, after as many as there are."""

PrefillTimes = Callable[[int, Layout], float]
"""`LongPlanner.prefill_s`."""


class Work(NamedTuple):
    """Seconds of a prefill: linear·tokens + square·tokens²."""

    linear: float
    square: float

    @classmethod
    def of(cls, prefill_s: PrefillTimes, tokens: int, layout: Layout) -> Work:
        """Of prompts of about so many tokens, up to the next power of two: a planner keeps what it has estimated, and
        prompts of all lengths ask for the same few estimates."""
        whole = 1 << max(1, (tokens - 1).bit_length())
        whole_s, half_s = prefill_s(whole, layout), prefill_s(whole // 2, layout)
        square = max(0.0, 2.0 * (whole_s - 2.0 * half_s)) / whole**2
        return cls(whole_s / whole - square * whole, square)

    def seconds(self, tokens: float) -> float:
        return (self.linear + self.square * tokens) * tokens

    def tokens(self, seconds: float) -> float:
        """That take so long."""
        if self.square * seconds < 1e-9 * self.linear**2:
            return seconds / self.linear if self.linear > 0.0 else 0.0
        root = math.sqrt(self.linear**2 + 4.0 * self.square * seconds)
        return (root - self.linear) / (2.0 * self.square)


def remaining_s(prefill_s: PrefillTimes, tokens: int, done: float, before: Layout, after: Layout) -> float:
    """Of a prompt of `tokens` of which `done` are prefilled by a group of layout `before`, on one of layout `after`.
    The same layout twice: as it is."""
    old = Work.of(prefill_s, tokens, before)
    new = old if before == after else Work.of(prefill_s, tokens, after)
    left = tokens - done
    return new.seconds(left) + 2.0 * old.square * done * left


class Elastic:
    """Of one policy. `spare`: how many free replicas are to be left to shorts."""

    def __init__(self, config: SchedulerConfig, planner: LongPlanner) -> None:
        self._config = config
        self._planner = planner
        self._idle_since_s: float | None = None
        """Since when more replicas are idle than are to be left."""
        self._seen: int | None = None
        """The cluster's count of changes when it was last found that nobody grows."""
        self._declined: dict[RequestId, tuple[int, float]] = {}
        """For whom of those looked at last how many workers more were not worth it, and until when that is not asked
        again: the less is left to be shared, the less they are."""
        self._rests_until_s = 0.0
        """Before this nobody looks again."""
        self._look_s: float | None = None
        """When the next look is due; None: not before something changes."""

    def decide(self, cluster: Cluster, spare: int, now_s: float) -> GrowLong | None:
        """When nobody waits."""
        seats = min(len(cluster.vacant), cluster.seats - spare)
        if seats < 1 or not cluster.running or not cluster.can_form_groups:
            self._idle_since_s = self._seen = self._look_s = None
            return None
        if self._idle_since_s is None:
            self._idle_since_s = now_s
        if self._seen != cluster.room_changes:
            due_s = max(now_s + SOON_S, self._idle_since_s + IDLE_S, self._rests_until_s)
            self._look_s = due_s if self._look_s is None else min(due_s, self._look_s)
        if self._look_s is None or now_s < self._look_s:
            return None
        return self._look(cluster, seats, now_s)

    def _look(self, cluster: Cluster, seats: int, now_s: float) -> GrowLong | None:
        """At the smallest groups, which gain most."""
        self._look_s, self._rests_until_s = None, now_s + LOOK_EVERY_S
        before, self._declined = self._declined, {}
        for _, _, request_id in cluster.running[:LOOKS_MAX]:
            request = cluster.requests[request_id]
            again_s = request.growth_since_s + TRY_AGAIN_S if request.growth else now_s
            if now_s < again_s:
                self._look_s = again_s if self._look_s is None else min(again_s, self._look_s)
                continue
            if request.state is not RequestState.RUNNING or request.joining or request.scheme.per_node > 1:
                continue
            if request.parted or request.parting_since_s is not None:
                continue
            declined, until_s = before.get(request_id, (0, now_s))
            if seats <= declined and now_s < until_s:
                self._declined[request_id] = declined, until_s
                continue
            newcomers = self._newcomers(cluster, request, seats, now_s)
            if newcomers:
                self._look_s = self._rests_until_s  # for the others
                return GrowLong(request, newcomers)
            self._declined[request_id] = seats, now_s + TRY_AGAIN_S
        self._seen = cluster.room_changes
        return None

    def long_changed(self, request: Request) -> None:
        """It may be able to grow now: it runs again, or has grown. And its pace is known anew."""
        self._seen = None
        self._declined.pop(request.request_id, None)

    def nobody_grows(self) -> None:
        """Somebody waits: what is idle is for them."""
        self._idle_since_s = self._look_s = None

    def next_deadline_s(self) -> float | None:
        return self._look_s

    def _newcomers(self, cluster: Cluster, request: Request, seats: int, now_s: float) -> tuple[WorkerId, ...]:
        most = min(seats, min(self._config.group_max, self._planner.degree_max) - len(request.members))
        offered = _offered(cluster, request, most) if most > 0 else []
        return tuple(offered[: self._best(cluster, request, offered, now_s)])

    def _best(self, cluster: Cluster, request: Request, offered: Sequence[WorkerId], now_s: float) -> int:
        """How many of these it takes in: the most that are worth it. None is weighed that would not be worth it even
        if all that can be shared were shared ideally."""
        assert request.pauses is not None
        tokens, prefill_s = request.tokens, self._planner.prefill_s
        size, left_s = len(request.members), request.pauses.remaining_s(now_s)
        if not offered or left_s <= GAIN_MIN_S:
            return 0
        before = layout_of(cluster, request.members)
        work = Work.of(prefill_s, tokens, before)
        done = work.tokens(max(0.0, work.seconds(tokens) - left_s))
        fixed_s = 2.0 * work.square * done * (tokens - done)
        for count in (len(offered), *(n for n in SIZES if n < len(offered))):
            share = size / (size + count)
            enough_s = min(left_s - GAIN_MIN_S, left_s * share / EFFICIENCY_MIN)
            if fixed_s + (left_s - fixed_s) * share > enough_s or _lacks_room(cluster, request, offered[:count]):
                continue
            after = layout_of(cluster, (*request.members, *offered[:count]))
            if remaining_s(prefill_s, tokens, done, before, after) <= enough_s:
                return count
        return 0


def _offered(cluster: Cluster, request: Request, most: int) -> list[WorkerId]:
    """Vacant replicas, those on the nodes of its members first. Of live ones, only such as stand behind rank 0 in the
    one order in which groups name their members (`in_rank_order`): it stays rank 0."""
    replicas, key = cluster.replicas, request.key
    first = replicas[request.members[0]].profile
    first_address, first_place = first.group_address, (first.node, first.worker_id)
    homes = Counter([replicas[member].node for member in request.members])
    nodes = [node for node, _ in homes.most_common()]
    nodes += [node for _, node in cluster.vacant.largest() if node not in homes]
    found: list[WorkerId] = []
    for node in nodes:
        for worker_id in cluster.vacant.of(node, len(cluster.vacant)):
            replica = replicas[worker_id]
            address = replica.profile.group_address
            if (first_address or address) and not (
                first_address and address and (replica.node, worker_id) > first_place
            ):
                continue
            if key in replica.held:
                continue  # of an earlier try: it has not said yet that it is free
            found.append(worker_id)
            if len(found) == most:
                return found
    return found


def _lacks_room(cluster: Cluster, request: Request, newcomers: Sequence[WorkerId]) -> bool:
    share = kv_share(request.spec.kv_tokens, len(request.members) + len(newcomers))
    return any(cluster.replicas[worker_id].kv_free < share for worker_id in newcomers)
