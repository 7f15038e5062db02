"""Groups that grow in the simulated cluster: times that can be worked out by hand, and books that are exact."""

from __future__ import annotations

import pytest

from common.policy.elastic import IDLE_S
from loadtest.simulator.growth import Progress
from tests.loadtest.sim_cluster import HOP_S, LONG_CHUNK_S, LONG_DECODE_S, LONG_TOKEN_S, build, events, run, workload
from tests.loadtest.test_sim_world import serve_at_random

LONG = 8_000
ALONE_S = LONG * LONG_TOKEN_S
ELASTIC = {"prefill": 4, "degree": 1, "shorts_spare": 0.0, "elastic": True}


def test_a_long_takes_in_idle_replicas_at_the_end_of_a_chunk() -> None:
    for seed in range(4):
        result = run([(0.0, LONG, 11)], record=True, seed=seed, **ELASTIC)
        (long,) = result.outcomes
        begun_s = long.prefill_started_s
        assert begun_s is not None
        assert long.first_token_s is not None
        # Of four times the speed from some moment on: that is where the three came in.
        grown_s = (4 * (long.first_token_s - begun_s) - ALONE_S) / 3 + begun_s
        ordered_s = begun_s + IDLE_S + 2 * HOP_S
        assert ordered_s <= grown_s <= ordered_s + LONG_CHUNK_S + 3 * HOP_S
        assert long.finished_s == pytest.approx(long.first_token_s + 10 * LONG_DECODE_S)
        assert result.counters["grown"] == 1
        assert "GroupGrown" in events(result, "r0")
        assert all(result.replica_busy_s[f"p{n}"] > 1.0 for n in range(4))


def test_without_the_switch_nobody_grows() -> None:
    result = run([(0.0, LONG, 11)], **(ELASTIC | {"elastic": False}))
    (long,) = result.outcomes
    assert result.counters.get("grown", 0) == 0
    assert long.first_token_s == pytest.approx(long.prefill_started_s + ALONE_S)


def test_a_pause_ends_the_try_and_the_newcomers_are_free_again() -> None:
    """The short comes when the order to grow is on its way."""
    at_s = 5 * HOP_S + IDLE_S + HOP_S
    world = build(**(ELASTIC | {"prefill": 2, "shorts_spare": 0.0}))
    result = world.run(workload((0.0, LONG, 5), (at_s, 300, 2)))
    assert [outcome.failure for outcome in result.outcomes] == [None, None]
    assert result.counters["growth_failed"] + result.counters.get("grown", 0) >= 1
    assert all(worker.kv._held == {} for worker in world._replicas.values())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("switches", [{}, {"colocation": False}, {"disaggregation": False, "decode": 0}])
def test_everything_ends_nothing_is_held_and_the_books_are_exact_throughout(
    switches: dict[str, object], seed: int
) -> None:
    options: dict[str, object] = {"prefill": 6, "decode": 2, "per_node": 2, "elastic": True, "shorts_spare": 0.5}
    world = build(**(options | switches))
    assert serve_at_random(world, seed).counters["grown"] > 0


def test_how_far_a_prefill_is_follows_from_what_is_left_before_and_after() -> None:
    def prefill_s(tokens: int, layout: tuple[int, ...]) -> float:
        return (tokens + tokens**2 / 1_000) / sum(layout)

    progress = Progress(prefill_s, 1_000, (1,))
    assert progress.whole_s == 2_000
    assert progress.done(2_000.0) == 0.0
    assert progress.done(2_000.0 - prefill_s(400, (1,))) == pytest.approx(400)
    left_s = progress.grow(2_000.0 - prefill_s(400, (1,)), (2,))
    # 600 tokens: half of their linear work and of their attention to each other, all of that to the 400 before.
    assert left_s == pytest.approx(300 + 180 + 2 * 400 * 600 / 1_000)
    assert progress.done(left_s) == pytest.approx(400)
    assert progress.done(0.0) == pytest.approx(1_000)
