"""When the KV of a paused long is moved out of its replicas, and when it is brought back.

A pause is cheap because the long's KV stays where it is. But where longs fill a replica's KV, a pause helps nobody: no
short has room there, however long the long stands. So, as a last resort, a long makes room: its whole KV is *spilled*,
on all replicas of its group, to host memory or a file, and is brought back before it goes on where it stood. It keeps
its members and its place. In sentences:

- Longs alone must stand in the way of the short whose turn it is: on no replica would it have room even if every other
  short were gone. Room that shorts will leave is waited for.
- A long that stands already comes first, then one that may be paused now; of several, the one with the least KV. It
  must have time enough left in this pause for its way out, the short, and its way back.
- Hysteresis: it stays out for at least as long as the way out took, unless the bound of its pause comes first; and it
  is not moved again before it has run for as long as both ways took. One that a worker refused to move is not asked
  again.
- It comes back when no short is left on its replicas, and at the latest so that the way back ends within the bounds of
  its pause (`PauseAccount.pause_left_s`, 0 from then on): nobody is placed there any more, so its room comes free
  within the time that a prefill and its handoff take. (That is why shorts must not decode where they prefill.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from common.policy.cluster import Cluster, Replica, Request
from common.policy.costs import shorts_s
from common.policy.decisions import PauseLong, SpillLong
from common.policy.lifecycle import RequestState
from common.policy.placement import GROUPS_MAX, PER_GROUP, NoPlace
from common.policy.preemption import PauseAccount, PauseBounds
from common.policy.scheduler_config import SchedulerConfig
from common.units import RequestId

MAKES_ROOM_SOON = frozenset({RequestState.PAUSING, RequestState.SPILLING})


def spills(config: SchedulerConfig) -> bool:
    """Whether any long ever does."""
    return config.spill != "off" and config.preemption and config.disaggregation


def room_by_spilling(
    cluster: Cluster, bounds: PauseBounds, short: Request, now_s: float
) -> SpillLong | PauseLong | NoPlace:
    """Which long makes room for this short, for which there is no place now; one at a time."""
    if not _only_longs_stand_in_the_way(cluster, short):
        return NoPlace()
    standing = [cluster.requests[request_id] for request_id in cluster.standing.least(GROUPS_MAX)]
    candidates = [long for long in standing if _would_make_room(cluster, long, short)]
    if any(long.state in MAKES_ROOM_SOON for long in candidates):
        return NoPlace()
    paused = [long for long in candidates if _has_time(cluster, bounds, long, short, now_s)]
    if paused:
        return SpillLong(min(paused, key=_kv))
    return _to_pause(cluster, bounds, short, now_s)


def _to_pause(cluster: Cluster, bounds: PauseBounds, short: Request, now_s: float) -> PauseLong | NoPlace:
    retry_s: float | None = None
    pausable: list[Request] = []
    for _, _, request_id in cluster.running[:GROUPS_MAX]:
        long = cluster.requests[request_id]
        pauses = long.pauses
        if pauses is None or long.state is not RequestState.RUNNING or not pauses.may_spill(now_s):
            continue
        needed_s = _needed_s(cluster, pauses, long, short)
        if needed_s > bounds.pause_max_s or not _would_make_room(cluster, long, short):
            continue
        from_s = pauses.pausable_from_s(now_s, needed_s, bounds)
        if from_s is not None and from_s <= now_s:
            pausable.append(long)
        elif from_s is not None and (retry_s is None or from_s < retry_s):
            retry_s = from_s
    return PauseLong(min(pausable, key=_kv)) if pausable else NoPlace(retry_s)


def _only_longs_stand_in_the_way(cluster: Cluster, short: Request) -> bool:
    """By a bounded number of replicas."""
    return not any(_room_beside_longs(replica) >= short.tokens for replica in _candidates(cluster))


def _candidates(cluster: Cluster) -> Iterator[Replica]:
    """Where a short may go, those with the fewest queued tokens first."""
    for index in (cluster.idle, cluster.decoding):
        yield from (cluster.replicas[worker_id] for worker_id in index.least())
    running = [request_id for _, _, request_id in cluster.running[:GROUPS_MAX]]
    for request_id in [*cluster.standing.least(GROUPS_MAX), *running]:
        yield from _members(cluster, request_id)


def _members(cluster: Cluster, request_id: RequestId) -> Iterator[Replica]:
    return (cluster.replicas[worker_id] for worker_id in cluster.groups[request_id].least(PER_GROUP))


def _room_beside_longs(replica: Replica) -> int:
    return replica.profile.kv_capacity_tokens - replica.kv_of_longs


def _would_make_room(cluster: Cluster, long: Request, short: Request) -> bool:
    """Its KV gone, one of its replicas could take the short; and all can move it. (Not while others join it.)"""
    if long.joining or not all(cluster.replicas[worker_id].profile.spill_bytes_max for worker_id in long.members):
        return False
    for replica in _members(cluster, long.request_id):
        room = _room_beside_longs(replica) + replica.held[long.key].tokens
        if room >= short.tokens <= replica.profile.context_tokens:
            return True
    return False


def _has_time(cluster: Cluster, bounds: PauseBounds, long: Request, short: Request, now_s: float) -> bool:
    """It is paused, and may be for as long as this takes."""
    pauses = long.pauses
    if pauses is None or long.state is not RequestState.PAUSED or not pauses.may_spill(now_s):
        return False
    return _needed_s(cluster, pauses, long, short) <= pauses.pause_left_s(now_s, bounds)


def _needed_s(cluster: Cluster, pauses: PauseAccount, long: Request, short: Request) -> float:
    """Its way out, the short, its way back. By its own measure, or by what others took; nothing where nobody has
    moved yet."""
    replicas = [cluster.replicas[worker_id] for worker_id in long.members]
    move_s = pauses.move_s or cluster.spill_token_s * max(replica.held[long.key].tokens for replica in replicas)
    return 2.0 * move_s + shorts_s(replicas[0].profile.step_cost, short.tokens, short.tokens)


def _kv(long: Request) -> tuple[int, int]:
    return long.spec.kv_tokens, long.order


def comes_back_in_s(cluster: Cluster, bounds: PauseBounds, long: Request, now_s: float) -> float | None:
    """Of a spilled long: 0: now. Later, unless something happens. None: when there is room."""
    pauses = long.pauses
    assert pauses is not None
    left_s = pauses.pause_left_s(now_s, bounds)
    members = [cluster.replicas[worker_id] for worker_id in long.members]
    rests_s = math.inf if any(replica.has_shorts for replica in members) else long.state_since_s + pauses.move_s - now_s
    wait_s = min(left_s, rests_s)
    if wait_s > 0.0:
        return wait_s
    roomy = all(replica.kv_free >= share for replica, share in zip(members, pauses.spilled, strict=True))
    return 0.0 if roomy else None
