"""`python -m loadtest sp`: how much faster a group of workers prefills a long prompt than one of them.

One prompt of 7,500 tokens goes through a prefill engine alone, then through the engines of two processes by ring and by
Ulysses attention, in turn, each process with one thread; medians of three. All ways cut the prompt as workers would.
The speed-up is that of the scheme that groups use; the share of communication is what the rank that waits longest
waits for others, uneven work included, as part of the whole time. No scheduler, no network but between the two.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from common.messages.groups import RING, GroupScheme
from common.settings import DtypeName, PrefillWorkerSettings
from loadtest import report

SPEEDUP_MIN = 1.55


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
    from services.engine.measure_groups import ALONE, measure_groups  # loads torch: only where it is used

    settings = PrefillWorkerSettings(
        model=options.model, cache_dir=options.cache_dir, threads=options.threads, dtype=options.dtype
    )
    schemes = (RING, GroupScheme(per_node=options.ranks))
    count = (options.runs + 1) * (1 + len(schemes))
    with report.progress() as bars, bars.counting(f"prefill, alone and by {options.ranks}", count) as step:
        found = measure_groups(settings, options.ranks, schemes, options.tokens, options.runs, options.seed, step)
    alone_s = statistics.median(found[ALONE].wall_s)
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
    chosen = RING.name(options.ranks)  # what the scheduler asks for
    best = max((scheme.name(options.ranks) for scheme in schemes), key=lambda name: float(ways[name]["speedup"]))
    return {
        "tokens": options.tokens,
        "threads": options.threads,
        "speedup": ways[chosen]["speedup"],
        "plan": {"scheme": chosen, "ranks": options.ranks},
        "comm_share": ways[chosen]["comm_share"],
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
        f"speed-up by {plan['scheme']}: {report.times(figures['speedup'])}, at least "
        f"{report.times(SPEEDUP_MIN)} wanted: {'met' if figures['speedup'] >= SPEEDUP_MIN else 'MISSED'}",
    ]
    title = f"prefill of {figures['tokens']} tokens, {figures['threads']} thread(s) per worker"
    report.table(title, ["", "median", "speed-up", "waiting"], rows, notes)
