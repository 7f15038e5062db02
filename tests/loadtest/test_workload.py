"""What is sent and when: seeded, Poisson, the same for every setting."""

from __future__ import annotations

import itertools
import random
import statistics

import msgspec

from loadtest.workload import FIRST_ID, VOCAB, Schedule, even_asks, make_ask, make_schedule, poisson_times


def schedule(seed: int = 7, **changes: float) -> Schedule:
    arguments = {"short_rps": 5.0, "long_rps": 0.1, "shorts_min": 60, "longs_min": 3, **changes}
    return make_schedule(
        seed,
        short_rps=arguments["short_rps"],
        long_rps=arguments["long_rps"],
        shorts_min=int(arguments["shorts_min"]),
        longs_min=int(arguments["longs_min"]),
    )


def test_a_seed_is_a_schedule() -> None:
    assert schedule(7) == schedule(7)
    assert schedule(7) != schedule(8)


def test_both_kinds_reach_their_minimum_and_time_rises() -> None:
    made = schedule()
    times = [arrival.at_s for arrival in made.arrivals]
    assert made.count("short") >= 60
    assert made.count("long") >= 3
    assert times == sorted(times)
    # It ends with the later minimum, so one of the two has exactly that many.
    assert made.count("short") == 60 or made.count("long") == 3


def test_shorts_alone_are_the_shorts_of_the_mix() -> None:
    made = schedule()
    shorts = [arrival for arrival in made.arrivals if arrival.ask.kind == "short"]
    assert list(made.only("short").arrivals) == shorts


def test_another_rate_changes_times_and_not_prompts() -> None:
    slow, fast = schedule(longs_min=0), schedule(longs_min=0, short_rps=50.0)
    assert [arrival.ask for arrival in slow.arrivals] == [arrival.ask for arrival in fast.arrivals]
    assert fast.duration_s < slow.duration_s / 5


def test_gaps_are_exponential() -> None:
    times = list(itertools.islice(poisson_times(20.0, random.Random(3)), 20_000))
    gaps = [later - earlier for earlier, later in itertools.pairwise([0.0, *times])]
    assert abs(statistics.mean(gaps) - 0.05) < 0.002
    assert abs(statistics.stdev(gaps) - 0.05) < 0.002  # mean and deviation of an exponential are equal
    assert abs(sum(gap > 0.05 for gap in gaps) / len(gaps) - 0.3679) < 0.015  # P(gap > mean) = 1/e


def test_an_ask_names_its_tokens_and_wants_every_token_as_an_event() -> None:
    ask = make_ask(random.Random(0), "short", 50, 4)
    body = msgspec.json.decode(ask.body)
    assert len(body["prompt"]) == ask.prompt_tokens == 50
    assert all(FIRST_ID <= token < VOCAB for token in body["prompt"])
    assert body["max_tokens"] == ask.output_tokens == 4
    assert (body["stream"], body["ignore_eos"], body["temperature"], body["logprobs"]) == (True, True, 0, 0)


def test_even_asks_cover_the_range_in_every_round() -> None:
    asks = even_asks(0, "here", "short", (32, 256), 8)
    for _ in range(3):
        lengths = sorted(next(asks).prompt_tokens for _ in range(8))
        assert lengths == [32, 64, 96, 128, 160, 192, 224, 256]
