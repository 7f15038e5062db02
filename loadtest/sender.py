"""`python -m loadtest.sender`: the process that sends. Started by `loadtest run`, one for each run.

An open loop is only as good as the hand that keeps its times. So the sender has a process, and a loop, of its own:
what the run hears on the bus, counts and draws is done elsewhere; prompts come ready-made; connections are made in
the warm-up; the garbage collector has nothing old to look at. It measures how late each request left all the same.

Standard input: one `SendPlan`, MessagePack, to the end. Standard output: a line of JSON per `Said`. All times are of
the machine's monotonic clock, which the parent reads too. It ends with its parent, or when the plan is done.
"""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Literal

import msgspec

from common.errors import PecSchedError
from common.messages.base import Record
from common.messages.requests import LengthClass
from common.runtime.supervisor import Supervisor
from loadtest.client import Answer, Client
from loadtest.nats_client import Door, NatsClient
from loadtest.workload import Ask

Via = Literal["http", "nats"]

START_IN_S = 0.5
"""Between the end of the warm-up and time zero."""
IN_FLIGHT_MAX = 8_192
"""Requests that wait for their answers at once; further ones count as failed, unsent."""
NICE = -10
"""Where no real-time class is allowed."""


class Send(Record, frozen=True, kw_only=True, array_like=True):
    """One request, ready to leave."""

    at_s: float
    """After time zero."""
    kind: LengthClass
    prompt_tokens: int
    output_tokens: int
    request_id: str
    body: bytes

    @property
    def ask(self) -> Ask:
        return Ask(self.kind, self.prompt_tokens, self.output_tokens, self.body)


class SendPlan(Record, frozen=True, kw_only=True):
    via: Via
    url: str
    """Of the router or, via NATS, of the server."""
    api_key: str = ""
    timeout_s: float
    """Of a whole answer."""
    warm_up: tuple[Send, ...]
    """At once, before time zero; all must be answered."""
    sends: tuple[Send, ...]
    """In order of time."""


class Sent(Record, frozen=True, kw_only=True, array_like=True):
    """What came of one request. Seconds after time zero."""

    sent_s: float
    first_s: float | None
    last_s: float | None
    failure: str | None


class WarmedUp(Record, frozen=True, kw_only=True, tag=True):
    zero_s: float
    """Time zero, of the monotonic clock; it lies ahead."""


class Answered(Record, frozen=True, kw_only=True, tag=True):
    """One request more has its answer, or will not get one."""


class Done(Record, frozen=True, kw_only=True, tag=True):
    sent: tuple[Sent, ...]
    """As in the plan."""
    busy: float
    """Share of one core that the sender used between time zero and the last answer."""


class Failed(Record, frozen=True, kw_only=True, tag=True):
    reason: str


Said = WarmedUp | Answered | Done | Failed

_encode_line = msgspec.json.Encoder().encode


def say(said: Said) -> None:
    """A line to the parent."""
    sys.stdout.buffer.write(_encode_line(said) + b"\n")
    sys.stdout.buffer.flush()


@asynccontextmanager
async def connected(via: Via, url: str, *, timeout_s: float, api_key: str = "") -> AsyncIterator[Door]:
    """A door, closed at the end of the block. Raises: ClientError; over HTTP, only once it is used."""
    door: Door
    if via == "http":
        door = Client(url, timeout_s=timeout_s, api_key=api_key)
    else:
        door = await NatsClient.connect(url, timeout_s=timeout_s)
    try:
        yield door
    finally:
        await door.close()


async def warm_up(door: Door, sends: tuple[Send, ...]) -> str | None:
    """Why it failed; None: every one was answered."""
    async with Supervisor() as tasks:
        answers = [tasks.spawn(door.complete(send.ask, send.request_id), name=send.request_id) for send in sends]
        for send, answer in zip(sends, answers, strict=True):
            failure = (await answer).failure(send.ask)
            if failure is not None:
                return failure
    return None


async def hold(door: Door, sends: tuple[Send, ...], zero_s: float) -> list[Sent]:
    """Send each at its time, however late the answers to others are; wait for all answers."""
    waiting = 0

    async def one(send: Send) -> Sent:
        nonlocal waiting
        if waiting >= IN_FLIGHT_MAX:
            answer = Answer(time.monotonic(), error=f"not sent: {waiting} requests wait for their answers")
        else:
            waiting += 1
            answer = await door.complete(send.ask, send.request_id)
            waiting -= 1
        say(Answered())
        return _sent(answer, send, zero_s)

    async with Supervisor() as tasks:
        running = []
        for send in sends:
            await asyncio.sleep(zero_s + send.at_s - time.monotonic())
            running.append(tasks.spawn(one(send), name=send.request_id))
        return await asyncio.gather(*running)


def _sent(answer: Answer, send: Send, zero_s: float) -> Sent:
    return Sent(
        sent_s=answer.sent_s - zero_s,
        first_s=None if answer.first_s is None else answer.first_s - zero_s,
        last_s=None if answer.last_s is None else answer.last_s - zero_s,
        failure=answer.failure(send.ask),
    )


async def perform(plan: SendPlan) -> None:
    """The whole of it. Raises: PecSchedError."""
    async with connected(plan.via, plan.url, timeout_s=plan.timeout_s, api_key=plan.api_key) as door:
        failure = await warm_up(door, plan.warm_up)
        if failure is not None:
            say(Failed(reason=f"the warm-up failed: {failure}"))
            return
        gc.collect()
        gc.freeze()
        zero_s = time.monotonic() + START_IN_S
        say(WarmedUp(zero_s=zero_s))
        begun_cpu_s = time.process_time()
        sent = await hold(door, plan.sends, zero_s)
        busy = (time.process_time() - begun_cpu_s) / max(time.monotonic() - zero_s, 1e-9)
        say(Done(sent=tuple(sent), busy=busy))


def come_first() -> None:
    """What sends at a time must not wait for a core behind what computes. Measured beside eleven runnable processes on
    two cores: woken 2 ms late at p99 in the real-time class, 22 ms with the niceness alone, 28 ms without either."""
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(os.sched_get_priority_min(os.SCHED_RR)))
    except (OSError, AttributeError):  # not allowed, or not this system's
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, NICE)


def main() -> int:
    """Read the plan, perform it."""
    plan = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=SendPlan)
    come_first()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        asyncio.run(perform(plan))
    except PecSchedError as error:
        say(Failed(reason=str(error)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
