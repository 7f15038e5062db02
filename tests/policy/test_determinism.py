"""The same seed, the same bytes: of what the core answers, whatever the hashes of strings are in this process."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys

import msgpack
import pytest

from common.policy.ledger import POLICIES
from common.policy.scheduler_config import SchedulerConfig
from common.runtime.journal import plain
from tests.policy.fake_world import World

SCRIPT = "from tests.policy.test_determinism import digests; print(*digests(), sep='\\n')"


class RecordingWorld(World):
    """Keeps every event and what was answered to it."""

    def __init__(self, config: SchedulerConfig, **more: int) -> None:
        self.digest = hashlib.sha256()
        self.answers = 0
        super().__init__(config, **more)

    def _handled(self, event: object, commands: list[object]) -> None:
        self.answers += len(commands)
        self.digest.update(msgpack.packb([self.now_s, plain(event), [plain(command) for command in commands]]))


def history(policy: str, seed: int) -> RecordingWorld:
    """Random requests, work and faults, all drawn from `seed`."""
    rng = random.Random(seed)
    config = SchedulerConfig(
        policy=policy, group_max=4, attempts_max=100, threshold_tokens=500, disaggregation=seed % 2 == 0
    )
    world = RecordingWorld(config, prefill=6, decode=3)
    for number in range(150):
        tokens = rng.choice([rng.randint(1, 400), rng.randint(1, 400), rng.randint(3_000, 40_000)])
        world.submit(f"q{number}", tokens, rng.randint(1, 300))
        for _ in range(rng.randint(0, 4)):
            if work := world.work():
                world.progress(rng.choice(work))
            if senders := world.senders():
                world.deliver(rng.choice(senders))
        if rng.random() < 0.05:
            world.restart(rng.choice(sorted(world.workers)))
        if rng.random() < 0.2:
            world.heartbeats()
            world.deliver_all()
        world.advance(rng.random() * 0.3)
    world.settle()
    return world


def digests() -> list[str]:
    runs = [*((policy, 1) for policy in POLICIES), ("pecsched", 2)]
    return [f"{policy} {seed} {history(policy, seed).digest.hexdigest()}" for policy, seed in runs]


def test_the_same_events_give_the_same_bytes_under_any_hash_seed():
    expected = digests()
    assert len(set(expected)) == len(expected), "each history is another"
    for hash_seed in ("0", "4711"):
        answer = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert answer.stdout.splitlines() == expected


@pytest.mark.parametrize("policy", POLICIES)
def test_a_history_is_worth_comparing(policy: str):
    world = history(policy, 1)
    assert world.answers > 500
    assert world.seen["group of 2"] + world.seen["group of 3"] > 3
