"""`python -m loadtest sp`: how much faster a group of workers prefills a long prompt than one of them.

One prompt of 7,500 tokens goes through a prefill engine alone, then through the engines of two processes by every
scheme that they could compute it by, in turn, each process with one thread; medians of three. In between each of the
two prefills it for itself at the same time: how much more they do together than one of them alone is what the machine
has to give (cores that share a physical one, its memory, or its clock give less than two), and the ceiling of every
speed-up. Schemes: a ring, and each of attention and MLP by Ulysses or Megatron (four combinations; with more ranks also
on nodes round a ring). All ways cut the prompt as workers would. The plan is what a scheduler would choose by what
these processes measured of themselves at start; its estimates stand beside the times. The share of communication is
what the rank that waits longest waits for others, uneven work included, as part of the whole time. No scheduler, no
network but between the ranks.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.messages.cluster import WorkerProfile
from common.messages.groups import RING, GroupScheme, Stage
from common.policy.live_planner import GroupPlan, Rank, plan_group
from common.policy.scheduler_config import SchedulerConfig
from common.settings import DtypeName, PrefillWorkerSettings
from common.units import WorkerId
from loadtest import report

if TYPE_CHECKING:
    from services.engine.interface import EngineProfile
    from services.engine.measure_groups import WayTimes

SPEEDUP_MIN = 1.55
OVER_BEST_MAX = 1.10
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
    count = (options.runs + 1) * (2 + len(schemes))
    with report.progress() as bars, bars.counting(f"prefill, alone and by {options.ranks}", count) as step:
        found = measure_groups(settings, options.ranks, schemes, options.tokens, options.runs, options.seed, step)
    plan = plan_of(options, found.profiles) if options.ranks > 1 else None
    return summed_up(options, schemes, found.ways, plan)


def plan_of(options: SpOptions, profiles: Sequence[EngineProfile]) -> GroupPlan:
    """What the scheduler would choose for these workers."""
    ranks = [Rank(_worker_of(profile, number), profile.kv_capacity_tokens) for number, profile in enumerate(profiles)]
    return plan_group(options.tokens, options.tokens + 1, ranks, SchedulerConfig())


def _worker_of(profile: EngineProfile, number: int) -> WorkerProfile:
    return WorkerProfile(
        worker_id=WorkerId(f"rank-{number}"),
        role="prefill",
        incarnation="",
        node="node-0",
        replica=f"rank-{number}",
        model_id=profile.model_id,
        model_fingerprint=profile.model_fingerprint,
        layers=profile.layers,
        kv_bytes_per_token=profile.kv_bytes_per_token,
        kv_capacity_tokens=profile.kv_capacity_tokens,
        context_tokens=profile.context_tokens,
        data_address="",
        step_cost=profile.step_cost,
        layer=profile.layer,
        exchange=profile.exchange,
        core_share=profile.core_share,
    )


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


def summed_up(
    options: SpOptions, schemes: Sequence[GroupScheme], found: Mapping[str, WayTimes], plan: GroupPlan | None = None
) -> dict[str, Any]:
    """What is printed, from the times of each way; those without a scheme are a worker alone, and each of them for
    itself at the same time. Without a plan the best as measured stands for it."""
    names = [scheme.name(options.ranks) for scheme in schemes]
    alone, apart = (way for way in found if way not in names)
    alone_s, apart_s = (statistics.median(found[way].wall_s) for way in (alone, apart))
    ceiling = options.ranks * alone_s / apart_s
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
    chosen = best if plan is None else plan.scheme.name(options.ranks)
    for name, estimate_s in () if plan is None else plan.estimates:
        ways[name]["estimate_s"] = estimate_s
    return {
        "tokens": options.tokens,
        "threads": options.threads,
        "speedup": ways[chosen]["speedup"],
        "plan": {
            "scheme": chosen,
            "ranks": options.ranks,
            "chosen_by": "measured" if plan is None else "cost",
            "why": "" if plan is None else plan.why,
        },
        "ceiling": ceiling,
        "of_ceiling": ways[chosen]["speedup"] / ceiling,
        "over_best": ways[chosen]["wall_s"] / ways[best]["wall_s"],
        "comm_share": ways[chosen]["comm_share"],
        "best": best,
        "ways": ways,
        "same_first_token": len(set().union(*(times.tokens for times in found.values()))) == 1,
    }


def show(figures: dict[str, Any]) -> None:
    plan, (_, apart, *_) = figures["plan"], figures["ways"]
    rows = [
        [
            way,
            report.s(times["wall_s"]),
            report.s(times["estimate_s"]) if "estimate_s" in times else "-",
            report.times(times["speedup"] if way != apart else figures["ceiling"]),
            f"{times['comm_share']:.0%}",
        ]
        for way, times in figures["ways"].items()
    ]
    notes = [
        "",
        f"first token {'the same' if figures['same_first_token'] else 'another one (may be, in bfloat16)'}",
        f"plan: {plan['scheme']}, speed-up {report.times(figures['speedup'])}, at least "
        f"{report.times(SPEEDUP_MIN)} wanted: {'met' if figures['speedup'] >= SPEEDUP_MIN else 'MISSED'}",
        f"{plan['ranks']} workers that exchange nothing do {report.times(figures['ceiling'])} the work of one here; "
        f"the plan reaches {figures['of_ceiling']:.0%} of that",
        f"the plan took {figures['over_best']:.2f} of the best as measured ({figures['best']}), at most "
        f"{OVER_BEST_MAX:.2f} wanted: {'met' if figures['over_best'] <= OVER_BEST_MAX else 'MISSED'}",
    ]
    title = f"prefill of {figures['tokens']} tokens, {figures['threads']} thread(s) per worker"
    report.table(title, ["", "median", "estimated", "speed-up", "waiting"], rows, notes)
