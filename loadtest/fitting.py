"""A trace's lengths, made to fit a live cluster.

The traces were recorded with models of long contexts; the cluster here may serve a small one. So, in this order:

1. *Longs* are made as in the paper (section 6.1): every prompt above a percentile of the trace's prompts, its 95th,
   becomes a long, its length drawn uniformly from a range. The paper's range is of its models; here it is a share of
   the context (`LONG_SHARES`), unless said otherwise. `--no-rewrite`: prompts as they are.
2. The others are *scaled* (`prompt_scale`), and *clipped* to the scheduler's threshold, above which it would take them
   for longs. Outputs are scaled too, and clipped to what the context leaves.

How many were clipped is counted, and said in the report. Arrivals stay as they are.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from common.messages.base import Record
from loadtest.simulator.scenario import WorkloadSpec
from loadtest.simulator.workload import Arrival, Workload, WorkloadError, long_lengths

LONG_SHARES = (0.75, 0.9)
"""Of the context: shortest and longest long, unless said otherwise."""


@dataclass(frozen=True, slots=True)
class Room:
    """What the cluster takes."""

    context_tokens: int
    """Of prompt and output together: the model's context, or less where no worker holds as much KV."""
    threshold_tokens: int
    """Longer prompts are long to the scheduler."""


@dataclass(frozen=True, slots=True)
class Scales:
    """Of the lengths that are not rewritten, and of all outputs."""

    prompt: float = 1.0
    output: float = 1.0


class FitFacts(Record, frozen=True, kw_only=True):
    """What was done to the lengths."""

    requests: int
    rewritten: int = 0
    long_low: int = 0
    long_high: int = 0
    clipped_prompts: int = 0
    prompt_max: int = 0
    """To which they were clipped."""
    clipped_outputs: int = 0

    def lines(self) -> list[str]:
        """For people."""
        said = []
        if self.rewritten:
            said.append(f"{self.rewritten} prompts became longs of {self.long_low} to {self.long_high} tokens")
        if self.clipped_prompts:
            said.append(f"{self.clipped_prompts} of {self.requests} prompts were clipped to {self.prompt_max} tokens")
        if self.clipped_outputs:
            said.append(f"{self.clipped_outputs} of {self.requests} outputs were clipped to what the context leaves")
        return said


def long_range(spec: WorkloadSpec, said: set[str], room: Room) -> tuple[int, int]:
    """Of the longs: what was said, else a share of the context. Raises: WorkloadError, if such longs would not be long,
    or would not fit."""
    low = spec.long_low if "long_low" in said else round(LONG_SHARES[0] * room.context_tokens)
    high = spec.long_high if "long_high" in said else max(low, round(LONG_SHARES[1] * room.context_tokens))
    if low > high:
        raise WorkloadError(f"longs of {low} to {high} tokens: the range is empty")
    if low <= room.threshold_tokens:
        raise WorkloadError(f"longs of {low} tokens: up to {room.threshold_tokens}, prompts are short to the scheduler")
    if high >= room.context_tokens:
        raise WorkloadError(
            f"longs of {high} tokens do not fit: the cluster takes {room.context_tokens} with the output"
        )
    return low, high


def fit(
    workload: Workload, spec: WorkloadSpec, said: set[str], room: Room, scales: Scales, seed: int
) -> tuple[Workload, FitFacts]:
    """The same arrivals with lengths that fit, the scheduler's threshold for theirs. `workload`: cut already, its
    threshold the percentile of the whole; `said`: the fields of the spec that somebody set. Raises: WorkloadError."""
    low, high = long_range(spec, said, room) if spec.rewrite else (0, 0)
    drawn = long_lengths(low, high, seed)
    prompt_max = room.threshold_tokens if spec.rewrite else room.context_tokens - 1
    made = []
    rewritten = clipped_prompts = clipped_outputs = 0
    for at_s, prompt, output in workload.arrivals:
        if spec.rewrite and prompt > workload.threshold_tokens:
            taken = next(drawn)
            rewritten += 1
        else:
            scaled = _scaled(prompt, scales.prompt)
            taken = min(scaled, prompt_max)
            clipped_prompts += taken < scaled
        scaled_output = _scaled(output, scales.output)
        output_taken = min(scaled_output, room.context_tokens - taken)
        clipped_outputs += output_taken < scaled_output
        made.append(Arrival(at_s, taken, output_taken))
    facts = FitFacts(
        requests=len(made),
        rewritten=rewritten,
        long_low=low,
        long_high=high,
        clipped_prompts=clipped_prompts,
        prompt_max=prompt_max,
        clipped_outputs=clipped_outputs,
    )
    return dataclasses.replace(workload, arrivals=tuple(made), threshold_tokens=room.threshold_tokens), facts


def _scaled(tokens: int, factor: float) -> int:
    return max(1, round(tokens * factor))
