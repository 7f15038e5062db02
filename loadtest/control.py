"""`python -m loadtest control`: what routers, scheduler and bus can do, beside engines that take no time.

NATS, Redis, the routers, one scheduler, 64 timed workers (`control_workers.py`) and this client share the machine's
cores. Every request has a prompt of two dozen words and gets sixteen tokens, streamed; every token of every
stream is checked. Over each of HTTP and NATS:

- *closed loop*: so many clients, each asks again when it has its answer; more of them until the rate stops to grow.
  The highest is `requests_per_s`, that of the streams below included.
- *open loop*: Poisson arrivals at half of that, or of what was promised, if that is less. The engines are told to take
  no time, so the whole time from a request's intended arrival to its last token is `added_ms`; to its first token,
  `added_first_ms`.
- *streams*: so many at once (1,000), for as long; none may be lost, and memory may not grow (`rss_mb`: before
  and after it, after a first round of the same).

`cpu_ms_per_request` says where the time goes at the highest rate, by process.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import uvloop

from common.runtime.process import turns
from common.runtime.supervisor import Supervisor
from common.settings import RouterSettings
from loadtest import report
from loadtest.control_client import Door, HttpDoor, NatsDoor, Question, Stream, make_questions
from loadtest.control_cluster import Cluster, Sizes, control_cluster
from loadtest.flags import not_negative, positive, rate
from loadtest.runner import MeasurementFailed
from loadtest.stats import percentiles
from loadtest.workload import poisson_times
from services.router.main import load_text

Transport = Literal["http", "nats"]

OUTPUT_TOKENS = 16
LEVELS = (8, 16, 32, 64, 128, 256)
"""Clients of the closed loop, in turn."""
GROWTH_MIN = 1.02
FLAT_LEVELS_MAX = 2
"""So many levels in a row that bring less than this over the best so far end the search."""
WARM_UP_SHARE = 0.25
OPEN_SHARE = 0.5
ANSWER_S = 30.0
SETTLE_S = 0.5
TARGETS: dict[Transport, float] = {"http": 300.0, "nats": 500.0}
"""Requests per second."""
TARGET_P50_MS = 5.0
TARGET_P99_MS = 25.0


@dataclass(frozen=True, slots=True)
class ControlOptions:
    seed: int = 0
    transports: tuple[Transport, ...] = ("http", "nats")
    streams: int = 1_000
    seconds: float = 6.0
    """Of each level and phase."""
    levels: tuple[int, ...] = LEVELS
    sizes: Sizes = field(default_factory=Sizes)


def add_flags(parser: argparse.ArgumentParser) -> None:
    options = ControlOptions()
    parser.add_argument("--seed", type=not_negative, default=0, help="of all that is random [0]")
    parser.add_argument("--transport", choices=("both", "http", "nats"), default="both", help="[both]")
    parser.add_argument("--routers", type=positive, default=options.sizes.routers, help="[1]")
    parser.add_argument("--prefill-workers", type=positive, default=options.sizes.prefill, help="[56]")
    parser.add_argument("--decode-workers", type=positive, default=options.sizes.decode, help="[8]")
    parser.add_argument("--streams", type=positive, default=options.streams, help="at once, in the last phase [1000]")
    parser.add_argument("--seconds", type=rate, default=options.seconds, help="of each level and phase [6]")
    slice_help = f"of turns on shared cores; 0: as the system does [{options.sizes.cpu_slice_ms}]"
    parser.add_argument("--cpu-slice-ms", type=not_negative, default=options.sizes.cpu_slice_ms, help=slice_help)
    parser.add_argument("--levels", type=_levels, default=options.levels, metavar="N,N", help="clients, in turn")


def _levels(text: str) -> tuple[int, ...]:
    return tuple(positive(part) for part in text.split(","))


def run_flags(flags: argparse.Namespace) -> dict[str, Any]:
    """Raises: PecSchedError."""
    return run(
        ControlOptions(
            seed=flags.seed,
            transports=("http", "nats") if flags.transport == "both" else (flags.transport,),
            streams=flags.streams,
            seconds=flags.seconds,
            levels=flags.levels,
            sizes=Sizes(
                routers=flags.routers,
                prefill=flags.prefill_workers,
                decode=flags.decode_workers,
                cpu_slice_ms=flags.cpu_slice_ms,
            ),
        )
    )


def run(options: ControlOptions) -> dict[str, Any]:
    """Raises: PecSchedError."""
    with turns(options.sizes.cpu_slice_ms), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(options))


async def _run(options: ControlOptions) -> dict[str, Any]:
    questions = make_questions(load_text(RouterSettings()), OUTPUT_TOKENS, seed=options.seed)
    figures: dict[str, Any] = {"sizes": asdict(options.sizes)}
    rss: dict[str, Any] = {}
    with report.progress() as bars:
        async with AsyncExitStack() as stack:
            with bars.waiting("cluster"):
                cluster = await stack.enter_async_context(control_cluster(options.sizes, bars.say))
            for transport in options.transports:
                async with _door(cluster, transport) as door:
                    bench = Bench(options, cluster, door, questions, bars)
                    figures[transport], rss[transport] = await bench.measure(transport)
    return {**figures, "rss_mb": rss}


@asynccontextmanager
async def _door(cluster: Cluster, transport: Transport) -> AsyncIterator[Door]:
    if transport == "http":
        door: Door = HttpDoor(cluster.urls, timeout_s=ANSWER_S)
    else:
        door = await NatsDoor.open(cluster.nats_url, timeout_s=ANSWER_S)
    try:
        yield door
    finally:
        await door.close()


@dataclass(slots=True)
class Bench:
    """The phases over one transport."""

    options: ControlOptions
    cluster: Cluster
    door: Door
    questions: Sequence[Question]
    bars: report.Bars

    async def measure(self, transport: Transport) -> tuple[dict[str, Any], dict[str, Any]]:
        best, levels = await self._highest(transport)
        rate = OPEN_SHARE * min(best["requests_per_s"], TARGETS[transport])
        with self.bars.waiting(f"{transport}: open loop at {rate:.0f}/s"):
            opened = await self._open_loop(rate)
        with self.bars.waiting(f"{transport}: {self.options.streams} streams"):
            crowd, rss = await self._crowd()
        levels[str(self.options.streams)] = crowd["requests_per_s"]
        if crowd["requests_per_s"] > best["requests_per_s"]:
            best = {name: crowd[name] for name in best if name != "clients"} | {"clients": self.options.streams}
        return {**best, **opened, "levels": levels, "streams": crowd}, rss

    async def _highest(self, transport: Transport) -> tuple[dict[str, Any], dict[str, float]]:
        """The best level's figures, and the rate of each."""
        best: dict[str, Any] = {}
        levels: dict[str, float] = {}
        flat = 0
        for clients in self.options.levels:
            with self.bars.waiting(f"{transport}: {clients} clients"):
                level = await self.closed_loop(clients, self.options.seconds)
            rate = levels[str(clients)] = level["requests_per_s"]
            flat = 0 if rate >= GROWTH_MIN * best.get("requests_per_s", 0.0) else flat + 1
            if rate > best.get("requests_per_s", 0.0):
                best = {**level, "clients": clients}
            if flat == FLAT_LEVELS_MAX:
                break
        return best, levels

    async def closed_loop(self, clients: int, seconds: float) -> dict[str, Any]:
        """Clients that ask again and again; counted once warm. Raises: MeasurementFailed, for any stream not whole."""
        loop = asyncio.get_running_loop()
        begin_s = loop.time() + WARM_UP_SHARE * seconds
        end_s = begin_s + seconds
        done: list[Stream] = []

        async def one(which: int) -> None:
            rng = random.Random(f"{self.options.seed}/{which}")
            while loop.time() < end_s:
                done.append(_whole(await self.door.ask(rng.choice(self.questions))))

        async with Supervisor() as tasks:
            asking = [tasks.spawn(one(which), name=f"client {which}") for which in range(clients)]
            await asyncio.sleep(begin_s - loop.time())
            before = self.cluster.cpu_s()
            await asyncio.sleep(end_s - loop.time())
            after = self.cluster.cpu_s()
            await asyncio.gather(*asking)
        counted = [stream for stream in done if begin_s <= stream.last_s < end_s]
        if not counted:
            raise MeasurementFailed(f"no answer within {seconds:g} s with {clients} clients")
        rate = len(counted) / seconds
        return {
            "requests_per_s": rate,
            "tokens_per_s": rate * OUTPUT_TOKENS,
            "latency_ms": _ms(percentiles([stream.last_s - stream.sent_s for stream in counted], 50, 99)),
            "cpu_ms_per_request": {name: 1e3 * (after[name] - before[name]) / len(counted) for name in before},
            "streams": len(done),
        }

    async def _open_loop(self, rate: float) -> dict[str, Any]:
        loop, rng = asyncio.get_running_loop(), random.Random(self.options.seed)
        times_s = []
        for at_s in poisson_times(rate, rng):
            if at_s > self.options.seconds:
                break
            times_s.append(at_s)
        zero_s = loop.time()
        late_s: list[float] = []

        async def one(at_s: float) -> tuple[float, float]:
            stream = _whole(await self.door.ask(rng.choice(self.questions)))
            late_s.append(stream.sent_s - at_s)
            return stream.first_s - at_s, stream.last_s - at_s

        async with Supervisor() as tasks:
            running = []
            for number, at_s in enumerate(times_s):
                await asyncio.sleep(zero_s + at_s - loop.time())
                running.append(tasks.spawn(one(zero_s + at_s), name=f"request {number}"))
            spans = await asyncio.gather(*running)
        return {
            "added_ms": _ms(percentiles([last_s for _, last_s in spans], 50, 99)),
            "added_first_ms": _ms(percentiles([first_s for first_s, _ in spans], 50, 99)),
            "open_loop": {"requests_per_s": rate, "requests": len(spans), "late_ms": _ms(percentiles(late_s, 50, 99))},
        }

    async def _crowd(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Twice the same: what grows in the first round is room that stays; what grows in the second is lost."""
        await self.closed_loop(self.options.streams, self.options.seconds)
        await asyncio.sleep(SETTLE_S)
        before = self.cluster.rss_mb()
        crowd = await self.closed_loop(self.options.streams, self.options.seconds)
        await asyncio.sleep(SETTLE_S)
        after = self.cluster.rss_mb()
        thousands = crowd["streams"] / 1e3
        rss = {
            name: {
                "before": before[name],
                "after": after[name],
                "per_1000_requests": (after[name] - before[name]) / thousands,
            }
            for name in before
        }
        return {"at_once": self.options.streams, "lost": 0, **crowd}, rss


def _whole(stream: Stream) -> Stream:
    if stream.failure is not None:
        raise MeasurementFailed(f"a stream is not whole: {stream.failure}")
    return stream


def _ms(seconds: dict[str, float | None]) -> dict[str, float | None]:
    return {name: None if value is None else 1e3 * value for name, value in seconds.items()}


def show(figures: dict[str, Any]) -> None:
    for transport in TARGETS:
        if transport in figures:
            _show_one(transport, figures[transport], figures["rss_mb"][transport])


def _show_one(transport: Transport, one: dict[str, Any], rss: dict[str, Any]) -> None:
    crowd, added, first = one["streams"], one["added_ms"], one["added_first_ms"]
    rows = [
        ["requests per second", f"{one['requests_per_s']:.0f}", f"with {one['clients']} clients"],
        ["tokens per second", f"{one['tokens_per_s']:.0f}", ""],
        [
            f"added at {one['open_loop']['requests_per_s']:.0f}/s, p50 / p99",
            f"{_of(added, 'p50')} / {_of(added, 'p99')}",
            "to the last token",
        ],
        ["", f"{_of(first, 'p50')} / {_of(first, 'p99')}", "to the first"],
        [f"{crowd['at_once']} streams at once", f"{crowd['requests_per_s']:.0f}/s", f"{crowd['lost']} lost"],
    ]
    rows += [
        [f"memory of {name}", f"{each['after']:.0f} MiB", f"{each['per_1000_requests']:+.2f} per 1,000 requests"]
        for name, each in rss.items()
    ]
    cpu = ", ".join(f"{name} {ms:.2f}" for name, ms in sorted(one["cpu_ms_per_request"].items(), key=_by_cost))
    levels = ", ".join(f"{clients}: {rate:.0f}" for clients, rate in one["levels"].items())
    notes = ["", f"requests per second by clients: {levels}", f"processor ms per request: {cpu}"]
    verdict = "met" if one["requests_per_s"] >= TARGETS[transport] else "MISSED"
    notes.append(f"requests per second: {one['requests_per_s']:.0f}, target {TARGETS[transport]:.0f}: {verdict}")
    notes.append(report.target("added, p50", added["p50"], TARGET_P50_MS, _show_ms))
    notes.append(report.target("added, p99", added["p99"], TARGET_P99_MS, _show_ms))
    report.table(f"over {transport.upper()}", ["", "", ""], rows, notes)


def _by_cost(item: tuple[str, float]) -> float:
    return -item[1]


def _of(values: dict[str, float | None], name: str) -> str:
    return _show_ms(values[name])


def _show_ms(value: float | None) -> str:
    return report.MISSING if value is None else f"{value:.1f} ms"
