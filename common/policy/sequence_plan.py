"""How the sequence of a long is split over the replicas of its group, and over how many ("fast SP").

Per request the cheapest of four combinations is taken: attention and MLP, each by Megatron or by Ulysses sequence
parallelism inside a node, with ring attention between nodes (PecSched paper, 4.2 and 5.3). What a combination costs is
`sequence_costs`' affair. Without fast SP the group is one plain ring.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Final, NamedTuple, TypeVar

from common.policy.cost_model import CostModel
from common.policy.long_planner import Layout, up_to
from common.policy.planned import SequencePlan
from common.policy.sequence_costs import (
    PlanRefused,
    Ring,
    Scheme,
    SequenceModel,
    StageTime,
    attention_stage,
    decode_exchange_s,
    elementwise_stage,
    mlp_stage,
)

__all__ = ["Layout", "PlanRefused", "SequencePlan", "SpPlanner", "decode_step_s", "layout_of", "plan_prefill"]

KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")

SCHEMES: tuple[Scheme, ...] = ("ulysses", "megatron")
"""Of equal ones (T = 1 has one MLP, a single processor one of everything) the first is named."""

EFFICIENCY_MIN = 0.7
"""Default of `SpPlanner`: below it a replica does more for the requests behind the long."""
DEGREE_MAX = 32
"""Default of `SpPlanner`; it also bounds the search."""
CACHE_MAX = 1 << 16
"""Estimates a planner keeps; when there are more, it starts over."""
GRID_BITS = 4
"""Estimated are token counts of so many leading bits, eight from each power of two to the next: so a planner soon knows
all that it is asked, and hardly a decision waits for an estimate. A time between two of these lies on the line between
theirs: within 0.4 % of the parabola that it is by and large, within 5 % of the steps that tiles and waves of them make
of it. A degree is that of the next smaller one, which is efficient for the larger prompt, too."""


class Choice(NamedTuple):
    """A combination and what it takes."""

    attention: Scheme
    mlp: Scheme
    prefill_s: float
    step_s: float

    @property
    def name(self) -> str:
        return f"{self.attention}/{self.mlp}"


def plan_prefill(
    model: CostModel, tokens: int, layout: Layout, *, fast_sp: bool = True, plain_ring: Ring = "contiguous"
) -> SequencePlan:
    """The cheapest way to prefill `tokens` on a group of this layout. With `fast_sp=False`: ring attention over
    every replica, in the order `plain_ring` (contiguous is the published one; zigzag balances it).

    Raises: PlanRefused where the layout cannot be, the tokens are too few to split, or their KV does not fit.
    """
    _check_layout(model, layout)
    _check_tokens(tokens, layout)
    room = sum(layout) * model.kv_capacity_tokens
    if tokens > room:
        raise PlanRefused(f"{tokens:,} tokens: the KV of {_words(layout)} has room for {room:,}")
    if not fast_sp:
        return _plain_plan(model, tokens, layout, plain_ring)
    choices, refused = choices_of(model, tokens, layout)
    best = _cheapest(choices)
    return SequencePlan(
        tokens=tokens,
        layout=layout,
        attention=best.attention,
        mlp=best.mlp,
        ring="zigzag",
        estimates=tuple((choice.name, choice.prefill_s) for choice in choices),
        refused=refused,
        prefill_s=best.prefill_s,
        step_s=best.step_s,
        why=_why(tokens, layout, choices, best, refused),
    )


def decode_step_s(model: CostModel, layout: Layout, kv_tokens: int) -> float:
    """Seconds of one token of one long whose KV lies evenly over a group: a replica runs the layers, every
    shard attends to its own KV, the partial outputs are merged. Raises: PlanRefused."""
    _check_layout(model, layout)
    shard = -(-kv_tokens // sum(layout))
    return model.decode_step_s(1, shard) + model.shape.layers * decode_exchange_s(model, layout)


def layout_of(free_by_node: Sequence[int], degree: int) -> Layout:
    """Of `degree` replicas where nodes have these to give, largest first: one node if one can, else whole nodes,
    largest first. Empty if there are too few."""
    layout = []
    for free in free_by_node:
        if free < 1:
            break
        taken = min(free, degree)
        layout.append(taken)
        degree -= taken
        if not degree:
            return tuple(layout)
    return ()


class SpPlanner:
    """Groups of any layout, from a cost model. Implements `LongPlanner`."""

    def __init__(
        self,
        model: CostModel,
        *,
        fast_sp: bool = True,
        plain_ring: Ring = "contiguous",
        efficiency_min: float = EFFICIENCY_MIN,
        degree_max: int = DEGREE_MAX,
        large_groups: bool = False,
    ) -> None:
        """`large_groups`: as large as fast SP would make them, though a plain ring is less efficient in them.
        Raises: ValueError."""
        if not 0 < efficiency_min <= 1:
            raise ValueError(f"efficiency_min {efficiency_min}: must be above 0 and at most 1")
        if degree_max < 1:
            raise ValueError(f"degree_max {degree_max}: must be 1 or more")
        self._model = model
        self._fast_sp = fast_sp
        self._plain_ring = plain_ring
        self._efficiency_min = efficiency_min
        self.degree_max: Final = degree_max
        self._estimate_s = self._balanced_s if large_groups else self._grid_s
        """By which groups are sized."""
        self._balanced: dict[tuple[int, Layout], float] = {}
        self._plain: dict[tuple[int, Layout], float] = {}
        self._degrees: dict[tuple[int, int, tuple[int, ...]], int] = {}

    def __repr__(self) -> str:
        how = "fast SP" if self._fast_sp else f"plain {self._plain_ring} ring"
        return f"SpPlanner({self._model!r}, {how}, efficiency >= {self._efficiency_min}, degree <= {self.degree_max})"

    def degree(self, tokens: int, kv_tokens: int, free_by_node: Sequence[int], kv_free_tokens: int) -> int:
        """Enough replicas for the KV, then one more at a time, node by node, while the prefill shortens and its
        parallel efficiency, prefill_s(1) / (prefill_s(d)·d), stays at `efficiency_min` or above. (Against one replica
        even where its KV needs two: two in a plain ring are no measure of efficiency.) 0 where the KV needs more
        than there are, or than `degree_max`.

        The estimates are of the way the group will work: a plain ring loses efficiency early, so its groups stay
        small, unless large ones were asked for."""
        if kv_free_tokens < 1:
            return 0
        fewest = max(1, -(-kv_tokens // kv_free_tokens))
        if fewest > self.degree_max:
            return 0
        if tokens < 2 * self.degree_max:  # so few may be too few to split
            return self._search(tokens, fewest, free_by_node)
        about = tokens - tokens % _grain(tokens)
        enough = up_to(free_by_node, self.degree_max)  # what is free beyond makes no other question of it
        key = (about, fewest, tuple(enough))
        degree = self._degrees.get(key)
        if degree is None:
            degree = self._search(about, fewest, enough)
            _keep(self._degrees, key, degree)
        return degree

    def _search(self, tokens: int, fewest: int, free_by_node: Sequence[int]) -> int:
        """See `degree`."""
        layout = layout_of(free_by_node, fewest)
        if not layout or tokens < _tokens_min(layout):
            return 0
        best, best_s = fewest, self._estimate_s(tokens, layout)
        work_s = self._estimate_s(tokens, (1,))
        for degree in range(fewest + 1, self.degree_max + 1):
            layout = layout_of(free_by_node, degree)
            if not layout or tokens < _tokens_min(layout):
                break
            took_s = self._estimate_s(tokens, layout)
            if work_s < self._efficiency_min * took_s * degree:
                break
            if took_s < best_s:
                best, best_s = degree, took_s
        return best

    def prefill_s(self, tokens: int, layout: Layout) -> float:
        """To within 5 % of what `plan` says (`GRID_BITS`); 0 of none. Whether they are enough to split and their KV
        fits is `degree`'s question. Raises: PlanRefused where the layout cannot be."""
        if tokens < 1:
            return 0.0
        grain = _grain(tokens)
        beyond = tokens % grain
        below_s = self._grid_s(tokens - beyond, layout)
        if not beyond:
            return below_s
        return below_s + (self._grid_s(tokens - beyond + grain, layout) - below_s) * beyond / grain

    def _grid_s(self, tokens: int, layout: Layout) -> float:
        """Of tokens of the grid."""
        if self._fast_sp:
            return self._balanced_s(tokens, layout)
        key = (tokens, layout)
        seconds = self._plain.get(key)
        if seconds is None:
            _check_layout(self._model, layout)
            seconds = _plain_choice(self._model, tokens, layout, self._plain_ring).prefill_s
            _keep(self._plain, key, seconds)
        return seconds

    def took(self, degree: int, expected_s: float, ran_s: float) -> None:
        """Nothing new: in a simulated cluster things take as long as this says."""

    def decode_step_s(self, layout: Layout, kv_tokens: int) -> float:
        """See the function of this name."""
        return decode_step_s(self._model, layout, kv_tokens)

    def plan(self, tokens: int, layout: Layout) -> SequencePlan:
        """The whole plan of exactly these tokens. Raises: PlanRefused."""
        return plan_prefill(self._model, tokens, layout, fast_sp=self._fast_sp, plain_ring=self._plain_ring)

    def _balanced_s(self, tokens: int, layout: Layout) -> float:
        key = (tokens, layout)
        seconds = self._balanced.get(key)
        if seconds is None:
            _check_layout(self._model, layout)
            seconds = _cheapest(choices_of(self._model, tokens, layout)[0]).prefill_s
            _keep(self._balanced, key, seconds)
        return seconds


def choices_of(
    model: SequenceModel, tokens: float, layout: Layout, *, past: float | None = None
) -> tuple[list[Choice], tuple[tuple[str, str], ...]]:
    """The combinations that are possible, and the others with the reason. With a `past`: of one chunk after so many
    tokens (see `attention_stage`)."""
    attention: dict[Scheme, StageTime] = {}
    refused = []
    for scheme in SCHEMES:
        try:
            attention[scheme] = attention_stage(model, tokens, layout, scheme, past=past)
        except PlanRefused as error:
            refused += [(f"{scheme}/{mlp}", str(error)) for mlp in SCHEMES]
    mlps = {scheme: mlp_stage(model, tokens, sum(layout), scheme) for scheme in SCHEMES}
    rest = elementwise_stage(model, tokens, sum(layout), whole_norms=False)
    choices = [
        _choice(model, (first, stage), (second, mlps[second]), rest)
        for first, stage in attention.items()
        for second in SCHEMES
    ]
    return choices, tuple(refused)


def _plain_choice(model: CostModel, tokens: int, layout: Layout, ring: Ring) -> Choice:
    attention = attention_stage(model, tokens, layout, "megatron", ring)
    mlp = mlp_stage(model, tokens, sum(layout), "megatron")
    rest = elementwise_stage(model, tokens, sum(layout), whole_norms=True)
    return _choice(model, ("megatron", attention), ("megatron", mlp), rest)


def _choice(
    model: SequenceModel, attention: tuple[Scheme, StageTime], mlp: tuple[Scheme, StageTime], rest: StageTime
) -> Choice:
    """All layers, and the output head for the last token."""
    c = model.coefficients
    layer_s = attention[1].seconds + mlp[1].seconds + rest.seconds + c.layer_s + c.other_s
    head_s = model.matmul_s(model.shape.head_weights / model.tp, 1)
    step_s = max(attention[1].step_s, mlp[1].step_s, rest.step_s)
    return Choice(attention[0], mlp[0], model.shape.layers * layer_s + head_s, step_s)


def _plain_plan(model: CostModel, tokens: int, layout: Layout, ring: Ring) -> SequencePlan:
    choice = _plain_choice(model, tokens, layout, ring)
    return SequencePlan(
        tokens=tokens,
        layout=layout,
        attention=choice.attention,
        mlp=choice.mlp,
        ring=ring,
        estimates=((f"{ring} ring", choice.prefill_s),),
        prefill_s=choice.prefill_s,
        step_s=choice.step_s,
        why=f"Fast SP is off: {tokens:,} tokens take a {ring} ring of {_words(layout)} {choice.prefill_s:.2f} s.",
    )


def _cheapest(choices: Sequence[Choice]) -> Choice:
    return min(choices, key=lambda choice: choice.prefill_s)


def _why(
    tokens: int, layout: Layout, choices: Sequence[Choice], best: Choice, refused: Sequence[tuple[str, str]]
) -> str:
    times = ", ".join(f"{choice.name} {choice.prefill_s:.2f} s" for choice in choices)
    reasons = "".join(f"; not possible: {reason}" for reason in dict.fromkeys(reason for _, reason in refused))
    return (
        f"{tokens:,} tokens on {_words(layout)}: attention by {best.attention}, MLP by {best.mlp} is the cheapest "
        f"(attention/MLP: {times}{reasons})."
    )


def _words(layout: Layout) -> str:
    return f"{'+'.join(map(str, layout))} replicas"


def _check_layout(model: CostModel, layout: Layout) -> None:
    """Raises: PlanRefused."""
    if not layout or layout[-1] < 1 or any(a < b for a, b in pairwise(layout)):
        raise PlanRefused(f"layout {layout}: must be replicas per node, 1 or more, largest first")
    most = model.gpus_per_node // model.tp
    if layout[0] > most:
        raise PlanRefused(f"layout {layout}: a node of {model.gpus_per_node} GPUs has {most} replicas of {model.tp}")


def _check_tokens(tokens: int, layout: Layout) -> None:
    """Raises: PlanRefused."""
    if tokens < _tokens_min(layout):
        raise PlanRefused(
            f"{tokens} tokens: a zigzag over {_words(layout)} needs at least {_tokens_min(layout)}, two chunks each"
        )


def _tokens_min(layout: Layout) -> int:
    return 2 * sum(layout) if sum(layout) > 1 else 1


def _grain(tokens: int) -> int:
    """From one token count of the grid to the next, about here."""
    return 1 << max(0, tokens.bit_length() - GRID_BITS)


def _keep(cache: dict[KeyT, ValueT], key: KeyT, value: ValueT) -> None:
    if len(cache) >= CACHE_MAX:
        cache.clear()
    cache[key] = value
