"""The client over NATS, against a router that answers badly, late or not at all; on the bus in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from common.runtime import subjects
from common.runtime.bus import Delivery
from common.runtime.bus_memory import MemoryBroker, MemoryBus
from loadtest.client import ClientError
from loadtest.nats_client import NatsClient
from loadtest.workload import Ask, nats_body

TOKENS = 3
Answers = list[dict[str, Any]]
WHOLE: Answers = [
    {"token_ids": [7]},
    {"token_ids": [8, 9], "finish_reason": "length"},
    {"done": True, "usage": {}},
]


def ask(name: str = "r") -> Ask:
    return Ask("short", 2, TOKENS, nats_body([1, 2], TOKENS, name))


@asynccontextmanager
async def router(answers: Answers, cancelled: list[str] | None = None) -> AsyncIterator[NatsClient]:
    """A client of a router that answers so."""
    broker = MemoryBroker()
    served, mine = MemoryBus(broker, "router"), MemoryBus(broker, "client")

    async def generate(delivery: Delivery) -> None:
        assert delivery.reply is not None
        for answer in answers:
            await served.publish(delivery.reply, msgspec.json.encode(answer))

    async def cancel(delivery: Delivery) -> None:
        if cancelled is not None:
            cancelled.append(msgspec.json.decode(delivery.data)["request_id"])

    await served.subscribe(subjects.GENERATE, generate)
    await served.subscribe(subjects.CANCEL, cancel)
    client = await NatsClient.on(mine, timeout_s=0.2)
    try:
        yield client
    finally:
        await client.close()
        await served.close()


async def test_a_stream_is_counted_token_by_token() -> None:
    async with router(WHOLE) as client:
        answers = await asyncio.gather(*(client.complete(ask(), "r") for _ in range(5)))
    for answer in answers:
        assert answer.failure(ask()) is None
        assert answer.tokens == TOKENS
        assert answer.first_s is not None
        assert answer.last_s is not None
        assert answer.sent_s <= answer.first_s <= answer.last_s


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ([{"error": {"message": "queue full"}, "done": True}], "queue full"),
        ([{"token_ids": [1], "finish_reason": "stop"}, {"done": True}], "1 tokens of 3"),
        ([{"token_ids": "x"}], "unreadable answer"),
    ],
)
async def test_what_is_not_the_whole_answer_is_a_failure(answers: Answers, why: str) -> None:
    async with router(answers) as client:
        answer = await client.complete(ask(), "r")
    assert why in (answer.failure(ask()) or "")


async def test_silence_ends_and_cancels_the_request() -> None:
    cancelled: list[str] = []
    async with router(WHOLE[:1], cancelled) as client:
        answer = await client.complete(ask("late"), "late")
        await client._bus.flush()
    assert answer.failure(ask()) == "no whole answer within 0.2 s"
    assert cancelled == ["late"]


async def test_who_gives_up_cancels_the_request() -> None:
    cancelled: list[str] = []
    async with router([], cancelled) as client:
        waiting = asyncio.create_task(client.complete(ask("left"), "left"))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await client._bus.flush()
    assert cancelled == ["left"]


async def test_nobody_describes_the_cluster() -> None:
    async with router([]) as client:
        with pytest.raises(ClientError, match="does a router run there"):
            await client.get("/v1/models")


async def test_no_nats_is_one_line() -> None:
    with pytest.raises(ClientError, match=r"cannot reach NATS at nats://127\.0\.0\.1:9") as caught:
        await NatsClient.connect("nats://127.0.0.1:9", timeout_s=1.0)
    assert "\n" not in str(caught.value)
