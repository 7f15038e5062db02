"""Time of the work of one replica of a model on a processor, from coefficients.

A pass over n tokens takes, in each of its layers, with W weights there, T-way tensor parallel:

- matmuls: every weight is read once and multiplied n times, and near the point where both take as long neither hides
  the other: `W/T · sqrt((bytes/memory_bytes_s)² + (2n/linear_flops)²)`. (The roofline's max is 20 % too low there;
  with the power left free, the profiles of A100 and H100 gave 2.02 and 1.97.)
- norms, rotations and activations: a fixed part, then per token and element, but not below so many tokens;
- what of a layer is fixed: launches, tiles not filled;
- two all-reduces of n·hidden elements if T > 1: `latency + 2(T−1)/T · bytes / bandwidth` (a ring's volume);
- attention: `4 · pairs · heads/T · head_dim` FLOPs (two matmuls, a multiply-add counts 2; a causal pass over n tokens
  after p sees n·p + n(n+1)/2 pairs), or the time to read the KV, whichever is longer;

and once the output head, for one token of each sequence. Decoding is the same with one token per sequence;
there attention is bound by reading the KV.

FLOPs count a multiply-add as 2 in this file. Nothing here reads files: `common.coefficients` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

from common.messages.cluster import StepCost
from common.policy import costs
from common.policy.model_shapes import MODELS as MODELS
from common.policy.model_shapes import ModelShape as ModelShape
from common.policy.processors import Coefficients, Link

FLOPS_PER_MAC = 2
ATTENTION_MATMULS = 2
"""Queries times keys, and weights times values."""

STEP_S_MAX = 0.010
"""Default bound of a step (one layer of one chunk), in seconds."""
CHUNK_TOKENS_MAX = 4_096
"""Default bound of a chunk: the matmuls' rate no longer rises with more tokens."""

_STEP_COST_TOKENS = tuple(1 << power for power in range(8, 14))
"""Sizes of the passes that `CostModel.step_cost` is fitted to: what shorts and chunks are."""


class ReplicaCosts(Protocol):
    """What a simulated replica asks; `CostModel` and `StepCostModel` answer."""

    kv_capacity_tokens: int

    def pass_s(self, tokens: int, past: int = 0) -> float: ...

    def batch_s(self, lengths: Sequence[int]) -> float: ...

    def decode_step_s(self, rows: int, kv_tokens: int) -> float: ...

    def shared_step_s(self, short_tokens: int, rows: int, kv_tokens: int) -> float: ...

    def kv_transfer_s(self, tokens: int, *, same_node: bool) -> float: ...

    def step_s(self, tokens: int, past: int) -> float: ...

    def step_cost(self) -> StepCost: ...


class CostModel:
    """One replica of a model: `tp` processors of one node."""

    weights_whole = False
    """Each of them has its share of the weights."""

    def __init__(
        self,
        shape: ModelShape,
        coefficients: Coefficients,
        tp: int,
        gpus_per_node: int,
        *,
        step_s_max: float = STEP_S_MAX,
        chunk_tokens_max: int = CHUNK_TOKENS_MAX,
    ) -> None:
        """Raises: ValueError where `tp` does not divide what it splits, or the weights do not fit."""
        _check_tp(shape, tp, gpus_per_node)
        self.shape = shape
        self.coefficients = coefficients
        self.tp = tp
        self.gpus_per_node = gpus_per_node
        self.step_s_max = step_s_max
        self.chunk_tokens_max = chunk_tokens_max
        self.kv_capacity_tokens = _kv_capacity_tokens(shape, coefficients, tp)
        """Tokens of KV for which one replica has room."""
        c = coefficients
        reduces = 2 * shape.layers if tp > 1 else 0
        self._fixed_s = shape.layers * (c.layer_s + c.other_s) + reduces * c.all_reduce.latency_s
        reduce_bytes = 2 * (tp - 1) / tp * shape.hidden * shape.dtype_bytes
        self._reduce_token_s = reduces * reduce_bytes / c.all_reduce.bytes_s
        self._other_tokens = c.other_tokens
        self._other_token_s = shape.layers * (
            c.norm_element_s * shape.hidden + c.activation_element_s * shape.activation_width / tp
        )
        weights = shape.layers * shape.linear_macs_per_token / tp
        self._read_s = shape.dtype_bytes * weights / c.memory_bytes_s
        self._macs_s = FLOPS_PER_MAC * weights / c.linear_flops
        head = shape.head_weights / tp
        self._head_read_s = shape.dtype_bytes * head / c.memory_bytes_s
        self._head_macs_s = FLOPS_PER_MAC * head / c.linear_flops
        self._one_head_s = self._head_s(1)
        self._pair_s = shape.layers * self.attention_s(1, shape.heads / tp)
        self._kv_read_s = shape.kv_bytes_per_token / tp / c.memory_bytes_s
        self._step_cost = self._fit_step_cost()

    def __repr__(self) -> str:
        return f"CostModel({self.shape.name} on {self.tp} x {self.coefficients.name})"

    def pass_s(self, tokens: int, past: int = 0) -> float:
        """Seconds of one pass over `tokens` new tokens of one sequence, with `past` tokens of KV before them."""
        pairs = tokens * (past + (tokens + 1) * 0.5)
        attention_s = max(pairs * self._pair_s, (past + tokens) * self._kv_read_s)
        return self._linear_s(tokens) + attention_s + self._one_head_s

    def batch_s(self, lengths: Sequence[int]) -> float:
        """Seconds of one pass over whole prompts of these lengths, back to back without padding."""
        if not lengths:
            return 0.0
        tokens = 0
        pairs = 0.0
        for length in lengths:
            tokens += length
            pairs += length * (length + 1) * 0.5
        attention_s = max(pairs * self._pair_s, tokens * self._kv_read_s)
        return self._linear_s(tokens) + attention_s + self._head_s(len(lengths))

    def decode_step_s(self, rows: int, kv_tokens: int) -> float:
        """Seconds of one token for each of `rows` sequences, which have `kv_tokens` of KV in all."""
        return self._linear_s(rows) + kv_tokens * self._kv_read_s + self._head_s(rows)

    def shared_step_s(self, short_tokens: int, rows: int, kv_tokens: int) -> float:
        """Seconds of a decode step in which `short_tokens` of prefill ride along. Their attention is counted as
        that of one prompt: an upper bound."""
        attention_s = short_tokens * (short_tokens + 1) * 0.5 * self._pair_s + kv_tokens * self._kv_read_s
        return self._linear_s(short_tokens + rows) + attention_s + self._head_s(rows + (short_tokens > 0))

    def kv_transfer_s(self, tokens: int, *, same_node: bool) -> float:
        """Seconds to move the KV of `tokens` to another replica, if nothing else moves: every rank sends its heads to
        its counterpart; between nodes they share the node's bandwidth."""
        size = tokens * self.shape.kv_bytes_per_token
        if same_node:
            return self.coefficients.intra_node.seconds(size / self.tp)
        return self.coefficients.inter_node.seconds(size)

    def step_s(self, tokens: int, past: int) -> float:
        """Seconds of the longest step, one layer of one chunk, of a prefill of `tokens` new tokens after `past`: what
        a pause waits for at most. Exact but for the error of `step_cost`, by which chunks are cut."""
        return _longest_step_s(self, tokens, past, self._layer_s)

    def chunk_tokens(self, past: int) -> int:
        """The largest chunk whose steps stay below `step_s_max` with `past` tokens before it."""
        return costs.chunk_tokens(
            self._step_cost,
            self.shape.layers,
            past,
            step_s_max=self.step_s_max,
            tokens_max=self.chunk_tokens_max,
        )

    def step_cost(self) -> StepCost:
        """The same costs in the form that workers announce: fitted to passes of 256 to 8,192 tokens (least squared
        relative error); attention is exact."""
        return self._step_cost

    def matmul_s(self, weights: float, tokens: float) -> float:
        """Seconds to multiply `tokens` rows by a matrix of `weights` elements, on one processor."""
        c = self.coefficients
        read_s = self.shape.dtype_bytes / c.memory_bytes_s
        return weights * math.hypot(read_s, tokens * FLOPS_PER_MAC / c.linear_flops)

    def other_s(self, tokens: float, parts: float) -> float:
        """Seconds of one layer's kernels that are neither matmul nor attention, the fixed part and that of the
        matmuls included, on one of `parts` processors that split heads and MLP columns."""
        c = self.coefficients
        element_s = c.norm_element_s * self.shape.hidden + c.activation_element_s * self.shape.activation_width / parts
        return c.layer_s + c.other_s + max(tokens, c.other_tokens) * element_s

    def attention_s(self, pairs: float, heads: float) -> float:
        """Seconds of one layer's attention over so many pairs of tokens, with `heads` query heads, on one
        processor."""
        flops = FLOPS_PER_MAC * ATTENTION_MATMULS * pairs * heads * self.shape.head_dim
        return flops / self.coefficients.attention_flops

    def _layer_s(self, tokens: int, past: int) -> float:
        return (self.pass_s(tokens, past) - self._one_head_s) / self.shape.layers

    def _linear_s(self, tokens: int) -> float:
        """Everything of all layers but attention."""
        matmuls_s = math.hypot(self._read_s, tokens * self._macs_s)
        other_s = max(tokens, self._other_tokens) * self._other_token_s
        return matmuls_s + other_s + self._fixed_s + tokens * self._reduce_token_s

    def _head_s(self, rows: int) -> float:
        return math.hypot(self._head_read_s, rows * self._head_macs_s)

    def _fit_step_cost(self) -> StepCost:
        sizes = _STEP_COST_TOKENS
        seconds = [self._linear_s(tokens) + self._one_head_s for tokens in sizes]
        pass_s, token_s = _line(sizes, seconds)
        return StepCost(pass_s=max(0.0, pass_s), token_s=token_s, pair_s=self._pair_s)


class StepCostModel:
    """A live worker's own measurements behind the same methods."""

    def __init__(
        self,
        prefill: StepCost,
        decode: StepCost,
        *,
        layers: int,
        kv_capacity_tokens: int,
        kv_bytes_per_token: int,
        link: Link,
        step_s_max: float,
        chunk_tokens_max: int,
    ) -> None:
        """`decode`: of a decode worker's step, its tokens the rows, its pairs the tokens of KV they attend to.
        `link`: the data plane between two workers. `step_s_max`, `chunk_tokens_max`: the worker's settings."""
        self.layers = layers
        self.kv_capacity_tokens = kv_capacity_tokens
        self.step_s_max = step_s_max
        self.chunk_tokens_max = chunk_tokens_max
        self._prefill = prefill
        self._decode = decode
        self._kv_bytes_per_token = kv_bytes_per_token
        self._link = link

    def pass_s(self, tokens: int, past: int = 0) -> float:
        """See `CostModel`."""
        return costs.pass_s(self._prefill, tokens, past)

    def batch_s(self, lengths: Sequence[int]) -> float:
        """See `CostModel`."""
        if not lengths:
            return 0.0
        cost = self._prefill
        pairs = sum(length * length for length in lengths) * 0.5
        return cost.pass_s + cost.token_s * sum(lengths) + cost.pair_s * pairs

    def decode_step_s(self, rows: int, kv_tokens: int) -> float:
        """See `CostModel`."""
        cost = self._decode
        return cost.pass_s + cost.token_s * rows + cost.pair_s * kv_tokens

    def shared_step_s(self, short_tokens: int, rows: int, kv_tokens: int) -> float:
        """See `CostModel`. A prefill worker's pass, in which the rows are tokens with a past."""
        cost = self._prefill
        pairs = short_tokens * short_tokens * 0.5 + kv_tokens
        return cost.pass_s + cost.token_s * (short_tokens + rows) + cost.pair_s * pairs

    def kv_transfer_s(self, tokens: int, *, same_node: bool) -> float:
        """See `CostModel`. Workers of one machine and of two are not told apart: one link was measured."""
        return self._link.seconds(tokens * self._kv_bytes_per_token)

    def step_s(self, tokens: int, past: int) -> float:
        """See `CostModel`."""
        return _longest_step_s(self, tokens, past, lambda chunk, before: self.pass_s(chunk, before) / self.layers)

    def chunk_tokens(self, past: int) -> int:
        """See `CostModel`."""
        return costs.chunk_tokens(
            self._prefill, self.layers, past, step_s_max=self.step_s_max, tokens_max=self.chunk_tokens_max
        )

    def step_cost(self) -> StepCost:
        """As measured."""
        return self._prefill


def _check_tp(shape: ModelShape, tp: int, gpus_per_node: int) -> None:
    """Raises: ValueError."""
    if tp < 1 or gpus_per_node < 1:
        raise ValueError(f"tp {tp} on {gpus_per_node} GPUs per node: both must be 1 or more")
    if gpus_per_node % tp:
        raise ValueError(
            f"tp {tp} does not divide the {gpus_per_node} GPUs of a node (a replica stays in one): "
            f"choose a tp that divides {gpus_per_node}"
        )
    for parts, count in (("heads", shape.heads), ("KV heads", shape.kv_heads), ("MLP columns", shape.ffn)):
        if count % tp:
            raise ValueError(f"{shape.name}: tp {tp} does not divide its {count} {parts}: choose a tp that does")


def _kv_capacity_tokens(shape: ModelShape, coefficients: Coefficients, tp: int) -> int:
    """Raises: ValueError where not even the KV of one token fits beside the weights."""
    usable = coefficients.memory_bytes * coefficients.memory_share * tp
    tokens = int((usable - shape.weight_bytes) // shape.kv_bytes_per_token)
    if tokens < 1:
        raise ValueError(
            f"{shape.name}: its weights take {shape.weight_bytes / 1e9:.1f} GB, and {tp} x {coefficients.name} have "
            f"{usable / 1e9:.1f} GB for weights and KV: raise tp, or choose a smaller model"
        )
    return tokens


class _Chunks(Protocol):
    step_s_max: float
    chunk_tokens_max: int

    def chunk_tokens(self, past: int) -> int: ...


def _longest_step_s(model: _Chunks, tokens: int, past: int, layer_s: Callable[[int, int], float]) -> float:
    """Of all chunks of a prefill. They shrink as the past grows: steps lengthen until the budget cuts the chunks, reach
    it, and pass it once a chunk is of one grain."""
    end = past + tokens
    first = min(tokens, model.chunk_tokens(past))
    last = min(tokens, model.chunk_tokens(end))
    ends_s = max(layer_s(first, past), layer_s(last, end - last))
    return max(ends_s, model.step_s_max) if last < min(tokens, model.chunk_tokens_max) else ends_s


def _line(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Intercept and slope with the least squared relative error. (No numpy: the policy has no dependencies.)"""
    weights = [1 / (took * took) for took in seconds]
    total = sum(weights)
    size_mean = sum(w * size for w, size in zip(weights, sizes, strict=True)) / total
    took_mean = sum(w * took for w, took in zip(weights, seconds, strict=True)) / total
    products = sum(
        w * (size - size_mean) * (took - took_mean) for w, size, took in zip(weights, sizes, seconds, strict=True)
    )
    squares = sum(w * (size - size_mean) ** 2 for w, size in zip(weights, sizes, strict=True))
    slope = products / squares
    return took_mean - slope * size_mean, slope
