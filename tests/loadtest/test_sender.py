"""The process that sends: it holds its times whatever the answers do, and says what went wrong."""

from __future__ import annotations

import asyncio
import time

import msgspec
import pytest

from loadtest import sender
from loadtest.client import Answer, ClientError
from loadtest.replay import send
from loadtest.runner import MeasurementFailed
from loadtest.sender import Answered, Send, SendPlan, hold, warm_up
from loadtest.workload import Ask


def planned(*times_s: float) -> tuple[Send, ...]:
    return tuple(
        Send(at_s=at_s, kind="short", prompt_tokens=1, output_tokens=2, request_id=f"r{number}", body=b"{}")
        for number, at_s in enumerate(times_s)
    )


class Door:
    """Answers when told to."""

    def __init__(self, *, answers: bool = True, expected: int = 0) -> None:
        self.asked: list[tuple[str, float]] = []
        self.expected = expected
        self.all_asked = asyncio.Event()
        self.may_answer = asyncio.Event()
        if answers:
            self.may_answer.set()

    async def complete(self, ask: Ask, request_id: str) -> Answer:
        sent_s = time.monotonic()
        self.asked.append((request_id, sent_s))
        if len(self.asked) == self.expected:
            self.all_asked.set()
        await self.may_answer.wait()
        now_s = time.monotonic()
        return Answer(sent_s, 200, now_s, now_s, tokens=ask.output_tokens, finish_reason="length", done=True)

    async def get(self, path: str) -> None:
        raise ClientError(path)

    async def close(self) -> None:
        self.may_answer.set()


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[sender.Said]:
    lines: list[sender.Said] = []
    monkeypatch.setattr(sender, "say", lines.append)
    return lines


async def test_requests_leave_at_their_times_though_nothing_is_answered(said: list[sender.Said]) -> None:
    times_s = (0.0, 0.0, 0.02, 0.05, 0.05)
    door = Door(answers=False, expected=len(times_s))
    zero_s = time.monotonic() + 0.01
    holding = asyncio.create_task(hold(door, planned(*times_s), zero_s))
    async with asyncio.timeout(30):
        await door.all_asked.wait()
    assert not said
    door.may_answer.set()
    sent = await holding
    assert [name for name, _ in door.asked] == ["r0", "r1", "r2", "r3", "r4"]
    assert all(each.sent_s >= at_s for each, at_s in zip(sent, times_s, strict=True))
    assert all(each.failure is None for each in sent)
    assert said == [Answered()] * 5


async def test_more_than_the_limit_in_flight_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = asyncio.Event()
    monkeypatch.setattr(sender, "say", lambda _: refused.set())
    monkeypatch.setattr(sender, "IN_FLIGHT_MAX", 2)
    door = Door(answers=False)
    holding = asyncio.create_task(hold(door, planned(0.0, 0.0, 0.0), time.monotonic()))
    async with asyncio.timeout(30):
        await refused.wait()
    door.may_answer.set()
    sent = await holding
    assert [each.failure for each in sent] == [None, None, "not sent: 2 requests wait for their answers"]
    assert len(door.asked) == 2


async def test_a_warm_up_that_is_not_answered_says_why() -> None:
    class Broken(Door):
        async def complete(self, ask: Ask, request_id: str) -> Answer:
            return Answer(0.0, error="status 503: no workers")

    assert await warm_up(Broken(), planned(0.0)) == "status 503: no workers"
    assert await warm_up(Door(), planned(0.0, 0.0)) is None


async def test_the_process_tells_in_one_line_that_the_cluster_is_missing() -> None:
    plan = SendPlan(via="http", url="http://127.0.0.1:9", timeout_s=5.0, warm_up=planned(0.0), sends=planned(0.0))
    async with asyncio.timeout(60):
        with pytest.raises(MeasurementFailed, match=r"127\.0\.0\.1:9 cannot be reached") as caught:
            await send(plan, lambda: None)
    assert "\n" not in str(caught.value)


async def test_the_process_counts_what_fails_and_goes_on() -> None:
    plan = SendPlan(via="http", url="http://127.0.0.1:9", timeout_s=5.0, warm_up=(), sends=planned(0.0, 0.01, 0.02))
    steps: list[None] = []
    async with asyncio.timeout(60):
        zero_s, done = await send(plan, lambda: steps.append(None))
    assert zero_s < time.monotonic()
    assert len(done.sent) == len(steps) == 3
    assert all("cannot be reached" in (each.failure or "") for each in done.sent)


def test_a_plan_survives_its_way_to_the_process() -> None:
    plan = SendPlan(via="nats", url="nats://x", timeout_s=1.0, warm_up=planned(0.0), sends=planned(0.5, 1.0))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=SendPlan) == plan
