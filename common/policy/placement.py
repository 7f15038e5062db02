"""Where work goes: the paper's cascade for shorts (section 5.1), the choice of a decoder, a long's place.

For a short, the first rule that fits:

1. an idle replica that runs no long work, the shortest queue first;
2. a replica on which a long *decodes*: share its steps, under a cap of tokens;
3. a replica on which a long *prefills*: pause it (one that is paused already costs no new pause).

Beyond the paper: nobody is paused for a short that a replica without longs would start within
`wait_instead_of_pause_s` anyway; and a group is paused as one, so of those that may be paused the smallest is, and
among equals the one with the most left: the others are done sooner, and their replicas are then free for shorts.

The paper's ablations are switches here: without *colocation* a short holds up a long's decode as it holds up its
prefill; without *preemption* it does neither; without *disaggregation* it decodes where it prefilled.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from common.policy.cluster import Cluster, Decoder, Replica, Request
from common.policy.colocation import has_room
from common.policy.costs import shorts_s
from common.policy.lifecycle import RequestState
from common.policy.load_index import NodeIndex
from common.policy.long_planner import Layout, LongPlanner
from common.policy.preemption import PauseBounds
from common.policy.scheduler_config import SchedulerConfig
from common.units import WorkerId

GROUPS_MAX = 8
PER_GROUP = 4
"""How many groups are looked at for a short, and how many replicas of each: a decision stays O(log n)."""
DRAINED_MAX = 64
"""How many replicas are thought of for a long that takes them from shorts."""

Rule = Literal["idle", "colocate", "exclude", "paused", "pause", "queue"]
"""Which rule of the cascade placed a short. `exclude`: where a long decodes, which waits meanwhile (no colocation);
`queue`: it waits behind others on a replica without longs."""


class Place(msgspec.Struct, frozen=True):
    replica: Replica
    rule: Rule


class NoPlace(msgspec.Struct, frozen=True):
    """Nothing fits now. `retry_s`: when a pause becomes legal, if one will; any event may change it sooner."""

    retry_s: float | None = None


def bounds_of(config: SchedulerConfig) -> PauseBounds:
    return PauseBounds(
        pause_max_s=config.pause_max_s,
        share_max=config.pause_share_max,
        immunity_s=config.pause_immunity_s,
        remaining_min_s=config.pause_remaining_min_s,
    )


def decoder_for(cluster: Cluster, slot_tokens: int) -> Decoder | None:
    """The decoder with the least reserved KV that has a row and a slot free."""
    for worker_id in cluster.decoder_load.least():
        decoder = cluster.decoders[worker_id]
        if decoder.kv_free >= slot_tokens and decoder.has_row:
            return decoder
    return None


def kv_share(kv_tokens: int, degree: int) -> int:
    """What each member of a group sets aside for a long, in tokens."""
    return math.ceil(kv_tokens / degree)


def layout_of(cluster: Cluster, members: tuple[WorkerId, ...]) -> Layout:
    """Members per node, largest first."""
    sizes: dict[str, int] = {}
    node, count = "", 0
    for worker_id in members:  # mostly node by node
        its_node = cluster.replicas[worker_id].node
        if its_node == node:
            count += 1
            continue
        sizes[node] = sizes.get(node, 0) + count
        node, count = its_node, 1
    sizes[node] = sizes.get(node, 0) + count
    return tuple(sorted([size for size in sizes.values() if size], reverse=True))


def in_rank_order(cluster: Cluster, members: tuple[WorkerId, ...]) -> tuple[tuple[WorkerId, ...], tuple[str, ...]]:
    """The members of a group and where they reach each other. Live workers stand in the same order in all groups, by
    node and name: groups that overlap then cannot wait for each other in a circle (`services/engine/collectives.py`).
    """
    if len(members) == 1 or not cluster.replicas[members[0]].profile.group_address:
        return members, ()
    profiles = [cluster.replicas[worker_id].profile for worker_id in members]
    if not all(profile.group_address for profile in profiles):
        return members, ()
    profiles.sort(key=lambda profile: (profile.node, profile.worker_id))
    return tuple(p.worker_id for p in profiles), tuple(p.group_address for p in profiles)


def group_for_long(
    cluster: Cluster,
    config: SchedulerConfig,
    planner: LongPlanner,
    request: Request,
    seats_max: int,
    *,
    drain: bool = False,
) -> tuple[WorkerId, ...]:
    """Replicas for a long, in rank order, node by node; none: not now.

    At most `seats_max` of them, and at most `group_max`. Of several nodes, those with the most vacant replicas, a
    bounded number of them; a group that fits into one node takes the node where it leaves the fewest. (A group
    starts when its last member does: none of them has shorts waiting, so all queues are equally short.) To `drain`
    is to take also replicas with shorts, which finish these first and get no more.
    """
    seats_max = min(seats_max, config.group_max)
    kv_max = cluster.kv_max("prefill")
    if request.spec.kv_tokens > seats_max * kv_max or not cluster.can_form_groups:
        return ()
    if config.group_max == 1:
        return _single(cluster, request.spec.kv_tokens)
    places = _least_queued_seats(cluster) if drain else cluster.vacant
    if request.spec.kv_tokens > len(places) * kv_max:
        return ()
    left = seats_max
    by_node: list[int] = []
    members: list[WorkerId] = []
    for size, node in places.largest():
        by_node.append(min(size, left))
        members += places.of(node, by_node[-1])
        left -= by_node[-1]
        if not left:
            break
    kv_free = _least_kv_free(cluster, members)
    degree = planner.degree(request.tokens, request.spec.kv_tokens, by_node, kv_free)
    one_node = places.best(degree) if degree else None
    if one_node is not None:
        alone = places.of(one_node, degree)
        if _least_kv_free(cluster, alone) >= kv_free:
            return tuple(alone)
    return tuple(members[:degree])


def _least_kv_free(cluster: Cluster, worker_ids: list[WorkerId]) -> int:
    """Of any of these; 0 of none."""
    least, replicas = -1, cluster.replicas
    for worker_id in worker_ids:
        kv_free = replicas[worker_id].kv_free
        if kv_free < least or least < 0:
            least = kv_free
    return max(0, least)


def _least_queued_seats(cluster: Cluster) -> NodeIndex:
    """Replicas whose prefill place is free, those with the fewest queued tokens; a bounded number."""
    seats = NodeIndex()
    for index in (cluster.idle, cluster.decoding):
        for worker_id in index.least(DRAINED_MAX):
            seats.add(worker_id, cluster.replicas[worker_id].node)
    return seats


def _single(cluster: Cluster, kv_tokens: int) -> tuple[WorkerId, ...]:
    """A replica with room for the whole request; one where no long decodes before one where one does."""
    for index in (cluster.idle, cluster.decoding):
        for worker_id in index.least():
            if cluster.replicas[worker_id].kv_free >= kv_tokens:
                return (worker_id,)
    return ()


def place_short(
    cluster: Cluster, config: SchedulerConfig, bounds: PauseBounds, request: Request, now_s: float
) -> Place | NoPlace:
    """The cascade. Looks at a bounded number of replicas per rule. `bounds`: `bounds_of(config)`."""
    free = _least_queued(cluster, config, request)
    wait_s = _wait_s(free, config) if free else float("inf")
    if free and wait_s <= config.wait_instead_of_pause_s:
        return Place(free, "idle")
    shared = _by_sharing(cluster, config, request)
    if shared:
        return shared
    paused = _by_pausing(cluster, config, bounds, request, wait_s, now_s) if config.preemption else NoPlace()
    if isinstance(paused, Place):
        return paused
    return _behind_others(cluster, config, request, free) or paused


def _least_queued(cluster: Cluster, config: SchedulerConfig, request: Request) -> Replica | None:
    for worker_id in cluster.idle.least():
        replica = cluster.replicas[worker_id]
        if not _has_batch_room(replica.queued_tokens, request, config):
            break  # the others have more to do
        if _fits(replica, request, config):
            return replica
    return None


def _by_sharing(cluster: Cluster, config: SchedulerConfig, request: Request) -> Place | None:
    """Rule 2: where longs decode. Without colocation they wait for the short, if longs may be held up at all."""
    if not config.colocation and not config.preemption:
        return None
    for worker_id in cluster.decoding.least():
        replica = cluster.replicas[worker_id]
        if config.colocation:
            at_once = has_room(replica, request.tokens, config.colocated_tokens_max)
        else:
            at_once = replica.queued_tokens == 0
        if not at_once:
            break  # the others have more to do
        if _fits(replica, request, config):
            return Place(replica, "colocate" if config.colocation else "exclude")
    return None


def _behind_others(cluster: Cluster, config: SchedulerConfig, request: Request, free: Replica | None) -> Place | None:
    """Nobody can take it at once: where it starts first, on a replica without longs or where longs decode (beyond
    the cap, which the worker keeps to: the short waits, the long does not)."""
    shared = None
    if config.colocation:
        candidates = (cluster.replicas[worker_id] for worker_id in cluster.decoding.least())
        roomy = (r for r in candidates if _has_batch_room(r.queued_tokens, request, config))
        fitting = (r for r in roomy if _fits(r, request, config))
        shared = next(fitting, None)
    if shared and (free is None or _wait_s(shared, config) < _wait_s(free, config)):
        return Place(shared, "colocate")
    return Place(free, "queue") if free else None


def _by_pausing(
    cluster: Cluster,
    config: SchedulerConfig,
    bounds: PauseBounds,
    request: Request,
    free_wait_s: float,
    now_s: float,
) -> Place | NoPlace:
    """Rule 3: a replica whose long is paused already, if the short starts soon there; else one more to pause,
    so that what waits is spread over the replicas; else behind the others on a paused one."""
    paused = _paused_already(cluster, config, bounds, request, free_wait_s, now_s)
    if paused and _wait_s(paused, config) <= config.wait_instead_of_pause_s:
        return Place(paused, "paused")
    to_pause: Replica | None = None
    smallest, most_left_s = 0, -math.inf
    retry_s: float | None = None
    for size, _, request_id in cluster.running[:GROUPS_MAX]:
        if to_pause and size > smallest:
            break  # the smallest come first
        long, lightest = cluster.requests[request_id], cluster.groups[request_id].lightest()
        pauses = long.pauses
        if pauses is None or long.state is not RequestState.RUNNING or lightest is None:
            continue
        left_s = pauses.remaining_s(now_s)
        replica = cluster.replicas[lightest[1]]
        if left_s <= most_left_s or not _has_batch_room(lightest[0], request, config):
            continue
        if not _fits(replica, request, config):
            continue
        needed_s = _wait_s(replica, config) + _run_s(replica, request)
        pausable_s = pauses.pausable_from_s(now_s, needed_s, bounds)
        if pausable_s is None:
            continue
        if pausable_s <= now_s:
            to_pause, smallest, most_left_s = replica, size, left_s
        elif retry_s is None or pausable_s < retry_s:
            retry_s = pausable_s
    if to_pause:
        return Place(to_pause, "pause")
    return Place(paused, "paused") if paused else NoPlace(retry_s)


def _paused_already(
    cluster: Cluster,
    config: SchedulerConfig,
    bounds: PauseBounds,
    request: Request,
    free_wait_s: float,
    now_s: float,
) -> Replica | None:
    """The least queued replica whose long stands still for long enough."""
    for request_id in cluster.standing.least(GROUPS_MAX):
        if not _has_batch_room(cluster.standing.load_of(request_id) or 0, request, config):
            return None  # its least loaded replica has more to do than fits, and those of the others too
        pauses = cluster.requests[request_id].pauses
        if pauses is None:
            continue
        left_s = pauses.pause_left_s(now_s, bounds)
        for worker_id in cluster.groups[request_id].least(PER_GROUP):
            replica = cluster.replicas[worker_id]
            wait_s = _wait_s(replica, config)
            if wait_s >= free_wait_s or wait_s + _run_s(replica, request) > left_s:
                break  # those with more to do start later still
            if _fits(replica, request, config) and _has_batch_room(replica.queued_tokens, request, config):
                return replica
    return None


def _fits(replica: Replica, request: Request, config: SchedulerConfig) -> bool:
    needed = request.tokens if config.disaggregation else request.spec.kv_tokens
    return replica.kv_free >= needed and request.tokens <= replica.profile.context_tokens


def _has_batch_room(queued_tokens: int, request: Request, config: SchedulerConfig) -> bool:
    """In-flight credit: a replica gets no more shorts than it can take in a few passes; the others stay
    in the global queue, where a replica that frees up sooner can have them."""
    return queued_tokens == 0 or queued_tokens + request.tokens <= config.batch_tokens_max


def _wait_s(replica: Replica, config: SchedulerConfig) -> float:
    queued = replica.queued_tokens
    return shorts_s(replica.profile.step_cost, queued, config.batch_tokens_max) if queued else 0.0


def _run_s(replica: Replica, request: Request) -> float:
    return shorts_s(replica.profile.step_cost, request.tokens, request.tokens)
