"""The loop that never waits."""

from __future__ import annotations

import asyncio
import time

import pytest

from common.runtime.virtual_time import VirtualTimeError, run_virtual, virtual


def test_hours_pass_at_once() -> None:
    async def main() -> float:
        await asyncio.sleep(3_600.0)
        return asyncio.get_running_loop().time()

    assert run_virtual(main()) == 3_600.0


@virtual
async def test_timers_fire_in_the_order_of_their_times() -> None:
    fired: list[tuple[float, str]] = []
    loop = asyncio.get_running_loop()

    async def after(delay_s: float, name: str) -> None:
        await asyncio.sleep(delay_s)
        fired.append((loop.time(), name))

    await asyncio.gather(after(3.0, "c"), after(1.0, "a"), after(2.5, "b"))
    assert fired == [(1.0, "a"), (2.5, "b"), (3.0, "c")]


@virtual
async def test_no_timer_fires_before_its_time() -> None:
    loop = asyncio.get_running_loop()
    await asyncio.sleep(5.0)
    deadline_s = loop.time() + 1e-10
    fired: list[float] = []
    loop.call_at(deadline_s, lambda: fired.append(loop.time()))
    while not fired:  # noqa: ASYNC110 - how the loop treats such short sleeps is what is tested
        await asyncio.sleep(0 if loop.time() >= deadline_s else 1e-12)
    assert fired[0] >= deadline_s


@virtual
async def test_time_stands_still_while_there_is_work() -> None:
    for _ in range(1_000):
        await asyncio.sleep(0)
    assert asyncio.get_running_loop().time() == 0.0


@virtual
async def test_timeouts_work() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(5.0):
            await asyncio.sleep(10.0)
    assert asyncio.get_running_loop().time() == 5.0


def test_waiting_for_nothing_is_an_error_and_not_a_hang() -> None:
    async def main() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(VirtualTimeError, match="waits for something"):
        run_virtual(main())


def test_a_run_without_end_stops_at_the_horizon() -> None:
    async def main() -> None:
        while True:  # noqa: ASYNC110
            await asyncio.sleep(1.0)

    with pytest.raises(VirtualTimeError, match=r"100\.0 virtual seconds"):
        run_virtual(main(), horizon_s=100.0)


@virtual
async def test_threads_run_at_once() -> None:
    real_s = await asyncio.to_thread(time.perf_counter)
    assert real_s > 0.0
    with pytest.raises(ZeroDivisionError):
        await asyncio.to_thread(lambda: 1 / 0)
    assert asyncio.get_running_loop().time() == 0.0


@pytest.fixture
def seven() -> int:
    return 7


@virtual
async def test_fixtures_reach_a_virtual_test(seven: int) -> None:
    assert seven == 7
