"""`python -m loadtest mixed`: does a long prompt hold up short ones?

One run measures, on clusters that it starts itself:

1. *Capacity of shorts* c, closed loop: twice as many clients at each level, until a level adds less than 5 %.
2. *A short's load*: how busy the cores are with shorts in an open loop at 0.4·c.
3. *A long's work* W: core-seconds of a shortest and a longest one on the otherwise idle cluster, mean.
4. *Shorts alone*, policy pecsched.
5. *Mixed*, policy fifo: the same shorts at the same times, and longs.
6. *Mixed*, policy pecsched: the very same arrivals as in 5.

The rates: shorts at 40 % of their capacity, longs added until the machine is about 70 % busy. A closed loop of
many clients decodes in large batches, at a fraction of the work per request of an open loop at 40 % of its
rate (seen: 78 % of all cores busy at 0.4·c); so shorts come at 0.4·c or at the rate that keeps 40 % of the
cores busy, whichever is less. With busy share b of the cores then, longs come at (0.7 - b)·cores/W per second,
and never faster than would keep 30 % of P = min(prefill workers, cores) workers occupied, 0.3·P/L with L the
time of a long alone (which is what bounds them where the engine does not compute on the cores).

Latencies count from the intended arrival (see runner.py). TTFT ends with the first token's event at the
client, JCT with the last token's. `pauses` is the difference of the scheduler's own counter; pause
latencies are what workers measured (short ready at the worker, or order received → long stopped) and the
coordinator tells the scheduler in `GroupPaused`, overheard on NATS. A failed request is counted, and in no latency.

With --groups N there is one more, the very same arrivals once more: PecSched, and longs prefilled by up to N workers.
With --rounds R both, PecSched without groups and with, are measured R times in turn, each round with arrivals of its
own; the comparison is the median of the rounds.

With --url, the cluster there is measured as it is: shorts alone, and mixed under whatever policy it runs.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil

from common.messages.base import Message
from common.messages.requests import LengthClass
from common.messages.sp import FormGroup, GroupPaused, GroupResumed
from common.runtime import subjects
from loadtest import report
from loadtest.client import Client
from loadtest.cluster import Place, busy_slots, observing, served, view_of
from loadtest.runner import MeasurementFailed, OpenLoopRun, run_closed_loop, run_in_turn, run_open_loop
from loadtest.stats import mean, percentile, percentiles, ratio
from loadtest.workload import LONG_TOKENS, OUTPUT_TOKENS, SHORT_TOKENS, Ask, Schedule, even_asks, make_schedule

SHORT_SHARE = 0.4
BUSY_SHARE = 0.7
PROBES = 2
"""Open-loop looks at how busy shorts keep the cores: the second corrects the first."""
PROBE_S = 25.0
LEVEL_S = 7.0
FLAT = 1.05
"""A level of concurrency that is not this much better than the one before is the last."""
LEVELS = (4, 8, 16, 32)
WARM_UP_ALONE, WARM_UP_CROWD = 2, 12
ANSWER_S = 300.0
ROUND_SEEDS = 1_000
"""From the seed of one round to that of the next."""


@dataclass(frozen=True, slots=True)
class MixedOptions:
    seed: int = 0
    shorts: int = 200
    longs: int = 8
    capacity_level_s: float = LEVEL_S
    short_rps: float | None = None
    """None: 0.4 of the measured capacity."""
    long_rps: float | None = None
    """None: from the measured time of a long alone."""
    short_tokens: tuple[int, int] = SHORT_TOKENS
    long_tokens: tuple[int, int] = LONG_TOKENS
    url: str = ""
    nats_url: str = ""
    api_key: str = ""
    serve_flags: tuple[str, ...] = ()
    pecsched_flags: tuple[str, ...] = ()
    """More of them where the policy is pecsched."""
    groups: int = 0
    """Workers that may share a long in one more setting; 0: there is none."""
    rounds: int = 1
    """Of PecSched without groups, and with."""


@dataclass(slots=True)
class Rates:
    """What the run found out before it could begin, or was told."""

    short_capacity_rps: float | None = None
    levels_rps: dict[int, float] = field(default_factory=dict)
    short_busy: float | None = None
    """Share of all cores that shorts alone keep busy at `short_rps`."""
    long_alone_s: float | None = None
    long_work_core_s: float | None = None
    slots: int | None = None
    short_rps: float = 0.0
    long_rps: float = 0.0


@dataclass(frozen=True, slots=True)
class Setting:
    """One measured setting."""

    run: OpenLoopRun
    pauses: int
    pause_latencies_s: tuple[float, ...]
    workers_per_long: float | None
    """At the start of its prefill, mean; None: nobody overheard it."""
    machine_busy: float | None
    """Share of all cores, clients included."""
    client_busy: float
    """Share of one core that this process used."""

    def figures(self) -> dict[str, Any]:
        """Under the keys of the contract."""
        longs = [sample.jct_s for sample in self.run.good("long")]
        return {
            "short_ttft_s": percentiles([sample.ttft_s for sample in self.run.good("short")], 50, 95, 99),
            "short_rps": self.run.rps("short"),
            "long_jct_s": {"mean": mean(longs), "max": max(longs, default=None)},
            "pauses": self.pauses,
            "pause_latency_s": percentiles(self.pause_latencies_s, 50, 99),
            "failed": len(self.run.failures),
        }


def run(options: MixedOptions) -> dict[str, Any]:
    """Everything, in order. Raises: PecSchedError."""
    if options.url and (options.serve_flags or options.pecsched_flags):
        raise MeasurementFailed("--serve and --serve-pecsched are for clusters started here: leave them out with --url")
    if options.rounds > 1 and not options.groups:
        raise MeasurementFailed("--rounds are of PecSched without groups and with: say --groups N, too")
    if options.url and options.groups:
        raise MeasurementFailed("--groups starts a cluster of its own: leave it out with --url")
    return asyncio.run(_run(options))


async def _run(options: MixedOptions) -> dict[str, Any]:
    begun_s = time.monotonic()
    with report.progress() as bars:
        bench = Bench(options, bars)
        settings = await (bench.at_url() if options.url else bench.all_settings())
    figures: dict[str, Any] = dict.fromkeys(("shorts_only", "fifo", "pecsched"))
    figures |= {name: setting.figures() for name, setting in settings.items()}
    figures["run"] = _run_facts(options, bench, settings, figures) | {"took_s": time.monotonic() - begun_s}
    return figures


class Bench:
    """The stages of the run."""

    def __init__(self, options: MixedOptions, bars: report.Bars) -> None:
        self.options = options
        self.rates = Rates()
        self.schedule = Schedule(())
        self.rounds: list[tuple[Setting, Setting]] = []
        """PecSched without groups, and with."""
        self._bars = bars

    async def all_settings(self) -> dict[str, Setting]:
        settings: dict[str, Setting] = {}
        async with self._cluster("pecsched") as (place, client):
            await self.find_rates(place, client)
            settings["shorts_only"] = await self.measure("shorts only", place, client, self.schedule.only("short"))
        async with self._cluster("fifo") as (place, client):
            settings["fifo"] = await self.measure("mixed, fifo", place, client, self.schedule)
        settings["pecsched"] = await self._mixed(self.schedule)
        if self.options.groups:
            settings["groups"] = await self._mixed(self.schedule, groups=True)
            self.rounds = [(settings["pecsched"], settings["groups"])]
            for number in range(1, self.options.rounds):
                schedule, groups_first = self._schedule(number), number % 2 == 1
                first = await self._mixed(schedule, groups=groups_first)
                second = await self._mixed(schedule, groups=not groups_first)
                self.rounds.append((second, first) if groups_first else (first, second))
        return settings

    async def _mixed(self, schedule: Schedule, *, groups: bool = False) -> Setting:
        flags = ("--group-max", str(self.options.groups)) if groups else ()
        async with self._cluster("pecsched", *flags) as (place, client):
            return await self.measure("mixed, groups" if groups else "mixed, pecsched", place, client, schedule)

    async def at_url(self) -> dict[str, Setting]:
        place = Place(self.options.url, self.options.nats_url, here=False)
        async with self._client(place) as client:
            policy = (await view_of(client)).policy
            await self.warm_up(client)
            await self.find_rates(place, client)
            shorts = await self.measure("shorts only", place, client, self.schedule.only("short"))
            mixed = await self.measure(f"mixed, {policy}", place, client, self.schedule)
        return {"shorts_only": shorts, policy: mixed}

    @asynccontextmanager
    async def _cluster(self, policy: str, *more: str) -> AsyncIterator[tuple[Place, Client]]:
        async with AsyncExitStack() as stack:
            with self._bars.waiting(f"starting a cluster, policy {policy}"):
                own = self.options.pecsched_flags if policy == "pecsched" else ()
                flags = ("--policy", policy, *self.options.serve_flags, *own, *more)
                place = await stack.enter_async_context(served(flags, self._bars.say))
            client = await stack.enter_async_context(self._client(place))
            await self.warm_up(client)
            yield place, client

    @asynccontextmanager
    async def _client(self, place: Place) -> AsyncIterator[Client]:
        client = Client(place.url, timeout_s=ANSWER_S, api_key=self.options.api_key)
        try:
            yield client
        finally:
            await client.close()

    async def warm_up(self, client: Client) -> None:
        """First uses cost more than all later ones: connections, code, memory."""
        asks = self._asks("warm-up shorts", "short")
        longs = self._asks("warm-up longs", "long", low_only=True) if self.options.longs else iter(())
        crowd = [*(next(asks) for _ in range(WARM_UP_CROWD)), *([next(longs)] if self.options.longs else [])]
        with self._bars.counting("warming up", WARM_UP_ALONE + len(crowd)) as step:
            singles = await run_in_turn(client, [next(asks) for _ in range(WARM_UP_ALONE)], step)
            together = await run_open_loop(client, Schedule.at_once(crowd), step)
        _require_whole("warm-up", singles, together)

    async def find_rates(self, place: Place, client: Client) -> None:
        """Fills `rates` and `schedule`."""
        rates, options = self.rates, self.options
        rates.slots = busy_slots(await view_of(client), place)
        rates.short_rps = options.short_rps or await self._find_short_rps(client)
        if options.longs:
            rates.long_rps = options.long_rps or await self._find_long_rps(client, rates.slots)
        self.schedule = self._schedule(0)

    def _schedule(self, number: int) -> Schedule:
        """Of this round."""
        rates, options = self.rates, self.options
        return make_schedule(
            options.seed + ROUND_SEEDS * number,
            short_rps=rates.short_rps,
            long_rps=rates.long_rps,
            shorts_min=options.shorts,
            longs_min=options.longs,
            short_tokens=options.short_tokens,
            long_tokens=options.long_tokens,
        )

    async def _find_short_rps(self, client: Client) -> float:
        asks = self._asks("capacity", "short")
        best = 0.0
        with self._bars.counting("capacity of shorts", len(LEVELS)) as step:
            for concurrency in LEVELS:
                count_s = self.options.capacity_level_s
                rps = await run_closed_loop(client, asks, concurrency, count_s=count_s)
                self.rates.levels_rps[concurrency] = rps
                step()
                before, best = best, max(best, rps)
                if rps < FLAT * before:
                    break
        if not best:
            raise MeasurementFailed("no short was served while the capacity was measured: --capacity-level-s is short")
        self.rates.short_capacity_rps = best
        rps = SHORT_SHARE * best
        for number in range(PROBES):
            busy = await self._short_busy(client, rps, number)
            if busy <= SHORT_SHARE:
                break
            rps, busy = rps * SHORT_SHARE / busy, SHORT_SHARE
        self.rates.short_busy = busy
        return rps

    async def _short_busy(self, client: Client, rps: float, number: int) -> float:
        """Share of all cores busy while shorts alone arrive at this rate."""
        low, high = self.options.short_tokens
        schedule = make_schedule(
            self.options.seed + number + 1,
            short_rps=rps,
            long_rps=0.0,
            shorts_min=max(1, round(rps * PROBE_S * self.options.capacity_level_s / LEVEL_S)),
            longs_min=0,
            short_tokens=(low, high),
            long_tokens=self.options.long_tokens,
        )
        with self._bars.counting("a short's load", len(schedule.arrivals)) as step, _busy() as busy:
            _require_whole("a short's load", await run_open_loop(client, schedule, step))
        return busy.machine

    async def _find_long_rps(self, client: Client, slots: int) -> float:
        asks = self._asks("long alone", "long")
        begun_s = time.monotonic()
        with self._bars.counting("a long alone", 2) as step, _busy() as busy:
            alone = await run_in_turn(client, [next(asks), next(asks)], step)
        took_s = time.monotonic() - begun_s
        _require_whole("a long alone", alone)
        cores = psutil.cpu_count() or 1
        self.rates.long_alone_s = math.fsum(sample.jct_s for sample in alone.samples) / len(alone.samples)
        self.rates.long_work_core_s = busy.machine * cores * took_s / len(alone.samples)
        short_busy = SHORT_SHARE if self.rates.short_busy is None else self.rates.short_busy
        by_work = max(0.01, BUSY_SHARE - short_busy) * cores / max(1e-3, self.rates.long_work_core_s)
        return min(by_work, (BUSY_SHARE - SHORT_SHARE) * slots / self.rates.long_alone_s)

    async def measure(self, title: str, place: Place, client: Client, schedule: Schedule) -> Setting:
        """One setting, from an idle cluster to its last answer."""
        pauses_before = await _pauses(client)
        talk = (subjects.SCHEDULER, subjects.COORDINATOR)
        async with observing(place, talk, FormGroup, GroupPaused, GroupResumed) as observer:
            with self._bars.counting(title, len(schedule.arrivals)) as step, _busy() as busy:
                measured = await run_open_loop(client, schedule, step)
            pauses = await _pauses(client) - pauses_before
        heard = observer.heard if observer is not None else []
        return Setting(
            run=measured,
            pauses=pauses,
            pause_latencies_s=pause_latencies_s(message for _, message in heard),
            workers_per_long=mean([len(m.members) for _, m in heard if isinstance(m, FormGroup)]),
            machine_busy=busy.machine if place.here else None,
            client_busy=busy.client,
        )

    def _asks(self, purpose: str, kind: LengthClass, *, low_only: bool = False) -> Iterator[Ask]:
        low, high = self.options.short_tokens if kind == "short" else self.options.long_tokens
        number = 32 if kind == "short" else 2
        return even_asks(self.options.seed, purpose, kind, (low, low if low_only else high), number)


def pause_latencies_s(heard: Iterable[Message]) -> tuple[float, ...]:
    """One per pause: a coordinator says again that a group stands, for as long as it does."""
    found: list[float] = []
    standing: set[tuple[str, int]] = set()
    for message in heard:
        match message:
            case GroupPaused() if (message.request_id, message.attempt) not in standing:
                standing.add((message.request_id, message.attempt))
                found.append(message.pause_latency_s)
            case GroupResumed():
                standing.discard((message.request_id, message.attempt))
            case _:
                pass
    return tuple(found)


@dataclass(slots=True)
class Busy:
    machine: float = 0.0
    client: float = 0.0


@contextmanager
def _busy() -> Iterator[Busy]:
    """How busy the machine's cores were within the block, and this process by itself."""
    busy, own = Busy(), psutil.Process()
    begun_s, before, own_before = time.monotonic(), psutil.cpu_times(), own.cpu_times()
    try:
        yield busy
    finally:
        took_s = max(1e-9, time.monotonic() - begun_s)
        after, own_after = psutil.cpu_times(), own.cpu_times()
        idle_s = (after.idle + getattr(after, "iowait", 0.0)) - (before.idle + getattr(before, "iowait", 0.0))
        busy.machine = max(0.0, 1.0 - idle_s / (took_s * (psutil.cpu_count() or 1)))
        used_s = own_after.user + own_after.system - own_before.user - own_before.system
        busy.client = used_s / took_s


async def _pauses(client: Client) -> int:
    return (await view_of(client)).counters.get("pauses", 0)


def _require_whole(what: str, *runs: OpenLoopRun) -> None:
    """Raises: MeasurementFailed."""
    failures = [failure for each in runs for failure in each.failures]
    if failures:
        raise MeasurementFailed(f"{what}: {len(failures)} requests failed; the first: {failures[0]}")


def _run_facts(
    options: MixedOptions, bench: Bench, settings: dict[str, Setting], figures: dict[str, Any]
) -> dict[str, Any]:
    """Beside the contract's figures: what they were measured with, and the two comparisons that matter."""
    rates = bench.rates

    def p99(name: str) -> float | None:
        return figures[name]["short_ttft_s"]["p99"] if figures.get(name) else None

    def jct(name: str) -> float | None:
        return figures[name]["long_jct_s"]["mean"] if figures.get(name) else None

    return {
        "seed": options.seed,
        "short_capacity_rps": rates.short_capacity_rps,
        "capacity_levels_rps": {str(level): rps for level, rps in rates.levels_rps.items()},
        "short_rate_rps": rates.short_rps,
        "short_busy": rates.short_busy,
        "long_alone_s": rates.long_alone_s,
        "long_work_core_s": rates.long_work_core_s,
        "long_slots": rates.slots,
        "long_rate_rps": rates.long_rps,
        "schedule_s": bench.schedule.duration_s,
        "shorts": bench.schedule.count("short"),
        "longs": bench.schedule.count("long"),
        "output_tokens": OUTPUT_TOKENS,
        "short_p99_pecsched_to_alone": ratio(p99("pecsched"), p99("shorts_only")),
        "short_p99_fifo_to_alone": ratio(p99("fifo"), p99("shorts_only")),
        "long_jct_pecsched_to_fifo": ratio(jct("pecsched"), jct("fifo")),
        "client_late_s_p99": {name: setting.run.late_s_p99 for name, setting in settings.items()},
        "client_busy": {name: setting.client_busy for name, setting in settings.items()},
        "machine_busy": {name: setting.machine_busy for name, setting in settings.items()},
        "workers_per_long": {name: setting.workers_per_long for name, setting in settings.items()},
        "failures": {name: _distinct(setting.run.failures) for name, setting in settings.items()},
        **(_grouped(options.groups, bench.rounds) if options.groups else {}),
    }


def _grouped(group_max: int, rounds: Sequence[tuple[Setting, Setting]]) -> dict[str, Any]:
    """What groups are worth: each round, and the medians."""
    figures = [(without.figures(), with_groups.figures()) for without, with_groups in rounds]
    p99s = [ratio(b["short_ttft_s"]["p99"], a["short_ttft_s"]["p99"]) for a, b in figures]
    jcts = [ratio(b["long_jct_s"]["mean"], a["long_jct_s"]["mean"]) for a, b in figures]
    return {
        "group_max": group_max,
        "rounds": [{"pecsched": a, "groups": b} for a, b in figures],
        "short_p99_groups_to_pecsched": percentile([times for times in p99s if times is not None], 50),
        "long_jct_groups_to_pecsched": percentile([times for times in jcts if times is not None], 50),
    }


def _distinct(failures: Sequence[str], shown_max: int = 5) -> list[str]:
    return list(dict.fromkeys(failures))[:shown_max]
