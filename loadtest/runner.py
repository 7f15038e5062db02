"""Sends asks: at their appointed times, or as fast as a number of clients in a loop do.

Open loop: a request is sent at its time however late the answers to earlier ones are, and every latency counts
from that *intended* time. So a cluster that stalls cannot slow down the measuring of its own stall
("coordinated omission"), and what the client itself was late at sending is in the latency, and reported.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from uuid import uuid4

from common.errors import PecSchedError
from common.messages.requests import LengthClass
from common.runtime.supervisor import Supervisor
from loadtest.client import Client
from loadtest.stats import percentile
from loadtest.workload import Ask, Schedule

START_IN_S = 0.2
"""Between the call and time zero of a schedule."""

OnDone = Callable[[], None]


class MeasurementFailed(PecSchedError):
    """There is no figure to be had: what it would be made of did not work."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One request. Times in seconds after the start of its schedule."""

    kind: LengthClass
    intended_s: float
    sent_s: float
    first_s: float | None
    last_s: float | None
    failure: str | None

    @property
    def ttft_s(self) -> float:
        """From the intended arrival to the first token. Of answers without failure only."""
        assert self.first_s is not None
        return self.first_s - self.intended_s

    @property
    def jct_s(self) -> float:
        """From the intended arrival to the last token. Of answers without failure only."""
        assert self.last_s is not None
        return self.last_s - self.intended_s


@dataclass(frozen=True, slots=True)
class OpenLoopRun:
    samples: tuple[Sample, ...]

    def good(self, kind: LengthClass) -> list[Sample]:
        return [sample for sample in self.samples if sample.kind == kind and sample.failure is None]

    @property
    def failures(self) -> list[str]:
        return [sample.failure for sample in self.samples if sample.failure is not None]

    @property
    def late_s_p99(self) -> float | None:
        """How late the client was at sending."""
        return percentile([sample.sent_s - sample.intended_s for sample in self.samples], 99)

    def rps(self, kind: LengthClass) -> float:
        """Answers per second, from time zero to the last of them."""
        ends = [sample.last_s for sample in self.good(kind) if sample.last_s is not None]
        return len(ends) / max(ends) if ends else 0.0


async def run_open_loop(client: Client, schedule: Schedule, on_done: OnDone) -> OpenLoopRun:
    """Send every arrival at its time; wait for all answers (the client bounds each)."""
    loop = asyncio.get_running_loop()
    zero_s = loop.time() + START_IN_S
    run_name = uuid4().hex[:8]

    async def one(number: int, ask: Ask, intended_s: float) -> Sample:
        answer = await client.complete(ask, f"load-{run_name}-{number}")
        on_done()
        return Sample(
            kind=ask.kind,
            intended_s=intended_s,
            sent_s=answer.sent_s - zero_s,
            first_s=None if answer.first_s is None else answer.first_s - zero_s,
            last_s=None if answer.last_s is None else answer.last_s - zero_s,
            failure=answer.failure(ask),
        )

    async with Supervisor() as tasks:
        running = []
        for number, arrival in enumerate(schedule.arrivals):
            await asyncio.sleep(zero_s + arrival.at_s - loop.time())
            running.append(tasks.spawn(one(number, arrival.ask, arrival.at_s), name=f"request {number}"))
        samples = await asyncio.gather(*running)
    return OpenLoopRun(tuple(samples))


async def run_closed_loop(client: Client, asks: Iterator[Ask], concurrency: int, *, count_s: float) -> float:
    """Answers per second with `concurrency` requests always in hand, counted over `count_s` once there were as
    many answers as clients: the first wave fills the cluster. Raises: MeasurementFailed."""
    loop = asyncio.get_running_loop()
    ends: list[float] = []
    run_name = uuid4().hex[:8]

    def counted_until_s() -> float:
        return ends[concurrency - 1] + count_s if len(ends) >= concurrency else math.inf

    async def one_client(which: int) -> None:
        number = 0
        while loop.time() < counted_until_s():
            ask = next(asks)
            answer = await client.complete(ask, f"load-{run_name}-{which}-{number}")
            failure = answer.failure(ask)
            if failure is not None:
                raise MeasurementFailed(f"a request failed while the capacity was measured: {failure}")
            ends.append(loop.time())
            number += 1

    async with Supervisor() as tasks:
        await asyncio.gather(*(tasks.spawn(one_client(i), name=f"client {i}") for i in range(concurrency)))
    return sum(end_s <= counted_until_s() for end_s in ends[concurrency:]) / count_s


async def run_in_turn(client: Client, asks: list[Ask], on_done: OnDone) -> OpenLoopRun:
    """One after another, each from its own sending on: service times on an idle cluster."""
    samples = []
    run_name = uuid4().hex[:8]
    for number, ask in enumerate(asks):
        answer = await client.complete(ask, f"load-{run_name}-{number}")
        on_done()
        first_s, last_s = answer.first_s, answer.last_s
        samples.append(
            Sample(
                kind=ask.kind,
                intended_s=0.0,
                sent_s=0.0,
                first_s=None if first_s is None else first_s - answer.sent_s,
                last_s=None if last_s is None else last_s - answer.sent_s,
                failure=answer.failure(ask),
            )
        )
    return OpenLoopRun(tuple(samples))
