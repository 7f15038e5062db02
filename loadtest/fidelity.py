"""`python -m loadtest fidelity`: does the simulator predict what the live cluster does?

One run, on a cluster that it starts itself:

1. *Probes* of the idle cluster: shorts one at a time, a long alone, and shorts one at a time while one worker, and then
   every worker, prefills a long. From them follow the factors and overheads of `fidelity_model.Calibration`.
2. *Load*, for each seed: shorts and longs, two Poisson processes in an open loop. Latencies count from the intended
   arrival. After each load the idle cluster is probed again, and what is predicted for it is the mean of what was
   found before and after: a shared machine is not as fast in one quarter of an hour as in the next.
3. *Replay*: the very same arrivals in the simulator, which runs the production scheduler core with the live scheduler's
   settings, the costs that the live workers measured of themselves at their start, and what the probes found.
   Nothing of 2 is used in 3 but arrivals and lengths.

Printed are p50 and p99 of TTFT and JCT per class, predicted and measured, for each seed and over all seeds. The target
is a p50 within 15 % and a p99 within 25 % of what was measured. A failed request is counted, and in no percentile.

With a real model the workers share the cores of this machine, so the simulated ones do too (`simulator/cores.py`):
by the weights of the system's scheduler, longs in the background; each core slower when all are busy, decode slower
still where it waits for one at every step, as measured. Not modelled: what router, scheduler, NATS, Redis and this
client compute beside that, and other users of the machine. The timed engine does not compute: its workers share
nothing.

    python -m loadtest fidelity --json fidelity.json
    python -m loadtest fidelity --seeds 0 --shorts 50 --longs 2 --serve '--engine timed'
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from common.messages.base import Record
from common.messages.requests import LengthClass
from common.policy.scheduler_config import SchedulerConfig
from common.runtime.cores import usable_cores
from common.settings import DecodeWorkerSettings, PrefillWorkerSettings, ServeSettings, WorkerSettings
from common.settings_loader import load
from loadtest import report
from loadtest.client import Client
from loadtest.cluster import served, view_of
from loadtest.fidelity_model import LiveCluster, calibrate, mean_of, replay
from loadtest.fidelity_probes import probe, warm_up
from loadtest.runner import MeasurementFailed, Sample, run_open_loop
from loadtest.simulator.result import Outcome
from loadtest.simulator.workload import Arrival, Workload
from loadtest.stats import percentile, ratio
from loadtest.workload import LONG_TOKENS, SHORT_TOKENS, Schedule, make_schedule
from services.local_plan import make_plan, role_environment
from services.scheduler.service import config_of

BOUNDS = {50: 0.15, 99: 0.25}
"""Percentile → how far the prediction may be from what was measured, as a share of it."""
CLASSES: tuple[LengthClass, ...] = ("short", "long")
METRICS = ("ttft_s", "jct_s")
ANSWER_S = 300.0
QUIET_S = 1.0
"""Between two loads."""

_Settings = TypeVar("_Settings", bound=WorkerSettings)


class FidelityOptions(Record, frozen=True, kw_only=True):
    seeds: tuple[int, ...] = (0, 1, 2)
    shorts: int = 120
    longs: int = 3
    short_rps: float = 0.5
    long_rps: float = 0.012
    short_tokens: tuple[int, int] = SHORT_TOKENS
    long_tokens: tuple[int, int] = LONG_TOKENS
    serve_flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Pair:
    """One request, as it was and as it was predicted."""

    measured: Sample
    predicted: Outcome

    @property
    def kind(self) -> LengthClass:
        return self.measured.kind

    @property
    def failed(self) -> bool:
        return self.measured.failure is not None or self.predicted.finished_s is None

    def facts(self) -> dict[str, Any]:
        """For the JSON."""
        facts: dict[str, Any] = {
            "class": self.kind,
            "at_s": self.predicted.arrived_s,
            "prompt_tokens": self.predicted.prompt_tokens,
            "output_tokens": self.predicted.output_tokens,
            "failure": self.measured.failure or self.predicted.failure,
        }
        for metric in METRICS if not self.failed else ():
            facts[metric] = {"predicted": getattr(self.predicted, metric), "measured": getattr(self.measured, metric)}
        return facts


def run(options: FidelityOptions) -> dict[str, Any]:
    """The figures. Raises: PecSchedError."""
    settings = load(ServeSettings, options.serve_flags, os.environ)
    config = config_of(settings)
    threshold = config.threshold_tokens
    if not options.short_tokens[1] <= threshold < options.long_tokens[0]:
        raise MeasurementFailed(
            f"shorts of {options.short_tokens[0]}-{options.short_tokens[1]} tokens and longs of "
            f"{options.long_tokens[0]}-{options.long_tokens[1]}: prompts above {threshold} are long, others short"
        )
    return asyncio.run(_run(options, settings, config))


async def _run(options: FidelityOptions, settings: ServeSettings, config: SchedulerConfig) -> dict[str, Any]:
    begun_s = time.monotonic()
    loads: dict[int, list[Pair]] = {}
    with report.progress() as bars:
        async with AsyncExitStack() as stack:
            with bars.waiting("starting a cluster"):
                place = await stack.enter_async_context(served(options.serve_flags, bars.say))
            client = Client(place.url, timeout_s=ANSWER_S)
            stack.push_async_callback(client.close)
            live = await _live_cluster(client, settings, config)
            await warm_up(client, live, options.short_tokens, options.long_tokens, bars)
            probes = [await probe(client, live, options.short_tokens, options.long_tokens, bars)]
            for seed in options.seeds:
                await asyncio.sleep(QUIET_S)
                schedule, samples = await _load(client, options, seed, bars)
                probes.append(await probe(client, live, options.short_tokens, options.long_tokens, bars))
                workload = workload_of(schedule, live.config.threshold_tokens, f"seed {seed}")
                around = mean_of([calibrate(live, each) for each in probes[-2:]])
                predicted = replay(live, around, workload, seed=seed)
                loads[seed] = [Pair(*both) for both in zip(samples, predicted, strict=True)]
    return figures_of(loads) | {
        "calibration": msgspec.to_builtins(mean_of([calibrate(live, each) for each in probes])),
        "probes": msgspec.to_builtins(probes),
        "requests": {str(seed): [pair.facts() for pair in pairs] for seed, pairs in loads.items()},
        "run": {
            **msgspec.to_builtins(options),
            "policy": config.policy,
            "engine": settings.engine,
            "cores": live.cores,
            "prefill_workers": len(live.prefill),
            "decode_workers": len(live.decode),
            "step_cost": msgspec.to_builtins([profile.step_cost for profile in (*live.prefill, *live.decode)]),
            "took_s": time.monotonic() - begun_s,
        },
    }


async def _live_cluster(client: Client, settings: ServeSettings, config: SchedulerConfig) -> LiveCluster:
    """As the scheduler sees it, with the settings that `serve` gave its workers."""
    profiles = [worker.profile for worker in (await view_of(client)).workers]
    return LiveCluster(
        config=config,
        prefill=tuple(profile for profile in profiles if profile.role == "prefill"),
        decode=tuple(profile for profile in profiles if profile.role == "decode"),
        worker=_given(settings, PrefillWorkerSettings),
        decoder=_given(settings, DecodeWorkerSettings),
        cores=0 if settings.engine == "timed" else usable_cores(),
    )


def _given(settings: ServeSettings, kind: type[_Settings]) -> _Settings:
    """What `serve` gave its workers of this kind."""
    role = next(role for role in make_plan(settings, 0).workers if role.settings is kind)
    return load(kind, [], role_environment(role, settings, os.environ, "nats://", "redis://"))


async def _load(
    client: Client, options: FidelityOptions, seed: int, bars: report.Bars
) -> tuple[Schedule, Sequence[Sample]]:
    """One seed's load on the live cluster."""
    schedule = make_schedule(
        seed,
        short_rps=options.short_rps,
        long_rps=options.long_rps,
        shorts_min=options.shorts,
        longs_min=options.longs,
        short_tokens=options.short_tokens,
        long_tokens=options.long_tokens,
    )
    with bars.counting(f"load, seed {seed}", len(schedule.arrivals)) as step:
        return schedule, (await run_open_loop(client, schedule, step)).samples


def workload_of(schedule: Schedule, threshold_tokens: int, name: str) -> Workload:
    """The same arrivals for the simulator."""
    arrivals = tuple(Arrival(a.at_s, a.ask.prompt_tokens, a.ask.output_tokens) for a in schedule.arrivals)
    return Workload(name, arrivals, threshold_tokens)


# --- figures -------------------------------------------------------------------------------------


def figures_of(loads: dict[int, list[Pair]]) -> dict[str, Any]:
    """`{"by_seed": {SEED: FIGURES}, "all": FIGURES}`, FIGURES as `compare` gives them."""
    everything = [pair for pairs in loads.values() for pair in pairs]
    return {"by_seed": {str(seed): compare(pairs) for seed, pairs in loads.items()}, "all": compare(everything)}


def compare(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Per class `{"requests", "failed", METRIC: {"p50": {"predicted", "measured", "ratio", "within"}, "p99": …}}`; the
    ratio is predicted over measured, and what is missing is None."""
    figures: dict[str, Any] = {}
    for kind in CLASSES:
        own = [pair for pair in pairs if pair.kind == kind]
        good = [pair for pair in own if not pair.failed]
        figures[kind] = {"requests": len(own), "failed": len(own) - len(good)}
        for metric in METRICS:
            predicted = [getattr(pair.predicted, metric) for pair in good]
            measured = [getattr(pair.measured, metric) for pair in good]
            figures[kind][metric] = {
                f"p{percent}": _figure(percentile(predicted, percent), percentile(measured, percent), bound)
                for percent, bound in BOUNDS.items()
            }
    return figures


def _figure(predicted: float | None, measured: float | None, bound: float) -> dict[str, Any]:
    quotient = ratio(predicted, measured)
    within = None if quotient is None else abs(quotient - 1.0) <= bound
    return {"predicted": predicted, "measured": measured, "ratio": quotient, "within": within}


def show(figures: dict[str, Any]) -> None:
    """The tables."""
    about = figures["run"]
    columns = ("", "predicted", "measured", "ratio", "")
    rows: list[list[str]] = []
    for name, part in (*((f"seed {seed}", part) for seed, part in figures["by_seed"].items()), ("all", figures["all"])):
        for kind in CLASSES:
            counted = f"{part[kind]['requests']} requests, {part[kind]['failed']} failed"
            rows.append([f"{name}, {kind}s ({counted})", "", "", "", ""])
            rows += [_row(metric, p, part[kind][metric][p]) for metric in METRICS for p in part[kind][metric]]
    judged = [part for kind in CLASSES for metric in METRICS for part in figures["all"][kind][metric].values()]
    within = sum(part["within"] is True for part in judged)
    report.table(
        f"the simulator beside the live cluster: policy {about['policy']}, engine {about['engine']}, "
        f"{about['prefill_workers']} prefill and {about['decode_workers']} decode workers, {about['cores']} cores",
        columns,
        rows,
        (
            "",
            *_calibration_lines(figures["calibration"]),
            f"over all seeds, {within} of {len(judged)} figures are within "
            + " and ".join(f"{bound:.0%} (p{percent})" for percent, bound in BOUNDS.items()),
        ),
    )


def _row(metric: str, percent: str, part: dict[str, Any]) -> list[str]:
    verdict = {True: "within", False: "OUTSIDE", None: report.MISSING}[part["within"]]
    title = f"  {metric.removesuffix('_s').upper()} {percent}"
    return [title, report.s(part["predicted"]), report.s(part["measured"]), report.times(part["ratio"]), verdict]


def _calibration_lines(found: dict[str, Any]) -> list[str]:
    """Of the mean of all."""

    def ms(name: str) -> str:
        return report.ms(found[name])

    def times(name: str) -> str:
        return report.times(found[name])

    factors = found.get("short_spread") or (1.0,)
    spread = f", each {min(factors):.2f} to {max(factors):.2f} times that"
    return [
        f"from probes: a pass of shorts {ms('short_pass_s')} and {ms('short_token_s')} per token{spread};",
        f"over what workers measured at their start, a long's passes {times('long_pass')}, a decode step "
        f"{times('decode_step')}, of a long {times('long_decode_step')};",
        f"beside computing {ms('beside_short_s')} per short and {ms('beside_long_s')} per long, "
        f"handover {ms('handover_s')};",
        f"speed of a core beside a busy one {times('together')}, and of decode where it waits for one "
        f"{times('crowded')} of that, its weight counting {times('step_gain')}",
    ]
