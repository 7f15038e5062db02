"""Where work goes: the paper's cascade for shorts (section 5.1), the choice of a decoder, a long's place.

For a short, the first rule that fits:

1. an idle replica that runs no long work, the shortest queue first;
2. a replica on which a long *decodes*: share its steps, under a cap of tokens;
3. a replica on which a long *prefills*: pause it (one that is paused already costs no new pause).

One guard beyond the paper: nobody is paused for a short that a replica without longs would start
within `wait_instead_of_pause_s` anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from common.policy.cluster import Cluster, Decoder, Replica, Request, SchedulerConfig
from common.policy.colocation import has_room
from common.policy.costs import shorts_s
from common.policy.lifecycle import RequestState
from common.policy.preemption import PauseBounds

Rule = Literal["idle", "colocate", "paused", "pause", "queue"]
"""Which rule of the cascade placed a short; `queue`: it waits behind others on a replica without longs."""


@dataclass(frozen=True, slots=True)
class Place:
    replica: Replica
    rule: Rule


@dataclass(frozen=True, slots=True)
class NoPlace:
    """Nothing fits now. `retry_s`: when a pause becomes legal, if one will; any event may change it sooner."""

    retry_s: float | None = None


def bounds_of(config: SchedulerConfig) -> PauseBounds:
    return PauseBounds(
        pause_max_s=config.pause_max_s,
        share_max=config.pause_share_max,
        immunity_s=config.pause_immunity_s,
        progress_max=config.pause_progress_max,
    )


def decoder_for(cluster: Cluster, slot_tokens: int) -> Decoder | None:
    """The decoder with the least reserved KV that has a row and a slot free."""
    for worker_id in cluster.decoder_load.least():
        decoder = cluster.decoders[worker_id]
        if decoder.has_row and decoder.kv_free >= slot_tokens:
            return decoder
    return None


def replica_for_long(cluster: Cluster, kv_tokens: int) -> Replica | None:
    """For a group of one: a replica whose prefill place is free and whose KV has room for the whole
    request; one where no long decodes before one where one does, then the fewest queued tokens."""
    if not cluster.can_form_groups:
        return None
    for index in (cluster.idle, cluster.decoding):
        for worker_id in index.least():
            replica = cluster.replicas[worker_id]
            if replica.kv_free >= kv_tokens:
                return replica
    return None


def place_short(cluster: Cluster, config: SchedulerConfig, request: Request, now_s: float) -> Place | NoPlace:
    """The cascade. Looks at a bounded number of replicas per rule."""
    free = _least_queued(cluster, config, request)
    wait_s = _wait_s(free, config) if free else float("inf")
    if free and wait_s <= config.wait_instead_of_pause_s:
        return Place(free, "idle")
    for worker_id in cluster.decoding.least():
        replica = cluster.replicas[worker_id]
        if _fits(replica, request) and has_room(replica, request.tokens, config.colocated_tokens_max):
            return Place(replica, "colocate")
    paused = _by_pausing(cluster, config, request, wait_s, now_s)
    if isinstance(paused, Place):
        return paused
    return Place(free, "queue") if free else paused


def _least_queued(cluster: Cluster, config: SchedulerConfig, request: Request) -> Replica | None:
    for worker_id in cluster.idle.least():
        replica = cluster.replicas[worker_id]
        if _fits(replica, request) and _has_batch_room(replica, request, config):
            return replica
    return None


def _by_pausing(
    cluster: Cluster, config: SchedulerConfig, request: Request, free_wait_s: float, now_s: float
) -> Place | NoPlace:
    """Rule 3: a replica whose long is paused already, if the short starts soon there; else one more to pause,
    so that what waits is spread over the replicas; else behind the others on a paused one."""
    bounds = bounds_of(config)
    paused: Replica | None = None
    to_pause: Replica | None = None
    retry_s: float | None = None
    for worker_id in cluster.prefilling.least():
        replica = cluster.replicas[worker_id]
        if not (_fits(replica, request) and _has_batch_room(replica, request, config)):
            continue
        long = cluster.requests[replica.long] if replica.long else None
        if long is None or long.pauses is None:
            continue
        needed_s = _wait_s(replica, config) + _run_s(replica, request)
        if long.state in (RequestState.PAUSED, RequestState.PAUSING):
            stays_s = long.pauses.pause_left_s(now_s, bounds)
            if paused is None and needed_s <= stays_s and _wait_s(replica, config) < free_wait_s:
                paused = replica
        elif long.state is RequestState.RUNNING and to_pause is None:
            pausable_s = long.pauses.pausable_from_s(now_s, needed_s, bounds)
            if pausable_s is not None and pausable_s <= now_s:
                to_pause = replica
            elif pausable_s is not None:
                retry_s = pausable_s if retry_s is None else min(retry_s, pausable_s)
    if paused and (to_pause is None or _wait_s(paused, config) <= config.wait_instead_of_pause_s):
        return Place(paused, "paused")
    return Place(to_pause, "pause") if to_pause else NoPlace(retry_s)


def _fits(replica: Replica, request: Request) -> bool:
    return replica.kv_free >= request.tokens and request.tokens <= replica.profile.context_tokens


def _has_batch_room(replica: Replica, request: Request, config: SchedulerConfig) -> bool:
    """In-flight credit: a replica gets no more shorts than it can take in a few passes; the others stay
    in the global queue, where a replica that frees up sooner can have them."""
    return replica.queued_tokens == 0 or replica.queued_tokens + request.tokens <= config.batch_tokens_max


def _wait_s(replica: Replica, config: SchedulerConfig) -> float:
    return shorts_s(replica.profile.step_cost, replica.queued_tokens, config.batch_tokens_max)


def _run_s(replica: Replica, request: Request) -> float:
    return shorts_s(replica.profile.step_cost, request.tokens, request.tokens)
