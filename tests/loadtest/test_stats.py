"""Percentiles, means, ratios."""

from __future__ import annotations

import random
import statistics

import pytest

from loadtest.stats import mean, percentile, percentiles, ratio


@pytest.mark.parametrize(
    ("samples", "percent", "expected"),
    [
        ([3.0], 99, 3.0),
        ([1.0, 2.0], 50, 1.5),
        ([5.0, 1.0, 3.0], 50, 3.0),
        ([5.0, 1.0, 3.0], 0, 1.0),
        ([5.0, 1.0, 3.0], 100, 5.0),
        (list(range(101)), 99, 99.0),
    ],
)
def test_percentile(samples: list[float], percent: float, expected: float) -> None:
    assert percentile(samples, percent) == pytest.approx(expected)


def test_percentile_agrees_with_the_standard_library() -> None:
    rng = random.Random(1)
    samples = [rng.gauss(0, 1) for _ in range(997)]
    cuts = statistics.quantiles(samples, n=100, method="inclusive")
    for percent in (1, 50, 95, 99):
        assert percentile(samples, percent) == pytest.approx(cuts[percent - 1])


def test_nothing_gives_none() -> None:
    assert percentiles([], 50, 99) == {"p50": None, "p99": None}
    assert mean([]) is None
    assert ratio(1.0, None) is None
    assert ratio(None, 1.0) is None
    assert ratio(1.0, 0.0) is None
    assert ratio(3.0, 2.0) == 1.5
