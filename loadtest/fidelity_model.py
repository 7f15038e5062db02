"""What `loadtest fidelity` predicts with: this machine's costs and a simulated cluster like the live one.

Costs come from the workers themselves (`WorkerProfile.step_cost`, measured at their start), and what those do not know
from probes of the idle cluster (`Calibration`), before the load that is compared. Nothing is fitted to the results.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from common.messages.base import Record
from common.messages.cluster import StepCost, WorkerProfile
from common.policy.cost_model import StepCostModel
from common.policy.processors import Link
from common.policy.scheduler_config import SchedulerConfig
from common.settings import DecodeWorkerSettings, PrefillWorkerSettings
from loadtest.runner import MeasurementFailed
from loadtest.simulator.cores import NICE_FACTOR, Cores
from loadtest.simulator.costs import SoloCosts
from loadtest.simulator.result import Outcome
from loadtest.simulator.workload import Workload
from loadtest.simulator.world import ClusterShape, World
from loadtest.workload import OUTPUT_TOKENS

SHORT_HOPS, LONG_HOPS = 2, 3
"""Messages before an order reaches the worker, of those that the simulated world counts: router to scheduler, and on to
the worker, a long's by way of the coordinator."""
MESSAGES = 3
"""In the path of a short's first token: those two, and the token to the client."""
WITHIN = 1.1
"""Of the time that a distance between steps explains: so long counts as explained by it."""
NO_LINK = Link(latency_s=0.0, bytes_s=math.inf)
"""How long a handover takes is measured as a whole."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One request of the calibration. Seconds."""

    prompt_tokens: int
    output_tokens: int
    ttft_s: float
    jct_s: float
    compute_s: float
    """In its prefill, as the worker measured."""

    @property
    def beside_s(self) -> float:
        """To its first token, less the computing."""
        return self.ttft_s - self.compute_s

    @property
    def decode_s(self) -> float:
        """From the first token to the last."""
        return self.jct_s - self.ttft_s


@dataclass(frozen=True, slots=True)
class Probes:
    alone: tuple[Probe, ...]
    """Shorts one at a time, nothing else there; of two output lengths at least, each of 2 or more."""
    long_alone: Probe
    beside_long: tuple[Probe, ...] = ()
    """Shorts one at a time, while another worker prefills a long; none: no cores are shared."""
    crowded: tuple[Probe, ...] = ()
    """The same while every prefill worker has a long, one of which is paused for the short's own prefill."""


class Calibration(Record, frozen=True, kw_only=True):
    """What workers do not know of themselves, as measured on the idle cluster. Factors: what was seen, over what the
    worker's `StepCost` says of it (that is measured in the compute thread's own time, without the service, and fitted
    to the chunks of longs: of short prompts it tells little)."""

    short_pass_s: float
    """Of a pass of shorts, whatever its length."""
    short_token_s: float
    """And for each of its tokens."""
    long_pass: float
    decode_step: float
    long_decode_step: float
    beside_short_s: float
    """A short's time to first token less the computing: client, router, scheduler, NATS, and the worker's own part."""
    beside_long_s: float
    handover_s: float
    """First token to second token, less one decode step."""
    together: float
    """Speed of a core beside a busy one, of one that is alone."""
    crowded: float
    """Beside that, speed of a decode worker when longs keep all cores busy, so that it waits for one at every step, of
    its share of the cores by weight; at most 1."""
    step_gain: float = 1.0
    """Where it is faster than that: by how much its weight counts for more; at least 1."""
    short_spread: tuple[float, ...] = ()
    """How long the pass of each short took that came alone, over what the line through all of them says: on a shared
    machine no two are alike, and a p99 is made of the slow ones. In a replay each pass is one of these."""

    @property
    def hop_s(self) -> float:
        return self.beside_short_s / MESSAGES


def mean_of(found: Sequence[Calibration]) -> Calibration:
    """Of one or more, field by field; what was seen of passes is kept."""
    spread = tuple(factor for each in found for factor in each.short_spread)
    names = [name for name in Calibration.__struct_fields__ if name != "short_spread"]
    means = {name: sum(getattr(each, name) for each in found) / len(found) for name in names}
    return Calibration(**means, short_spread=spread)


class LiveCosts:
    """`ReplicaCosts` of the live workers: their own measurements, corrected by what probes showed."""

    def __init__(self, measured: StepCostModel, found: Calibration, *, seed: int = 0) -> None:
        self._measured = measured
        self._found = found
        self._rng = random.Random(seed)
        self.kv_capacity_tokens = measured.kv_capacity_tokens

    def pass_s(self, tokens: int, past: int = 0) -> float:
        """Of a long's chunk."""
        return self._found.long_pass * self._measured.pass_s(tokens, past)

    def batch_s(self, lengths: Sequence[int]) -> float:
        """Of shorts; their attention is in their tokens' part. Another time for each pass, see `short_spread`."""
        pass_s = self._found.short_pass_s + self._found.short_token_s * sum(lengths)
        return pass_s * self._rng.choice(self._found.short_spread) if self._found.short_spread else pass_s

    def decode_step_s(self, rows: int, kv_tokens: int) -> float:
        return self._found.decode_step * self._measured.decode_step_s(rows, kv_tokens)

    def shared_step_s(self, short_tokens: int, rows: int, kv_tokens: int) -> float:
        alone_s = self._found.long_decode_step * self._measured.shared_step_s(0, rows, kv_tokens)
        return alone_s + self._found.short_token_s * short_tokens

    def kv_transfer_s(self, tokens: int, *, same_node: bool) -> float:
        """The world counts one layer's part of it after the pass, which is what was measured."""
        return self._found.handover_s * self._measured.layers

    def step_s(self, tokens: int, past: int) -> float:
        return self._found.long_pass * self._measured.step_s(tokens, past)

    def chunk_tokens(self, past: int) -> int:
        return self._measured.chunk_tokens(past)

    def step_cost(self) -> StepCost:
        """As the worker told the live scheduler."""
        return self._measured.step_cost()


@dataclass(frozen=True, slots=True)
class LiveCluster:
    """What of the live cluster its simulated twin needs."""

    config: SchedulerConfig
    prefill: tuple[WorkerProfile, ...]
    decode: tuple[WorkerProfile, ...]
    worker: PrefillWorkerSettings
    decoder: DecodeWorkerSettings
    cores: int
    """That its workers share; 0: computing takes none of them."""

    def costs(self) -> StepCostModel:
        """Raises: MeasurementFailed."""
        if not self.prefill or not self.decode:
            raise MeasurementFailed("the cluster has no prefill or no decode worker: there is nothing to compare")
        one = self.prefill[0]
        return StepCostModel(
            _mean_cost(self.prefill),
            _mean_cost(self.decode),
            layers=one.layers,
            kv_capacity_tokens=one.kv_capacity_tokens,
            kv_bytes_per_token=one.kv_bytes_per_token,
            link=NO_LINK,
            step_s_max=self.worker.step_ms_max / 1e3,
            chunk_tokens_max=self.worker.chunk_tokens,
        )

    def shared_cores(self, found: Calibration) -> Cores | None:
        """See `Cores`; None: they share none."""
        if not self.cores:
            return None
        return Cores(
            self.cores,
            together=found.together,
            crowded=found.crowded,
            background_nice=self.worker.long_nice,
            step_nice=self.decoder.decode_nice,
            step_gain=found.step_gain,
            step_distance_s=self.decoder.crowded_itl_ms / 1e3,
        )

    def shape(self) -> ClusterShape:
        one = self.prefill[0]
        return ClusterShape(
            nodes=1,
            replicas_per_node=len(self.prefill) + len(self.decode),
            decode_replicas=len(self.decode),
            gpus_per_replica=1,
            layers=one.layers,
            kv_bytes_per_token=one.kv_bytes_per_token,
            model=one.model_id,
            rows_max=self.decode[0].rows_max,
        )


def _mean_cost(profiles: Sequence[WorkerProfile]) -> StepCost:
    """Workers of one machine measured the same thing, at the same time."""
    costs, count = [profile.step_cost for profile in profiles], len(profiles)
    return StepCost(
        pass_s=sum(cost.pass_s for cost in costs) / count,
        token_s=sum(cost.token_s for cost in costs) / count,
        pair_s=sum(cost.pair_s for cost in costs) / count,
    )


def calibrate(live: LiveCluster, probes: Probes) -> Calibration:
    """Raises: MeasurementFailed (probes from which it does not follow)."""
    measured = live.costs()
    alone, long = probes.alone, probes.long_alone
    pass_s, token_s = line([(probe.prompt_tokens, probe.compute_s) for probe in alone])
    step_s, handover_s = _decode_of(alone)

    def alone_s(probe: Probe) -> float:
        return pass_s + token_s * probe.prompt_tokens + decode_alone_s(probe)

    def decode_alone_s(probe: Probe) -> float:
        return handover_s + (probe.output_tokens - 1) * step_s

    def at_its_distance(probe: Probe) -> bool:
        """It decoded as fast as the distance between steps allows: its weight held it up no more than that."""
        distance_s = live.decoder.crowded_itl_ms / 1e3
        due_s = handover_s + (probe.output_tokens - 1) * distance_s
        return step_s < distance_s and probe.decode_s <= WITHIN * due_s

    together = _speed((alone_s(probe), probe.compute_s + probe.decode_s) for probe in probes.beside_long)
    crowded = [probe for probe in probes.crowded if probe.output_tokens == OUTPUT_TOKENS]
    long_s = SoloCosts(measured, measured.layers).prefill_s(long.prompt_tokens, (1,))
    long_step_s = long.decode_s / (long.output_tokens - 1)
    return Calibration(
        short_pass_s=pass_s,
        short_token_s=token_s,
        short_spread=tuple(probe.compute_s / (pass_s + token_s * probe.prompt_tokens) for probe in alone),
        long_pass=long.compute_s / long_s,
        decode_step=step_s / measured.decode_step_s(1, round(median(probe.prompt_tokens for probe in alone))),
        long_decode_step=long_step_s / measured.shared_step_s(0, 1, long.prompt_tokens),
        beside_short_s=max(0.0, median(probe.beside_s for probe in alone)),
        beside_long_s=max(0.0, long.beside_s),
        handover_s=handover_s,
        together=together,
        **_in_a_crowd(
            live,
            1.0
            if crowded and 2 * sum(map(at_its_distance, crowded)) > len(crowded)
            else _speed((decode_alone_s(probe), together * probe.decode_s) for probe in crowded),
        ),
    )


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Intercept and slope, neither below 0, that outliers hardly move: the median slope of all pairs (Theil and Sen).
    Raises: MeasurementFailed (all at one place)."""
    slopes = [(y - v) / (x - u) for number, (x, y) in enumerate(points) for u, v in points[:number] if x != u]
    if not slopes:
        raise MeasurementFailed("what a token costs follows from prompts of different lengths: widen --short-tokens")
    slope = max(0.0, median(slopes))
    return max(0.0, median(y - slope * x for x, y in points)), slope


def _decode_of(alone: Sequence[Probe]) -> tuple[float, float]:
    """Seconds of a decode step of one row, and of the handover, from answers of two lengths."""
    lengths = sorted({probe.output_tokens for probe in alone})
    if len(lengths) < 2 or lengths[0] < 2:
        raise MeasurementFailed("a decode step follows from answers of two lengths of 2 tokens or more")
    low, high = lengths[0], lengths[-1]
    low_s, high_s = (median(p.decode_s for p in alone if p.output_tokens == length) for length in (low, high))
    step_s = (high_s - low_s) / (high - low)
    if step_s <= 0.0:
        raise MeasurementFailed(f"{high} tokens took no longer than {low}: this machine is too busy to be measured")
    return step_s, max(0.0, low_s - (low - 1) * step_s)


def _speed(pairs: Iterable[tuple[float, float]]) -> float:
    """Of work that would take the first by itself and took the second; at most 1, and 1 without any."""
    return min(1.0, median([alone_s / took_s for alone_s, took_s in pairs] or [1.0]))


def _in_a_crowd(live: LiveCluster, share: float) -> dict[str, float]:
    """`Calibration.crowded` and `.step_gain`, from the share of a core that decode was seen to get, or could have had,
    while every prefill worker had a long."""
    longs = len(live.prefill) * NICE_FACTOR**-live.worker.long_nice
    weight = NICE_FACTOR**-live.decoder.decode_nice
    due = min(1.0, live.cores * weight / (weight + longs)) if len(live.prefill) >= live.cores > 0 else 1.0
    if share <= due:
        return {"crowded": share / due}
    share = min(share, 0.99)  # a whole core has no weight that explains it
    return {"crowded": 1.0, "step_gain": share * longs / (live.cores - share) / weight}


def replay(live: LiveCluster, found: Calibration, workload: Workload, *, seed: int) -> list[Outcome]:
    """The live cluster's twin under the same arrivals, in their order; times to tokens are those at the client.
    Raises: SimulationError, MeasurementFailed."""
    measured = live.costs()
    costs = LiveCosts(measured, found, seed=seed)
    world = World(
        live.shape(),
        live.config,
        costs,
        SoloCosts(costs, measured.layers),
        None,
        seed=seed,
        hop_s=found.hop_s,
        cores=live.shared_cores(found),
        long_itl_s_max=live.worker.long_itl_ms_max / 1e3,
    )
    outcomes = world.run(workload).outcomes
    for outcome in outcomes:
        # What lies before the worker is in the world's messages; the rest is the token's way back.
        hops = LONG_HOPS if outcome.long else SHORT_HOPS
        back_s = max(0.0, (found.beside_long_s if outcome.long else found.beside_short_s) - hops * found.hop_s)
        if outcome.first_token_s is not None:
            outcome.first_token_s += back_s
        if outcome.finished_s is not None:
            outcome.finished_s += back_s
    return outcomes
