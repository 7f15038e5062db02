"""A workload without a file: drawn from distributions fitted to the Azure LLM inference trace 2023.

Source: Azure Public Dataset, `AzureLLMInferenceTrace_{conv,code}.csv`, 2023-11-16 (CC-BY 4.0; Patel et al.,
"Splitwise", ISCA 2024): 19,366 and 8,819 requests of the same hour. What is fitted, and from what:

*Lengths.* Quantiles of prompts per service (`CONV_PROMPT`, `CODE_PROMPT`), linear between them, drawn evenly over the
distribution (one from each 1/n of it, in random order), so that an hour of any seed has the trace's percentiles.
Outputs of code do not depend on the prompt (rank correlation -0.02): one table. Those of conv do: prompts of 980 to
1,130 tokens are answered with about 400 tokens, others with about 100; so conv has a table per band of prompt ranks.

*Arrivals of conv*: a Poisson process whose rate changes every minute, log-normal, first-order autoregressive; deviation
of the logarithm 0.22 and correlation of neighbours 0.85, as counted in the trace. That alone makes its bursts.

*Arrivals of code*: bursts and silences. Gaps between neighbours have the trace's quantiles (`CODE_GAP_S`: a quarter
under 2.1 ms, the longest 217 s; logarithmic between them). The rank of a gap is correlated with those before it, 0.15
at distances of 1 to 20 gaps and 0.06 at 50: a slow autoregressive part (0.98 per gap) with 0.15 of the variance.

*Result*, both services together; dispersion is the variance over the mean of the arrivals per window (Poisson: 1):

| | trace | here |
|---|---|---|
| prompt tokens: p50, p80, p95, p99, mean | 1046, 2170, 4141, 7435, 1434 | 1045, 2175, 4204, 7435, 1446 |
| prompts under 2,000 tokens | 78.2 % | 78.2 % |
| output tokens: p50, p80, p95, p99, mean | 90, 387, 433, 581, 154 | 90, 384, 447, 596, 155 |
| output of the prompts above the 95th percentile: median, 95th | 15, 127 | 15, 116 to 134 |
| dispersion per 1, 5, 10, 30, 60 s, mean of 12 seeds | 5.1, 16, 26, 49, 63 | 4.4, 14, 22, 44, 59 |
| the same of conv | 1.4, 2.5, 3.9, 8.9, 16 | 1.2, 2.1, 3.2, 7.5, 14 |
| the same of code | 13, 47, 72, 124, 164 | 11, 39, 64, 124, 171 |

What is not modelled: the share of conv's long answers drifts over the trace's hour (0.1 to 0.6), here it does not; and
the trace ends after 3,513 s, here its 28,185 requests are spread over 3,600 s.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

from loadtest.simulator.workload import Arrival, Workload, make_workload

HOUR_S = 3600.0
CONV_PER_HOUR, CODE_PER_HOUR = 19_366, 8_819
TRACE_RPS = (CONV_PER_HOUR + CODE_PER_HOUR) / HOUR_S
"""Requests per second unless asked for another rate."""


class Quantiles(NamedTuple):
    """Of a distribution: the value at each share of it, both rising."""

    shares: tuple[float, ...]
    values: tuple[float, ...]

    @classmethod
    def of(cls, *pairs: tuple[float, float]) -> Quantiles:
        """From (share, value)."""
        return cls(tuple(share for share, _ in pairs), tuple(value for _, value in pairs))

    def at(self, share: float) -> float:
        """The value at a share, linear between the quantiles."""
        shares, values = self
        above = bisect_right(shares, share, 1, len(shares) - 1)
        low, value_low = shares[above - 1], values[above - 1]
        return value_low + (values[above] - value_low) * (share - low) / (shares[above] - low)


# fmt: off
CONV_PROMPT = Quantiles.of(
    (0, 2), (.01, 29), (.02, 91), (.05, 181), (.1, 207), (.15, 372), (.2, 387), (.25, 396), (.3, 403),
    (.35, 414), (.4, 703), (.45, 984), (.5, 1020), (.55, 1045), (.6, 1071), (.65, 1097), (.7, 1130),
    (.75, 1189), (.8, 1315), (.85, 1877), (.9, 2735), (.92, 4073), (.95, 4083), (.98, 4098), (.99, 4142),
    (.995, 4831), (.999, 6212), (1, 14050),
)
CODE_PROMPT = Quantiles.of(
    (0, 3), (.01, 17), (.02, 35), (.05, 75), (.1, 147), (.15, 232), (.2, 385), (.25, 578), (.3, 770),
    (.35, 938), (.4, 1075), (.45, 1261), (.5, 1469), (.55, 1690), (.6, 1909), (.65, 2164), (.7, 2433),
    (.75, 2745), (.8, 3193), (.85, 3923), (.9, 5194), (.92, 5961), (.94, 6585), (.95, 7315), (.96, 7431),
    (.97, 7435), (1, 7437),
)
CODE_OUTPUT = Quantiles.of(
    (0, 6), (.05, 6), (.15, 7), (.25, 9), (.4, 11), (.5, 13), (.6, 16), (.7, 20), (.8, 29), (.85, 39), (.9, 55),
    (.95, 90), (.97, 128), (.98, 172), (.99, 252), (.995, 361), (.999, 831), (1, 1899),
)
CONV_OUTPUT_SHARES = (0, .05, .1, .25, .5, .6, .75, .9, .95, .99, 1)
CONV_OUTPUT: tuple[tuple[float, Quantiles], ...] = tuple(
    (end, Quantiles(CONV_OUTPUT_SHARES, tokens)) for end, tokens in (
        (.1, (11, 16, 66, 112, 161, 169, 189, 217, 217, 294, 1000)),
        (.4, (7, 43, 59, 80, 93, 98, 109, 139, 162, 217, 739)),
        (.45, (10, 45, 64, 89, 153, 392, 403, 431, 464, 595, 921)),
        (.7, (28, 363, 377, 394, 406, 414, 428, 482, 552, 658, 1000)),
        (.8, (26, 60, 92, 181, 396, 401, 417, 453, 523, 643, 992)),
        (.85, (24, 47, 52, 75, 107, 129, 166, 230, 374, 482, 918)),
        (1, (15, 32, 37, 47, 69, 79, 101, 138, 158, 236, 757)),
    )
)
"""Per band of prompt ranks, up to which share of the prompts it reaches."""
CODE_GAP_S = Quantiles.of(
    (0, 1e-6), (.01, 2.2e-5), (.05, 8.8e-5), (.1, 2.09e-4), (.15, 8.85e-4), (.2, 1.184e-3), (.25, 2.077e-3),
    (.3, 3.292e-3), (.35, 5.344e-3), (.4, .0151), (.45, .0382), (.5, .0638), (.6, .095), (.7, .1001),
    (.75, .104), (.8, .1601), (.85, .1988), (.9, .2729), (.95, .4008), (.97, .5974), (.98, .7987), (.99, 2.205),
    (.995, 9.978), (.998, 41.41), (.999, 79.23), (.9995, 132.5), (1, 217.2),
)
# fmt: on
CONV_RATE_LOG_DEVIATION, CONV_RATE_CORRELATION, CONV_RATE_STEP_S = 0.22, 0.85, 60.0
CODE_GAP_SLOW_SHARE, CODE_GAP_SLOW_CORRELATION = 0.15, 0.98


def synthetic(seed: int = 0, seconds: float = HOUR_S, rate: float = TRACE_RPS) -> Workload:
    """Requests of `seconds` at `rate` per second: exactly 28,185 in the default hour.

    Another rate is the same process at another speed, as with a recorded trace: its bursts are as many requests, in
    less time. Each hour (at the trace's rate) depends on the seed and its number alone. Raises: ValueError.
    """
    if not (0.0 < seconds < math.inf and 0.0 < rate < math.inf):
        raise ValueError(f"{seconds} s at {rate} requests/s: both must be more than 0")
    speed = rate / TRACE_RPS
    end_s = seconds * speed
    hours = math.ceil(end_s / HOUR_S)
    made = (
        Arrival(at_s / speed, prompt, output)
        for hour in range(hours)
        for at_s, prompt, output in _hour(random.Random(f"{seed}/synthetic hour {hour}"), hour * HOUR_S)
        if at_s < end_s
    )
    return make_workload(f"synthetic, seed {seed}", made)


def _hour(rng: random.Random, start_s: float) -> list[Arrival]:
    """One hour of both services, in order of time."""
    conv = zip(_conv_times(rng), _conv_lengths(rng), strict=True)
    code = zip(_code_times(rng), _code_lengths(rng), strict=True)
    return sorted(Arrival(start_s + at_s, prompt, output) for rows in (conv, code) for at_s, (prompt, output) in rows)


def _conv_times(rng: random.Random) -> Iterator[float]:
    """Given how many there are, times of a Poisson process are independent, as dense as the rate."""
    level = rng.gauss()
    rates = []
    fresh = math.sqrt(1.0 - CONV_RATE_CORRELATION**2)
    for _ in range(round(HOUR_S / CONV_RATE_STEP_S)):
        rates.append(math.exp(CONV_RATE_LOG_DEVIATION * level))
        level = CONV_RATE_CORRELATION * level + fresh * rng.gauss()
    steps = rng.choices(range(len(rates)), weights=rates, k=CONV_PER_HOUR)
    return ((step + rng.random()) * CONV_RATE_STEP_S for step in steps)


def _code_times(rng: random.Random) -> Iterator[float]:
    """Sums of gaps. Their ranks are those of a slow and a white normal sequence, added; they fill the hour."""
    slow = rng.gauss()
    fresh = math.sqrt(1.0 - CODE_GAP_SLOW_CORRELATION**2)
    slow_part, white_part = math.sqrt(CODE_GAP_SLOW_SHARE), math.sqrt(1.0 - CODE_GAP_SLOW_SHARE)
    levels = []
    for _ in range(CODE_PER_HOUR):
        levels.append(slow_part * slow + white_part * rng.gauss())
        slow = CODE_GAP_SLOW_CORRELATION * slow + fresh * rng.gauss()
    gaps_s = [0.0] * CODE_PER_HOUR
    logarithms = Quantiles(CODE_GAP_S.shares, tuple(map(math.log, CODE_GAP_S.values)))
    for rank, place in enumerate(sorted(range(CODE_PER_HOUR), key=levels.__getitem__)):
        gaps_s[place] = math.exp(logarithms.at((rank + rng.random()) / CODE_PER_HOUR))
    stretch = HOUR_S / sum(gaps_s)
    return (at_s * stretch for at_s in accumulate(gaps_s[:-1], initial=0.0))  # the last gap reaches the next hour


def _conv_lengths(rng: random.Random) -> Iterator[tuple[int, int]]:
    bands = [end for end, _ in CONV_OUTPUT]
    for share in _even_shares(rng, CONV_PER_HOUR):
        outputs = CONV_OUTPUT[min(bisect_right(bands, share), len(bands) - 1)][1]
        yield round(CONV_PROMPT.at(share)), round(outputs.at(rng.random()))


def _code_lengths(rng: random.Random) -> Iterator[tuple[int, int]]:
    for share in _even_shares(rng, CODE_PER_HOUR):
        yield round(CODE_PROMPT.at(share)), round(CODE_OUTPUT.at(rng.random()))


def _even_shares(rng: random.Random, number: int) -> list[float]:
    """One from each 1/number of [0, 1), in random order."""
    shares = [(place + rng.random()) / number for place in range(number)]
    rng.shuffle(shares)
    return shares
