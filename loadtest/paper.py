"""`python -m loadtest paper`: the paper's experiments on the simulator, each figure beside the paper's.

For each of its four models: PecSched with the longs taken out, FIFO (and FIFO without longs), Reservation, Priority,
PecSched and its four ablations, at the trace's rate and at 50 % and 80 % of short capacity; and a sweep from 10 % to
95 % of it with three of them, on a shorter stretch of the trace. What short capacity is: `paper_report/capacity.py`.

    python -m loadtest paper --html report.html --json figures.json
    python -m loadtest paper --quick --models yi-34b --loads trace 50%
    python -m loadtest paper --trace conv.csv code.csv --html azure.html

The JSON is {MODEL: {LOAD: {POLICY: figures}}}; `--details` has the rest: the sweep, the checks, the comparison.
Without `--trace` the workload is a synthetic hour like Azure's. `--quick`: the first ten minutes of the trace.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from loadtest import pages, report
from loadtest.paper_report.comparison import compare_all, orders, summary_of
from loadtest.paper_report.runs import Plan, Run, perform_all, plan
from loadtest.paper_report.table import CONSOLE_COLUMNS, console_cells
from loadtest.paper_report.targets import check_all
from loadtest.paper_report.variants import (
    LOADS,
    SWEEP,
    SWEEP_SHARES,
    SWEEP_VARIANTS,
    TRACE,
    share_of,
)
from loadtest.simulator.scenario import PRESETS
from loadtest.simulator.synthetic import synthetic
from loadtest.simulator.traces import read_trace
from loadtest.simulator.workload import Workload, rewrite_longs

QUICK_S = 600.0
SWEEP_S, QUICK_SWEEP_S = 600.0, 150.0
"""The stretch of the trace that the sweep takes, at the trace's rate."""
JOBS_MAX = 64

Sweep = dict[str, dict[str, list[dict[str, Any] | None]]]
"""Model → policy → figures per share of capacity."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """See the module."""
    parser.add_argument("--quick", action="store_true", help="the first ten minutes of the trace")
    parser.add_argument(
        "--models", nargs="+", choices=tuple(PRESETS), default=list(PRESETS), metavar="MODEL", help="[all four]"
    )
    parser.add_argument(
        "--loads",
        nargs="+",
        default=list(LOADS),
        metavar="LOAD",
        help=f"{TRACE}, N%% of short capacity, {SWEEP} [{' '.join(LOADS).replace('%', '%%')}]",
    )
    parser.add_argument(
        "--trace",
        nargs="+",
        default=[],
        metavar="PATH",
        help="Azure CSV files or a folder of them, or a Mooncake JSONL [synthetic]",
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is random [0]")
    parser.add_argument("--jobs", type=_jobs, default=2, help="processes [2]")
    parser.add_argument("--html", default="", metavar="FILE", help="the report, one file with its plots inside")
    parser.add_argument("--details", default="", metavar="FILE", help="JSON: sweep, checks, comparison with the paper")


def run(flags: argparse.Namespace) -> dict[str, Any]:
    """{MODEL: {LOAD: {POLICY: figures}}}, and the files that were asked for.

    Raises: PecSchedError: bad input, before anything runs; a run that failed.
    """
    report.check_writable(flags.html, "--html")
    pages.check_plots(flags.html)
    report.check_writable(flags.details, "--details")
    for load in flags.loads:
        if load != SWEEP:
            share_of(load)
    began_s = time.perf_counter()
    with report.progress() as bars:
        with bars.waiting("reading" if flags.trace else "drawing"):
            workload = workload_of(flags.trace, flags.seed, QUICK_S if flags.quick else None)
            sweep_s = QUICK_SWEEP_S if flags.quick else SWEEP_S
            todo = plan(workload, list(dict.fromkeys(flags.models)), list(dict.fromkeys(flags.loads)), sweep_s)
        for line in _capacity_lines(todo):
            bars.say(line)
        with bars.counting(f"simulating, {len(todo.tasks)} runs", len(todo.tasks)) as step:
            runs = perform_all(todo.tasks, workload, flags.seed, flags.jobs, lambda _: step())
        figures = figures_of(todo, runs)
        sweep = sweep_of(runs)
        about = about_of(flags, workload, todo, runs, sweep_s, time.perf_counter() - began_s)
        if flags.html:
            with bars.waiting(f"writing {flags.html}"):
                _write(flags.html, figures, sweep, about)
        if flags.details:
            report.write_json(flags.details, details_of(figures, sweep, about))
    return figures


def workload_of(trace: Sequence[str], seed: int, first_s: float | None) -> Workload:
    """The longs are made out of the whole trace; then it is cut. Raises: WorkloadError."""
    workload = rewrite_longs(read_trace(trace) if trace else synthetic(seed), seed=seed)
    return workload if first_s is None else workload.first(first_s)


def figures_of(todo: Plan, runs: Sequence[Run]) -> dict[str, Any]:
    """In the order they were planned in; the sweep is left out."""
    found = {run.task: run.figures for run in runs}
    figures: dict[str, Any] = {model: {} for model in todo.capacities}
    for task in todo.tasks:
        if task.stretch_s is None:
            figures[task.model].setdefault(task.load, {})[task.variant] = found[task]
    return figures


def sweep_of(runs: Sequence[Run]) -> Sweep:
    """What was run of the sweep."""
    made: Sweep = {}
    places = {f"{SWEEP} {share:.0%}": place for place, share in enumerate(SWEEP_SHARES)}
    for task, figures, _ in runs:
        if task.stretch_s is not None:
            policies = made.setdefault(task.model, {policy: [None] * len(SWEEP_SHARES) for policy in SWEEP_VARIANTS})
            policies[task.variant][places[task.load]] = figures
    return made


def about_of(
    flags: argparse.Namespace, workload: Workload, todo: Plan, runs: Sequence[Run], sweep_s: float, wall_s: float
) -> dict[str, Any]:
    """How the figures came about."""
    scaled = [load for load in flags.loads if load not in (TRACE, SWEEP)]
    return {
        "workload": workload.name,
        "shorts": workload.shorts,
        "longs": workload.longs,
        "duration_s": workload.duration_s,
        "seed": flags.seed,
        "quick": flags.quick,
        "jobs": flags.jobs,
        "runs": len(runs),
        "wall_s": wall_s,
        "run_s_max": max((run.wall_s for run in runs), default=0.0),
        "run_s": [(*run.task[:3], run.wall_s) for run in runs],
        "sweep_s": sweep_s,
        "sweep_requests": todo.sweep_requests,
        "sweep_shares": SWEEP_SHARES,
        "scaled_loads": scaled,
        "capacity": {
            model: {
                **msgspec.to_builtins(capacity),
                "limit": capacity.limit,
                "trace_share": capacity.trace_share,
                "scales": {load: capacity.rate_scale(share_of(load) or 1.0) for load in scaled},
            }
            for model, capacity in todo.capacities.items()
        },
    }


def details_of(figures: Mapping[str, Any], sweep: Sweep, about: Mapping[str, Any]) -> dict[str, Any]:
    """What stands beside the figures."""
    return {
        "about": about,
        "checks": msgspec.to_builtins(check_all(figures)),
        "comparison": msgspec.to_builtins(compare_all(figures)),
        "orders": msgspec.to_builtins(orders(figures)),
        "sweep": sweep,
    }


def show(figures: Mapping[str, Any]) -> None:
    """A table per model and load, the checks that were missed, and how often the directions are the paper's."""
    for model, loads in figures.items():
        for load, policies in loads.items():
            rows = [console_cells(policy, found) for policy, found in policies.items()]
            report.table(f"{model}, {load}: short delay, longs' JCT", CONSOLE_COLUMNS, rows)
    checks = check_all(figures)
    if not checks:
        return
    missed = [f"{check.model}, {check.load}: {check.name}: {check.found}: MISSED" for check in checks if not check.met]
    directions = [(title, f"{agree} of {count}") for title, agree, count in summary_of(compare_all(figures))]
    report.table("direction as in the paper", ("", "of models and loads"), directions)
    report.table(f"promised: {len(checks) - len(missed)} of {len(checks)} hold", ("",), (), missed)


def _capacity_lines(todo: Plan) -> list[str]:
    return [
        f"{model}: short capacity {own.rps:.1f}/s (prefill {own.prefill_rps:.1f}, decode {own.decode_rps:.1f}), "
        f"trace {own.trace_share:.0%}"
        for model, own in todo.capacities.items()
    ]


def _write(path: str, figures: Mapping[str, Any], sweep: Sweep, about: Mapping[str, Any]) -> None:
    """Raises: ReportError."""
    from loadtest.paper_report.page import page  # its matplotlib is an extra, and slow to import

    pages.write_html(path, page(figures, sweep, about))


def _jobs(text: str) -> int:
    number = int(text)
    if not 1 <= number <= JOBS_MAX:
        raise argparse.ArgumentTypeError(f"must be from 1 to {JOBS_MAX}")
    return number
