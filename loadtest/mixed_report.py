"""The table of `loadtest mixed`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from loadtest import report

SETTINGS = {
    "shorts_only": "shorts alone",
    "fifo": "mixed, FIFO",
    "pecsched": "mixed, PecSched",
    "groups": "with groups",
}
SHORT_P99_MAX, LONG_JCT_MAX = 1.5, 1.2
GROUPS_MAX = 1.0
"""Of what PecSched reaches without them: groups are there to prefill longs faster, at no cost to shorts."""


def show(figures: Mapping[str, Any]) -> None:
    run = figures["run"]
    columns = {name: title for name, title in SETTINGS.items() if figures.get(name) is not None}

    def row(title: str, pick: Callable[[Any], Any], form: Callable[[Any], str] = str) -> list[str]:
        return [title, *(form(pick(figures[name])) for name in columns)]

    def of_run(title: str, key: str, form: Callable[[Any], str]) -> list[str]:
        return [title, *(form(run[key].get(name)) for name in columns)]

    rows = [
        row("short TTFT p50", lambda f: f["short_ttft_s"]["p50"], report.ms),
        row("short TTFT p95", lambda f: f["short_ttft_s"]["p95"], report.ms),
        row("short TTFT p99", lambda f: f["short_ttft_s"]["p99"], report.ms),
        row("shorts served per second", lambda f: f["short_rps"], lambda rps: f"{rps:.2f}"),
        row("long JCT mean", lambda f: f["long_jct_s"]["mean"], report.s),
        row("long JCT max", lambda f: f["long_jct_s"]["max"], report.s),
        row("pauses", lambda f: f["pauses"]),
        row("pause latency p50", lambda f: f["pause_latency_s"]["p50"], report.ms),
        row("pause latency p99", lambda f: f["pause_latency_s"]["p99"], report.ms),
        row("failed", lambda f: f["failed"]),
        of_run("workers per long", "workers_per_long", lambda count: "-" if count is None else f"{count:.2f}"),
        of_run("machine busy (all cores)", "machine_busy", report.share),
        of_run("client busy (one core)", "client_busy", report.share),
        of_run("client late at sending p99", "client_late_s_p99", report.ms),
    ]
    title = f"{run['shorts']} shorts, {run['longs']} longs in {run['schedule_s']:.0f} s, seed {run['seed']}"
    report.table(title, ["", *columns.values()], rows, _notes(figures))


def _notes(figures: Mapping[str, Any]) -> list[str]:
    run = figures["run"]
    capacity, work = run["short_capacity_rps"], run["long_work_core_s"]
    notes = [
        "",
        f"shorts: {run['short_rate_rps']:.2f}/s"
        + (
            f"; capacity, closed loop: {capacity:.2f}/s; cores busy with shorts alone: {run['short_busy']:.0%}"
            if capacity is not None
            else ", as told"
        ),
        f"longs: {run['long_rate_rps']:.4f}/s"
        + (
            f"; a long alone: {run['long_alone_s']:.1f} s, {work:.1f} core-seconds" if work is not None else ", as told"
        ),
    ]
    if figures["shorts_only"] and figures["pecsched"] and figures["fifo"]:
        notes += [
            f"FIFO's short p99 / shorts alone: {report.times(run['short_p99_fifo_to_alone'])}",
            report.target(
                "PecSched's short p99 / shorts alone", run["short_p99_pecsched_to_alone"], SHORT_P99_MAX, report.times
            ),
            report.target(
                "PecSched's mean long JCT / FIFO's", run["long_jct_pecsched_to_fifo"], LONG_JCT_MAX, report.times
            ),
        ]
    if figures.get("groups"):
        most, short, long = run["group_max"], run["short_p99_groups_to_pecsched"], run["long_jct_groups_to_pecsched"]
        notes += [
            report.target(f"mean long JCT with groups of up to {most} / without", long, GROUPS_MAX, report.times),
            report.target(f"short p99 with groups of up to {most} / without", short, GROUPS_MAX, report.times),
        ]
        if len(run["rounds"]) > 1:
            notes.append(f"(medians of {len(run['rounds'])} rounds; the table is of the first)")
            notes += [_round(number, each) for number, each in enumerate(run["rounds"], 1)]
    for name, failures in run["failures"].items():
        notes += [f"failed, {SETTINGS[name]}: {failure}" for failure in failures]
    return notes


def _round(number: int, figures: Mapping[str, Any]) -> str:
    without, with_groups = figures["pecsched"], figures["groups"]

    def both(title: str, pick: Callable[[Any], Any], form: Callable[[Any], str]) -> str:
        return f"{title} {form(pick(without))} without, {form(pick(with_groups))} with"

    long = both("mean long JCT", lambda f: f["long_jct_s"]["mean"], report.s)
    short = both("short p99", lambda f: f["short_ttft_s"]["p99"], report.ms)
    return f"  round {number}: {long}; {short}; {both('failed', lambda f: f['failed'], str)}"
