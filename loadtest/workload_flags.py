"""What arrives, as the command line says it: the same flags for a simulated run and a live one."""

from __future__ import annotations

import argparse
from typing import Any

from loadtest.simulator.scenario import WorkloadSpec
from loadtest.simulator.synthetic import TRACE_RPS, synthetic
from loadtest.simulator.traces import read_trace
from loadtest.simulator.workload import Workload, make_workload, rewrite_longs


def add_workload_flags(
    group: argparse._ArgumentGroup,
    *,
    synthetic_s: str = "3600",
    synthetic_rps: str = f"{TRACE_RPS:.2f}",
    long_low: str = "100000",
    long_high: str = "500000",
) -> None:
    """Flags that are not given stay None, and are left to whoever reads them; the arguments are their defaults, in
    words."""
    group.add_argument(
        "--trace",
        nargs="+",
        metavar="PATH",
        help="Azure CSV files or a folder of them, or a Mooncake JSONL [synthetic]",
    )
    group.add_argument("--synthetic-s", type=float, metavar="S", help=f"length of a synthetic workload [{synthetic_s}]")
    group.add_argument("--synthetic-rps", type=float, metavar="RPS", help=f"its requests per second [{synthetic_rps}]")
    speed = group.add_mutually_exclusive_group()
    speed.add_argument("--rate-scale", type=float, metavar="X", help="arrival rate, as a multiple of the trace's [1]")
    speed.add_argument(
        "--time-scale", dest="rate_scale", type=_inverse, metavar="X", help="the other way round: its time, stretched"
    )
    group.add_argument("--keep", type=float, metavar="SHARE", help="of the requests, drawn by lot, at their times [1]")
    group.add_argument("--first", dest="first_s", type=float, metavar="S", help="only the trace's first S seconds")
    group.add_argument("--no-rewrite", dest="rewrite", action="store_const", const=False, help="prompts as they are")
    group.add_argument("--long-low", type=int, metavar="TOKENS", help=f"shortest long [{long_low}]")
    group.add_argument("--long-high", type=int, metavar="TOKENS", help=f"longest long [{long_high}]")
    group.add_argument("--long-percentile", type=float, metavar="P", help="longer prompts become longs [95]")
    group.add_argument("--without-longs", action="store_const", const=True, help="take the longs out")


def said_of(flags: argparse.Namespace) -> dict[str, Any]:
    """The fields of a `WorkloadSpec` that the flags name."""
    return {name: value for name in WorkloadSpec.__struct_fields__ if (value := getattr(flags, name)) is not None}


def read_workload(spec: WorkloadSpec, seed: int) -> Workload:
    """As it was recorded, or drawn. Raises: WorkloadError."""
    return read_trace(spec.trace) if spec.trace else synthetic(seed, spec.synthetic_s, spec.synthetic_rps or TRACE_RPS)


def cut(workload: Workload, spec: WorkloadSpec, seed: int) -> Workload:
    """What is left of it: a stretch, a share, at another rate, without longs. Raises: WorkloadError."""
    if spec.first_s is not None:
        workload = workload.first(spec.first_s)
    workload = workload.thinned(spec.keep, seed).scaled(spec.rate_scale)
    return workload.without_longs() if spec.without_longs else workload


def workload_of(spec: WorkloadSpec, seed: int) -> Workload:
    """For a cluster that takes prompts of any length. The longs are made first, out of the whole trace. Raises:
    WorkloadError."""
    workload = read_workload(spec, seed)
    if spec.rewrite:
        workload = rewrite_longs(workload, spec.long_percentile, spec.long_low, spec.long_high, seed)
    else:
        workload = make_workload(workload.name, workload.arrivals, spec.long_percentile)
    return cut(workload, spec, seed)


def _inverse(text: str) -> float:
    factor = float(text)
    if not factor > 0.0:
        raise argparse.ArgumentTypeError("must be more than 0")
    return 1.0 / factor
