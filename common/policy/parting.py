"""When a long that prefills gives replicas back: its first takes in the KV of all and goes on alone.

A group is worth its replicas while it does more with them than others would. It no longer is

- where shorts keep it standing: they stop all of its replicas to use one, and would hardly ever stop one alone, beside
  which they have others. If one replica, undisturbed, is done sooner than the group that stands as often as it has so
  far, it goes on alone;
- where the next long waits for a place, and both together are done sooner, on average, each on its own part of the
  replicas than one after the other on all of them. (Of two equal ones that is so if the group is less than 1.5 times as
  fast as one replica: on cores that its ranks share with others it may be.)

Both by the estimates of the planner, which hears how long groups really take. Only longs whose first replica has set
aside room for all KV can (`GroupScheme.gathers`); one that did does not grow again.
"""

from __future__ import annotations

from collections.abc import Sequence

from common.policy.cluster import Cluster, Request
from common.policy.decisions import PartLong
from common.policy.elastic import GAIN_MIN_S, LOOKS_MAX, Work
from common.policy.lifecycle import RequestState
from common.policy.long_planner import LongPlanner
from common.policy.placement import layout_of
from common.policy.preemption import PauseAccount
from common.units import WorkerId

LOOK_EVERY_S = 0.5
PAUSES_MIN = 3
"""So often must it have stood before it is said to."""
STOOD_MAX = 0.9
"""Of its time: more is not counted on."""


class Parting:
    """Of one policy."""

    def __init__(self, planner: LongPlanner) -> None:
        self._planner = planner
        self._rests_until_s = 0.0

    def is_due(self, cluster: Cluster, now_s: float) -> bool:
        """Whether to ask for a decision."""
        return now_s >= self._rests_until_s and bool(cluster.running) and cluster.running[-1][0] > 1

    def decide(self, cluster: Cluster, waiting: Request | None, spare: int, now_s: float) -> PartLong | None:
        """`waiting`: the long whose turn it is, for which there was no place. `spare`: replicas that are left to
        shorts. Looks at the largest groups, which have the most to give back."""
        self._rests_until_s = now_s + LOOK_EVERY_S
        for _, _, request_id in reversed(cluster.running[-LOOKS_MAX:]):
            request = cluster.requests[request_id]
            if _may_part(request) and self._pays(cluster, request, waiting, spare, now_s):
                return PartLong(request)
        return None

    def _pays(self, cluster: Cluster, request: Request, waiting: Request | None, spare: int, now_s: float) -> bool:
        pauses, prefill_s, tokens = request.pauses, self._planner.prefill_s, request.tokens
        assert pauses is not None
        left_s = pauses.remaining_s(now_s)
        if left_s <= GAIN_MIN_S:
            return False
        together = layout_of(cluster, request.members)
        work, one = Work.of(prefill_s, tokens, together), Work.of(prefill_s, tokens, (1,))
        done = work.tokens(max(0.0, work.seconds(tokens) - left_s))
        alone_s = one.seconds(tokens) - one.seconds(done)
        stands_s = left_s / (1.0 - stood(pauses, now_s))
        if alone_s + GAIN_MIN_S <= stands_s:
            return True
        others = request.members[1:]
        if waiting is None or not _has_place(cluster, waiting, others, spare):
            return False
        in_turn_s = 2.0 * stands_s + prefill_s(waiting.tokens, together)
        apart_s = alone_s + prefill_s(waiting.tokens, layout_of(cluster, others))
        return apart_s + GAIN_MIN_S <= in_turn_s


def stood(pauses: PauseAccount, now_s: float) -> float:
    """Share of its time for which a long was paused so far; 0 while that says little."""
    if pauses.count < PAUSES_MIN:
        return 0.0
    return min(STOOD_MAX, pauses.suspended_by(now_s) / max(1e-9, now_s - pauses.started_s))


def _may_part(request: Request) -> bool:
    runs = request.state is RequestState.RUNNING and not request.joining and request.parting_since_s is None
    return runs and request.scheme.gathers and len(request.members) > 1


def _has_place(cluster: Cluster, waiting: Request, freed: Sequence[WorkerId], spare: int) -> bool:
    """Whether it would have one on these, and has none now."""
    seats = cluster.seats - spare
    if min(seats, len(cluster.vacant)) > 0 or seats + len(freed) < 1:
        return False
    return waiting.spec.kv_tokens <= sum(cluster.replicas[worker_id].kv_free for worker_id in freed)
