"""The scheduler's view of the cluster: requests, replicas, decoders, and exact accounting of KV and queues.

One object is mutated by one caller (`scheduler.py`); policies read it. Every reservation of KV is made
here when an order is given and stays until the worker says that the KV is free (or is lost), so that a
stale view cannot overload a worker. Replicas are kept in indexes by load: finding the least loaded one
costs O(log n).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from common.messages.cluster import WorkerProfile, WorkerRole
from common.messages.groups import RING, GroupScheme
from common.messages.requests import LengthClass, RequestSpec
from common.policy.core import InvariantViolated
from common.policy.costs import decode_slot_tokens
from common.policy.lifecycle import RequestState
from common.policy.load_index import LoadIndex, NodeIndex
from common.policy.preemption import PauseAccount
from common.units import Attempt, RequestId, WorkerId

HoldKey = tuple[RequestId, Attempt]


@dataclass(slots=True, eq=False)
class Request:
    """An accepted request that has not ended."""

    spec: RequestSpec
    """Set by `take` alone."""
    length_class: LengthClass
    order: int
    """Place in the queue: rank of its first submission. Kept over interruptions."""
    arrived_s: float
    state: RequestState = RequestState.QUEUED
    state_since_s: float = 0.0
    prefill_worker: WorkerId | None = None
    decode_worker: WorkerId | None = None
    members: tuple[WorkerId, ...] = ()
    scheme: GroupScheme = RING
    """By which the members compute it."""
    sizes: tuple[int, ...] = ()
    """By rank: of how many ranks the group was when this one came into it."""
    joining: tuple[WorkerId, ...] = ()
    """Who is to come into the group (`growing.py`)."""
    parted: tuple[WorkerId, ...] = ()
    """Who was in the group, and has given its share of the KV to rank 0."""
    parting_since_s: float | None = None
    """When rank 0 was told to take in all KV and go on alone; None: it was not, or has."""
    growth: int = 0
    """Number of the last try to grow."""
    growth_since_s: float = 0.0
    pauses: PauseAccount | None = None
    """Of a long, from the forming of its group."""
    phases: list[tuple[str, float]] = field(default_factory=list)
    """States it came to, and when; see `RequestLife`."""
    first_step_s: float | None = None
    """Of a short: when its prefill worker began to compute it."""
    # What follows from the above, kept because every decision asks for it many times:
    request_id: RequestId = field(init=False)
    key: HoldKey = field(init=False)
    is_long: bool = field(init=False)
    tokens: int = field(init=False)
    """Its length in every queue."""
    slot_tokens: int = field(init=False)
    """What a decode worker sets aside for it, as a short."""

    def __post_init__(self) -> None:
        self.is_long = self.length_class == "long"
        self.take(self.spec)

    def take(self, spec: RequestSpec) -> None:
        """Its first attempt, or a later one."""
        self.spec = spec
        self.request_id = spec.request_id
        self.key = (spec.request_id, spec.attempt)
        self.tokens = spec.prompt.tokens
        self.slot_tokens = decode_slot_tokens(spec.kv_tokens)

    @property
    def workers(self) -> tuple[WorkerId, ...]:
        if self.is_long:
            return self.members + self.joining
        if self.prefill_worker is None or self.decode_worker is None or self.prefill_worker == self.decode_worker:
            worker_id = self.prefill_worker if self.prefill_worker is not None else self.decode_worker
            return () if worker_id is None else (worker_id,)
        return (self.prefill_worker, self.decode_worker)


@dataclass(slots=True, eq=False)
class Reservation:
    """KV set aside on a worker for one attempt of a request."""

    tokens: int
    ordered_s: float
    """Last order given about it; heartbeats older than a grace after it prove nothing."""
    dropped: bool = False
    """The worker was told to drop it and has not confirmed."""
    of_long: bool = False


@dataclass(slots=True, eq=False)
class Worker:
    """What replica and decoder share."""

    profile: WorkerProfile
    heard_s: float
    worker_id: WorkerId = field(init=False)
    node: str = field(init=False)
    kv_free: int = field(init=False)
    held: dict[HoldKey, Reservation] = field(default_factory=dict)
    kv_reserved: int = 0
    shunned: bool = False
    """It gets no new work: somebody could not reach it (until its next heartbeat, or until it is lost), or it is
    leaving."""

    def __post_init__(self) -> None:
        self.worker_id = self.profile.worker_id
        self.node = self.profile.node
        self.kv_free = self.profile.kv_capacity_tokens


@dataclass(slots=True, eq=False)
class Replica(Worker):
    """A prefill worker."""

    queued: dict[HoldKey, int] = field(default_factory=dict)
    """Shorts sent and not yet prefilled, in tokens."""
    queued_tokens: int = 0
    resident: set[HoldKey] = field(default_factory=set)
    """Shorts that decode where they prefilled (no disaggregation)."""
    long: RequestId | None = None
    """The long that holds its prefill place (running or paused)."""
    decoding: set[RequestId] = field(default_factory=set)
    """Longs that decode here."""
    kv_of_longs: int = 0
    """What is reserved for longs: shorts never have that."""
    home: LoadIndex[WorkerId] | None = None
    """The one index of the cluster that has it."""
    in_vacant: bool = False
    """So has the cluster's index of vacant ones."""

    @property
    def has_shorts(self) -> bool:
        return self.queued_tokens > 0 or bool(self.resident)

    @property
    def is_vacant(self) -> bool:
        """Neither shorts nor the prefill of a long."""
        return self.long is None and not self.queued_tokens and not self.resident


@dataclass(slots=True, eq=False)
class Decoder(Worker):
    """A decode worker. Its reservations are in whole slots."""

    @property
    def has_row(self) -> bool:
        return len(self.held) < self.profile.rows_max


class Cluster:
    """All records and the only methods that change them."""

    def __init__(self) -> None:
        self.requests: dict[RequestId, Request] = {}
        self.replicas: dict[WorkerId, Replica] = {}
        self.decoders: dict[WorkerId, Decoder] = {}
        self.strangers: dict[WorkerId, tuple[str, str]] = {}
        """Workers that report and cannot work with those above: incarnation, and why."""
        self.idle: LoadIndex[WorkerId] = LoadIndex()
        """Replicas without any long, by queued tokens."""
        self.decoding: LoadIndex[WorkerId] = LoadIndex()
        """Replicas on which longs decode and none prefills, by queued tokens."""
        self.groups: dict[RequestId, LoadIndex[WorkerId]] = {}
        """The replicas whose prefill place a long holds, by queued tokens. (Per long: a group of 28 that is paused
        changes one entry, not 28.)"""
        self.standing: LoadIndex[RequestId] = LoadIndex()
        """Groups that are paused, or about to be, by the queued tokens of their least loaded replica."""
        self.running: list[tuple[int, int, RequestId]] = []
        """The other groups, by size, then by how long ago they were formed or paused: members, serial, request. (To
        insert moves the pointers behind it, faster than any tree finds its place.)"""
        self._running_as: dict[RequestId, tuple[int, int, RequestId]] = {}
        self._serial = 0
        self.shunned: LoadIndex[WorkerId] = LoadIndex()
        """Replicas that get no new work, and prefill no long. (Those of a group leave it when it ends.)"""
        self.vacant = NodeIndex()
        """Those of the idle and the decoding ones that have no shorts either, by node."""
        self.room_changes = 0
        """Counts what may make room for a group: who found none need not look again before."""
        self.decoder_load: LoadIndex[WorkerId] = LoadIndex()
        """Decoders by reserved KV."""
        self.can_form_groups = False
        """Whether an SP coordinator is there."""
        self.spill_token_s = 0.0
        """What it took to move a long's KV out of a replica, the last time, by token reserved for it there."""
        self._kv_max: dict[str, int] = {}
        self._per_node: Counter[str] = Counter()
        self._largest_nodes: dict[int, list[int]] = {}
        """Answers of `replicas_by_node`, until a worker comes or goes."""

    # --- workers ---------------------------------------------------------------------------------

    def worker(self, worker_id: WorkerId) -> Replica | Decoder | None:
        return self.replicas.get(worker_id) or self.decoders.get(worker_id)

    def workers(self) -> Iterator[Replica | Decoder]:
        yield from self.replicas.values()
        yield from self.decoders.values()

    def add_worker(self, profile: WorkerProfile, now_s: float) -> Replica | Decoder:
        worker: Replica | Decoder
        if profile.role == "prefill":
            worker = self.replicas[profile.worker_id] = Replica(profile=profile, heard_s=now_s)
            self._per_node[profile.node] += 1
        else:
            worker = self.decoders[profile.worker_id] = Decoder(profile=profile, heard_s=now_s)
        self._reindex(worker)
        self._kv_max.clear()
        self._largest_nodes.clear()
        return worker

    @property
    def seats(self) -> int:
        """Replicas whose prefill place is free, and not shunned."""
        return len(self.idle) + len(self.decoding)

    def kv_max(self, role: WorkerRole) -> int:
        """The largest KV capacity among the workers of a role; 0: there is none."""
        found = self._kv_max.get(role)
        if found is None:
            workers = self.replicas.values() if role == "prefill" else self.decoders.values()
            found = self._kv_max[role] = max((w.profile.kv_capacity_tokens for w in workers), default=0)
        return found

    def replicas_by_node(self, count: int) -> list[int]:
        """How many replicas the `count` largest nodes have."""
        found = self._largest_nodes.get(count)
        if found is None:
            found = self._largest_nodes[count] = [size for _, size in self._per_node.most_common(count) if size]
        return found

    def remove_worker(self, worker_id: WorkerId) -> None:
        """Forget a lost worker and all it held. Requests that ran there are the caller's to interrupt."""
        replica = self.replicas.pop(worker_id, None)
        if replica is not None:
            self._per_node[replica.node] -= 1
        self.decoders.pop(worker_id, None)
        if replica is not None and replica.home is not None:
            replica.home.discard(worker_id)
            if replica.long is not None:
                self._close_group(replica.long)
            if replica.in_vacant:
                self.vacant.discard(worker_id, replica.node)
        self.decoder_load.discard(worker_id)
        self._kv_max.clear()
        self._largest_nodes.clear()

    def shun(self, worker: Replica | Decoder, shunned: bool) -> None:
        worker.shunned = shunned
        self._reindex(worker)

    def _reindex(self, worker: Replica | Decoder) -> None:
        if isinstance(worker, Decoder):
            self._index_decoder(worker)
            return
        self._rehome(worker, self._home_of(worker))

    def _rehome(self, replica: Replica, home: LoadIndex[WorkerId]) -> None:
        """Its place, or what decodes there, changed. (In the same index its load is what it was.)"""
        if replica.home is home:
            return
        worker_id = replica.worker_id
        if replica.home is not None:
            replica.home.discard(worker_id)
        replica.home = home
        self._reload(replica)

    def _index_decoder(self, decoder: Decoder) -> None:
        if decoder.shunned:
            self.decoder_load.discard(decoder.worker_id)
        else:
            self.decoder_load.set(decoder.worker_id, decoder.kv_reserved)

    def _reload(self, replica: Replica) -> None:
        """Its shorts changed: its load, not its home."""
        worker_id, long = replica.worker_id, replica.long
        assert replica.home is not None
        replica.home.set(worker_id, replica.queued_tokens)
        if long is not None and long in self.standing:
            self._stands(long)
        vacant = long is None and not (replica.queued_tokens or replica.resident or replica.shunned)
        if vacant is replica.in_vacant:
            return
        replica.in_vacant = vacant
        if vacant:
            self.vacant.add(worker_id, replica.node)
            self.room_changes += 1
        else:
            self.vacant.discard(worker_id, replica.node)

    def _home_of(self, replica: Replica) -> LoadIndex[WorkerId]:
        if replica.long is not None:
            return self.groups[replica.long]
        if replica.shunned:
            return self.shunned
        return self.decoding if replica.decoding else self.idle

    def group_moved(self, request_id: RequestId, *, stands: bool) -> None:
        """It stands still now, or runs again."""
        if request_id not in self.groups:
            return
        self._runs_not(request_id)
        if stands:
            self._stands(request_id)
        else:
            self._runs(request_id)

    def group_resized(self, request_id: RequestId) -> None:
        """It has more members than before."""
        if request_id in self._running_as:
            self._runs_not(request_id)
            self._runs(request_id)

    def _stands(self, request_id: RequestId) -> None:
        lightest = self.groups[request_id].lightest()
        if lightest is not None:
            self.standing.set(request_id, lightest[0])

    def _close_group(self, request_id: RequestId) -> None:
        """If its last replica has left it."""
        if request_id not in self.groups:
            return
        if not len(self.groups[request_id]):
            del self.groups[request_id]
            self._runs_not(request_id)
        elif request_id in self.standing:
            self._stands(request_id)

    def _runs(self, request_id: RequestId) -> None:
        self._serial += 1
        place = self._running_as[request_id] = (len(self.requests[request_id].members), self._serial, request_id)
        insort(self.running, place)

    def _runs_not(self, request_id: RequestId) -> None:
        self.standing.discard(request_id)
        place = self._running_as.pop(request_id, None)
        if place is not None:
            del self.running[bisect_left(self.running, place)]

    # --- KV --------------------------------------------------------------------------------------

    def reserve_long(self, replicas: Sequence[Replica], key: HoldKey, shares: Sequence[int], now_s: float) -> None:
        """For members of its group, of each its share; or again, with others: its KV was moved out, or comes back."""
        for replica, tokens in zip(replicas, shares, strict=True):
            reservation = replica.held.get(key)
            if reservation is None:
                replica.held[key] = Reservation(tokens, now_s, False, True)
                more = tokens
            else:
                more = tokens - reservation.tokens
                reservation.tokens, reservation.ordered_s = tokens, now_s
            replica.kv_reserved += more
            replica.kv_free -= more
            replica.kv_of_longs += more

    def reserve(self, worker: Replica | Decoder, key: HoldKey, tokens: int, now_s: float) -> None:
        if key in worker.held:
            raise InvariantViolated(f"{key} is reserved twice on {worker.worker_id}")
        worker.held[key] = Reservation(tokens=tokens, ordered_s=now_s)
        worker.kv_reserved += tokens
        worker.kv_free -= tokens
        if isinstance(worker, Decoder):
            self._index_decoder(worker)

    def release(self, worker_id: WorkerId, key: HoldKey) -> bool:
        """The worker holds nothing of this attempt any more. False: it was not on the books."""
        worker = self.worker(worker_id)
        if worker is None:
            return False
        reserved = self._unreserve(worker, key)
        if isinstance(worker, Decoder):
            self._index_decoder(worker)
            return reserved
        request = self.requests.get(key[0])
        self.room_changes += request is None or request.is_long
        if key in worker.queued or key in worker.resident:
            worker.queued_tokens -= worker.queued.pop(key, 0)
            worker.resident.discard(key)
            self._reload(worker)
        return reserved

    def release_long(self, request: Request) -> None:
        """None of its replicas holds anything of this attempt any more."""
        key = request.key
        for worker_id in request.workers:
            replica = self.replicas.get(worker_id)
            if replica is not None and key in replica.held:
                tokens = replica.held.pop(key).tokens
                replica.kv_reserved -= tokens
                replica.kv_free += tokens
                replica.kv_of_longs -= tokens
        self.room_changes += 1

    def _unreserve(self, worker: Replica | Decoder, key: HoldKey) -> bool:
        reservation = worker.held.pop(key, None)
        if reservation is None:
            return False
        worker.kv_reserved -= reservation.tokens
        worker.kv_free += reservation.tokens
        if reservation.of_long and isinstance(worker, Replica):
            worker.kv_of_longs -= reservation.tokens
        return True

    # --- places ----------------------------------------------------------------------------------

    def enqueue_short(self, replica: Replica, request: Request) -> None:
        replica.queued[request.key] = request.tokens
        replica.queued_tokens += request.tokens
        self._reload(replica)

    def dequeue_short(self, worker_id: WorkerId, key: HoldKey, *, stays: bool = False) -> None:
        """Its prefill is done. Its KV stays until handed over, or, if it `stays` to decode here, to its end."""
        replica = self.replicas.get(worker_id)
        if replica is not None:
            replica.queued_tokens -= replica.queued.pop(key, 0)
            if stays:
                replica.resident.add(key)
            self._reload(replica)

    def seat_long(self, replicas: Sequence[Replica], request_id: RequestId) -> None:
        """It takes the prefill places of these; of more than it had, when it grows."""
        group = self.groups.get(request_id)
        if group is None:
            group = self.groups[request_id] = LoadIndex()
            self._runs(request_id)
        loads: list[tuple[int, WorkerId]] = []
        vacant: list[tuple[str, WorkerId]] = []
        for replica in replicas:
            if replica.long is not None:
                raise InvariantViolated(f"{replica.worker_id} already prefills {replica.long}, not {request_id}")
            worker_id, home = replica.worker_id, replica.home
            replica.long, replica.home = request_id, group
            if home is not None:
                home.discard(worker_id)
            loads.append((replica.queued_tokens, worker_id))
            if replica.in_vacant:
                replica.in_vacant = False
                vacant.append((replica.node, worker_id))
        group.set_all(loads)
        self.vacant.discard_all(vacant)
        if request_id in self.standing:
            self._stands(request_id)

    def unseat_long(self, request: Request, *, decodes: bool) -> None:
        """The long leaves the prefill place of its replicas, to decode there or for good."""
        self.unseat(request, request.workers, decodes=decodes)

    def unseat(self, request: Request, workers: tuple[WorkerId, ...], *, decodes: bool) -> None:
        """Of some of its replicas."""
        request_id = request.request_id
        group = self.groups.get(request_id)
        whole = group is not None and len(group) == len(workers)  # then its index goes as a whole, too
        to_idle: list[tuple[int, WorkerId]] = []
        to_decoding: list[tuple[int, WorkerId]] = []
        vacant: list[tuple[str, WorkerId]] = []
        for worker_id in workers:
            replica = self.replicas.get(worker_id)
            if replica is None:
                continue
            if decodes:
                replica.decoding.add(request_id)
            else:
                replica.decoding.discard(request_id)
            if replica.long == request_id:
                replica.long = None
            if replica.long is not None:
                continue  # another one has its place: it is indexed by that
            home, former = self._home_of(replica), replica.home
            if home is former:
                continue
            if replica.shunned:
                self._rehome(replica, home)
                continue
            replica.home = home
            if former is not None and not (whole and former is group):
                former.discard(worker_id)
            (to_decoding if replica.decoding else to_idle).append((replica.queued_tokens, worker_id))
            if not replica.in_vacant and replica.is_vacant:
                replica.in_vacant = True
                self.room_changes += 1
                vacant.append((replica.node, worker_id))
        self.idle.set_all(to_idle)
        self.decoding.set_all(to_decoding)
        self.vacant.add_all(vacant)
        if whole:
            del self.groups[request_id]
            self._runs_not(request_id)
        else:
            self._close_group(request_id)
