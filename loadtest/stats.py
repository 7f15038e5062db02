"""Figures out of samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def percentile(samples: Iterable[float], percent: float) -> float | None:
    """The value below which `percent` of the samples lie, linear between neighbours; None without samples."""
    ordered = sorted(samples)
    if not ordered:
        return None
    place = (len(ordered) - 1) * percent / 100.0
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def percentiles(samples: Sequence[float], *percents: int) -> dict[str, float | None]:
    """`{"p50": …}` for each of `percents`."""
    return {f"p{percent}": percentile(samples, percent) for percent in percents}


def mean(samples: Sequence[float]) -> float | None:
    """None without samples."""
    return math.fsum(samples) / len(samples) if samples else None


def ratio(above: float | None, below: float | None) -> float | None:
    """None where one of them is missing, or nothing to divide by."""
    return above / below if above is not None and below else None
