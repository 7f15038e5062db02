"""`python -m loadtest scale`: what a decision costs in clusters of 32 to 8,192 GPUs.

Every size is simulated by itself, one after the other in this process, with the production scheduler core; what is
measured is the real time of each of its decisions (`Scheduler.handle`), and per request their sum over its simulated
completion time. A machine is not equally fast in every minute, so the sizes take turns, and each figure is the median
of its rounds. The arrival rate grows with the cluster, and so do the decode replicas: every GPU has as much
to do at every size. The number of requests stays the same, so larger clusters are watched for a shorter time; the
share of GPUs idle while requests come says how loaded they were. The workload is the synthetic one with the paper's
longs; the model is the one with a replica per GPU, for which there is the most to choose from.

    python -m loadtest scale --json scale.json
    python -m loadtest scale --gpus 32 8192 --requests 5000 --rounds 1
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from common import compiled
from loadtest import report
from loadtest.paper_report.variants import PaperError
from loadtest.simulator.scenario import PRESETS, Scenario, check_scenario, check_workload
from loadtest.simulator.summary import summarize
from loadtest.simulator.synthetic import TRACE_RPS, synthetic
from loadtest.simulator.workload import Workload, rewrite_longs
from loadtest.simulator.world import simulate
from loadtest.stats import percentile, percentiles, ratio

GPUS = (32, 128, 512, 2048, 8192)
REQUESTS = 20_000
ROUNDS = 3
DEFAULT_MODEL = "mistral-7b"
SCHED_SHARE_MAX = 0.001
GROWTH_MAX = 2.0
"""Of a decision's p99, from the smallest cluster to the largest."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """See the module."""
    parser.add_argument("--gpus", nargs="+", type=int, default=list(GPUS), metavar="N", help=f"sizes [{_words(GPUS)}]")
    parser.add_argument("--requests", type=int, default=REQUESTS, metavar="N", help=f"of each size [{REQUESTS}]")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help=f"runs of each size [{ROUNDS}]")
    parser.add_argument("--model", choices=tuple(PRESETS), default=DEFAULT_MODEL, help=f"[{DEFAULT_MODEL}]")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random [0]")


def run(flags: argparse.Namespace) -> dict[str, Any]:
    """The figures. Raises: PecSchedError: bad input, before anything runs; SimulationError."""
    if flags.requests < 1:
        raise PaperError(f"--requests {flags.requests}: must be 1 or more")
    if flags.rounds < 1:
        raise PaperError(f"--rounds {flags.rounds}: must be 1 or more")
    sizes = list(dict.fromkeys(sorted(flags.gpus)))
    found: dict[str, list[dict[str, Any]]] = {str(gpus): [] for gpus in sizes}
    with report.progress() as bars:
        with bars.waiting("drawing"):
            scenarios = {gpus: scenario_of(flags.model, gpus) for gpus in sizes}
            workload = rewrite_longs(synthetic(flags.seed, flags.requests / TRACE_RPS), seed=flags.seed)
            for scenario in scenarios.values():
                check_workload(scenario, workload)
        with bars.counting("simulating, sizes", flags.rounds * len(sizes)) as step:
            for _ in range(flags.rounds):
                for gpus, scenario in scenarios.items():
                    found[str(gpus)].append(measure(scenario, workload, flags.seed))
                    bars.say(f"{gpus} GPUs: {found[str(gpus)][-1]['wall_s']:.1f} s")
                    step()
    return {
        "by_gpus": {gpus: middle(rounds) for gpus, rounds in found.items()},
        "rounds": flags.rounds,
        "model": flags.model,
        "seed": flags.seed,
        "requests": len(workload.arrivals),
        "core": compiled.state(),
    }


def scenario_of(model: str, gpus: int) -> Scenario:
    """The model's preset, at another size. Raises: PaperError, ScenarioError."""
    preset = PRESETS[model]
    if gpus < preset.gpus_per_node or gpus % preset.gpus_per_node:
        raise PaperError(f"--gpus {gpus}: must be whole nodes of {preset.gpus_per_node}")
    decode_replicas = max(1, round(preset.decode_replicas * gpus / preset.gpus))
    scenario = msgspec.structs.replace(
        preset, name="", nodes=gpus // preset.gpus_per_node, decode_replicas=decode_replicas
    )
    check_scenario(scenario)
    return scenario


def measure(scenario: Scenario, workload: Workload, seed: int) -> dict[str, Any]:
    """One size."""
    rate_scale = scenario.gpus / PRESETS[scenario.model].gpus
    began_s = time.perf_counter()
    result = simulate(scenario, workload.scaled(rate_scale), seed=seed)
    wall_s = time.perf_counter() - began_s
    shares = summarize(result)["sched_over_jct_p99"]
    return {
        "decision_s": percentiles(result.decision_s, 50, 99),
        "sched_over_jct_p99": max((share for share in shares.values() if share is not None), default=None),
        "sched_over_jct_p99_of": shares,
        "sched_s_p99": percentile((outcome.sched_s for outcome in result.outcomes), 99),
        "decisions": len(result.decision_s),
        "replicas": scenario.replicas,
        "rate_rps": rate_scale * len(workload.arrivals) / workload.duration_s if workload.duration_s else None,
        "arrivals_s": result.arrivals_end_s,
        "gpu_idle_arrivals": result.gpu_idle_arrivals,
        "wall_s": wall_s,
    }


def middle(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of several measurements of one size, each figure's median. (What is simulated is the same in all.)"""
    merged = {key: _median([found[key] for found in rounds]) for key in rounds[0]}
    shares = merged["sched_over_jct_p99_of"].values()
    merged["sched_over_jct_p99"] = max((share for share in shares if share is not None), default=None)
    return merged


def _median(values: Sequence[Any]) -> Any:
    if isinstance(values[0], Mapping):
        return {key: _median([value[key] for value in values]) for key in values[0]}
    return None if None in values else statistics.median(values)


def show(figures: Mapping[str, Any]) -> None:
    """The table, and what was promised."""
    by_gpus = figures["by_gpus"]
    rows = [_row(gpus, found) for gpus, found in by_gpus.items()]
    head = ("GPUs", "decision p50", "p99", "per request p99", "over JCT p99", "arrivals", "over", "idle then", "took")
    sizes = list(by_gpus.values())
    growth = ratio(sizes[-1]["decision_s"]["p99"], sizes[0]["decision_s"]["p99"])
    ends = f"{next(iter(by_gpus))} to {list(by_gpus)[-1]} GPUs"
    notes = [
        f"the scheduler's core: {figures['core']}",
        report.target(f"p99 of a decision, growth from {ends}", growth, GROWTH_MAX, report.times),
        *(
            report.target(
                f"scheduling time over JCT, p99, at {gpus} GPUs", found["sched_over_jct_p99"], SCHED_SHARE_MAX, _share
            )
            for gpus, found in by_gpus.items()
        ),
    ]
    title = f"{figures['model']}, {figures['requests']} requests at each size, medians of {figures['rounds']} rounds"
    report.table(title, head, rows, notes)


def _row(gpus: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    rate = report.MISSING if found["rate_rps"] is None else f"{found['rate_rps']:.1f}/s"
    return (
        gpus,
        _us(found["decision_s"]["p50"]),
        _us(found["decision_s"]["p99"]),
        _us(found["sched_s_p99"]),
        _share(found["sched_over_jct_p99"]),
        rate,
        report.s(found["arrivals_s"]),
        f"{found['gpu_idle_arrivals']:.1%}",
        report.s(found["wall_s"]),
    )


def _or_missing(form: Callable[[float], str]) -> Callable[[float | None], str]:
    return lambda number: report.MISSING if number is None else form(number)


_us = _or_missing(lambda seconds: f"{seconds * 1e6:.0f} µs")
_share = _or_missing(lambda part: f"{part:.4%}")


def _words(sizes: tuple[int, ...]) -> str:
    return " ".join(map(str, sizes))
