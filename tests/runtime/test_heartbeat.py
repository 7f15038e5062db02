"""A heartbeat beats at start, at intervals, and when asked."""

from __future__ import annotations

import asyncio

import pytest

from common.runtime.heartbeat import Heartbeat
from common.runtime.supervisor import Supervisor
from common.runtime.virtual_time import virtual


@virtual
async def test_at_start_at_intervals_and_when_asked() -> None:
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    beats_s: list[float] = []

    async def beat() -> None:
        beats_s.append(loop.time() - start_s)

    heartbeat = Heartbeat(1.0, beat)
    async with Supervisor() as tasks:
        tasks.spawn(heartbeat.run(), name="heartbeat")
        await asyncio.sleep(2.25)
        heartbeat.now()
        await asyncio.sleep(1.5)
    assert beats_s == [0.0, 1.0, 2.0, 2.25, 3.25]


@pytest.mark.parametrize("turns", range(5))
async def test_a_cancel_that_comes_as_it_is_asked_is_heard(turns: int) -> None:
    """`asyncio.wait_for` would swallow it on Python 3.11, and a process that stops would wait for ever."""

    async def beat() -> None:
        pass

    heartbeat = Heartbeat(60.0, beat)
    task = asyncio.get_running_loop().create_task(heartbeat.run())
    await asyncio.sleep(0.01)
    heartbeat.now()
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    _, running = await asyncio.wait([task], timeout=1.0)
    assert not running
