"""Simulated groups that leave all KV to their first replica, at the end of the prefill or before: times that can be
worked out by hand, and books that are exact."""

from __future__ import annotations

import pytest

from loadtest.simulator.growth import Progress
from tests.loadtest.sim_cluster import HOP_S, LONG_CHUNK_S, LONG_DECODE_S, LONG_TOKEN_S, build, events, run
from tests.loadtest.test_sim_world import serve_at_random

LONG = 8_000
ALONE_S = LONG * LONG_TOKEN_S
SPEED = 1.2
PARTING = {
    "prefill": 2,
    "degree": 2,
    "group_speed": SPEED,
    "shorts_spare": 0.0,
    "elastic": True,
    "group_gathers": True,
}


@pytest.mark.parametrize("gathers", [False, True])
def test_after_the_prefill_the_first_replica_has_all_kv_and_decodes_alone(gathers: bool) -> None:
    options = {"prefill": 2, "degree": 2, "group_gathers": gathers, "record": True}
    result = run([(0.0, LONG, 101), (ALONE_S / 2 + 1.0, 400, 2)], **options)
    long, short = result.outcomes
    assert long.first_token_s == pytest.approx(long.prefill_started_s + ALONE_S / 2)
    assert long.finished_s == pytest.approx(long.first_token_s + 100 * LONG_DECODE_S, abs=0.2)
    assert short.failure is None
    decodes = {span.lane for span in result.spans if span.kind == "long decode"}
    assert decodes == ({"p0 decode"} if gathers else {"p0 decode", "p1 decode"})
    assert result.counters["placed_idle" if gathers else "placed_colocate"] == 1


def test_a_long_that_waits_gets_a_replica_where_the_group_is_hardly_faster() -> None:
    for seed in range(4):
        result = run([(0.0, LONG, 11), (2.0, LONG, 11)], record=True, seed=seed, **(PARTING | {"degree": 2}))
        first, second = result.outcomes
        assert "GroupParted" in events(result, "r0")
        assert result.counters["parted"] == 1
        # Done by both until the chunk after the one that ran at 2.0 s, by one after it.
        begun_s = first.prefill_started_s
        parted_s = (ALONE_S - (first.first_token_s - begun_s)) / (SPEED - 1.0) + begun_s
        assert 2.0 + LONG_CHUNK_S <= parted_s <= 2.0 + 2.0 * LONG_CHUNK_S + 12 * HOP_S + 0.5
        assert second.prefill_started_s == pytest.approx(parted_s, abs=0.6), "on the replica that is free"
        assert second.prefill_started_s < first.first_token_s


def test_a_group_that_is_worth_it_keeps_its_replicas() -> None:
    result = run([(0.0, LONG, 11), (2.0, LONG, 11)], **(PARTING | {"group_speed": 1.9}))
    assert result.counters.get("parted", 0) == 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("switches", [{}, {"colocation": False}, {"disaggregation": False, "decode": 0}])
def test_everything_ends_nothing_is_held_and_the_books_are_exact_throughout(
    switches: dict[str, object], seed: int
) -> None:
    world = build(seed=seed, **(PARTING | {"prefill": 4, "decode": 2, "per_node": 2} | switches))
    assert serve_at_random(world, seed).counters["parted"] > 0


def test_what_is_left_when_one_replica_goes_on_alone() -> None:
    def prefill_s(tokens: int, layout: tuple[int, ...]) -> float:
        return (tokens + tokens**2 / 1_000) / sum(layout)

    progress = Progress(prefill_s, 1_000, (2,))
    left_s = progress.gather(1_000.0 - prefill_s(400, (2,)))
    assert left_s == pytest.approx(prefill_s(1_000, (1,)) - prefill_s(400, (1,)))
    assert progress.done(left_s) == pytest.approx(400)
    assert progress.done(0.0) == pytest.approx(1_000)
