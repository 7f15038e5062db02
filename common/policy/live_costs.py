"""What a group of live workers takes, from what its workers measured of themselves.

Every worker holds the whole model. In a group of d, rows of w ranks of one node split heads and columns, and the d/w
rows form a ring (`GroupScheme`). To the formulas of `sequence_costs` a row is a replica of w processors whose weights
are whole, and each row a node of its own; a chunk has a past, so queries travel round the ring. What these formulas ask
of processors and links is here answered by a worker's `StepCost` and `ExchangeCost`:

- a matrix of W weights: its part of `token_s`, which is the time of all linear work per token;
- attention to so many pairs in so many heads: their part of `pair_s`;
- what a pass costs anyway, `pass_s`: paid by each rank in each pass;
- a message to each of the others, one after another, and the bytes of the busiest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from common.messages.cluster import ExchangeCost, LayerShape, WorkerProfile
from common.messages.groups import RING, GroupScheme
from common.policy import costs
from common.policy.model_shapes import ModelShape
from common.policy.processors import Link
from common.policy.sequence_costs import MERGE_BYTES
from common.policy.sequence_plan import choices_of

CHUNK_TOKENS = 512
"""Of each rank."""
WAITING = 0.10
"""Part by which a group takes longer than its work and its exchanges: two steps of equal work do not take equally
long, and in each the ranks wait for the slowest. ASSUMPTION, from `loadtest sp` with two ranks on one machine: so the
ring was estimated 8 % above its time, the four others within 8 % of theirs."""
RANK_GAIN = 0.6
"""What each rank after the first adds to the speed of a ring, in ranks, where workers did not measure exchanges.
(Prototypes with two ranks were 1.5 to 1.66 times as fast as one.)"""


class SchemeTimes(NamedTuple):
    """Of one long on one group."""

    possible: tuple[tuple[GroupScheme, float], ...]
    """With the seconds its prefill takes; the ring first."""
    refused: tuple[tuple[GroupScheme, str], ...]
    """Why they are not."""


class LiveRates(NamedTuple):
    """See `sequence_costs.Rates`."""

    layer_s: float
    memory_bytes_s: float
    all_reduce: Link
    intra_node: Link
    inter_node: Link
    other_s: float = 0.0
    norm_element_s: float = 0.0
    activation_element_s: float = 0.0
    """These three are in `StepCost.token_s` and `pass_s`."""


class LiveModel:
    """A row of `width` ranks in a group. Implements `sequence_costs.SequenceModel`."""

    weights_whole = True
    step_s_max = math.inf
    """A step is one layer of one chunk: workers cut the chunks so that it is short enough."""

    def __init__(
        self, profile: WorkerProfile, layer: LayerShape, exchange: ExchangeCost, width: int, *, ring_bytes_s: float
    ) -> None:
        """`ring_bytes_s`: between rows, one direction, at the most."""
        self.tp = width
        self.shape = shape_of(profile, layer)
        self._cost = profile.step_cost
        message_s, bytes_s = exchange.message_s, 1.0 / max(exchange.byte_s, 1e-15)
        others_s = message_s * (width - 1)
        self.coefficients = LiveRates(
            layer_s=profile.step_cost.pass_s / profile.layers,
            memory_bytes_s=MERGE_BYTES / max(exchange.merge_element_s, 1e-15),
            # An all-gather and a reduce-scatter.
            all_reduce=Link(latency_s=2 * others_s, bytes_s=bytes_s),
            intra_node=Link(latency_s=others_s, bytes_s=bytes_s),
            inter_node=Link(latency_s=message_s, bytes_s=min(bytes_s, ring_bytes_s)),
        )

    def matmul_s(self, weights: float, tokens: float) -> float:
        """Of one layer. The weights are read anyway: that is in `pass_s`."""
        return self._cost.token_s * tokens * weights / (self.shape.layers * self.shape.linear_macs_per_token)

    def attention_s(self, pairs: float, heads: float) -> float:
        """Of one layer."""
        return self._cost.pair_s * pairs * heads / (self.shape.layers * self.shape.heads)


def shape_of(profile: WorkerProfile, layer: LayerShape) -> ModelShape:
    """The model this worker serves. (The output head is in `StepCost.pass_s`: no vocabulary.)"""
    kv_elements = profile.layers * 2 * layer.kv_heads * layer.head_dim
    return ModelShape(
        name=profile.model_id,
        layers=profile.layers,
        hidden=layer.hidden,
        heads=layer.query_heads,
        kv_heads=layer.kv_heads,
        head_dim=layer.head_dim,
        ffn=layer.intermediate,
        vocab=0,
        dtype_bytes=max(1, round(profile.kv_bytes_per_token / kv_elements)),
    )


@lru_cache(maxsize=1024)
def scheme_times(
    profile: WorkerProfile, tokens: int, sizes: tuple[int, ...], *, internode_bytes_s: float = math.inf
) -> SchemeTimes:
    """The prefill of `tokens` on a group of workers like this one, `sizes` of them on each node, by every scheme.

    Rows of `w` ranks must not span nodes, so `w` divides all of the sizes. A chunk is as large as its group is, and
    attends to what came before it: on average, to half of the rest. Where the ranks of a node compute on more cores
    than it has, they take turns."""
    degree = sum(sizes)
    crowding = max(1.0, max(sizes) * profile.core_share)
    layer, exchange = profile.layer, profile.exchange
    if degree == 1 or layer is None or exchange is None:
        return SchemeTimes(((RING, _plain_s(profile, tokens, degree)),), ())
    chunks = max(1, math.ceil(tokens / (CHUNK_TOKENS * degree)))
    chunk = tokens / chunks
    possible: list[tuple[GroupScheme, float]] = []
    refused: list[tuple[GroupScheme, str]] = []
    for width in _divisors(math.gcd(*sizes)):
        ring_bytes_s = internode_bytes_s if len(sizes) > 1 else math.inf
        model = LiveModel(profile, layer, exchange, width, ring_bytes_s=ring_bytes_s)
        choices, reasons = choices_of(model, chunk, (1,) * (degree // width), past=(tokens - chunk) / 2)
        if width == 1:  # nothing is split in a node: they are all the same
            choices = choices[:1]
        for choice in choices:
            scheme = GroupScheme(per_node=width, attention=choice.attention, mlp=choice.mlp)
            possible.append((scheme, chunks * choice.prefill_s * (1.0 + WAITING) * crowding))
        refused += [(GroupScheme(per_node=width), reason) for reason in dict.fromkeys(why for _, why in reasons)]
    return SchemeTimes(tuple(possible), tuple(refused))


def _plain_s(profile: WorkerProfile, tokens: int, degree: int) -> float:
    """By a ring, where it is not known what its exchanges cost."""
    speedup = 1.0 + RANK_GAIN * (degree - 1)
    cost = profile.step_cost
    shared = type(cost)(pass_s=cost.pass_s, token_s=cost.token_s / speedup, pair_s=cost.pair_s / speedup)
    return costs.prefill_s(shared, tokens, CHUNK_TOKENS * degree)


def _divisors(number: int) -> Sequence[int]:
    return [part for part in range(1, number + 1) if number % part == 0]
