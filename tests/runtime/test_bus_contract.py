"""One contract, two buses: whatever holds here, roles may rely on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from common.runtime.bus import Bus, BusError, BusTimeout, Delivery, Endpoint, Handler, NoResponders
from common.runtime.bus_memory import MemoryBroker, MemoryBus
from common.runtime.bus_nats import connect_nats
from services.embedded import EmbeddedServer

WAIT_S = 10.0


class MemoryWorld:
    def __init__(self) -> None:
        self.broker = MemoryBroker(seed=7)
        self.buses: list[Bus] = []

    async def bus(self, name: str) -> Bus:
        self.buses.append(MemoryBus(self.broker, name))
        return self.buses[-1]

    @asynccontextmanager
    async def outage(self) -> AsyncIterator[None]:
        self.broker.cut()
        yield
        self.broker.heal()


class NatsWorld:
    def __init__(self, server: EmbeddedServer) -> None:
        self.server = server
        self.buses: list[Bus] = []

    async def bus(self, name: str) -> Bus:
        self.buses.append(await connect_nats(self.server.url, name))
        return self.buses[-1]

    @asynccontextmanager
    async def outage(self) -> AsyncIterator[None]:
        await self.server.stop()
        # Until every client has noticed: only then is the buffer in use.
        await eventually(lambda: all("reconnecting" in repr(bus) for bus in self.buses))
        yield
        await self.server.start()


World = MemoryWorld | NatsWorld


@pytest.fixture(params=["memory", "nats"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    if request.param == "memory":
        memory = MemoryWorld()
        yield memory
        for bus in memory.buses:
            await bus.close()
        return
    async with EmbeddedServer.nats() as server:
        nats = NatsWorld(server)
        yield nats
        for bus in nats.buses:
            await bus.close()


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)  # another process changes it: there is nothing to be woken by


async def outcome(publishing: Coroutine[Any, Any, None]) -> str:
    try:
        await publishing
    except BusError as error:
        return str(error)
    return "sent"


class Received:
    """A handler that keeps what it got."""

    def __init__(self) -> None:
        self.deliveries: list[Delivery] = []
        self._came = asyncio.Event()

    async def __call__(self, delivery: Delivery) -> None:
        self.deliveries.append(delivery)
        self._came.set()

    @property
    def data(self) -> list[bytes]:
        return [delivery.data for delivery in self.deliveries]

    async def count(self, wanted: int) -> None:
        async with asyncio.timeout(WAIT_S):
            while len(self.deliveries) < wanted:
                self._came.clear()
                await self._came.wait()


def echo(bus: Bus, *, prefix: bytes = b"") -> Handler:
    async def handle(delivery: Delivery) -> None:
        assert delivery.reply is not None
        await bus.publish(delivery.reply, prefix + delivery.data, headers=delivery.headers)

    return handle


async def test_a_subscription_receives_its_subject_and_no_other(world: World) -> None:
    listener, speaker, received = await world.bus("listener"), await world.bus("speaker"), Received()
    await listener.subscribe("orders.one", received)
    await speaker.publish("orders.two", b"not this")
    await speaker.publish("orders.one.more", b"nor this")
    await speaker.publish("orders.one", b"this", reply="answers.here", headers={"k": "v"})
    await received.count(1)
    assert received.deliveries == [
        Delivery(subject="orders.one", data=b"this", reply="answers.here", headers={"k": "v"})
    ]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.*", [b"a.b", b"a.c"]),
        ("a.>", [b"a.b", b"a.b.c", b"a.c"]),
        ("*.b", [b"a.b", b"x.b"]),
        (">", [b"a", b"a.b", b"x.b", b"a.b.c", b"a.c"]),
        ("a.*.c", [b"a.b.c"]),
    ],
)
async def test_wildcards(world: World, pattern: str, expected: list[bytes]) -> None:
    listener, speaker, received = await world.bus("listener"), await world.bus("speaker"), Received()
    await listener.subscribe(pattern, received)
    last = Received()
    await listener.subscribe("end", last)
    for subject in ("a", "a.b", "x.b", "a.b.c", "a.c"):
        await speaker.publish(subject, subject.encode())
    await speaker.publish("end", b"end")
    await last.count(1)
    await received.count(len(expected))
    assert [data for data in received.data if data != b"end"] == expected


async def test_messages_of_one_publisher_stay_in_order(world: World) -> None:
    listener, speaker, received = await world.bus("listener"), await world.bus("speaker"), Received()
    await listener.subscribe("numbers", received)
    sent = [str(i).encode() for i in range(1_000)]
    for data in sent:
        await speaker.publish("numbers", data)
    await received.count(len(sent))
    assert received.data == sent


async def test_handlers_of_one_subscription_run_one_after_another(world: World) -> None:
    bus = await world.bus("both")
    running, overlapped, done = 0, False, asyncio.Event()

    async def slow(delivery: Delivery) -> None:
        nonlocal running, overlapped
        running += 1
        overlapped = overlapped or running > 1
        await asyncio.sleep(0)
        running -= 1
        if delivery.data == b"last":
            done.set()

    await bus.subscribe("work", slow)
    for data in (b"1", b"2", b"3", b"last"):
        await bus.publish("work", data)
    await asyncio.wait_for(done.wait(), WAIT_S)
    assert not overlapped


async def test_a_queue_group_shares_and_others_still_hear_everything(world: World) -> None:
    speaker = await world.bus("speaker")
    first, second, everything = Received(), Received(), Received()
    await (await world.bus("one")).subscribe("jobs", first, queue="workers")
    await (await world.bus("two")).subscribe("jobs", second, queue="workers")
    await (await world.bus("auditor")).subscribe("jobs", everything)
    sent = {str(i).encode() for i in range(200)}
    for data in sent:
        await speaker.publish("jobs", data)
    await everything.count(200)
    await eventually(lambda: len(first.data) + len(second.data) >= 200)
    assert first.data
    assert second.data
    assert sorted(first.data + second.data) == sorted(sent)


async def test_request_and_answer_with_headers(world: World) -> None:
    server, client = await world.bus("server"), await world.bus("client")
    await server.subscribe("echo", echo(server, prefix=b"re: "))
    answer = await client.request("echo", b"hello", timeout_s=WAIT_S, headers={"content-type": "text/plain"})
    assert answer.data == b"re: hello"
    assert answer.headers["content-type"] == "text/plain"


async def test_many_requests_at_once_get_their_own_answers(world: World) -> None:
    server, client = await world.bus("server"), await world.bus("client")
    await server.subscribe("echo", echo(server))
    questions = [str(i).encode() for i in range(100)]
    answers = await asyncio.gather(*(client.request("echo", q, timeout_s=WAIT_S) for q in questions))
    assert [answer.data for answer in answers] == questions


async def test_a_request_that_nobody_serves_fails_at_once(world: World) -> None:
    client = await world.bus("client")
    with pytest.raises(NoResponders, match=r"nobody\.here"):
        await client.request("nobody.here", b"", timeout_s=WAIT_S)


async def test_a_request_without_an_answer_times_out(world: World) -> None:
    server, client, received = await world.bus("server"), await world.bus("client"), Received()
    await server.subscribe("silent", received)
    with pytest.raises(BusTimeout, match="silent"):
        await client.request("silent", b"", timeout_s=0.05)


async def test_a_message_above_the_limit_is_refused_and_the_bus_stays_usable(world: World) -> None:
    bus, received = await world.bus("both"), Received()
    await bus.subscribe("big", received)
    with pytest.raises(BusError, match="the server takes at most"):
        await bus.publish("big", b"x" * (bus.max_payload + 1))
    with pytest.raises(BusError, match="the server takes at most"):
        await bus.publish("big", b"x" * (bus.max_payload - 10), headers={"counts": "too"})
    with pytest.raises(BusError, match="the server takes at most"):
        await bus.request("big", b"x" * (bus.max_payload + 1), timeout_s=1.0)
    await bus.publish("big", b"x" * bus.max_payload)
    await received.count(1)
    assert [len(data) for data in received.data] == [bus.max_payload]


@pytest.mark.parametrize("subject", ["", "with space", "new\nline"])
async def test_a_subject_that_is_none_is_refused(world: World, subject: str) -> None:
    bus = await world.bus("speaker")
    with pytest.raises(BusError):
        await bus.publish(subject, b"")


async def test_a_handler_that_fails_does_not_end_its_subscription(world: World) -> None:
    bus, handled = await world.bus("both"), Received()

    async def handle(delivery: Delivery) -> None:
        if delivery.data == b"bad":
            raise ValueError("bad message")
        await handled(delivery)

    await bus.subscribe("mixed", handle)
    for data in (b"good", b"bad", b"good again"):
        await bus.publish("mixed", data)
    await handled.count(2)
    assert handled.data == [b"good", b"good again"]


async def test_nothing_arrives_after_unsubscribe(world: World) -> None:
    bus, stopped, still = await world.bus("both"), Received(), Received()
    subscription = await bus.subscribe("news", stopped)
    await bus.subscribe("news", still)
    await bus.publish("news", b"1")
    await stopped.count(1)
    await subscription.unsubscribe()
    await bus.publish("news", b"2")
    await still.count(2)
    assert stopped.data == [b"1"]


async def test_instances_of_a_service_share_its_requests(world: World) -> None:
    client = await world.bus("client")
    for name in (b"one", b"two"):
        server = await world.bus(name.decode())
        await server.serve("pecsched", "1.0.0", "test", [Endpoint("ask", "v1.ask", echo(server, prefix=name))])
    answers = [await client.request("v1.ask", b"", timeout_s=WAIT_S) for _ in range(50)]
    assert {answer.data for answer in answers} == {b"one", b"two"}


async def test_a_service_may_answer_with_many_messages(world: World) -> None:
    server, client, received = await world.bus("server"), await world.bus("client"), Received()

    async def stream(delivery: Delivery) -> None:
        assert delivery.reply is not None
        for i in range(5):
            await server.publish(delivery.reply, str(i).encode(), headers={"last": "1"} if i == 4 else None)

    await server.serve("pecsched", "1.0.0", "test", [Endpoint("stream", "v1.stream", stream)])
    inbox = client.new_inbox()
    await client.subscribe(inbox, received)
    await client.publish("v1.stream", b"", reply=inbox)
    await received.count(5)
    assert received.data == [b"0", b"1", b"2", b"3", b"4"]
    assert [bool(d.headers) for d in received.deliveries] == [False] * 4 + [True]


async def test_a_service_that_fails_answers_with_an_error(world: World) -> None:
    server, client = await world.bus("server"), await world.bus("client")

    async def fail(delivery: Delivery) -> None:
        raise ValueError("no such model")

    service = await server.serve("pecsched", "1.0.0", "test", [Endpoint("ask", "v1.ask", fail)])
    answer = await client.request("v1.ask", b"", timeout_s=WAIT_S)
    assert answer.headers["Nats-Service-Error-Code"] == "500"
    assert "no such model" in answer.headers["Nats-Service-Error"]
    await service.unsubscribe()
    with pytest.raises(NoResponders):
        await client.request("v1.ask", b"", timeout_s=WAIT_S)


async def test_a_service_that_ends_handles_what_is_on_its_way(world: World) -> None:
    server, client, answers = await world.bus("server"), await world.bus("client"), Received()
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def answer(delivery: Delivery) -> None:
        begun.set()
        await go_on.wait()
        assert delivery.reply is not None
        await server.publish(delivery.reply, delivery.data)

    service = await server.serve("pecsched", "1.0.0", "test", [Endpoint("ask", "v1.ask", answer)])
    inbox = client.new_inbox()
    await client.subscribe(inbox, answers)
    for number in range(3):
        await client.publish("v1.ask", str(number).encode(), reply=inbox)
    await client.flush()
    await begun.wait()
    ending = asyncio.create_task(service.unsubscribe())
    await asyncio.sleep(0)
    go_on.set()
    await ending
    await answers.count(3)
    assert answers.data == [b"0", b"1", b"2"]
    with pytest.raises(NoResponders):
        await client.request("v1.ask", b"", timeout_s=WAIT_S)


async def test_inboxes_are_unique(world: World) -> None:
    buses = [await world.bus("one"), await world.bus("two")]
    inboxes = [bus.new_inbox() for bus in buses for _ in range(100)]
    assert len(set(inboxes)) == 200


async def test_after_an_outage_the_buffered_messages_arrive_and_subscriptions_live(world: World) -> None:
    listener, speaker, received = await world.bus("listener"), await world.bus("speaker"), Received()
    await listener.subscribe("news", received)
    back = {"listener": asyncio.Event(), "speaker": asyncio.Event()}
    listener.on_reconnect(back["listener"].set)
    speaker.on_reconnect(back["speaker"].set)
    alone = Received()
    await speaker.subscribe("news", alone)
    async with world.outage():
        await speaker.publish("news", b"said meanwhile")
        with pytest.raises(BusError):
            await speaker.flush(timeout_s=0.1)
        assert not back["speaker"].is_set()
    for event in back.values():
        await asyncio.wait_for(event.wait(), WAIT_S)
    # The listener may have come back after the speaker: what was said in between is lost to it (at most once).
    await alone.count(1)
    await speaker.publish("news", b"said after")
    await received.count(1)
    await eventually(lambda: b"said after" in received.data)
    await alone.count(2)
    assert alone.data == [b"said meanwhile", b"said after"]


async def test_what_waits_during_an_outage_is_bounded(world: World) -> None:
    bus = await world.bus("speaker")
    async with world.outage():
        outcomes = [await outcome(bus.publish("news", b"x" * 500_000)) for _ in range(100)]
    assert outcomes[0] == "sent"
    assert "disconnected" in outcomes[-1]


async def test_close_delivers_what_is_pending(world: World) -> None:
    listener, speaker, received = await world.bus("listener"), await world.bus("speaker"), Received()
    await listener.subscribe("news", received)
    for i in range(100):
        await speaker.publish("news", str(i).encode())
    await speaker.close()
    await received.count(100)
    own, late = await world.bus("own"), Received()
    await own.subscribe("self", late)
    for i in range(100):
        await own.publish("self", str(i).encode())
    await own.close()
    assert len(late.data) == 100


async def test_a_closed_bus_refuses_and_closes_again_without_harm(world: World) -> None:
    bus = await world.bus("speaker")
    await bus.close()
    await bus.close()
    with pytest.raises(BusError):
        await bus.publish("news", b"")
    with pytest.raises(BusError):
        await bus.subscribe("news", Received())


async def test_a_server_that_is_not_there_is_named_without_its_password() -> None:
    with pytest.raises(
        BusError, match=r"cannot reach NATS at nats://\*\*\*@127\.0\.0\.1:1: connection refused"
    ) as error:
        await connect_nats("nats://user:secret@127.0.0.1:1", "test", patience_s=0.3)
    assert "secret" not in str(error.value)


async def test_nats_discovers_the_service() -> None:
    async with EmbeddedServer.nats() as server:
        bus = await connect_nats(server.url, "test")
        await bus.serve("pecsched", "1.2.3", "test", [Endpoint("ask", "v1.ask", echo(bus), {"format": "json"})])
        info = await bus.request("$SRV.INFO.pecsched", b"", timeout_s=WAIT_S)
        assert b'"version": "1.2.3"' in info.data
        assert b'"v1.ask"' in info.data
        await bus.close()


async def test_nats_that_ends_the_connection_for_good_is_reported() -> None:
    async with EmbeddedServer.nats() as server:
        gone = asyncio.Event()
        bus = await connect_nats(server.url, "test", on_closed=gone.set)
        # A protocol violation, as a mismatched client version would commit it: the server says -ERR and closes.
        await bus._client._send_command(b"SUB\r\n")
        await bus._client._flush_pending()
        await asyncio.wait_for(gone.wait(), WAIT_S)
        with pytest.raises(BusError):
            await bus.publish("news", b"")
        await bus.close()
