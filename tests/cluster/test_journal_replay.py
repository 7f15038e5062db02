"""What the scheduler was told in a live run, told again to a fresh core, yields the same commands."""

from __future__ import annotations

import asyncio
from typing import get_args

import pytest

from common.policy.scheduler import Scheduler
from common.policy.scheduler_io import SchedulerEvent
from common.runtime.journal import JournalWriter, ReplayDiffers, read_journal, replay
from common.runtime.virtual_time import run_virtual
from services.scheduler.service import config_of
from tests.cluster.world import cluster


def recorded(path, **options):
    """Run a small mixed load with a lost worker; the config and epoch of the scheduler that was recorded."""

    async def main():
        with JournalWriter(path) as journal:
            async with cluster(journal=journal, seed=3, **options) as c:
                epoch = c.nodes["scheduler"].service.epoch
                config = config_of(c.nodes["scheduler"].service._settings)
                for number in range(30):
                    c.submit(3_000 if number % 10 == 0 else 80, max_tokens=6)
                    await asyncio.sleep(c.random.expovariate(8.0))
                    if number == 15:
                        await c.cancel(c.answers[-1])
                        await c.kill("p1")
        return config, epoch

    return run_virtual(main())


@pytest.mark.parametrize(
    "switches",
    [
        {"policy": "pecsched"},
        {"policy": "fifo"},
        {"policy": "reservation"},
        {"policy": "priority"},
        {"disaggregation": False, "colocation": False},
        {"group_max": 2, "shorts_spare": 0.0},
    ],
    ids=str,
)
def test_a_replayed_journal_gives_the_same_commands(tmp_path, switches):
    path = tmp_path / "scheduler.journal"
    config, epoch = recorded(path, **switches)
    entries = list(read_journal(path, get_args(SchedulerEvent)))
    assert sum(len(entry.commands) for entry in entries) > 100
    assert replay(Scheduler(config, epoch), entries) == len(entries)


def test_another_config_would_have_decided_otherwise(tmp_path):
    path = tmp_path / "scheduler.journal"
    config, epoch = recorded(path, policy="pecsched")
    entries = list(read_journal(path, get_args(SchedulerEvent)))
    with pytest.raises(ReplayDiffers, match="answered"):
        replay(Scheduler(type(config)(policy="fifo", threshold_tokens=50), epoch), entries)
