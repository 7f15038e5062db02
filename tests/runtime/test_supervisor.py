"""Tasks end with their owner, and their owner ends with the first that fails."""

from __future__ import annotations

import asyncio

import pytest

from common.runtime.supervisor import Supervisor
from common.runtime.virtual_time import virtual


class Tracked:
    """Sleeps for ever and says whether it was cancelled."""

    def __init__(self) -> None:
        self.cancelled = False

    async def run(self) -> None:
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            self.cancelled = True
            raise


async def fail_after(delay_s: float, error: Exception) -> None:
    await asyncio.sleep(delay_s)
    raise error


@virtual
async def test_leaving_the_block_cancels_and_awaits_what_still_runs() -> None:
    tracked = [Tracked(), Tracked()]
    async with Supervisor() as tasks:
        spawned = [tasks.spawn(t.run(), name=f"task-{i}") for i, t in enumerate(tracked)]
        await asyncio.sleep(1.0)
        assert tasks.running == ("task-0", "task-1")
    assert [t.cancelled for t in tracked] == [True, True]
    assert all(task.done() for task in spawned)
    assert tasks.running == ()


@virtual
async def test_the_block_ends_with_the_exception_of_a_task() -> None:
    other = Tracked()
    with pytest.raises(KeyError, match="lost"):  # noqa: PT012
        async with Supervisor() as tasks:
            tasks.spawn(other.run(), name="other")
            tasks.spawn(fail_after(2.0, KeyError("lost")), name="failing")
            await asyncio.sleep(1_000.0)
    assert other.cancelled
    assert asyncio.get_running_loop().time() == 2.0


@virtual
async def test_the_first_of_several_failures_is_raised() -> None:
    with pytest.raises(KeyError, match="first"):  # noqa: PT012
        async with Supervisor() as tasks:
            tasks.spawn(fail_after(1.0, KeyError("first")), name="first")
            tasks.spawn(fail_after(1.0, ValueError("second")), name="second")
            await asyncio.sleep(1_000.0)


@virtual
async def test_an_exception_of_the_block_itself_passes_and_cancels_the_tasks() -> None:
    tracked = Tracked()
    with pytest.raises(ValueError, match="of the block"):  # noqa: PT012
        async with Supervisor() as tasks:
            tasks.spawn(tracked.run(), name="tracked")
            await asyncio.sleep(0)
            raise ValueError("of the block")
    assert tracked.cancelled


@virtual
async def test_cancelling_the_owner_cancels_the_tasks() -> None:
    tracked = Tracked()

    async def own() -> None:
        async with Supervisor() as tasks:
            tasks.spawn(tracked.run(), name="tracked")
            await asyncio.sleep(1_000.0)

    owner = asyncio.ensure_future(own())
    await asyncio.sleep(1.0)
    owner.cancel()
    with pytest.raises(asyncio.CancelledError):
        await owner
    assert tracked.cancelled


@virtual
async def test_stop_ends_the_tasks_and_the_block_goes_on() -> None:
    tracked = Tracked()
    async with Supervisor() as tasks:
        tasks.spawn(tracked.run(), name="tracked")
        await asyncio.sleep(0)
        await tasks.stop()
        assert tracked.cancelled
        result = await tasks.spawn(asyncio.sleep(1.0, "went on"), name="next")
    assert result == "went on"


@virtual
async def test_a_task_may_stop_its_siblings() -> None:
    tracked = Tracked()
    async with Supervisor() as tasks:
        tasks.spawn(tracked.run(), name="tracked")
        await asyncio.sleep(0)
        await tasks.spawn(tasks.stop(), name="stopper")
    assert tracked.cancelled


@virtual
async def test_nothing_is_spawned_outside_of_the_block() -> None:
    async with Supervisor() as tasks:
        pass
    with pytest.raises(RuntimeError):
        tasks.spawn(asyncio.sleep(1.0), name="late")
