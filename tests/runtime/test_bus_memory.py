"""What only the in-memory bus can do: faults on demand, the same way every time."""

from __future__ import annotations

import asyncio

import pytest

from common.runtime.bus import Delivery
from common.runtime.bus_memory import SUBSCRIPTION_PENDING_MAX, Faults, MemoryBroker, MemoryBus, matches
from common.runtime.virtual_time import run_virtual, virtual


@pytest.mark.parametrize(
    ("pattern", "subject", "expected"),
    [
        ("a.b", "a.b", True),
        ("a.b", "a.b.c", False),
        ("a.b.c", "a.b", False),
        ("a.>", "a", False),
        ("a.>", "a.b.c.d", True),
        ("*", "a", True),
        ("*", "a.b", False),
        ("a.*.*", "a.b", False),
    ],
)
def test_subject_matching(pattern: str, subject: str, expected: bool) -> None:
    assert matches(pattern, subject) is expected


async def exchange(seed: int, faults: Faults, messages: int = 200) -> list[tuple[float, int]]:
    """Two publishers, one listener: (time of arrival, number) of whatever arrived."""
    broker = MemoryBroker(seed=seed, faults=faults)
    listener, publishers = MemoryBus(broker), [MemoryBus(broker, "even"), MemoryBus(broker, "odd")]
    arrived: list[tuple[float, int]] = []

    async def take(delivery: Delivery) -> None:
        arrived.append((asyncio.get_running_loop().time(), int(delivery.data)))

    await listener.subscribe("numbers", take)
    for number in range(messages):
        await publishers[number % 2].publish("numbers", str(number).encode())
        await asyncio.sleep(0.001)
    await asyncio.sleep(60.0)
    await listener.close()
    return arrived


def test_delays_keep_the_order_of_each_publisher_and_mix_them_with_others() -> None:
    arrived = run_virtual(exchange(1, Faults(delay_s=(0.0, 0.05))))
    numbers = [number for _, number in arrived]
    assert [n for n in numbers if n % 2 == 0] == list(range(0, 200, 2))
    assert [n for n in numbers if n % 2 == 1] == list(range(1, 200, 2))
    assert numbers != sorted(numbers)


def test_the_same_seed_gives_the_same_run() -> None:
    faults = Faults(delay_s=(0.0, 0.05), drop_share=0.2)
    first = run_virtual(exchange(1, faults))
    assert run_virtual(exchange(1, faults)) == first
    assert run_virtual(exchange(2, faults)) != first
    assert 100 < len(first) < 200


@virtual
async def test_messages_are_dropped_by_rule() -> None:
    faults = Faults(drop_if=lambda sender, delivery: sender == "even")
    arrived = await exchange(1, faults)
    assert [number for _, number in arrived] == list(range(1, 200, 2))


@virtual
async def test_who_is_cut_off_alone_misses_what_others_say() -> None:
    broker = MemoryBroker()
    listener, speaker = MemoryBus(broker, "listener"), MemoryBus(broker, "speaker")
    got: list[bytes] = []
    reconnected: list[str] = []
    listener.on_reconnect(lambda: reconnected.append("listener"))
    speaker.on_reconnect(lambda: reconnected.append("speaker"))

    async def take(delivery: Delivery) -> None:
        got.append(delivery.data)

    await listener.subscribe("news", take)
    broker.cut("listener")
    await speaker.publish("news", b"missed")
    await asyncio.sleep(1.0)
    broker.heal("listener")
    await speaker.publish("news", b"heard")
    await asyncio.sleep(1.0)
    assert (got, reconnected) == ([b"heard"], ["listener"])
    with pytest.raises(KeyError):
        broker.cut("nobody")


@virtual
async def test_a_slow_subscriber_loses_messages_rather_than_growing_without_bound() -> None:
    broker = MemoryBroker()
    bus, release, handled = MemoryBus(broker), asyncio.Event(), 0

    async def slow(_: Delivery) -> None:
        nonlocal handled
        handled += 1
        await release.wait()

    await bus.subscribe("news", slow)
    for _ in range(SUBSCRIPTION_PENDING_MAX + 100):
        await bus.publish("news", b"")
    release.set()
    await bus.close()
    assert handled == SUBSCRIPTION_PENDING_MAX


def test_repr_tells_the_state() -> None:
    broker = MemoryBroker()
    bus = MemoryBus(broker, "router")
    assert repr(bus) == "MemoryBus('router', connected, subscriptions=0)"
    broker.cut("router")
    assert repr(bus) == "MemoryBus('router', cut off, subscriptions=0)"
