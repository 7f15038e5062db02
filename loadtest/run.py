"""`python -m loadtest run`: a trace replayed on a live cluster, in an open loop.

Each request is sent at the trace's own time, however late the answers to others are: over HTTP, over NATS, or the same
arrivals over one and then the other. The times are held by a process that does nothing else (`loadtest/sender.py`);
how late it was is part of the result.

    python -m loadtest run --trace conv.csv code.csv --first 600 --keep 0.05 --output-scale 0.2 --html run.html
    python -m loadtest run --via both --serve '--policy fifo' --json fifo.json
    python -m loadtest run --via nats --nats-url nats://127.0.0.1:4222 --trace mooncake.jsonl

Without --url and --nats-url it starts a cluster of its own, `--serve` being more flags for it. Order of what is done to
a trace: read whole, longs marked; cut (`--first`), thinned (`--keep`), scaled in time; longs rewritten and lengths
fitted to the model (`loadtest/fitting.py`). Without a trace the arrivals are synthetic. Prompts are random tokens,
prepared before the first is sent; every request asks for exactly as many tokens as its output had.

Latencies count from the intended arrival. Queueing delays, pauses and lanes are overheard on NATS, at some cost to the
machine (`--deaf`: not), on clocks of this machine. What the figures mean: `loadtest/run_report/record.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import msgspec

from common.messages.views import ClusterView
from common.settings import ServeSettings
from common.settings_loader import load
from loadtest import pages, report
from loadtest.cluster import Place, served, view_of
from loadtest.fitting import Room, Scales, fit
from loadtest.flags import cluster_flags, not_negative, positive, rate
from loadtest.replay import Replay, Target
from loadtest.run_report.outputs import write_files
from loadtest.run_report.record import Recorded, RunFigures, figures_of
from loadtest.run_report.table import show as show_runs
from loadtest.runner import MeasurementFailed
from loadtest.sender import Via, connected
from loadtest.simulator.scenario import WorkloadSpec, workload_spec
from loadtest.simulator.workload import WorkloadError, make_workload
from loadtest.workload_flags import add_workload_flags, cut, read_workload, said_of
from services.scheduler.service import config_of

SYNTHETIC_S, SYNTHETIC_RPS = 60.0, 1.0
ANSWER_S = 300.0
WARM_UP = 8
QUIET_S = 1.0
"""Between two runs."""
DESCRIBED_S = 10.0


def add_flags(parser: argparse.ArgumentParser) -> None:
    """See the module."""
    cluster = parser.add_argument_group("cluster")
    cluster_flags(cluster)
    cluster.add_argument(
        "--via", choices=("http", "nats", "both"), default="http", help="both: one, then the other [http]"
    )
    cluster.add_argument(
        "--threshold-tokens",
        type=positive,
        help="of the cluster at --url: longer prompts are long there [as in `serve`]",
    )
    cluster.add_argument("--timeout-s", type=rate, default=ANSWER_S, help=f"for a whole answer [{ANSWER_S:g}]")
    cluster.add_argument("--warm-up", type=not_negative, default=WARM_UP, help=f"shorts before the run [{WARM_UP}]")
    cluster.add_argument("--deaf", action="store_true", help="do not listen on NATS: no queueing delays, no lanes")
    workload = parser.add_argument_group("workload")
    shares = "of the model's context"
    add_workload_flags(
        workload,
        synthetic_s=f"{SYNTHETIC_S:g}",
        synthetic_rps=f"{SYNTHETIC_RPS:g}",
        long_low=f"75 %% {shares}",
        long_high=f"90 %% {shares}",
    )
    workload.add_argument("--prompt-scale", type=rate, default=1.0, metavar="X", help="of prompts that stay shorts [1]")
    workload.add_argument("--output-scale", type=rate, default=1.0, metavar="X", help="of all outputs [1]")
    written = parser.add_argument_group("output")
    written.add_argument("--html", default="", metavar="FILE", help="the report, one file with its plots inside")
    written.add_argument("--csv", default="", metavar="FILE", help="a line per request")
    written.add_argument("--perfetto", default="", metavar="FILE", help="what every worker did; .gz: compressed")


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What the flags say, checked."""

    vias: tuple[Via, ...]
    spec: WorkloadSpec
    said: frozenset[str]
    """Fields of the spec that somebody set."""
    scales: Scales
    seed: int
    url: str
    nats_url: str
    api_key: str
    serve_flags: tuple[str, ...]
    threshold_tokens: int
    timeout_s: float
    warm_up: int
    listen: bool

    @property
    def starts(self) -> bool:
        """A cluster of its own."""
        return not self.url and not self.nats_url


def run(flags: argparse.Namespace) -> dict[str, Any]:
    """The figures, and the files that were asked for. Raises: PecSchedError."""
    for flag in ("html", "csv", "perfetto"):
        report.check_writable(getattr(flags, flag), f"--{flag}")
    pages.check_plots(flags.html)
    options = options_of(flags)
    begun_s = time.monotonic()
    with report.progress() as bars:
        runs = asyncio.run(_run(options, bars))
        with bars.waiting("writing"):
            write_files(runs, html=flags.html, csv=flags.csv, perfetto=flags.perfetto)
    figures = [figures_of(each) for each in runs]
    if not any(each.answered for each in figures):
        raise MeasurementFailed(f"no request was answered: {figures[0].failures[0]}")
    return {"runs": msgspec.to_builtins(figures), "took_s": time.monotonic() - begun_s}


def show(figures: dict[str, Any]) -> None:
    """The table."""
    show_runs(msgspec.convert(figures["runs"], list[RunFigures]))


def options_of(flags: argparse.Namespace) -> RunOptions:
    """Raises: MeasurementFailed, WorkloadError, SettingsError."""
    elsewhere = flags.url or flags.nats_url
    vias: tuple[Via, ...] = ("http", "nats") if flags.via == "both" else (flags.via,)
    if elsewhere and flags.serve:
        raise MeasurementFailed("--serve is for a cluster started here: leave it out with --url or --nats-url")
    if not elsewhere and flags.threshold_tokens:
        raise MeasurementFailed(
            "--threshold-tokens tells of the cluster at --url; here: --serve '--threshold-tokens N'"
        )
    for via, flag in (("http", "--url"), ("nats", "--nats-url")):
        if elsewhere and via in vias and not getattr(flags, flag[2:].replace("-", "_")):
            raise MeasurementFailed(f"--via {flags.via}: where is that cluster's other door? {flag} is missing")
    serve_flags = tuple(shlex.split(flags.serve))
    settings = load(ServeSettings, serve_flags, {} if elsewhere else os.environ)
    said = said_of(flags)
    return RunOptions(
        vias=vias,
        spec=workload_spec({"synthetic_s": SYNTHETIC_S, "synthetic_rps": SYNTHETIC_RPS} | said),
        said=frozenset(said),
        scales=Scales(flags.prompt_scale, flags.output_scale),
        seed=flags.seed,
        url=flags.url,
        nats_url=flags.nats_url,
        api_key=flags.api_key,
        serve_flags=serve_flags,
        threshold_tokens=flags.threshold_tokens or config_of(settings).threshold_tokens,
        timeout_s=flags.timeout_s,
        warm_up=flags.warm_up,
        listen=not flags.deaf,
    )


async def _run(options: RunOptions, bars: report.Bars) -> list[Recorded]:
    """One for each way in."""
    with bars.waiting("reading" if options.spec.trace else "drawing"):
        whole = read_workload(options.spec, options.seed)
        marked = make_workload(whole.name, whole.arrivals, options.spec.long_percentile)
        wanted = cut(marked, options.spec, options.seed)
        if not wanted.arrivals:
            raise WorkloadError(f"{wanted.name}: no requests")
    runs = []
    async with AsyncExitStack() as stack:
        place = Place(options.url, options.nats_url, here=False)
        if options.starts:
            with bars.waiting("starting a cluster"):
                place = await stack.enter_async_context(served(options.serve_flags, bars.say))
        cluster, room = await _described(options, place)
        workload, facts = fit(wanted, options.spec, set(options.said), room, options.scales, options.seed)
        target = Target(
            place=place,
            cluster=cluster,
            api_key=options.api_key,
            timeout_s=options.timeout_s,
            warm_up=options.warm_up,
            seed=options.seed,
            listen=options.listen,
        )
        for number, via in enumerate(options.vias):
            if number:
                await asyncio.sleep(QUIET_S)
            runs.append(await Replay(target, workload, facts, via).perform(bars))
    return runs


async def _described(options: RunOptions, place: Place) -> tuple[str, Room]:
    """The cluster in a line, and what it takes. Raises: ClientError; MeasurementFailed: it has no workers, or is no
    cluster."""
    via = options.vias[0]
    url = place.url if via == "http" else place.nats_url
    try:
        async with connected(via, url, timeout_s=DESCRIBED_S, api_key=options.api_key) as door:
            card = (await door.get("/v1/models"))["data"][0]
            name, context_tokens = str(card["id"]), int(card["max_model_len"])
            view = await view_of(door)
    except (msgspec.MsgspecError, LookupError, TypeError, ValueError) as error:
        raise MeasurementFailed(f"{url} answers, but not as a PecSched router: {error}") from error
    return _in_a_line(name, view), room_of(context_tokens, view, options.threshold_tokens)


def room_of(context_tokens: int, view: ClusterView, threshold_tokens: int) -> Room:
    """What the cluster takes. Raises: MeasurementFailed, if it has no workers."""
    held = [w.profile.kv_capacity_tokens for w in view.workers if w.profile.role == "prefill"]
    if not held:
        raise MeasurementFailed("the cluster has no prefill worker: nothing would be answered")
    return Room(min(context_tokens, max(held)), threshold_tokens)


def _in_a_line(model: str, view: ClusterView) -> str:
    roles = [worker.profile.role for worker in view.workers]
    return f"{model}, {roles.count('prefill')} prefill and {roles.count('decode')} decode workers, policy {view.policy}"
