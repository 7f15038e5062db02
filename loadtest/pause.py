"""`python -m loadtest pause`: how long a short that is ready waits for a long prefill to stand still.

The real prefill worker (service, core, torch engine, one thread) on an in-memory bus, in this process, with
nobody else there; this file plays scheduler and coordinator. A prompt of 7,000 tokens is prefilled
several times: undisturbed, and paused again and again after running for a random time. At each pause a
short arrives (`RunPrefill`) and with it the order to pause; when it is served, the long resumes.

Taken are, in the same process and on one clock,
- *at the worker*: `SegmentPaused.pause_latency_s`, its own measure (short ready, or order received → stopped);
- *from outside*: short sent → word of the stop heard, so that the worker's measure can be believed;
- short sent → its own pass begun.
And of the long: its own computing time with and without pauses, and its first token, which must be the same.
With --ranks the long is a group's (`pause_groups.py`).
"""

from __future__ import annotations

import asyncio
import random
import sys
from array import array
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from common.messages.base import Message
from common.messages.prefill import KvReleased, PrefillFailed, PrefillFinished, RunPrefill
from common.messages.requests import Prompt, RequestSpec, SamplingParams, TokensGenerated
from common.messages.sp import (
    LoadSegment,
    PauseSegment,
    RunSegment,
    SegmentFailed,
    SegmentFinished,
    SegmentLoaded,
    SegmentPart,
    SegmentPaused,
    SegmentPrefilled,
)
from common.runtime import subjects
from common.runtime.bus import Bus, Delivery
from common.runtime.bus_memory import MemoryBroker, MemoryBus
from common.runtime.store_memory import MemoryStore
from common.runtime.supervisor import Supervisor
from common.runtime.wire import WireError, decode, encode
from common.settings import DtypeName, EngineName, PrefillWorkerSettings
from common.units import RequestId, RouterId, WorkerId
from loadtest import report
from loadtest.runner import MeasurementFailed
from loadtest.stats import mean, percentiles, ratio
from loadtest.workload import FIRST_ID, VOCAB
from services.engine.transport_memory import MemoryHub
from services.prefill_worker.main import load_engine
from services.prefill_worker.service import PrefillWorker

RUN_S_MEAN = 0.08
"""How long the long runs between two pauses, exponentially distributed: a pause falls anywhere within a step."""
SHORT_TOKENS = (32, 128)
PLAIN_RUNS = 2
"""Undisturbed prefills: one before, one after."""
ANSWER_S = 120.0
TARGET_P99_S = 0.040
GROUP_TARGET_P99_S = 0.060
WORKER, ROUTER = WorkerId("measured"), RouterId("loadtest")

Heard = (
    SegmentLoaded
    | SegmentPaused
    | SegmentPrefilled
    | SegmentFinished
    | SegmentFailed
    | PrefillFinished
    | PrefillFailed
    | KvReleased
    | TokensGenerated
)
OnPause = Callable[[], None]


@dataclass(frozen=True, slots=True)
class PauseOptions:
    seed: int = 0
    model: str = "embedded"
    cache_dir: str = ""
    tokens: int = 7_000
    threads: int = 1
    dtype: DtypeName = "auto"
    pauses: int = 120
    engine: EngineName = "torch"
    ranks: int = 1


@dataclass(slots=True)
class LongRun:
    """One prefill of the long prompt."""

    at_worker_s: list[float] = field(default_factory=list)
    outside_s: list[float] = field(default_factory=list)
    waited_s: list[float] = field(default_factory=list)
    compute_s: float = 0.0
    steps: int = 0
    first_token: int = -1


def run(options: PauseOptions) -> dict[str, Any]:
    """Raises: PecSchedError."""
    return asyncio.run(measure(options))


async def measure(options: PauseOptions) -> dict[str, Any]:
    """The same on a loop that runs already."""
    with report.progress() as bars:
        async with _worker(options, bars) as rig:
            return await measure_on(rig, options, bars)


class Prefills(Protocol):
    """What is measured: whatever prefills the long."""

    async def prefill(self, name: str, *, pauses: int, on_pause: OnPause = ...) -> LongRun: ...


async def measure_on(rig: Prefills, options: PauseOptions, bars: report.Bars) -> dict[str, Any]:
    """Raises: MeasurementFailed."""
    plain: list[LongRun] = []
    paused: list[LongRun] = []
    with bars.counting("prefills of the long, undisturbed", PLAIN_RUNS) as step:
        await rig.prefill("warm-up", pauses=0)
        plain.append(await rig.prefill("plain-0", pauses=0))
        step()
        with bars.counting("pauses", options.pauses) as on_pause:
            while (left := options.pauses - sum(len(each.at_worker_s) for each in paused)) > 0:
                paused.append(await rig.prefill(f"paused-{len(paused)}", pauses=left, on_pause=on_pause))
                if not paused[-1].at_worker_s:
                    raise MeasurementFailed("the prefill ended before it could be paused: --tokens is too low")
        plain.append(await rig.prefill("plain-1", pauses=0))
        step()
    return _figures(options, plain, paused)


def _figures(options: PauseOptions, plain: list[LongRun], paused: list[LongRun]) -> dict[str, Any]:
    def all_of(lists: Iterable[list[float]]) -> dict[str, float | None]:
        samples = [sample for each in lists for sample in each]
        return percentiles(samples, 50, 99) | {"max": max(samples)}

    plain_s, paused_s = mean([each.compute_s for each in plain]), mean([each.compute_s for each in paused])
    return {
        "tokens": options.tokens,
        "threads": options.threads,
        "ranks": options.ranks,
        "pauses": sum(len(each.at_worker_s) for each in paused),
        "at_worker_s": all_of(each.at_worker_s for each in paused),
        "outside_s": all_of(each.outside_s for each in paused),
        "short_waited_s": all_of(each.waited_s for each in paused),
        "long_compute_s": {"undisturbed": plain_s, "paused": paused_s, "ratio": ratio(paused_s, plain_s)},
        "long_runs": {"undisturbed": len(plain), "paused": len(paused)},
        "same_first_token": len({each.first_token for each in plain + paused}) == 1,
        "same_steps": len({each.steps for each in plain + paused}) == 1,
    }


@asynccontextmanager
async def _worker(options: PauseOptions, bars: report.Bars) -> AsyncIterator[Rig]:
    """A prefill worker that runs, and what plays the others."""
    settings = PrefillWorkerSettings(
        worker_id=WORKER,
        model=options.model,
        cache_dir=options.cache_dir,
        engine=options.engine,
        dtype=options.dtype,
        threads=options.threads,
    )
    with bars.waiting("loading the model"):
        engine = await asyncio.to_thread(load_engine, settings)
    broker = MemoryBroker()
    worker = PrefillWorker(settings, MemoryBus(broker, "worker"), MemoryStore(), engine, MemoryHub().plane())
    rig = Rig(MemoryBus(broker, "others"), options)
    async with Supervisor() as tasks:
        serving = tasks.spawn(worker.run(), name="prefill worker")
        await worker.started()
        await rig.listen()
        yield rig
        worker.stop()
        await serving


class Ears:
    """Keeps what was heard until it is asked for."""

    def __init__(self) -> None:
        self._said: dict[tuple[type[Message], str], tuple[float, Message]] = {}
        """By kind and request, and when."""
        self._news = asyncio.Event()
        self._failure = ""

    def keep(self, request_id: str, message: Message) -> None:
        self._said[type(message), request_id] = asyncio.get_running_loop().time(), message
        self._news.set()

    def fail(self, reason: str) -> None:
        """Whoever waits, or will, raises."""
        self._failure = reason
        self._news.set()

    async def hears(self, request_id: str, *kinds: type[Message]) -> tuple[float, Message]:
        """When one of these was heard of this request, and what. Raises: MeasurementFailed."""
        try:
            async with asyncio.timeout(ANSWER_S):
                while True:
                    if self._failure:
                        raise MeasurementFailed(self._failure)
                    for kind in kinds:
                        if (kind, request_id) in self._said:
                            return self._said.pop((kind, request_id))
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            names = " or ".join(kind.__name__ for kind in kinds)
            raise MeasurementFailed(f"no {names} of {request_id} within {ANSWER_S:g} s") from None


class Rig:
    """Scheduler, coordinator and router of one worker, as far as this needs them."""

    def __init__(self, bus: Bus, options: PauseOptions) -> None:
        self._bus = bus
        self._rng = random.Random(options.seed)
        self._prompt = random_prompt(self._rng, options.tokens)
        self._ears = Ears()
        self._hears = self._ears.hears
        self._ended: set[str] = set()
        """Longs whose prefill is over."""

    async def listen(self) -> None:
        for subject in (subjects.COORDINATOR, subjects.SCHEDULER, subjects.router(ROUTER)):
            await self._bus.subscribe(subject, self._hear)

    async def prefill(self, name: str, *, pauses: int, on_pause: OnPause = lambda: None) -> LongRun:
        """Prefill the prompt once, with at most so many pauses. Raises: MeasurementFailed."""
        spec, measured = spec_of(name, self._prompt), LongRun()
        part = SegmentPart(start=0, tokens=spec.prompt.tokens)
        await self._order(LoadSegment(worker_id=WORKER, spec=spec, rank=0, members=(WORKER,), parts=(part,)))
        await self._hears(name, SegmentLoaded)
        await self._order(RunSegment(worker_id=WORKER, request_id=spec.request_id, attempt=0))
        while len(measured.at_worker_s) < pauses:
            await asyncio.sleep(self._rng.expovariate(1.0 / RUN_S_MEAN))
            if not await self._pause(spec, measured):
                break
            on_pause()
            await self._order(RunSegment(worker_id=WORKER, request_id=spec.request_id, attempt=0))
        _, ended = await self._hears(name, SegmentPrefilled)
        _, token = await self._hears(name, TokensGenerated)
        await self._hears(name, SegmentFinished)
        assert isinstance(ended, SegmentPrefilled)
        assert isinstance(token, TokensGenerated)
        measured.compute_s, measured.steps = ended.compute_s, ended.steps
        measured.first_token = token.chunks[0].token_ids[0]
        return measured

    async def _pause(self, long: RequestSpec, measured: LongRun) -> bool:
        """A short arrives, the long stands, the short is served. False: the long had ended before."""
        tokens = self._rng.randint(*SHORT_TOKENS)
        short = spec_of(f"{long.request_id}-short-{len(measured.at_worker_s)}", random_prompt(self._rng, tokens))
        sent_s = asyncio.get_running_loop().time()
        await self._order(
            RunPrefill(worker_id=WORKER, spec=short, decode_worker_id=WorkerId("nobody"), decode_address="nowhere:1")
        )
        await self._order(PauseSegment(worker_id=WORKER, request_id=long.request_id, attempt=0))
        stopped_s, stopped = await self._hears(long.request_id, SegmentPaused, SegmentPrefilled)
        _, prefilled = await self._hears(short.request_id, PrefillFinished)
        assert isinstance(prefilled, PrefillFinished)
        await self._hears(short.request_id, KvReleased)
        if not isinstance(stopped, SegmentPaused):
            self._ears.keep(long.request_id, stopped)
            return False
        measured.at_worker_s.append(stopped.pause_latency_s)
        measured.outside_s.append(stopped_s - sent_s)
        measured.waited_s.append(prefilled.waited_s)
        return True

    async def _order(self, order: RunPrefill | LoadSegment | RunSegment | PauseSegment) -> None:
        await self._bus.publish(subjects.worker(WORKER), encode(order))

    async def _hear(self, delivery: Delivery) -> None:
        try:
            message = decode(delivery.data, Heard)
        except WireError:
            return  # heartbeats, and what is of no interest here
        if isinstance(message, SegmentPrefilled):
            self._ended.add(message.request_id)
        if isinstance(message, SegmentFailed) and message.request_id in self._ended:
            return  # the order to pause crossed the end of the prefill: there is nothing to pause any more
        if isinstance(message, SegmentFailed | PrefillFailed):
            self._ears.fail(f"{message.request_id}: {message.reason}")
        self._ears.keep(
            message.chunks[0].request_id if isinstance(message, TokensGenerated) else message.request_id, message
        )


def random_prompt(rng: random.Random, tokens: int) -> array[int]:
    return array("i", [rng.randrange(FIRST_ID, VOCAB) for _ in range(tokens)])


def spec_of(name: str, prompt: array[int]) -> RequestSpec:
    """One greedy token: a short that needs no decode worker, a long that ends with its prefill."""
    ids = array("i", prompt)
    if sys.byteorder == "big":
        ids.byteswap()
    return RequestSpec(
        request_id=RequestId(name),
        router_id=ROUTER,
        prompt=Prompt(tokens=len(prompt), inline=ids.tobytes()),
        max_tokens=1,
        sampling=SamplingParams(temperature=0.0),
    )


def show(figures: dict[str, Any]) -> None:
    titles = {
        "at_worker_s": "at the worker: short ready or order received, to stopped",
        "outside_s": "from outside: short sent, to word of the stop",
        "short_waited_s": "short received, to its pass begun",
    }
    rows = [[title, *(report.ms(figures[key][p]) for p in ("p50", "p99", "max"))] for key, title in titles.items()]
    long, runs = figures["long_compute_s"], figures["long_runs"]
    target_s = TARGET_P99_S if figures["ranks"] == 1 else GROUP_TARGET_P99_S
    notes = [
        "",
        f"the long's own computing: {report.s(long['undisturbed'])} undisturbed ({runs['undisturbed']} runs), "
        f"{report.s(long['paused'])} paused ({runs['paused']} runs, {figures['pauses']} pauses): "
        f"{report.times(long['ratio'])}",
        f"its first token: {'the same' if figures['same_first_token'] else 'DIFFERENT'}; "
        f"steps computed: {'the same' if figures['same_steps'] else 'DIFFERENT'}",
        report.target("pause latency from outside, p99", figures["outside_s"]["p99"], target_s, report.ms),
    ]
    title = f"{figures['pauses']} pauses of a prefill of {figures['tokens']} tokens, {figures['threads']} thread(s)"
    if figures["ranks"] > 1:
        title += f" on each of {figures['ranks']} workers"
    report.table(title, ["", "p50", "p99", "max"], rows, notes)
