"""Shorts that never stop arriving, more than the cluster can take: a long that was admitted ends all the same, within
a bound that follows from the share of its time it may yield.

With a share σ, pauses of at most P, an undisturbed prefill of W and k pauses whose two orders take a hop h each way:
pauses add up to at most `σ·(T + P) + 2·k·h`, from which `T <= (W + σ·P + 2·k·h) / (1 - σ)`. And k is bounded too: a
pause is followed by its immunity.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.messages.cluster import CoordinatorHeartbeat, WorkerHeartbeat
from common.messages.decode import DecodeFinished
from common.messages.prefill import KvReleased, PrefillFinished, RunPrefill
from common.messages.requests import RequestSpec
from common.messages.scheduling import RequestSubmitted
from common.messages.sp import (
    FormGroup,
    GroupFinished,
    GroupFormed,
    GroupPaused,
    GroupPrefillFinished,
    GroupResumed,
    GroupSpilled,
    PauseGroup,
    RestoreGroup,
    ResumeGroup,
    SpillGroup,
)
from common.policy.core import TimePassed
from common.policy.costs import shorts_s
from common.policy.pecsched import DRAIN_AFTER_S, TRY_AGAIN_S
from common.policy.scheduler import Scheduler
from common.policy.scheduler_config import SchedulerConfig
from common.policy.scheduler_io import SchedulerCommand, SchedulerEvent
from tests.policy.fake_world import EvenPlanner
from tests.policy.scenario import COST, profile, spec
from tests.policy.watch import PauseWatch

END_S = 2_000.0


@dataclass
class TimedReplica:
    """Prefills one short at a time, in order, whenever no long prefills there."""

    blocked: bool = False
    queue: list[RequestSpec] = field(default_factory=list)
    busy: bool = False


@dataclass
class TimedLong:
    """`left_s` of work as of `since_s`, if it runs."""

    members: tuple[str, ...]
    left_s: float
    formed_s: float
    since_s: float | None
    serial: int = 0
    pauses: int = 0
    ended_s: float | None = None


class Stream:
    """Virtual time: every message takes a hop, prefills take their time, decodes none."""

    def __init__(
        self, config: SchedulerConfig, replicas: int, hop_s: float, *, kv: int = 40_000, move_s: float = 0.0
    ) -> None:
        """`move_s`: to move a long's KV out of a replica, or back."""
        self.move_s, self.moves = move_s, 0
        self.planner = EvenPlanner()
        self.scheduler = Scheduler(config, 1, self.planner if config.group_max > 1 else None)
        self.watch = PauseWatch(config)
        self.config, self.hop_s, self.now_s = config, hop_s, 0.0
        self.replicas = {f"p{i}": TimedReplica() for i in range(replicas)}
        self.longs: dict[str, TimedLong] = {}
        self.first_short_s: dict[str, float] = {}
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0
        for name in self.replicas:
            self.handle(WorkerHeartbeat(profile=profile(name, kv=kv, spill_bytes=1)))
        self.handle(WorkerHeartbeat(profile=profile("d0", "decode", kv=10**9, rows=10**6)))
        self.handle(CoordinatorHeartbeat(coordinator_id="c", incarnation="1"))

    def at(self, at_s: float, what: Callable[[], None]) -> None:
        self._serial += 1
        heapq.heappush(self._agenda, (at_s, self._serial, what))

    def tell(self, event: SchedulerEvent, after_s: float = 0.0) -> None:
        self.at(self.now_s + after_s + self.hop_s, lambda: self.handle(event))

    def handle(self, event: SchedulerEvent) -> None:
        commands = self.scheduler.handle(event, self.now_s)
        self.watch.saw(self.scheduler, event, commands, self.now_s)
        for command in commands:
            self.at(self.now_s + self.hop_s, lambda command=command: self.perform(command))

    def run(self, until: Callable[[], bool]) -> None:
        while not until():
            deadline_s = self.scheduler.next_deadline_s()
            if deadline_s is not None and deadline_s <= self._agenda[0][0]:
                self.now_s = max(self.now_s, deadline_s)
                self.handle(TimePassed())
                continue
            self.now_s, _, what = heapq.heappop(self._agenda)
            assert self.now_s < END_S, "it does not end"
            what()

    def shorts_every(self, gap_s: float, tokens: list[int], number: int = 0) -> None:
        """For ever."""
        self.handle(RequestSubmitted(spec=spec(f"s{number}", tokens[number % len(tokens)])))
        self.at(self.now_s + gap_s, lambda: self.shorts_every(gap_s, tokens, number + 1))

    # --- orders ----------------------------------------------------------------------------------

    def perform(self, command: SchedulerCommand) -> None:
        match command:
            case RunPrefill():
                self.replicas[command.worker_id].queue.append(command.spec)
                self._serve(command.worker_id)
            case FormGroup():
                name = command.spec.request_id
                work_s = self.scheduler._ledger.planner.prefill_s(command.spec.prompt.tokens, (len(command.members),))
                self.longs[name] = TimedLong(command.members, work_s, self.now_s, None)
                self._run_long(name)
                self.tell(GroupFormed(request_id=name, attempt=0))
            case PauseGroup():
                long = self.longs[command.request_id]
                if long.since_s is not None:
                    long.left_s -= self.now_s - long.since_s
                    long.since_s, long.serial, long.pauses = None, long.serial + 1, long.pauses + 1
                    self._block(long, False)
                    done = GroupPaused(
                        request_id=command.request_id, attempt=0, step=1, prefilled_tokens=0, pause_latency_s=0.0
                    )
                    self.tell(done)
            case SpillGroup():
                self.moves += 1
                self.tell(GroupSpilled(request_id=command.request_id, attempt=0), self.move_s)
            case RestoreGroup():
                again = {"step": 1, "prefilled_tokens": 0, "pause_latency_s": 0.0}
                self.tell(GroupPaused(request_id=command.request_id, attempt=0, **again), self.move_s)
            case ResumeGroup():
                self._run_long(command.request_id)
                self.tell(GroupResumed(request_id=command.request_id, attempt=0))

    def _block(self, long: TimedLong, blocked: bool) -> None:
        for name in long.members:
            self.replicas[name].blocked = blocked
            self._serve(name)

    def _run_long(self, name: str) -> None:
        long = self.longs[name]
        long.since_s = self.now_s
        self._block(long, True)
        serial = long.serial
        self.at(self.now_s + long.left_s, lambda: self._end_long(name, serial))

    def _end_long(self, name: str, serial: int) -> None:
        long = self.longs[name]
        if long.serial != serial or long.ended_s is not None:
            return
        long.ended_s, long.since_s = self.now_s, None
        self._block(long, False)
        self.tell(GroupPrefillFinished(request_id=name, attempt=0, compute_s=1.0))
        self.tell(GroupFinished(request_id=name, attempt=0, finish_reason="length", generated=1), 0.1)

    def _serve(self, name: str) -> None:
        replica = self.replicas[name]
        if replica.busy or replica.blocked or not replica.queue:
            return
        short, replica.busy = replica.queue.pop(0), True
        self.first_short_s.setdefault(name, self.now_s)
        took_s = shorts_s(COST, short.prompt.tokens, short.prompt.tokens)
        self.at(self.now_s + took_s, lambda: self._short_done(name, short.request_id))

    def _short_done(self, name: str, request_id: str) -> None:
        self.replicas[name].busy = False
        about = {"worker_id": name, "request_id": request_id, "attempt": 0}
        self.tell(PrefillFinished(compute_s=0.1, last_layer_computed_s=0, **about))
        self.tell(KvReleased(**about))
        decoded = about | {"worker_id": "d0"}
        self.tell(DecodeFinished(finish_reason="length", generated=1, **decoded))
        self._serve(name)


@pytest.mark.parametrize("load", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("group_max", [1, 4])
def test_a_long_starts_though_shorts_keep_every_replica_busy(group_max: int, load: float):
    sizes = [100, 300, 200, 400]
    work_s = sum(shorts_s(COST, size, size) for size in sizes) / len(sizes)
    stream = Stream(
        SchedulerConfig(group_max=group_max, elastic=False, lease_s=1e9, no_worker_s=1e9), replicas=4, hop_s=0.001
    )
    stream.at(0.1, lambda: stream.shorts_every(work_s / load / 4, sizes))
    stream.at(20.0, lambda: stream.handle(RequestSubmitted(spec=spec("L", 20_000 * min(group_max, 4) - 20))))
    stream.run(lambda: bool(stream.longs))
    assert stream.now_s <= 20.0 + DRAIN_AFTER_S + TRY_AGAIN_S + 2 * stream.hop_s


@pytest.mark.parametrize("group_max", [1, 2])
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    replicas=st.integers(2, 4),
    load=st.floats(0.5, 3.0),
    sizes=st.lists(st.integers(20, 400), min_size=1, max_size=4),
    share=st.sampled_from([0.1, 0.5, 0.8]),
    pause_max_s=st.sampled_from([0.2, 1.0, 4.0]),
    hop_s=st.sampled_from([0.0, 0.001, 0.01]),
    tokens=st.integers(3_000, 20_000),
)
def test_a_long_ends_though_shorts_never_stop(
    group_max: int,
    replicas: int,
    load: float,
    sizes: list[int],
    share: float,
    pause_max_s: float,
    hop_s: float,
    tokens: int,
):
    config = SchedulerConfig(
        pause_share_max=share,
        pause_max_s=pause_max_s,
        group_max=group_max,
        elastic=False,
        lease_s=1e9,
        no_worker_s=1e9,
        queue_max=500,
    )
    stream = Stream(config, replicas, hop_s)
    names = [f"L{i}" for i in range(replicas)]
    for name in names:  # as many as there is room for: every replica prefills a long
        stream.handle(RequestSubmitted(spec=spec(name, tokens)))
    work_s = sum(shorts_s(COST, size, size) for size in sizes) / len(sizes)
    stream.at(0.5, lambda: stream.shorts_every(work_s / load / replicas, sizes))
    stream.run(lambda: any(long.ended_s is not None for long in stream.longs.values()))
    for long in (long for long in stream.longs.values() if long.ended_s is not None):
        whole_s = stream.scheduler._ledger.planner.prefill_s(tokens, (len(long.members),))
        assert long.ended_s is not None
        bound_s = (whole_s + share * pause_max_s + 2 * long.pauses * hop_s) / (1 - share)
        took_s = long.ended_s - long.formed_s
        assert took_s <= bound_s + 2 * hop_s + 1e-3
        assert long.pauses <= 1 + took_s / config.pause_immunity_s


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    replicas=st.integers(1, 3),
    load=st.floats(0.5, 3.0),
    share=st.sampled_from([0.1, 0.5, 0.8]),
    pause_max_s=st.sampled_from([1.0, 4.0]),
    hop_s=st.sampled_from([0.0, 0.01]),
    move_s=st.sampled_from([0.0, 0.1, 0.5]),
)
def test_a_long_ends_though_shorts_that_need_its_room_never_stop(
    replicas: int, load: float, share: float, pause_max_s: float, hop_s: float, move_s: float
):
    """The first move, of which nobody knew how long it takes, may exceed a pause by itself; each other one is over in
    time, but for the hops of its orders and answers."""
    sizes = [300, 200, 400]
    config = SchedulerConfig(
        pause_share_max=share, pause_max_s=pause_max_s, lease_s=1e9, no_worker_s=1e9, queue_max=500
    )
    stream = Stream(config, replicas, hop_s, kv=20_100, move_s=move_s)
    for number in range(replicas):
        stream.handle(RequestSubmitted(spec=spec(f"L{number}", 20_000)))
    work_s = sum(shorts_s(COST, size, size) for size in sizes) / len(sizes)
    stream.at(0.5, lambda: stream.shorts_every(work_s / load / replicas, sizes))
    stream.run(lambda: any(long.ended_s is not None for long in stream.longs.values()))
    assert stream.moves
    for long in (long for long in stream.longs.values() if long.ended_s is not None):
        assert long.ended_s is not None
        whole_s = stream.scheduler._ledger.planner.prefill_s(20_000, (1,))
        hops_s = 6 * long.pauses * hop_s
        assert (
            long.ended_s - long.formed_s <= (whole_s + share * pause_max_s + hops_s + 2 * move_s) / (1 - share) + 0.01
        )
