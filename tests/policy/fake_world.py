"""The world around a scheduler, as small as can be: workers, a coordinator and a router that answer orders
with the events real ones send. Everything that is under way waits in per-sender queues until delivered.

After every event the scheduler checks its books, and `watch.py` what holds between it and this world."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from common.messages.cluster import (
    CoordinatorHeartbeat,
    CoordinatorLeft,
    Holding,
    HoldingPhase,
    RouterHeartbeat,
    WorkerHeartbeat,
    WorkerLeft,
)
from common.messages.decode import DecodeBusy, DecodeFailed, DecodeFinished, ExpectKv
from common.messages.prefill import DropRequest, KvReleased, PrefillFailed, PrefillFinished, RunPrefill
from common.messages.scheduling import (
    CancelRequested,
    RequestAccepted,
    RequestFailed,
    RequestInterrupted,
    RequestRefused,
    RequestSubmitted,
)
from common.messages.sp import (
    DissolveGroup,
    FormGroup,
    GroupFailed,
    GroupFinished,
    GroupFormed,
    GroupGrown,
    GroupNotSpilled,
    GroupParted,
    GroupPaused,
    GroupPrefillFinished,
    GroupResumed,
    GroupSpilled,
    GrowGroup,
    PartGroup,
    PauseGroup,
    RestoreGroup,
    ResumeGroup,
    SpillGroup,
)
from common.policy.core import TimePassed, require
from common.policy.lifecycle import IN_GROUP
from common.policy.long_planner import Layout
from common.policy.scheduler import Scheduler
from common.policy.scheduler_config import SchedulerConfig
from common.policy.scheduler_io import (
    EndBusRequest,
    ForgetRequest,
    SaveRequest,
    SchedulerCommand,
    SchedulerEvent,
    WorkerKeptOut,
)
from tests.policy.scenario import profile, spec
from tests.policy.watch import ROUNDING_S, Key, PauseWatch, RequestWatch

SPILL_BYTES = 1_000_000
MENDED_S = 20
"""Within so many seconds, all that lost messages broke is mended."""
STEPS_MAX = 8
"""In so many steps, a second each, the first of those that wait is done: it forms, is paused and resumed, prefills,
decodes, is released."""


@dataclass
class FakeWorker:
    role: str
    incarnation: int = 1
    alive: bool = True
    leaving: bool = False
    holds: dict[Key, str] = field(default_factory=dict)

    def phase_of(self, key: Key) -> HoldingPhase:
        return "expected" if self.role == "decode" and self.holds[key] == "held" else "decode"


@dataclass
class FakeGroup:
    members: tuple[str, ...]
    gathers: bool = False
    state: str = "running"
    """running, paused, spilled, decoding; unreachable: a member was dead when it was formed, which takes a
    while to find out"""
    trying: GrowGroup | None = None
    """To grow."""
    tried: int = 0

    @property
    def newcomers(self) -> tuple[str, ...]:
        return tuple(w for w in self.trying.members if w not in self.members) if self.trying else ()


@dataclass
class FakeRequest:
    tokens: int
    max_tokens: int
    attempt: int = 0
    ended: str | None = None


class EvenPlanner:
    """As few replicas as hold the KV, and one more if there is one: groups of every size come about."""

    degree_max = 1_000

    def degree(self, tokens: int, kv_tokens: int, free_by_node: Sequence[int], kv_free_tokens: int) -> int:
        if kv_free_tokens <= 0:
            return 0
        needed = math.ceil(kv_tokens / kv_free_tokens)
        free = sum(free_by_node)
        return min(free, needed + 1) if needed <= free else 0

    def prefill_s(self, tokens: int, layout: Layout) -> float:
        return 1e-3 * tokens / sum(layout)

    def took(self, degree: int, expected_s: float, ran_s: float) -> None:
        pass


class World:
    """Deliver what is under way, in any interleaving; each sender's messages stay in order."""

    def __init__(self, config: SchedulerConfig, prefill: int = 2, decode: int = 1, kv: int = 20_000) -> None:
        self.config = config
        self.scheduler = Scheduler(config, epoch=1, planner=EvenPlanner() if config.group_max > 1 else None)
        self.now_s = 0.0
        self.kv = kv
        self.workers = {f"p{i}": FakeWorker("prefill") for i in range(prefill)}
        self.workers |= {f"d{i}": FakeWorker("decode") for i in range(decode)}
        self.groups: dict[Key, FakeGroup] = {}
        self.coordinator_incarnation = 1
        self.requests: dict[str, FakeRequest] = {}
        self.to_scheduler: dict[str, deque[SchedulerEvent]] = {}
        self.saved: set[str] = set()
        self.handled: list[tuple[float, SchedulerEvent, Sequence[SchedulerCommand]]] = []
        self.router_heard_s = 0.0
        self.disk_full = False
        """No worker has room for KV that is moved out."""
        self.orders_to_lose = 0
        """So many of the next orders vanish on the way."""
        self.pauses = PauseWatch(config)
        self.watch = RequestWatch()
        self.seen: Counter[str] = Counter()
        """How often the situations that are hard to come by came about."""
        self.heartbeats()
        self.deliver_all()

    # --- senders ---------------------------------------------------------------------------------

    def send(self, sender: str, event: SchedulerEvent) -> None:
        self.to_scheduler.setdefault(sender, deque()).append(event)

    def senders(self) -> list[str]:
        return sorted(s for s, queue in self.to_scheduler.items() if queue)

    def heartbeats(self) -> None:
        for name, worker in self.workers.items():
            if worker.alive:
                holdings = tuple(
                    Holding(request_id=r, attempt=a, phase=worker.phase_of((r, a)), kv_tokens=1)
                    for r, a in sorted(worker.holds)
                )
                # Two replicas to a node.
                node = f"n{int(name[1:]) // 2}"
                incarnation = str(worker.incarnation)
                me = profile(name, worker.role, kv=self.kv, incarnation=incarnation, node=node, spill_bytes=SPILL_BYTES)
                self.send(name, WorkerHeartbeat(profile=me, holdings=holdings, leaving=worker.leaving))
        waiting = tuple((r, q.attempt) for r, q in sorted(self.requests.items()) if q.ended is None)
        self.send("r", RouterHeartbeat(router_id="r", waiting=waiting))
        self.send(
            "c",
            CoordinatorHeartbeat(
                coordinator_id="c", incarnation=str(self.coordinator_incarnation), driving=tuple(sorted(self.groups))
            ),
        )

    def submit(self, name: str, tokens: int, max_tokens: int) -> None:
        self.requests[name] = FakeRequest(tokens, max_tokens)
        self.send("r", RequestSubmitted(spec=spec(name, tokens, max_tokens=max_tokens)))

    def cancel(self, name: str) -> None:
        request = self.requests[name]
        if request.ended is None:
            request.ended = "cancelled"
            self.send("r", CancelRequested(request_id=name, router_id="r"))

    # --- the scheduler ---------------------------------------------------------------------------

    def deliver(self, sender: str) -> None:
        self._handle(self.to_scheduler[sender].popleft())

    def deliver_all(self) -> None:
        while senders := self.senders():
            self.deliver(senders[0])

    def advance(self, seconds: float) -> None:
        """Time passes; the scheduler is called at each of its deadlines."""
        end_s = self.now_s + seconds
        for _ in range(1_000):
            deadline_s = self.scheduler.next_deadline_s()
            if deadline_s is None or deadline_s > end_s:
                break
            self.now_s = max(self.now_s, deadline_s)
            self._handle(TimePassed())
        else:
            raise AssertionError("the scheduler's deadline does not move on")
        self.now_s = end_s

    def _handle(self, event: SchedulerEvent) -> None:
        commands = self.scheduler.handle(event, self.now_s)
        if isinstance(event, RouterHeartbeat):
            self.router_heard_s = self.now_s
        self._handled(event, commands)
        self.scheduler.check()
        self.pauses.saw(self.scheduler, event, commands, self.now_s)
        for command in commands:
            if self._is_lost_on_the_way(command):
                self.watch.answer_lost(command)
            else:
                self._perform(command)
        self._check()
        self._note(commands)

    def _handled(self, event: SchedulerEvent, commands: Sequence[SchedulerCommand]) -> None:
        self.handled.append((self.now_s, event, commands))

    @property
    def log(self) -> list[str]:
        return [f"{at_s:.3f} {event!r} -> {commands!r}" for at_s, event, commands in self.handled]

    def _is_lost_on_the_way(self, command: SchedulerCommand) -> bool:
        if self.orders_to_lose == 0 or isinstance(command, SaveRequest | ForgetRequest | EndBusRequest | WorkerKeptOut):
            return False
        self.orders_to_lose -= 1
        self.seen[f"{type(command).__name__} lost"] += 1
        return True

    def _check(self) -> None:
        """Between the scheduler's books and this world."""
        known = self.scheduler.cluster.requests
        require(self.saved == set(known), "a standby finds a record of every request, and of no other")
        under_way = {e.spec.request_id for e in self.to_scheduler.get("r", ()) if isinstance(e, RequestSubmitted)}
        alive = {name for name, request in self.requests.items() if request.ended is None}
        if self.now_s - self.router_heard_s >= self.config.lease_s - ROUNDING_S:
            self.watch.router_lost(alive - under_way)
        self.watch.nobody_is_lost({n: r.spec.attempt for n, r in known.items()}, alive, under_way)
        self._groups_have_their_kv()

    def _groups_have_their_kv(self) -> None:
        """A group that the scheduler counts on, paused or not, has KV on every one of its members."""
        for (name, attempt), group in self.groups.items():
            request = self.scheduler.cluster.requests.get(name)
            if (
                group.state == "unreachable"
                or request is None
                or request.spec.attempt != attempt
                or request.state not in IN_GROUP
            ):
                continue
            for worker_id in group.members:
                held = (name, attempt) in self.workers[worker_id].holds
                require(held, f"{name} is {group.state}, and its KV on {worker_id} is gone")
                booked = self.scheduler.cluster.replicas[worker_id].held[name, attempt].tokens
                require(
                    booked > 0 or group.state == "spilled", f"{name} is {group.state} on {worker_id}, by the books not"
                )

    def _note(self, commands: Sequence[SchedulerCommand]) -> None:
        for command in commands:
            if isinstance(command, FormGroup):
                self.seen[f"group of {min(len(command.members), 3)}"] += 1
                nodes = {self.scheduler.cluster.replicas[w].profile.node for w in command.members}
                self.seen["group over two nodes"] += len(nodes) > 1
            elif isinstance(command, PauseGroup):
                members = self.scheduler.cluster.requests[command.request_id].members
                self.seen["group of several paused"] += len(members) > 1
            elif isinstance(command, SpillGroup):
                self.seen["spilled"] += 1
                self.seen["group of several spilled"] += (
                    len(self.scheduler.cluster.requests[command.request_id].members) > 1
                )
            elif isinstance(command, RestoreGroup):
                self.seen["restored"] += 1

    def _perform(self, command: SchedulerCommand) -> None:
        match command:
            case SaveRequest():
                self.saved.add(command.record.spec.request_id)
            case ForgetRequest():
                self.saved.discard(command.request_id)
            case EndBusRequest() | WorkerKeptOut() | RequestAccepted():
                pass
            case RequestRefused() | RequestFailed():
                request = self.requests.get(command.request_id)
                if request is not None and command.attempt == request.attempt and request.ended is None:
                    request.ended = "failed"
            case RequestInterrupted():
                self._resubmit(command)
            case RunPrefill() | ExpectKv():
                local = isinstance(command, RunPrefill) and command.decode_worker_id == command.worker_id
                key = (command.spec.request_id, command.spec.attempt)
                self._hold(command.worker_id, key, "local" if local else "held")
            case DropRequest():
                self._drop(command.worker_id, (command.request_id, command.attempt))
            case FormGroup():
                key = (command.spec.request_id, command.spec.attempt)
                self.groups[key] = FakeGroup(command.members, command.scheme.gathers)
                if not all(self.workers[w].alive for w in command.members):
                    self.groups[key].state = "unreachable"
                    return
                for worker_id in command.members:
                    self._hold(worker_id, key, "segment")
                self.send("c", GroupFormed(request_id=key[0], attempt=key[1]))
            case GrowGroup():
                self._grow((command.request_id, command.attempt), command)
            case PartGroup():
                self._part((command.request_id, command.attempt))
            case PauseGroup() | ResumeGroup():
                self._steer((command.request_id, command.attempt), pause=isinstance(command, PauseGroup))
            case SpillGroup() | RestoreGroup():
                self._move((command.request_id, command.attempt), out=isinstance(command, SpillGroup))
            case DissolveGroup():
                self._dissolve((command.request_id, command.attempt), "dissolved")

    def _resubmit(self, command: RequestInterrupted) -> None:
        request = self.requests.get(command.request_id)
        if request is None or request.ended is not None:
            self.send("r", CancelRequested(request_id=command.request_id, router_id="r"))
        elif command.attempt == request.attempt:
            request.attempt += 1
            again = spec(command.request_id, request.tokens, max_tokens=request.max_tokens, attempt=request.attempt)
            self.send("r", RequestSubmitted(spec=again))

    # --- workers ---------------------------------------------------------------------------------

    def _hold(self, worker_id: str, key: Key, phase: str = "held") -> None:
        worker = self.workers[worker_id]
        if worker.alive:
            worker.holds[key] = phase

    def _drop(self, worker_id: str, key: Key) -> None:
        worker = self.workers[worker_id]
        if worker.alive:
            worker.holds.pop(key, None)
            self.send(worker_id, KvReleased(worker_id=worker_id, request_id=key[0], attempt=key[1]))

    def _steer(self, key: Key, *, pause: bool) -> None:
        group = self.groups.get(key)
        if group is None or group.state not in ("running", "paused"):
            return
        group.state = "paused" if pause else "running"
        if pause:
            self._keep(key, group)
            event = GroupPaused(request_id=key[0], attempt=key[1], step=1, prefilled_tokens=1, pause_latency_s=0.01)
            self.send("c", event)
        else:
            self.send("c", GroupResumed(request_id=key[0], attempt=key[1]))

    def _grow(self, key: Key, order: GrowGroup) -> None:
        group = self.groups.get(key)
        if group is None:
            self.send("c", GroupFailed(request_id=key[0], attempt=key[1], reason="no such group"))
            return
        if group.trying is not None:
            assert group.trying.growth == order.growth, "one try at a time"
            return
        newcomers = [worker_id for worker_id in order.members if worker_id not in group.members]
        if group.tried >= order.growth or group.state != "running":
            group.tried = max(group.tried, order.growth)
            self._tell_grown(key, group, group.tried)
            return
        group.trying = order
        for worker_id in newcomers:
            self._hold(worker_id, key, "segment")
        if not all(self.workers[worker_id].alive for worker_id in newcomers):
            self._keep(key, group)

    def _part(self, key: Key) -> None:
        """At once, if it can."""
        group = self.groups.get(key)
        if group is None:
            self.send("c", GroupFailed(request_id=key[0], attempt=key[1], reason="no such group"))
            return
        if group.gathers and group.state in ("running", "paused"):
            self._keep(key, group)
            self.seen["parted"] += len(group.members) > 1
            group.members = group.members[:1]
        word = GroupParted(request_id=key[0], attempt=key[1], members=group.members, prefilled_tokens=1)
        self.send("c", word)

    def _keep(self, key: Key, group: FakeGroup) -> None:
        """It does not grow."""
        if group.trying is None:
            return
        for worker_id in group.newcomers:
            self.workers[worker_id].holds.pop(key, None)
        group.tried, group.trying = group.trying.growth, None
        self._tell_grown(key, group, group.tried)

    def _tell_grown(self, key: Key, group: FakeGroup, growth: int) -> None:
        word = GroupGrown(request_id=key[0], attempt=key[1], growth=growth, members=group.members, prefilled_tokens=1)
        self.send("c", word)

    def _move(self, key: Key, *, out: bool) -> None:
        group = self.groups.get(key)
        if group is None or group.state not in ("paused", "spilled"):
            return
        about = {"request_id": key[0], "attempt": key[1]}
        if out and group.state == "paused" and self.disk_full:
            self.seen["spill refused"] += 1
            self.send("c", GroupNotSpilled(reason="no room", **about))
            return
        group.state = "spilled" if out else "paused"
        if out:
            self.send("c", GroupSpilled(**about))
        else:
            self.send("c", GroupPaused(step=1, prefilled_tokens=1, pause_latency_s=0.01, **about))

    def _dissolve(self, key: Key, reason: str, *, retryable: bool = True) -> None:
        group = self.groups.pop(key, None)
        for worker_id in (*group.members, *group.newcomers) if group else ():
            self.workers[worker_id].holds.pop(key, None)
        self.send("c", GroupFailed(request_id=key[0], attempt=key[1], reason=reason, retryable=retryable))

    def work(self) -> list[Key]:
        """What could make progress now."""
        alive = [w for w in self.workers.values() if w.alive]
        shorts = {k for w in alive if w.role == "prefill" for k, phase in w.holds.items() if phase != "segment"}
        decodes = {k for w in alive if w.role == "decode" for k in w.holds}
        return sorted(shorts | decodes | {k for k, g in self.groups.items() if g.state not in ("paused", "spilled")})

    def progress(self, key: Key) -> None:
        """One request takes its next step: prefill → handed over → decoded; group prefill → decode → finished."""
        if key in self.groups:
            self._progress_group(key)
            return
        prefill = next((n for n, w in self.workers.items() if w.role == "prefill" and w.alive and key in w.holds), None)
        decode = next((n for n, w in self.workers.items() if w.role == "decode" and w.alive and key in w.holds), None)
        about = {"request_id": key[0], "attempt": key[1]}
        if prefill is not None and self.workers[prefill].holds[key] != "held":
            self._progress_local(prefill, key)
        elif prefill is not None:
            del self.workers[prefill].holds[key]
            self.send(prefill, PrefillFinished(worker_id=prefill, compute_s=0.1, last_layer_computed_s=0, **about))
            self.send(prefill, KvReleased(worker_id=prefill, **about))
            if decode is not None:
                self.workers[decode].holds[key] = "decoding"
        elif decode is not None and self.workers[decode].holds[key] == "decoding":
            del self.workers[decode].holds[key]
            self.send(decode, DecodeFinished(worker_id=decode, finish_reason="length", generated=1, **about))
            self._delivered(key)
        elif decode is not None:  # its prefill worker is gone: the reservation lapses
            self._drop(decode, key)

    def _progress_local(self, worker_id: str, key: Key) -> None:
        """Prefill → decode → finished, all on one worker."""
        about = {"worker_id": worker_id, "request_id": key[0], "attempt": key[1]}
        if self.workers[worker_id].holds[key] == "local":
            self.workers[worker_id].holds[key] = "decoding here"
            self.send(worker_id, PrefillFinished(compute_s=0.1, last_layer_computed_s=0, **about))
        else:
            del self.workers[worker_id].holds[key]
            self.send(worker_id, DecodeFinished(finish_reason="length", generated=1, **about))
            self._delivered(key)

    def _progress_group(self, key: Key) -> None:
        group = self.groups[key]
        about = {"request_id": key[0], "attempt": key[1]}
        if group.state == "unreachable":
            self._dissolve(key, "a member cannot be reached")
        elif group.trying is not None:
            group.members, group.tried, group.trying = group.trying.members, group.trying.growth, None
            self.seen["grown"] += 1
            self._tell_grown(key, group, group.tried)
        elif group.state == "running":
            group.state = "decoding"
            if group.gathers:
                self.seen["gathered"] += len(group.members) > 1
                group.members = group.members[:1]
            self.send("c", GroupPrefillFinished(compute_s=1, members=group.members, **about))
        elif group.state == "decoding":
            del self.groups[key]
            for worker_id in group.members:
                self.workers[worker_id].holds.pop(key, None)
            self.send("c", GroupFinished(finish_reason="length", generated=1, **about))
            self._delivered(key)

    def _delivered(self, key: Key) -> None:
        request = self.requests[key[0]]
        if request.attempt == key[1] and request.ended is None:
            request.ended = "finished"

    # --- faults ----------------------------------------------------------------------------------

    def crash(self, worker_id: str) -> None:
        worker = self.workers[worker_id]
        self.workers[worker_id] = replace(worker, alive=False, holds={})
        self.to_scheduler.pop(worker_id, None)
        for key in [k for k, g in self.groups.items() if worker_id in g.newcomers]:
            self.seen["newcomer lost"] += 1
            self._keep(key, self.groups[key])
        for key in [k for k, g in self.groups.items() if worker_id in g.members]:
            request = self.scheduler.cluster.requests.get(key[0])
            if len(self.groups[key].members) > 1 and request is not None and request.key == key:
                self.seen[f"member lost while {request.state.value}"] += 1
            self._dissolve(key, f"{worker_id} was lost")

    def restart(self, worker_id: str) -> None:
        if self.workers[worker_id].alive:
            self.crash(worker_id)
        worker = self.workers[worker_id]
        self.workers[worker_id] = FakeWorker(worker.role, incarnation=worker.incarnation + 1)

    def restart_coordinator(self) -> None:
        self.coordinator_incarnation += 1
        self.groups.clear()
        self.to_scheduler.pop("c", None)

    def retire(self, worker_id: str) -> None:
        """It says with its heartbeats that it will leave, and ends what it holds meanwhile."""
        self.workers[worker_id].leaving = True

    def leave(self, worker_id: str) -> None:
        """It stops by its own will, and says so."""
        worker = self.workers[worker_id]
        if worker.alive:
            self.crash(worker_id)
            self.send(worker_id, WorkerLeft(worker_id=worker_id, incarnation=str(worker.incarnation)))

    def coordinator_leaves(self) -> None:
        """Another one reports with the next heartbeats."""
        left = CoordinatorLeft(coordinator_id="c", incarnation=str(self.coordinator_incarnation))
        self.restart_coordinator()
        self.send("c", left)

    def lose_next(self, sender: str) -> None:
        """A message vanishes on the way."""
        event = self.to_scheduler[sender].popleft()
        if isinstance(event, RequestSubmitted):
            self.watch.submission_lost(event.spec.request_id, event.spec.attempt)

    def fail_work(self, key: Key, *, retryable: bool) -> None:
        """It cannot be done: where it prefills, where it decodes, or in its group."""
        about = {"request_id": key[0], "attempt": key[1]}
        if key in self.groups:
            self._dissolve(key, "cosmic ray", retryable=retryable)
            return
        for name, worker in self.workers.items():
            if not worker.alive or key not in worker.holds:
                continue
            phase = worker.holds.pop(key)
            if worker.role == "prefill" and phase != "decoding here":
                suspect = next((n for n, w in self.workers.items() if w.role == "decode"), None)
                failed = PrefillFailed(
                    worker_id=name, reason="cosmic ray", retryable=retryable, suspect_worker_id=suspect, **about
                )
                self.send(name, failed)
            elif retryable and phase == "held":
                self.send(name, DecodeBusy(worker_id=name, **about))
            else:
                self.send(name, DecodeFailed(worker_id=name, reason="cosmic ray", **about))
            return

    def settle(self) -> None:
        """No more faults: everybody works, until nothing is left to do. Every accepted request ends in bounded time:
        lost messages are mended by heartbeats within leases, then each second everybody takes a step."""
        self.orders_to_lose = 0
        for name, worker in self.workers.items():
            if not worker.alive or worker.leaving:
                self.restart(name)
        for _ in range(MENDED_S + STEPS_MAX * (1 + len(self.requests))):
            self.heartbeats()
            self.deliver_all()
            for key in self.work():
                self.progress(key)
            self.deliver_all()
            self.advance(1.0)
            ended = all(r.ended for r in self.requests.values()) and not self.scheduler.cluster.requests
            if ended and not any(w.held for w in self.scheduler.cluster.workers()):
                return
        last = "\n".join(self.log[-60:])
        raise AssertionError(f"not everything ended:\n{last}")
