"""`python -m loadtest sim`: one workload on one simulated cluster under one policy.

The scheduler is the production core, unchanged; the cluster is a cost model (`loadtest/simulator/world.py`). Without
flags: Mistral 7B on the paper's cluster, 4 nodes of 8 A100, under pecsched, and a synthetic hour like Azure's trace of
2023 (28,185 requests) whose longest 5 % of prompts became longs of 100,000 to 500,000 tokens.

    python -m loadtest sim --model yi-34b --trace conv.csv code.csv --first 600
    python -m loadtest sim --policy fifo --rate-scale 0.5 --csv requests.csv
    python -m loadtest sim --first 600 --html report.html --json sim.json      (`loadtest compare` takes the JSON)
    python -m loadtest sim --scenario cluster.toml --perfetto run.json.gz     (open it at https://ui.perfetto.dev)

A scenario file is TOML, `loadtest/simulator/scenario.py` shows one; a flag changes what it says. The longs are made
first, out of the whole trace; then it is cut (`--first`, in the trace's own seconds), thinned (`--keep`), scaled. So a
cut or scaled run has the very longs of the whole one.

Queueing delay: arrival to the start of the prefill. TTFT: arrival to the first token. JCT: arrival to the last one.
"""

from __future__ import annotations

import argparse
import time
import tomllib
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from loadtest import pages, report
from loadtest.run_report.outputs import write_files
from loadtest.run_report.record import Recorded, figures_of, load_facts
from loadtest.simulator.result import SimResult
from loadtest.simulator.scenario import (
    POLICIES,
    PRESETS,
    Scenario,
    ScenarioError,
    check_workload,
    load_scenario,
    make_scenario,
    overlaid,
)
from loadtest.simulator.summary import summarize
from loadtest.simulator.workload import Workload
from loadtest.simulator.world import simulate
from loadtest.workload_flags import add_workload_flags, said_of, workload_of

DEFAULT_MODEL = "mistral-7b"
SWITCHES = ("preemption", "disaggregation", "colocation", "fast_sp")
CLUSTER_FLAGS = ("model", "gpu", "nodes", "gpus_per_node", "tp", "decode_replicas", "policy")
PERCENT = 100


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that are not given stay None: then the scenario file decides, or the model's preset."""
    cluster = parser.add_argument_group("cluster")
    cluster.add_argument("--scenario", default="", metavar="FILE", help="TOML; flags change what it says")
    cluster.add_argument("--model", help=f"{', '.join(PRESETS)} [{DEFAULT_MODEL}]")
    cluster.add_argument("--gpu", help="a100, h100, or a file written by `loadtest fit-costs` [a100]")
    cluster.add_argument("--nodes", type=int, help="[4]")
    cluster.add_argument("--gpus-per-node", type=int, help="[8]")
    cluster.add_argument("--tp", type=int, help="GPUs of one replica [the model's: 1, 2, 4, 4]")
    cluster.add_argument(
        "--decode-replicas", type=int, help="replicas that only decode shorts [the model's: 4, 4, 1, 1]"
    )
    cluster.add_argument("--policy", help=f"{', '.join(POLICIES)} [pecsched]")
    for switch in SWITCHES:
        name = switch.replace("_", "-")
        cluster.add_argument(f"--no-{name}", dest=switch, action="store_const", const=False, help="pecsched without it")
    cluster.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any key of a scenario: scheduler.pause_max_s=1, coefficients.attention_flops=1.5e14",
    )
    arriving = parser.add_argument_group("workload")
    add_workload_flags(arriving)
    arriving.add_argument("--seed", type=int, default=0, help="of all that is random [0]")
    written = parser.add_argument_group("output")
    written.add_argument("--html", default="", metavar="FILE", help="the report, one file with its plots inside")
    written.add_argument("--csv", default="", metavar="FILE", help="a line per request")
    written.add_argument("--perfetto", default="", metavar="FILE", help="what every worker did; .gz: compressed")


def run(flags: argparse.Namespace) -> dict[str, Any]:
    """The figures. Raises: PecSchedError: bad input, before anything runs; SimulationError."""
    report.check_writable(flags.html, "--html")
    pages.check_plots(flags.html)
    report.check_writable(flags.csv, "--csv")
    report.check_writable(flags.perfetto, "--perfetto")
    scenario = scenario_of(flags)
    with report.progress() as bars:
        with bars.waiting("reading" if scenario.workload.trace else "drawing"):
            workload = workload_of(scenario.workload, flags.seed)
            check_workload(scenario, workload)
        with bars.counting(f"simulating {len(workload.arrivals)} requests, %", PERCENT) as step:
            begun_s = time.perf_counter()
            ended = _percent(step)
            record = bool(flags.perfetto or flags.html)
            result = simulate(scenario, workload, seed=flags.seed, record=record, progress=ended)
            took_s = time.perf_counter() - begun_s
            ended(1, 1)
        recorded = recorded_of(scenario, workload, result, flags.seed)
        if flags.html or flags.csv or flags.perfetto:
            with bars.waiting("writing"):
                write_files([recorded], html=flags.html, csv=flags.csv, perfetto=flags.perfetto)
    runs = [msgspec.to_builtins(figures_of(recorded))]
    return {"runs": runs} | _figures(scenario, workload, result, flags.seed, took_s)


def scenario_of(flags: argparse.Namespace) -> Scenario:
    """Raises: ScenarioError."""
    said = {name: value for name in (*CLUSTER_FLAGS, *SWITCHES) if (value := getattr(flags, name)) is not None}
    arriving = said_of(flags)
    changes = overlaid(said, {"workload": arriving} if arriving else {})
    for assignment in flags.set:
        changes = overlaid(changes, _assigned(assignment))
    if flags.scenario:
        return load_scenario(flags.scenario, changes)
    return make_scenario(overlaid({"model": DEFAULT_MODEL}, changes))


def recorded_of(scenario: Scenario, workload: Workload, result: SimResult, seed: int) -> Recorded:
    """For the report that live runs have too."""
    return Recorded(
        label="simulated",
        kind="simulated",
        cluster=_in_a_line(scenario),
        load=load_facts(workload, seed),
        outcomes=result.outcomes,
        spans=result.spans,
    )


def _in_a_line(scenario: Scenario) -> str:
    cluster = f"{scenario.nodes} nodes of {scenario.gpus_per_node} {scenario.gpu}, tp {scenario.tp}"
    prefill = scenario.prefill_replicas
    policy = ", ".join((scenario.policy, *(f"no {s.replace('_', ' ')}" for s in SWITCHES if not getattr(scenario, s))))
    decode = scenario.replicas - prefill
    return f"{scenario.model} on {cluster}: {prefill} replicas prefill, {decode} decode; policy {policy}"


def show(figures: Mapping[str, Any]) -> None:
    """The table."""
    workload, found = figures["workload"], figures["figures"]
    title = figures["runs"][0]["cluster"]
    report.table(f"{title}; {workload['name']}", ("", "shorts", "longs"), _rows(found, workload), _notes(figures))


def _rows(found: Mapping[str, Any], workload: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    s, delay, ttft, jct = _time, found["short_delay_s"], found["short_ttft_s"], found["short_jct_s"]
    long_delay, long_jct = found["long_delay_s"], found["long_jct_s"]
    overhead = found["sched_over_jct_p99"]
    return [
        ("requests", str(workload["shorts"]), str(workload["longs"])),
        ("queueing delay p50", s(delay["p50"]), s(long_delay["p50"])),
        ("queueing delay p99", s(delay["p99"]), s(long_delay["p99"])),
        ("TTFT p50", s(ttft["p50"]), ""),
        ("TTFT p99", s(ttft["p99"]), ""),
        ("JCT mean", "", s(long_jct["mean"])),
        ("JCT p50", s(jct["p50"]), ""),
        ("JCT p99", s(jct["p99"]), s(long_jct["p99"])),
        ("suspended, mean", "", s(found["long_suspended_s"]["mean"])),
        ("starved", "", str(found["starved"])),
        ("scheduling time / JCT p99", _fine_share(overhead["short"]), _fine_share(overhead["long"])),
    ]


def _notes(figures: Mapping[str, Any]) -> list[str]:
    found = figures["figures"]
    decision = found["decision_s"]
    rps = report.MISSING if found["short_rps"] is None else f"{found['short_rps']:.2f}/s"
    notes = [
        f"shorts served: {rps}; preemptions: {found['preemptions']}; GPUs idle: {_fine_share(found['gpu_idle'])}",
        f"one decision: p50 {_us(decision['p50'])}, p99 {_us(decision['p99'])}",
        f"simulated {found['ended_s']:.0f} s in {figures['wall_s']:.1f} s",
    ]
    if found["failed"] or found["unfinished"]:
        notes.append(f"not served: {found['failed']} failed, {found['unfinished']} without an end")
    return notes


def _figures(scenario: Scenario, workload: Workload, result: SimResult, seed: int, took_s: float) -> dict[str, Any]:
    return {
        "scenario": msgspec.to_builtins(scenario),
        "replicas": {"prefill": scenario.prefill_replicas, "decode": scenario.replicas - scenario.prefill_replicas},
        "workload": {
            "name": workload.name,
            "shorts": workload.shorts,
            "longs": workload.longs,
            "threshold_tokens": workload.threshold_tokens,
            "duration_s": workload.duration_s,
        },
        "seed": seed,
        "figures": summarize(result),
        "counters": result.counters,
        "wall_s": took_s,
    }


def _percent(step: Callable[[], None]) -> Callable[[int, int], None]:
    """A progress report of (done, of how many) as single steps of a hundred."""
    shown = 0

    def advance(done: int, total: int) -> None:
        nonlocal shown
        while total and shown < PERCENT * done // total:
            shown += 1
            step()

    return advance


def _assigned(assignment: str) -> dict[str, Any]:
    """`a.b=1` as {"a": {"b": 1}}; the value as in TOML, or else text. Raises: ScenarioError."""
    key, equals, text = assignment.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ScenarioError(f"--set {assignment}: must be KEY=VALUE")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    for name in reversed(names):
        value = {name: value}
    return dict(value)


def _time(seconds: float | None) -> str:
    return report.s(seconds) if seconds is None or seconds >= 1.0 else report.ms(seconds)


def _fine_share(part: float | None) -> str:
    return report.MISSING if part is None else f"{part:.3%}"


def _us(seconds: float | None) -> str:
    return report.MISSING if seconds is None else f"{seconds * 1e6:.0f} µs"
