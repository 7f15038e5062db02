"""Random schedules of whole groups: coordinator's core and prefill workers' cores together, two longs of two to four
ranks on overlapping workers, shorts meanwhile, pauses and resumes at any moment; then with drops and losses."""

from __future__ import annotations

from collections import Counter

import pytest

from common.messages.groups import GATHERED_RING, RING
from common.messages.sp import GroupFinished
from common.policy.sp_group import GroupState
from tests.policy.group_world import GroupWorld

WORKERS = 4
UNBOUNDED = (
    GroupState.PREFILLING,
    GroupState.RESUMING,
    GroupState.PAUSED,
    GroupState.SPILLED,
    GroupState.DECODING,
)
"""No rank owes an answer in a time."""


def shorts(world: GroupWorld, number: int) -> None:
    worker_id = world.random.choice(sorted(world.worlds))
    here, exclusive = world.random.random() < 0.3, world.random.random() < 0.2
    world.short(worker_id, f"s{number}", world.random.randint(1, 900), here=here, exclusive=exclusive)


def form(world: GroupWorld, name: str) -> int:
    """Of some workers in the order of their names, as the scheduler names them. Returns how many tokens it draws."""
    size = world.random.randint(1, WORKERS)
    members = tuple(sorted(world.random.sample(sorted(world.worlds), size)))
    tokens, max_tokens = world.random.randint(600, 6_000), world.random.randint(1, 6)
    scheme = GATHERED_RING if world.random.random() < 0.5 else RING
    world.form(name, members, tokens, max_tokens, scheme=scheme)
    return max_tokens


def disturb(world: GroupWorld, names: list[str], number: int, *, pauses: bool) -> None:
    """Something that the scheduler may do at any time."""
    match world.random.choice("sspprwggmmmbo" if pauses else "ssggggo"):
        case "s":
            shorts(world, number)
        case "m":
            world.spill(world.random.choice(names))
        case "b":
            world.restore(world.random.choice(names))
        case "p":
            world.pause(world.random.choice(names))
        case "o":
            world.part(world.random.choice(names))
        case "r":
            world.resume(world.random.choice(names))
        case "g":
            world.grow(world.random.choice(names))
        case "w" if all(world.coordinator.state_of(name, 0) in UNBOUNDED for name in names):
            world.wait()  # an order to run is repeated


def run(seed: int, *, faults: bool) -> GroupWorld:
    world = GroupWorld(seed, WORKERS)
    # A stop token is drawn at times: a long may end with its first token, or before its last.
    world.stop_token_share = 0.1 if seed % 5 == 0 else 0.0
    world.unmet_share = 0.1 if seed % 3 == 0 else 0.0
    world.refused_share = 0.2
    names = ["a", "b"][: 1 + seed % 2]
    expected = {name: form(world, name) for name in names}
    for number in range(400):
        if world.random.random() < 0.08:
            disturb(world, names, number, pauses=seed % 3 > 0)
        elif faults and world.random.random() < 0.01:
            fault(world, names)
        else:
            world.act()
    for _ in range(10):
        for name in names:
            if world.coordinator.state_of(name, 0) is GroupState.SPILLED:
                world.restore(name)
            if world.coordinator.state_of(name, 0) in (GroupState.PAUSED, GroupState.PAUSING):
                world.resume(name)
        world.settle()
    if faults:
        for request_id, attempt in world.coordinator.driving():  # as the scheduler does, who misses a worker
            world.dissolve(request_id, attempt)
        world.settle()
    else:
        require_served(world, expected)
    world.require_empty()
    assert {name for name, _ in world.endings} == set(names)
    return world


def fault(world: GroupWorld, names: list[str]) -> None:
    name = world.random.choice(names)
    if world.random.random() < 0.5:
        world.dissolve(name)
    else:
        world.kill(world.random.choice(sorted(world.worlds)))


def require_served(world: GroupWorld, expected: dict[str, int]) -> None:
    for name, max_tokens in expected.items():
        ending = world.endings[name, 0]
        assert isinstance(ending, GroupFinished), f"{name}: {ending}\n{world.describe()}"
        drawn = world.tokens_of(name)
        assert [index for index, _ in drawn] == list(range(ending.generated))
        assert ending.generated == max_tokens or world.stop_token_share


def nightly(request: pytest.FixtureRequest, seeds: int) -> range:
    return range(seeds * (25 if request.config.getoption("--nightly") else 1))


def test_groups_are_paused_as_one_and_get_all_their_tokens(request: pytest.FixtureRequest) -> None:
    seen: Counter[str] = Counter()
    for seed in nightly(request, 60):
        seen += run(seed, faults=False).seen
    assert seen["paused in a chunk"] > 10
    assert seen["paused"] > seen["paused in a chunk"] > 0
    assert seen["called while busy"] > 50
    assert seen["grown"] > 8
    assert seen["not grown"] > 15
    assert seen["entered"] > 2 * seen["grown"], "the old ranks, too"
    assert seen["spilled"] > 10
    assert seen["all stand again"] > 3
    assert seen["turn ended"] > 5
    assert seen["parted at the end"] > 10
    assert seen["parted"] > 5


def test_whatever_is_lost_or_dropped_everything_ends_and_nothing_is_held(request: pytest.FixtureRequest) -> None:
    seen: Counter[str] = Counter()
    for seed in nightly(request, 60):
        seen += run(seed, faults=True).seen
    assert seen["killed"] > 30
    assert seen["broken pass"] > 15
    assert seen["broke off"] > 0
