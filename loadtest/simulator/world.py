"""The fake world: the production scheduler core, unchanged, and a cluster that performs its commands in no time.

The core is handed the very messages that routers, workers and the SP coordinator send, in their order, and its commands
are performed with a cost model (`replica.py`, `decoder.py`, `group.py`). There is no event per token or step: ends are
computed, and computed anew when something changes.

- A control message takes `hop_s` from one process to the next: router to scheduler, scheduler to worker and back;
  groups are reached by way of their coordinator, two hops. Messages of the core take no time beside that: how
  long `Scheduler.handle` really takes is measured with the host's clock, kept, and not added to simulated time.
- Every worker, the coordinator and the router give one heartbeat, at the start; leases are longer than any run
  (`LEASE_S`). Nothing is lost here, and 8,192 workers' heartbeats would teach the scheduler nothing.
- Recorded output lengths are what is generated: `max_tokens` is the output.
- A request that is refused, failed or interrupted has failed; nobody submits it again.
- KV moves at the speed of an idle link; transfers do not slow each other down.

A run ends when all has ended and every message is delivered, or when nothing can move any more: then what has no
finish is left without.
"""

from __future__ import annotations

import gc
import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from heapq import heappop
from time import perf_counter
from typing import Any, TypeVar

import msgspec

from common.messages.cluster import CoordinatorHeartbeat, RouterHeartbeat, WorkerHeartbeat, WorkerProfile, WorkerRole
from common.messages.decode import ExpectKv
from common.messages.prefill import DropRequest, RunPrefill
from common.messages.requests import Prompt, RequestSpec
from common.messages.scheduling import (
    CancelRequested,
    RequestAccepted,
    RequestFailed,
    RequestInterrupted,
    RequestRefused,
    RequestSubmitted,
)
from common.messages.sp import DissolveGroup, FormGroup, GrowGroup, PartGroup, PauseGroup, ResumeGroup
from common.policy.core import TimePassed
from common.policy.cost_model import ReplicaCosts
from common.policy.long_planner import LongPlanner
from common.policy.scheduler import Scheduler
from common.policy.scheduler_config import SchedulerConfig
from common.policy.scheduler_io import EndBusRequest, ForgetRequest, SaveRequest, SchedulerEvent, WorkerKeptOut
from common.policy.sequence_plan import SpPlanner
from common.settings import PrefillWorkerSettings
from common.units import CoordinatorId, RequestId, RouterId, WorkerId
from loadtest.simulator.cores import Cores
from loadtest.simulator.costs import LongCosts, SpCosts
from loadtest.simulator.decoder import Decoder
from loadtest.simulator.group import COORDINATOR_HOPS, Group
from loadtest.simulator.growth import Try
from loadtest.simulator.job import Job
from loadtest.simulator.recorder import Recorder
from loadtest.simulator.replica import Replica
from loadtest.simulator.result import Outcome, SimResult
from loadtest.simulator.scenario import PolicyName, Scenario, cost_model, scheduler_config
from loadtest.simulator.site import Limits, Site, Word
from loadtest.simulator.timeline import Timeline
from loadtest.simulator.usage import Usage, is_denied
from loadtest.simulator.workload import Arrival, Workload

LEASE_S = 5e8
"""Longer than any run, and within the bounds of `units.Seconds` when added to its times."""
HOP_S = 0.0005
"""Default time of a control message."""
LONG_ITL_S_MAX = PrefillWorkerSettings().long_itl_ms_max / 1e3
"""As live workers have it."""
ROWS_MAX = 256
"""Default rows of a decode worker's batch (vLLM's default)."""
IDLE_WAKES_MAX = 1_000
"""So often may the scheduler wake itself in a row, with nothing under way, and order nothing."""
ROUTER = RouterId("router")

T = TypeVar("T")
Progress = Callable[[int, int], None]
"""Called now and then with (requests ended, requests)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterShape:
    """Which workers there are. The decode workers are the last replicas, on the last nodes, so that as many nodes as
    possible are whole for longs."""

    nodes: int
    replicas_per_node: int
    decode_replicas: int
    gpus_per_replica: int
    layers: int
    kv_bytes_per_token: int = 0
    model: str = "model"
    rows_max: int = ROWS_MAX

    @property
    def replicas(self) -> int:
        return self.nodes * self.replicas_per_node


class World:
    """One run. Build it, `run` it once."""

    def __init__(
        self,
        shape: ClusterShape,
        config: SchedulerConfig,
        costs: ReplicaCosts,
        longs: LongCosts,
        planner: LongPlanner | None,
        *,
        seed: int = 0,
        hop_s: float = HOP_S,
        record: bool = False,
        cores: Cores | None = None,
        long_itl_s_max: float = LONG_ITL_S_MAX,
    ) -> None:
        self._shape = shape
        self._config = config = msgspec.structs.replace(config, lease_s=LEASE_S)
        self._core = Scheduler(config, epoch=1, planner=planner)
        self._timeline = Timeline()
        self._recorder = Recorder() if record else None
        if cores is not None:
            cores.attach(self._timeline)
        self._site = Site(
            timeline=self._timeline,
            costs=costs,
            longs=longs,
            limits=Limits(config.batch_tokens_max, config.colocated_tokens_max, shape.layers, long_itl_s_max),
            hop_s=hop_s,
            random=random.Random(f"{seed}/pauses"),
            usage=Usage(),
            hear=self._hear,
            recorder=self._recorder,
            cores=cores,
        )
        self._replicas: dict[str, Replica] = {}
        self._decoders: dict[str, Decoder] = {}
        self._groups: dict[str, Group] = {}
        self._jobs: dict[str, Job] = {}
        self._waiting_longs: dict[str, tuple[Job, float, float]] = {}
        """Longs not known to have begun, with what shorts and longs had used when they came."""
        self._arrivals: Sequence[Arrival] = ()
        self._threshold_tokens = config.threshold_tokens
        self._ended = 0
        self._busy_at_end_of_arrivals_s = 0.0
        self._deadline_s = LEASE_S
        """The scheduler's next one; `LEASE_S`: none that matters."""
        self._has_news = True
        """The scheduler has handled something since it was asked for its deadline."""
        self._idle_wakes = 0
        self._decisions = array("d")
        self._stalled = False
        self._perform = self._performers()
        self._open_workers()

    def _performers(self) -> dict[type, Callable[[Any], None] | None]:
        """Of each of the scheduler's commands, what it does in this world; None: nothing."""
        return {
            SaveRequest: None,
            ForgetRequest: self._request_ended,
            RequestAccepted: None,
            EndBusRequest: None,
            WorkerKeptOut: None,
            RequestRefused: self._request_refused,
            RequestFailed: self._request_failed,
            RequestInterrupted: self._request_interrupted,
            RunPrefill: self._run_prefill,
            ExpectKv: self._expect_kv,
            DropRequest: self._drop,
            FormGroup: self._form_group,
            GrowGroup: self._grow_group,
            PartGroup: self._part_group,
            PauseGroup: self._pause_group,
            ResumeGroup: self._resume_group,
            DissolveGroup: self._dissolve_group,
        }

    def _open_workers(self) -> None:
        shape, site = self._shape, self._site
        prefilling = shape.replicas - shape.decode_replicas
        width = len(str(shape.replicas - 1))
        capacity = site.costs.kv_capacity_tokens
        for number in range(shape.replicas):
            node = f"n{number // shape.replicas_per_node:0{width}d}"
            if number < prefilling:
                name = WorkerId(f"p{number:0{width}d}")
                self._replicas[name] = Replica(site, name, node, capacity, self._decoders)
                self._heartbeat(name, node, "prefill")
            else:
                name = WorkerId(f"d{number:0{width}d}")
                self._decoders[name] = Decoder(site, name, node, capacity)
                self._heartbeat(name, node, "decode")
        self._tell_core(CoordinatorHeartbeat(coordinator_id=CoordinatorId("coordinator"), incarnation="1"))
        self._tell_core(RouterHeartbeat(router_id=ROUTER))

    def _heartbeat(self, name: WorkerId, node: str, role: WorkerRole) -> None:
        shape, costs = self._shape, self._site.costs
        profile = WorkerProfile(
            worker_id=name,
            role=role,
            incarnation="1",
            node=node,
            replica=name,
            tp_size=shape.gpus_per_replica,
            model_id=shape.model,
            model_fingerprint=shape.model,
            layers=shape.layers,
            kv_bytes_per_token=shape.kv_bytes_per_token,
            kv_capacity_tokens=costs.kv_capacity_tokens,
            context_tokens=2**31 - 1,
            rows_max=shape.rows_max if role == "decode" else 1,
            data_address=f"{name}:1",
            step_cost=costs.step_cost(),
        )
        self._tell_core(WorkerHeartbeat(profile=profile))

    # --- the run ---------------------------------------------------------------------------------

    def run(self, workload: Workload, progress: Progress | None = None) -> SimResult:
        """Raises: SimulationError if the scheduler orders what no worker can do."""
        self._arrivals = workload.arrivals
        self._threshold_tokens = workload.threshold_tokens
        self._decisions = array("d")
        if self._arrivals:
            self._timeline.at(self._arrivals[0].at_s + self._site.hop_s, self._arrive, 0)
        with _calm_collector():
            self._loop(progress)
            return self._result()

    def _loop(self, progress: Progress | None) -> None:
        timeline, heap = self._timeline, self._timeline.heap
        every = max(1, len(self._arrivals) // 100)
        shown = 0
        while True:
            next_s = heap[0][0] if heap else LEASE_S
            if self._has_news:
                self._has_news = False
                self._deadline_s = self._core.next_deadline_s() or LEASE_S
            if self._deadline_s <= next_s and self._deadline_s < LEASE_S:
                if not self._wake(alone=not heap):
                    return
            elif heap:
                timeline.now_s, _, do, what = heappop(heap)
                do(what)
            else:
                self._stalled = any(job.finished_s is None and job.failure is None for job in self._jobs.values())
                return
            if self._ended - shown >= every:
                shown = self._ended
                if progress is not None:
                    progress(shown, len(self._arrivals))

    def _wake(self, *, alone: bool) -> bool:
        """A deadline of the scheduler's has come. False: nothing can move any more. `alone`: nothing is under way."""
        timeline = self._timeline
        timeline.now_s = max(timeline.now_s, self._deadline_s)
        if self._handle(TimePassed(), None) or not alone:
            self._idle_wakes = 0
            return True
        self._idle_wakes += 1
        self._stalled = self._idle_wakes > IDLE_WAKES_MAX
        return not self._stalled

    def _arrive(self, number: int) -> None:
        """Its submission reaches the scheduler, a hop after its arrival at the router."""
        at_s, prompt_tokens, output_tokens = self._arrivals[number]
        spec = RequestSpec(
            request_id=RequestId(f"r{number}"),
            router_id=ROUTER,
            prompt=Prompt(tokens=prompt_tokens, key="prompt"),
            max_tokens=max(1, output_tokens),
        )
        job = Job(spec, at_s, is_long=prompt_tokens > self._threshold_tokens)
        self._jobs[job.request_id] = job
        if job.is_long:
            usage = self._site.usage
            usage.advance(self._timeline.now_s)
            self._waiting_longs[job.request_id] = (job, usage.short_s, usage.long_s)
        self._handle(RequestSubmitted(spec=spec), job)
        if number + 1 < len(self._arrivals):
            self._timeline.at(self._arrivals[number + 1].at_s + self._site.hop_s, self._arrive, number + 1)
        else:
            self._arrivals_ended()

    def _arrivals_ended(self) -> None:
        """Who has waited in vain for as long as requests came?"""
        now_s, usage = self._timeline.now_s, self._site.usage
        usage.advance(now_s)
        self._busy_at_end_of_arrivals_s = usage.any_s
        for job, short_s, long_s in self._waiting_longs.values():
            if job.prefill_started_s is None and job.failure is None:
                waited_s = now_s - job.arrived_s
                short_s, long_s = usage.short_s - short_s, usage.long_s - long_s
                job.denied = is_denied(waited_s, len(self._replicas), short_s, long_s)
        self._waiting_longs.clear()

    # --- the scheduler ---------------------------------------------------------------------------

    def _hear(self, words: Sequence[Word]) -> None:
        for job, event in words:
            self._handle(event, job)

    def _handle(self, event: SchedulerEvent, job: Job | None) -> int:
        """Returns how many commands came of it."""
        now_s, recorder = self._timeline.now_s, self._recorder
        began_s = perf_counter()
        commands = self._core.handle(event, now_s)
        took_s = perf_counter() - began_s
        self._decisions.append(took_s)
        if job is not None:
            job.sched_s += took_s
        self._has_news = True
        if recorder is not None:
            recorder.heard(now_s, event)
            for command in commands:
                recorder.said(now_s, command)
        table = self._perform
        for command in commands:
            perform = table[type(command)]
            if perform is not None:
                perform(command)
        return len(commands)

    def _tell_core(self, event: SchedulerEvent) -> None:
        """At the start: nobody waits for it."""
        self._handle(event, None)

    # --- its commands ----------------------------------------------------------------------------

    def _run_prefill(self, command: RunPrefill) -> None:
        job = self._jobs[command.spec.request_id]
        job.decode_worker_id = command.decode_worker_id
        job.exclusive = command.exclusive
        self._after(1, self._replicas[command.worker_id].take, job)

    def _expect_kv(self, command: ExpectKv) -> None:
        self._decoders[command.worker_id].kv.reserve(command.spec.request_id, command.spec.kv_tokens)

    def _drop(self, command: DropRequest) -> None:
        worker = self._replicas.get(command.worker_id) or self._decoders[command.worker_id]
        self._after(1, worker.drop, self._jobs[command.request_id])

    def _form_group(self, command: FormGroup) -> None:
        members = tuple(self._replicas[worker_id] for worker_id in command.members)
        gathers = command.scheme.gathers
        group = Group(self._site, self._jobs[command.spec.request_id], members, gathers=gathers)
        self._groups[command.spec.request_id] = group
        self._after(COORDINATOR_HOPS, Group.form, group)

    def _grow_group(self, command: GrowGroup) -> None:
        tried = Try.of(self._groups[command.request_id], command, self._replicas)
        tried.take_kv()
        self._after(COORDINATOR_HOPS, Try.begin, tried)

    def _part_group(self, command: PartGroup) -> None:
        self._after(COORDINATOR_HOPS, Group.part, self._groups[command.request_id])

    def _pause_group(self, command: PauseGroup) -> None:
        self._after(COORDINATOR_HOPS, Group.pause, self._groups[command.request_id])

    def _resume_group(self, command: ResumeGroup) -> None:
        self._after(COORDINATOR_HOPS, Group.resume, self._groups[command.request_id])

    def _dissolve_group(self, command: DissolveGroup) -> None:
        self._after(COORDINATOR_HOPS, Group.dissolve, self._groups[command.request_id])

    def _after(self, hops: int, do: Callable[[T], None], what: T) -> None:
        timeline = self._timeline
        timeline.at(timeline.now_s + hops * self._site.hop_s, do, what)

    def _request_ended(self, _: ForgetRequest) -> None:
        self._ended += 1

    def _request_refused(self, command: RequestRefused) -> None:
        self._ended += 1
        self._jobs[command.request_id].failure = f"refused, {command.code}: {command.message}"

    def _request_failed(self, command: RequestFailed) -> None:
        self._jobs[command.request_id].failure = f"failed: {command.message}"

    def _request_interrupted(self, command: RequestInterrupted) -> None:
        job = self._jobs[command.request_id]
        job.failure = f"interrupted: {command.reason}"
        self._site.tell(((job, CancelRequested(request_id=job.request_id, router_id=ROUTER)),))

    # --- the result ------------------------------------------------------------------------------

    def _result(self) -> SimResult:
        shape, usage = self._shape, self._site.usage
        jobs = self._jobs.values()
        arrivals_end_s = self._arrivals[-1].at_s if self._arrivals else 0.0
        began_s = self._arrivals[0].at_s if self._arrivals else 0.0
        ended_s = max((job.finished_s for job in jobs if job.finished_s is not None), default=0.0)
        ended_s = max(ended_s, arrivals_end_s)
        recorder = self._recorder
        return SimResult(
            policy=self._config.policy,
            outcomes=[_outcome_of(job) for job in jobs],
            arrivals_end_s=arrivals_end_s,
            ended_s=ended_s,
            gpus=shape.replicas * shape.gpus_per_replica,
            gpu_idle=_idle(usage.any_s, shape.replicas, ended_s - began_s),
            gpu_idle_arrivals=_idle(self._busy_at_end_of_arrivals_s, shape.replicas, arrivals_end_s - began_s),
            replica_busy_s={
                **{name: replica.busy_s for name, replica in self._replicas.items()},
                **{name: decoder.busy_s for name, decoder in self._decoders.items()},
            },
            counters=dict(self._core.view(self._timeline.now_s).counters),
            decision_s=self._decisions,
            stalled=self._stalled,
            spans=recorder.spans if recorder is not None else [],
            event_log=recorder.event_log() if recorder is not None else b"",
        )


def _idle(busy_s: float, workers: int, seconds: float) -> float:
    return max(0.0, 1.0 - busy_s / (workers * seconds)) if seconds > 0.0 else 0.0


def _outcome_of(job: Job) -> Outcome:
    return Outcome(
        request_id=job.request_id,
        long=job.is_long,
        arrived_s=job.arrived_s,
        prompt_tokens=job.tokens,
        output_tokens=job.output_tokens,
        prefill_started_s=job.prefill_started_s,
        first_token_s=job.first_token_s,
        finished_s=job.finished_s,
        failure=job.failure,
        pauses=job.pauses,
        suspended_s=job.suspended_s,
        sched_s=job.sched_s,
        denied=job.denied,
    )


def simulate(
    scenario: Scenario,
    workload: Workload,
    *,
    policy: PolicyName | None = None,
    preemption: bool | None = None,
    disaggregation: bool | None = None,
    colocation: bool | None = None,
    fast_sp: bool | None = None,
    seed: int = 0,
    record: bool = False,
    progress: Progress | None = None,
) -> SimResult:
    """One workload under one policy; what is not said is the scenario's.

    Longs may have groups of any size, decode where their KV lies, and no request is refused for a long queue, unless
    `scenario.scheduler` says otherwise. The baselines use plain ring attention (paper, 6.1). Without disaggregation
    there are no decode workers.

    Raises: ScenarioError if such a cluster cannot be; SimulationError if the scheduler orders what cannot be done.
    """
    said = {
        "policy": policy,
        "preemption": preemption,
        "disaggregation": disaggregation,
        "colocation": colocation,
        "fast_sp": fast_sp,
    }
    scenario = msgspec.structs.replace(scenario, **{name: value for name, value in said.items() if value is not None})
    model = cost_model(scenario)
    unsaid = {"group_max": scenario.replicas, "queue_max": len(workload.arrivals) + 1, "group_gathers": False}
    config = msgspec.structs.replace(
        scheduler_config(scenario, workload.threshold_tokens),
        **{name: value for name, value in unsaid.items() if name not in scenario.scheduler},
    )
    own = scenario.policy == "pecsched"
    # Baselines gang a long's replicas at its arrival: with groups as small as a plain ring is efficient in, most of the
    # cluster waits for partners (FIFO takes more than twice as long). They get what serves them better.
    planner = SpPlanner(model, fast_sp=scenario.fast_sp and own, large_groups=not own)
    shape = ClusterShape(
        nodes=scenario.nodes,
        replicas_per_node=scenario.replicas_per_node,
        decode_replicas=scenario.decode_replicas if scenario.disaggregation else 0,
        gpus_per_replica=scenario.tp,
        layers=model.shape.layers,
        kv_bytes_per_token=model.shape.kv_bytes_per_token,
        model=scenario.model,
    )
    world = World(shape, config, model, SpCosts(model, planner), planner, seed=seed, record=record)
    return world.run(workload, progress)


@contextmanager
def _calm_collector() -> Iterator[None]:
    """A run makes millions of records that live as long as a request, and no cycles to speak of: the collector would
    go through all of them again and again, also within the decisions that are timed."""
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 1_000)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
