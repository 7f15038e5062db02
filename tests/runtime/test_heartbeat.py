"""A heartbeat beats at start, at intervals, and when asked."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from common.errors import StartupError
from common.runtime.heartbeat import Heartbeat, show_life
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


@virtual
async def test_a_sign_of_life_is_renewed_while_the_loop_runs(tmp_path: Path) -> None:
    file = tmp_path / "alive"
    async with Supervisor() as tasks:
        tasks.spawn(show_life(str(file), 1.0), name="sign of life")
        await asyncio.sleep(0.5)
        assert file.exists()
        for _ in range(3):
            os.utime(file, (0, 0))
            await asyncio.sleep(1.0)
            assert file.stat().st_mtime > 0


async def test_without_a_file_there_is_nothing_to_show() -> None:
    await show_life("", 1.0)


async def test_a_sign_of_life_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"cannot touch .*nowhere/alive: No such file.*--alive-file"):
        await show_life(str(tmp_path / "nowhere" / "alive"), 1.0)
