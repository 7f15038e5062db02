"""What arrives at a simulated cluster, and when.

A request is *long* if its prompt has more tokens than the workload's threshold. As in the paper (section 6.1), the
longs of a trace of ordinary requests are made: every request whose prompt is above the 95th percentile of prompt
lengths gets a prompt drawn uniformly from 100,000 to 500,000 tokens, and keeps its arrival and its output.
"""

from __future__ import annotations

import dataclasses
import random
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from common.errors import PecSchedError
from loadtest.stats import percentile as percentile_of

LONG_PERCENTILE = 95.0
LONG_TOKENS_LOW, LONG_TOKENS_HIGH = 100_000, 500_000
ENDS_WITH = 1.02
"""A workload whose last arrival is within this of the time asked for does not end early."""


class WorkloadError(PecSchedError):
    """A workload that cannot be read or made. Its text is one line: the file, the place in it, what is wrong."""


class Arrival(NamedTuple):
    at_s: float
    """Seconds after the start of the workload."""
    prompt_tokens: int
    output_tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class Workload:
    """Arrivals in order of time."""

    name: str
    arrivals: tuple[Arrival, ...]
    threshold_tokens: int
    """A request with more prompt tokens than this is long."""

    @property
    def duration_s(self) -> float:
        """From the start to the last arrival; 0 without arrivals."""
        return self.arrivals[-1].at_s if self.arrivals else 0.0

    @property
    def longs(self) -> int:
        return sum(arrival.prompt_tokens > self.threshold_tokens for arrival in self.arrivals)

    @property
    def shorts(self) -> int:
        return len(self.arrivals) - self.longs

    def without_longs(self) -> Workload:
        """The shorts alone, when they came."""
        shorts = tuple(a for a in self.arrivals if a.prompt_tokens <= self.threshold_tokens)
        return dataclasses.replace(self, name=f"{self.name}, no longs", arrivals=shorts)

    def scaled(self, rate: float) -> Workload:
        """The same requests at `rate` times the arrival rate, so in 1/rate of the time. Raises: ValueError."""
        if not 0.0 < rate < float("inf"):
            raise ValueError(f"a rate scale of {rate}: must be more than 0")
        if rate == 1.0:
            return self
        arrivals = tuple(Arrival(at_s / rate, prompt, output) for at_s, prompt, output in self.arrivals)
        return dataclasses.replace(self, name=f"{self.name} ×{rate:g}", arrivals=arrivals)

    def thinned(self, share: float, seed: int) -> Workload:
        """Each request with this probability, when it came. Raises: WorkloadError, if none is left."""
        if share >= 1.0:
            return self
        rng = random.Random(f"{seed}/kept")
        kept = tuple(arrival for arrival in self.arrivals if rng.random() < share)
        if not kept:
            raise WorkloadError(f"{self.name}: a share of {share:g} of {len(self.arrivals)} requests is none")
        return dataclasses.replace(self, name=f"{self.name}, {share:g} of it", arrivals=kept)

    def first(self, seconds: float) -> Workload:
        """What arrives in the first `seconds`. The name tells of a workload that ends well before. Raises:
        WorkloadError, if nothing arrives in them."""
        end = bisect_left(self.arrivals, seconds, key=lambda arrival: arrival.at_s)
        if not end:
            raise WorkloadError(f"{self.name}: nothing arrives in the first {seconds:g} s")
        if end == len(self.arrivals):
            if seconds <= self.duration_s * ENDS_WITH:
                return self
            return dataclasses.replace(self, name=f"{self.name}, ends after {self.duration_s:.0f} s of {seconds:g} s")
        return dataclasses.replace(self, name=f"{self.name}, first {seconds:g} s", arrivals=self.arrivals[:end])


def make_workload(name: str, arrivals: Iterable[Arrival], percentile: float = LONG_PERCENTILE) -> Workload:
    """A workload of `arrivals` (in order of time) whose longs are the prompts above that percentile of their lengths,
    in percent; the percentile is rounded down to whole tokens. Raises: WorkloadError (no arrivals, no such percentile).
    """
    made = tuple(arrivals)
    if not 0.0 <= percentile <= 100.0:
        raise WorkloadError(f"a long percentile of {percentile:g}: must be from 0 to 100")
    threshold = percentile_of((arrival.prompt_tokens for arrival in made), percentile)
    if threshold is None:
        raise WorkloadError(f"{name}: no requests")
    return Workload(name, made, int(threshold))


def rewrite_longs(
    workload: Workload,
    percentile: float = LONG_PERCENTILE,
    low: int = LONG_TOKENS_LOW,
    high: int = LONG_TOKENS_HIGH,
    seed: int = 0,
) -> Workload:
    """Every prompt above the percentile becomes a long of `low` to `high` tokens, drawn uniformly (both included).

    The draws depend on the seed and on the place among the longs alone. Raises: WorkloadError, if the range is empty
    or reaches down to the length of the shorts.
    """
    marked = make_workload(workload.name, workload.arrivals, percentile)
    if low > high:
        raise WorkloadError(f"longs of {low} to {high} tokens: the range is empty")
    if low <= marked.threshold_tokens:
        shorts = f"shorts have up to {marked.threshold_tokens}"
        raise WorkloadError(f"longs of {low} to {high} tokens are not longer than the shorts: {shorts}")
    drawn = long_lengths(low, high, seed)
    arrivals = tuple(
        Arrival(at_s, next(drawn), output) if prompt > marked.threshold_tokens else Arrival(at_s, prompt, output)
        for at_s, prompt, output in marked.arrivals
    )
    return dataclasses.replace(marked, arrivals=arrivals)


def long_lengths(low: int, high: int, seed: int) -> Iterator[int]:
    """Lengths of longs without end, drawn uniformly, both ends included: the same for the same seed."""
    rng = random.Random(f"{seed}/long lengths")
    while True:
        yield rng.randint(low, high)
