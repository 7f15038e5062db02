"""`python -m loadtest sp`: how much faster a group of workers prefills a long prompt than one of them.

One prompt of 7,500 tokens goes through a prefill engine alone, then through the engines of two processes by every
scheme that they could compute it by, in turn, each process with one thread; medians of three. Schemes: a ring, and
each of attention and MLP by Ulysses or Megatron (four combinations; with more ranks also on nodes round a ring). All
ways cut the prompt as workers would. The plan is the best as measured here. The share of communication is what the rank
that waits longest waits for others, uneven work included, as part of the whole time. No scheduler, no network but
between the ranks.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.messages.groups import RING, GroupScheme, Stage
from common.settings import DtypeName, PrefillWorkerSettings
from loadtest import report

if TYPE_CHECKING:
    from services.engine.measure_groups import WayTimes

SPEEDUP_MIN = 1.55
STAGES: tuple[Stage, ...] = ("ulysses", "megatron")


@dataclass(frozen=True, slots=True)
class SpOptions:
    seed: int = 0
    model: str = "embedded"
    cache_dir: str = ""
    tokens: int = 7_500
    threads: int = 1
    dtype: DtypeName = "bfloat16"
    ranks: int = 2
    runs: int = 3


def run(options: SpOptions) -> dict[str, Any]:
    """Raises: PecSchedError, EngineError."""
    from services.engine.measure_groups import measure_groups  # loads torch: only where it is used

    settings = PrefillWorkerSettings(
        model=options.model, cache_dir=options.cache_dir, threads=options.threads, dtype=options.dtype
    )
    schemes = schemes_of(options.ranks)
    count = (options.runs + 1) * (1 + len(schemes))
    with report.progress() as bars, bars.counting(f"prefill, alone and by {options.ranks}", count) as step:
        found = measure_groups(settings, options.ranks, schemes, options.tokens, options.runs, options.seed, step)
    return summed_up(options, schemes, found)


def schemes_of(ranks: int) -> list[GroupScheme]:
    """All by which so many ranks can compute: a ring, and the mixtures on nodes of two and more."""
    nodes = [per_node for per_node in range(2, ranks + 1) if ranks % per_node == 0]
    return [
        RING,
        *(
            GroupScheme(per_node=per_node, attention=attention, mlp=mlp)
            for per_node, attention, mlp in itertools.product(nodes, STAGES, STAGES)
        ),
    ]


def summed_up(options: SpOptions, schemes: Sequence[GroupScheme], found: Mapping[str, WayTimes]) -> dict[str, Any]:
    """What is printed, from the times of each way; the one without a scheme is a worker alone."""
    names = [scheme.name(options.ranks) for scheme in schemes]
    (alone,) = (way for way in found if way not in names)
    alone_s = statistics.median(found[alone].wall_s)
    ways: dict[str, dict[str, Any]] = {
        way: {
            "wall_s": statistics.median(times.wall_s),
            "speedup": alone_s / statistics.median(times.wall_s),
            "comm_share": statistics.median(times.wait_share),
            "cpu_s": times.cpu_s,
            "runs_s": times.wall_s,
        }
        for way, times in found.items()
    }
    best = min(names, key=lambda name: float(ways[name]["wall_s"]))
    return {
        "tokens": options.tokens,
        "threads": options.threads,
        "speedup": ways[best]["speedup"],
        "plan": {"scheme": best, "ranks": options.ranks, "chosen_by": "measured"},
        "comm_share": ways[best]["comm_share"],
        "best": best,
        "ways": ways,
        "same_first_token": len(set().union(*(times.tokens for times in found.values()))) == 1,
    }


def show(figures: dict[str, Any]) -> None:
    plan = figures["plan"]
    rows = [
        [way, report.s(times["wall_s"]), report.times(times["speedup"]), f"{times['comm_share']:.0%}"]
        for way, times in figures["ways"].items()
    ]
    notes = [
        "",
        f"first token {'the same' if figures['same_first_token'] else 'another one (may be, in bfloat16)'}",
        f"best as measured: {plan['scheme']}, speed-up {report.times(figures['speedup'])}, at least "
        f"{report.times(SPEEDUP_MIN)} wanted: {'met' if figures['speedup'] >= SPEEDUP_MIN else 'MISSED'}",
    ]
    title = f"prefill of {figures['tokens']} tokens, {figures['threads']} thread(s) per worker"
    report.table(title, ["", "median", "speed-up", "waiting"], rows, notes)
