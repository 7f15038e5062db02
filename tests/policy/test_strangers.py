"""Workers that cannot work with those that are there get nothing, and people learn why."""

from __future__ import annotations

import msgspec
import pytest

from common.messages.cluster import WorkerHeartbeat, WorkerLeft, WorkerProfile
from common.policy.scheduler import Scheduler
from common.policy.scheduler_config import SchedulerConfig
from common.policy.scheduler_io import WorkerKeptOut
from tests.policy.scenario import profile


def heard(scheduler: Scheduler, who: WorkerProfile, now_s: float) -> list[str]:
    """Reasons said for keeping it out."""
    commands = scheduler.handle(WorkerHeartbeat(profile=who), now_s)
    scheduler.check()
    return [command.reason for command in commands if isinstance(command, WorkerKeptOut)]


def present(scheduler: Scheduler) -> set[str]:
    return {worker.profile.worker_id for worker in scheduler.view(0.0).workers}


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_worker_with_another_model_is_kept_out_and_said_so_once(role: str):
    scheduler = Scheduler(SchedulerConfig(), epoch=1)
    assert heard(scheduler, profile("a"), 0.0) == []
    other = msgspec.structs.replace(profile("b", role), model_id="other", model_fingerprint="g")
    (reason,) = heard(scheduler, other, 0.1)
    for part in ("other (g)", "is not that of a", "m (f)"):
        assert part in reason
    assert heard(scheduler, other, 1.1) == [], "not at every heartbeat"
    assert heard(scheduler, msgspec.structs.replace(other, incarnation="2"), 1.5) == [reason], "but at every start"
    assert present(scheduler) == {"a"}
    view = scheduler.view(1.6)
    assert [(stranger.worker_id, stranger.reason) for stranger in view.strangers] == [("b", reason)]
    assert view.counters["workers_kept_out"] == 2


def test_when_the_others_have_gone_it_is_taken_in():
    scheduler = Scheduler(SchedulerConfig(), epoch=1)
    other = msgspec.structs.replace(profile("b"), model_fingerprint="g")
    heard(scheduler, profile("a"), 0.0)
    heard(scheduler, other, 0.1)
    scheduler.handle(WorkerLeft(worker_id=profile("a").worker_id, incarnation="1"), 0.2)
    assert heard(scheduler, other, 1.1) == []
    assert present(scheduler) == {"b"}
    assert scheduler.view(1.2).strangers == ()


def test_one_that_leaves_is_forgotten():
    scheduler = Scheduler(SchedulerConfig(), epoch=1)
    heard(scheduler, profile("a"), 0.0)
    heard(scheduler, msgspec.structs.replace(profile("b"), model_fingerprint="g"), 0.1)
    scheduler.handle(WorkerLeft(worker_id=profile("b").worker_id, incarnation="1"), 0.2)
    assert scheduler.view(0.3).strangers == ()
