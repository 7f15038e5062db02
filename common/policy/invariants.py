"""What holds of the scheduler's books after every event, each invariant by its name.

Each reads everything and is O(requests + workers): for tests, and for a live scheduler that is told to check itself.
All raise: InvariantViolated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from common.policy.cluster import Cluster, Decoder, HoldKey, Replica, Request
from common.policy.core import require
from common.policy.decisions import SchedulingPolicy
from common.policy.lifecycle import IN_GROUP, PREFILLING_LONG, STANDING_LONG, RequestState
from common.policy.scheduler_config import SchedulerConfig
from common.policy.sp_shares import kv_of_rank
from common.units import RequestId, RouterId

PLACED_SHORT = frozenset({RequestState.PREFILLING, RequestState.HANDOFF, RequestState.DECODING})
WAITING = frozenset({RequestState.QUEUED, RequestState.INTERRUPTED})


def check_books(
    cluster: Cluster, policy: SchedulingPolicy, config: SchedulerConfig, owners: Mapping[RouterId, Iterable[RequestId]]
) -> None:
    """All of them. `owners`: the requests of each router."""
    every_request_has_its_router(cluster, owners)
    queue_is_exact(cluster, policy)
    kv_is_exact_and_under_its_cap(cluster)
    queued_tokens_are_exact_and_under_their_cap(cluster, config)
    no_kv_in_two_places(cluster)
    no_short_in_two_places(cluster)
    no_long_in_two_places(cluster)
    who_waits_stands_nowhere(cluster)
    a_group_keeps_its_kv(cluster)
    replicas_are_indexed_by_their_state(cluster)


def every_request_has_its_router(cluster: Cluster, owners: Mapping[RouterId, Iterable[RequestId]]) -> None:
    owned = Counter(request_id for ids in owners.values() for request_id in ids)
    require(owned == Counter(cluster.requests.keys()), "every request has one router")
    for router_id, ids in owners.items():
        for request_id in ids:
            require(cluster.requests[request_id].spec.router_id == router_id, f"{request_id}: not of {router_id}")


def queue_is_exact(cluster: Cluster, policy: SchedulingPolicy) -> None:
    """Whoever is queued waits in the policy's queue once, and nobody else; its counts and tokens are those of a
    recount."""
    queued = {name: r for name, r in cluster.requests.items() if r.state is RequestState.QUEUED}
    waiting = Counter(r.request_id for r in policy.waiting(len(cluster.requests) + 1))
    require(waiting == Counter(queued.keys()), f"queued: {sorted(queued)}, in the queue: {sorted(waiting.elements())}")
    longs = sum(r.is_long for r in queued.values())
    require(policy.waiting_longs() == longs, f"{policy.waiting_longs()} longs wait, recounted {longs}")
    require(policy.waiting_shorts() == len(queued) - longs, f"{policy.waiting_shorts()} shorts wait, by recount not")
    tokens = sum(r.tokens for r in queued.values())
    require(policy.waiting_tokens() == tokens, f"{policy.waiting_tokens()} tokens wait, recounted {tokens}")


def kv_is_exact_and_under_its_cap(cluster: Cluster) -> None:
    for worker in cluster.workers():
        name, total = worker.worker_id, sum(r.tokens for r in worker.held.values())
        require(worker.kv_reserved == total, f"{name}: KV {worker.kv_reserved} != sum {total}")
        free = worker.profile.kv_capacity_tokens - total
        require(worker.kv_free == free, f"{name}: free KV {worker.kv_free} != {free}")
        require(total <= worker.profile.kv_capacity_tokens, f"{name}: {total} tokens of KV exceed its capacity")
        if isinstance(worker, Decoder):
            require(len(worker.held) <= worker.profile.rows_max, f"{name}: more rows than it has")
            continue
        of_longs = sum(r.tokens for r in worker.held.values() if r.of_long)
        require(worker.kv_of_longs == of_longs, f"{name}: KV of longs {worker.kv_of_longs} != sum {of_longs}")


def queued_tokens_are_exact_and_under_their_cap(cluster: Cluster, config: SchedulerConfig) -> None:
    """In-flight credit: a replica has no more queued than it takes in one pass, unless it is a single short (where a
    long decodes: a step's cap, should that be larger)."""
    cap = max(config.batch_tokens_max, config.colocated_tokens_max)
    for name, replica in cluster.replicas.items():
        total = sum(replica.queued.values())
        require(replica.queued_tokens == total, f"{name}: {replica.queued_tokens} queued tokens, recounted {total}")
        require(total <= cap or len(replica.queued) == 1, f"{name}: {total} queued tokens exceed its credit of {cap}")
        require(replica.queued.keys() <= replica.held.keys(), f"{name}: a queued short holds no KV")
        require(replica.resident <= replica.held.keys(), f"{name}: a short that decodes here holds no KV")
        require(not replica.resident & replica.queued.keys(), f"{name}: a short decodes and is queued")


def no_kv_in_two_places(cluster: Cluster) -> None:
    """One attempt has KV on one replica and one decode worker at most; that of a long, on the members of its group."""
    on_decoders = Counter(key for decoder in cluster.decoders.values() for key in decoder.held)
    require(all(n == 1 for n in on_decoders.values()), "KV of one attempt on two decode workers")
    on_replicas = Counter(
        key for replica in cluster.replicas.values() for key, kept in replica.held.items() if not kept.dropped
    )
    for (request_id, attempt), count in on_replicas.items():
        request = cluster.requests.get(request_id)
        if request is not None and not request.is_long:
            require(count == 1, f"{request_id}: KV of attempt {attempt} on {count} replicas")
        elif request is not None and request.spec.attempt == attempt and request.members:
            require(count == len(request.workers), f"{request_id}: KV outside its group")


def no_short_in_two_places(cluster: Cluster) -> None:
    """A short that runs does so on one replica and one decoder, and is queued on that replica until prefilled."""
    queued_at: dict[HoldKey, list[str]] = {}
    for worker_id, replica in cluster.replicas.items():
        for key in replica.queued:
            queued_at.setdefault(key, []).append(worker_id)
    for name, request in cluster.requests.items():
        if request.is_long:
            continue
        placed = request.state in PLACED_SHORT
        places = (request.prefill_worker, request.decode_worker)
        require(placed == (None not in places), f"{name}: {request.state.value} at {places}")
        if request.decode_worker is not None:
            home = cluster.worker(request.decode_worker)
            require(home is not None and request.key in home.held, f"{name}: no KV reserved for its decode")
        queued = queued_at.get(request.key, [])
        if request.state is RequestState.PREFILLING:
            require(queued == [request.prefill_worker], f"{name}: prefills on {request.prefill_worker}, not {queued}")
        elif request.state is RequestState.DECODING:  # its word may have come before that of the prefill's end
            require(queued in ([], [request.prefill_worker]), f"{name}: decodes, and is queued on {queued}")
        else:
            require(not queued, f"{name}: {request.state.value}, and is queued on {queued}")


def no_long_in_two_places(cluster: Cluster) -> None:
    """A long holds the prefill place of exactly its members while it prefills, and decodes on no others."""
    seats: dict[RequestId, set[str]] = {}
    decodes: dict[RequestId, set[str]] = {}
    for worker_id, replica in cluster.replicas.items():
        if replica.long is not None:
            seats.setdefault(replica.long, set()).add(worker_id)
        for request_id in replica.decoding:
            decodes.setdefault(request_id, set()).add(worker_id)
    longs = {name: request for name, request in cluster.requests.items() if request.is_long}
    require(seats.keys() | decodes.keys() <= longs.keys(), "a place is held by nobody")
    for name, request in longs.items():
        members = set(request.workers)
        require(len(members) == len(request.workers), f"{name}: a member twice in {request.members}")
        require(bool(members) == (request.state in IN_GROUP), f"{name}: {request.state.value} on {request.members}")
        expected = members if request.state in PREFILLING_LONG else set()
        require(seats.get(name, set()) == expected, f"{name}: {request.state.value} on seats {seats.get(name)}")
        # Its first token may have been the last: then it decodes nowhere.
        allowed = (set(), members) if request.state is RequestState.DECODING else (set(),)
        require(decodes.get(name, set()) in allowed, f"{name}: {request.state.value}, decodes on {decodes.get(name)}")


def who_waits_stands_nowhere(cluster: Cluster) -> None:
    """Queued, or to be submitted again: at no place; and nobody works on the attempt that is queued."""
    held = {key for worker in cluster.workers() for key in worker.held}
    for name, request in cluster.requests.items():
        if request.state in WAITING:
            require(not request.workers and request.pauses is None, f"{name}: {request.state.value} at a place")
        if request.state is RequestState.QUEUED:
            require(request.key not in held, f"{name}: queued, and has KV")


def a_group_keeps_its_kv(cluster: Cluster) -> None:
    """On every member, the share that was set aside when it was formed; paused as well as running. Nothing while it is
    spilled."""
    for name, request in cluster.requests.items():
        if not request.is_long or request.state not in IN_GROUP:
            continue
        state, count = request.state.value, len(request.members)
        require(len(request.sizes) == count, f"{name}: {request.sizes} for {count} members")
        sizes = request.sizes + (len(request.workers),) * len(request.joining)
        for rank, (worker_id, size) in enumerate(zip(request.workers, sizes, strict=True)):
            replica = cluster.replicas.get(worker_id)
            require(replica is not None, f"{name}: its member {worker_id} is gone while {state}")
            assert replica is not None
            reservation = replica.held.get(request.key)
            require(reservation is not None, f"{name}: no KV on {worker_id} while {state}")
            assert reservation is not None
            share = kv_of_rank(request.scheme, size, rank, request.spec.kv_tokens, replica.profile.layer)
            share = 0 if request.state is RequestState.SPILLED else share
            require(reservation.tokens == share, f"{name}: {reservation.tokens} tokens of KV on {worker_id}: {share}")
            require(not reservation.dropped, f"{name}: {worker_id} was told to drop it while {state}")


def replicas_are_indexed_by_their_state(cluster: Cluster) -> None:
    """Every replica is in the one index of its state; decoders that are shunned are in none."""
    homes = {"idle": cluster.idle, "decoding": cluster.decoding, "shunned": cluster.shunned}
    homes |= {f"group of {request_id}": index for request_id, index in cluster.groups.items()}
    for request_id in cluster.groups:
        stands = _state_of(cluster, request_id) in STANDING_LONG
        lightest = cluster.groups[request_id].lightest()
        wanted = lightest[0] if stands and lightest is not None else None
        require(cluster.standing.load_of(request_id) == wanted, f"{request_id}: its least load while it stands")
    running = {request_id for _, _, request_id in cluster.running}
    require(running | set(cluster.standing.ids()) == cluster.groups.keys(), "a group runs, or stands")
    require(len(cluster.running) + len(cluster.standing) == len(cluster.groups), "no group does both")
    for name, replica in cluster.replicas.items():
        found = [home for home, index in homes.items() if name in index]
        require(found == [_home_of(cluster, replica)], f"{name}: indexed as {found}, is {_home_of(cluster, replica)}")
        node = cluster.vacant.of(replica.node, len(cluster.vacant))
        require((name in node) == replica.in_vacant == (replica.is_vacant and not replica.shunned), f"{name}: vacancy")
    require(sum(map(len, homes.values())) == len(cluster.replicas), "a replica that is gone is indexed")
    free = sum(map(_has_free_seat, cluster.replicas.values()))
    require(cluster.seats == free, "a replica that is gone has a seat")
    vacant = sum(replica.in_vacant for replica in cluster.replicas.values())
    require(len(cluster.vacant) == vacant, "a replica that is gone is vacant")
    served = {name for name, decoder in cluster.decoders.items() if not decoder.shunned}
    require(set(cluster.decoder_load.ids()) == served, "decoders that can be reached are indexed")


def _has_free_seat(replica: Replica) -> bool:
    return replica.long is None and not replica.shunned


def _home_of(cluster: Cluster, replica: Replica) -> str:
    if replica.long is not None:
        return f"group of {replica.long}"
    if replica.shunned:
        return "shunned"
    return "decoding" if replica.decoding else "idle"


def _state_of(cluster: Cluster, request_id: RequestId) -> RequestState | None:
    request: Request | None = cluster.requests.get(request_id)
    return request.state if request else None
