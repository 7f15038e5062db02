"""Simulations as tasks: each is one policy on one model's cluster at one load, by itself, in one of a few processes."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from loadtest.paper_report.capacity import ShortCapacity, short_capacity
from loadtest.paper_report.variants import (
    SWEEP,
    SWEEP_SHARES,
    SWEEP_VARIANTS,
    VARIANTS,
    PaperError,
    share_of,
)
from loadtest.simulator.scenario import PRESETS, check_workload
from loadtest.simulator.summary import summarize
from loadtest.simulator.workload import Workload
from loadtest.simulator.world import simulate

RUN_S_MAX = 600.0
"""No run is waited for longer than this."""


class Task(NamedTuple):
    model: str
    load: str
    """A name; of the sweep, `sweep N%`."""
    variant: str
    rate_scale: float
    stretch_s: float | None = None
    """Only what arrives in the first so many seconds of the workload; none: all of it."""


class Run(NamedTuple):
    task: Task
    figures: dict[str, Any]
    wall_s: float


class Plan(NamedTuple):
    tasks: tuple[Task, ...]
    """The longest first, so that the processes end together."""
    capacities: Mapping[str, ShortCapacity]
    """Per model, of the whole workload."""
    sweep_requests: int


def plan(workload: Workload, models: Sequence[str], loads: Sequence[str], sweep_s: float) -> Plan:
    """Every run there is to do, checked: whether each request fits its cluster, and each load is one.

    Raises: PaperError, ScenarioError.
    """
    stretch = workload.first(sweep_s)
    tasks: list[Task] = []
    sweep: list[Task] = []
    capacities = {}
    for model in models:
        check_workload(PRESETS[model], workload)
        capacity = capacities[model] = short_capacity(PRESETS[model], workload)
        for load in loads:
            if load == SWEEP:
                sweep += _sweep(model, short_capacity(PRESETS[model], stretch), sweep_s)
                continue
            share = share_of(load)
            scale = 1.0 if share is None else capacity.rate_scale(share)
            tasks += [Task(model, load, variant, scale) for variant in VARIANTS]
    return Plan((*tasks, *sweep), capacities, len(stretch.arrivals))


def _sweep(model: str, capacity: ShortCapacity, stretch_s: float) -> Iterator[Task]:
    for share in SWEEP_SHARES:
        for variant in SWEEP_VARIANTS:
            yield Task(model, f"{SWEEP} {share:.0%}", variant, capacity.rate_scale(share), stretch_s)


def perform(task: Task, workload: Workload, seed: int) -> Run:
    """Raises: SimulationError, ScenarioError."""
    variant = VARIANTS[task.variant]
    if task.stretch_s is not None:
        workload = workload.first(task.stretch_s)
    if not variant.longs:
        workload = workload.without_longs()
    began_s = time.perf_counter()
    result = simulate(
        PRESETS[task.model],
        workload.scaled(task.rate_scale),
        policy=variant.policy,
        preemption=variant.switch("preemption"),
        disaggregation=variant.switch("disaggregation"),
        colocation=variant.switch("colocation"),
        fast_sp=variant.switch("fast_sp"),
        seed=seed,
    )
    return Run(task, summarize(result), time.perf_counter() - began_s)


def perform_all(
    tasks: Sequence[Task], workload: Workload, seed: int, jobs: int, done: Callable[[Run], None]
) -> list[Run]:
    """In any order; `done` is called after each. Raises: PaperError if one does not end; what `perform` raises."""
    runs = []
    for run in _runs(tasks, workload, seed, jobs):
        runs.append(run)
        done(run)
    return runs


def _runs(tasks: Sequence[Task], workload: Workload, seed: int, jobs: int) -> Iterator[Run]:
    if jobs == 1:
        yield from (perform(task, workload, seed) for task in tasks)
        return
    # Spawned, not forked: a progress bar's thread may hold a lock at the fork.
    with multiprocessing.get_context("spawn").Pool(jobs, _begin, (workload, seed)) as pool:
        results = pool.imap_unordered(_perform, tasks)
        for number in range(len(tasks)):
            try:
                yield results.next(timeout=RUN_S_MAX)
            except multiprocessing.TimeoutError:
                waited = f"no run ended within {RUN_S_MAX:.0f} s"
                raise PaperError(
                    f"{waited}, after {number} of {len(tasks)}: one is stuck, or its process died"
                ) from None


_given: tuple[Workload, int] | None = None
"""Of a process of the pool: what all its runs have in common."""


def _begin(workload: Workload, seed: int) -> None:
    global _given
    _given = (workload, seed)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its pool


def _perform(task: Task) -> Run:
    assert _given is not None
    return perform(task, *_given)
