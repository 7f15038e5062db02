"""A rank's share of a model's weights, for the stages that a node's ranks compute by Megatron's scheme.

A share of an attention is the same module of transformers with fewer heads, and a share of an MLP the same with fewer
columns: their forward code is used as it is. The projections into heads or columns keep some rows of their weight, the
projection back some columns of its own, as views: every rank holds the whole weights anyway (it serves shorts with
them), and a share costs no memory. What the shares of all ranks return adds up to what the whole module would; so a
bias of the projection back is kept by the first alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.policy.sp_shares import HeadShare, Range, head_shares, part_of
from services.engine.model import LoadedModel


@dataclass(frozen=True, slots=True)
class LayerShare:
    """Called as the whole modules are."""

    attention: Any
    """None: no head is left for this rank."""
    mlp: Any


class WeightShares:
    """All shares of one model's weights; each is made when it is first asked for, and kept."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._made: dict[tuple[int, int], tuple[LayerShare, ...]] = {}
        """By ranks of the node and place among them."""

    def of(self, per_node: int, place: int) -> tuple[LayerShare, ...]:
        """By layer."""
        key = (per_node, place)
        if key not in self._made:
            self._made[key] = self._make(per_node, place)
        return self._made[key]

    def _make(self, per_node: int, place: int) -> tuple[LayerShare, ...]:
        model = self._model
        heads = head_shares(model.query_heads, model.kv_heads, per_node)[place]
        columns = part_of(model.config.intermediate_size, per_node, place)
        return tuple(
            LayerShare(
                attention=_attention(model, layer.self_attn, heads, first=place == 0) if heads.query_heads else None,
                mlp=_mlp(layer.mlp, columns, first=place == 0),
            )
            for layer in model.decoder.layers
        )


class PartialLinear(nn.Module):
    """Some rows or columns of a linear's weight, as views. Several pieces of rows: their outputs one after another."""

    def __init__(self, pieces: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        super().__init__()
        self._pieces = tuple(pieces)

    @classmethod
    def rows(cls, whole: Any, *ranges: Range) -> PartialLinear:
        """Some of the outputs, with their biases."""
        bias = whole.bias
        return cls([(whole.weight.data[a:b], None if bias is None else bias.data[a:b]) for a, b in ranges])

    @classmethod
    def columns(cls, whole: Any, columns: Range, *, biased: bool) -> PartialLinear:
        """What some of the inputs contribute to the outputs."""
        bias = whole.bias.data if biased and whole.bias is not None else None
        return cls([(whole.weight.data[:, slice(*columns)], bias)])

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = [F.linear(inputs, weight, bias) for weight, bias in self._pieces]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def _attention(model: LoadedModel, whole: Any, heads: HeadShare, *, first: bool) -> Any:
    """The module with these heads only."""
    size, query_end = model.head_dim, model.query_heads * model.head_dim
    query = (heads.query[0] * size, heads.query[1] * size)
    kv = (heads.kv[0] * size, heads.kv[1] * size)
    config = copy.copy(whole.config)
    config.num_attention_heads, config.num_key_value_heads = heads.query_heads, heads.kv_heads
    config.head_dim = size  # else it would follow from the number of heads
    part = _like(whole, config, whole.layer_idx)
    if hasattr(whole, "qkv_proj"):
        value_begin = query_end + model.kv_heads * size
        keys, values = ((begin + kv[0], begin + kv[1]) for begin in (query_end, value_begin))
        part.qkv_proj = PartialLinear.rows(whole.qkv_proj, query, keys, values)
    else:
        part.q_proj = PartialLinear.rows(whole.q_proj, query)
        part.k_proj = PartialLinear.rows(whole.k_proj, kv)
        part.v_proj = PartialLinear.rows(whole.v_proj, kv)
    part.o_proj = PartialLinear.columns(whole.o_proj, query, biased=first)
    if hasattr(whole, "q_norm"):
        part.q_norm, part.k_norm = whole.q_norm, whole.k_norm  # over a head: the same for all
    return part


def _mlp(whole: Any, columns: Range, *, first: bool) -> Any:
    """The module with these columns of the layer in between only."""
    config = copy.copy(whole.config)
    config.intermediate_size = columns[1] - columns[0]
    part = _like(whole, config)
    if hasattr(whole, "gate_up_proj"):
        up_begin = whole.config.intermediate_size
        up = (up_begin + columns[0], up_begin + columns[1])
        part.gate_up_proj = PartialLinear.rows(whole.gate_up_proj, columns, up)
    else:
        part.gate_proj = PartialLinear.rows(whole.gate_proj, columns)
        part.up_proj = PartialLinear.rows(whole.up_proj, columns)
    part.down_proj = PartialLinear.columns(whole.down_proj, columns, biased=first)
    return part


def _like(whole: Any, *args: Any) -> Any:
    """A module of the same class without weights."""
    with torch.device("meta"):
        return type(whole)(*args).eval()
