"""One decode step: one new token for each of a batch of sequences, through our own layer loop.

At one token per sequence the time goes into reading weights and into starting operators, so the loop
takes transformers' weights but not its modules: q, k, v are one product, gate and up are one, the
weights are stored in the order the CPU's kernels read them, and attention works on tables of slots (see
`slots.py`) without expanding or gathering KV.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from services.engine.decode_attention import Attention, fastest
from services.engine.kv_cache import KvShape
from services.engine.model import LoadedModel
from services.engine.slots import Slot, SlotKv

Linear = Callable[[Tensor], Tensor]

CALL_TOKENS = 512
"""An attention call costs about as much as attending to so many tokens: slots that lie apart, or differ
in length, share a call as long as that computes fewer tokens in vain."""


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One sequence of a step. `position` is that of the token fed, which is the number of tokens before it."""

    slot: Slot
    position: int
    token_id: int


@dataclass(frozen=True, slots=True)
class Run:
    """Batch rows [begin, end), attended in one call over the slots [first, last] of one size."""

    slot_tokens: int
    first: int
    last: int
    length: int
    begin: int
    end: int
    places: Tensor | None
    """[end - begin] int64: which of the run's slots each row has; None: one after another."""
    mask: Tensor | None
    """[slots, 1, 1, length], 0 or -inf; None: all are `length` long."""


@dataclass(frozen=True, slots=True)
class DecodeLayer:
    qkv: Linear
    out: Linear
    gate_up: Linear
    down: Linear
    activation: Callable[[Tensor], Tensor]
    attention_norm: Tensor
    mlp_norm: Tensor
    head_norm: Tensor | None
    """[query_heads + kv_heads, head_dim]: weights of the norm of queries and keys, where the family has one."""


class Decoder:
    """The weights of a model and the loop over its layers. Not thread-safe: one step at a time."""

    def __init__(self, model: LoadedModel, kv: SlotKv) -> None:
        """Takes the weights out of `model.module`, layer by layer, so that they are held once: the module
        is empty afterwards. (The embedding of a tied model stays beside the head made of it.)"""
        decoder, config = model.decoder, model.config
        self.kv = kv
        self.device = model.device
        self.query_heads, self.kv_heads, self.head_dim = model.query_heads, model.kv_heads, model.head_dim
        self._eps: float = config.rms_norm_eps
        self._scaling: float = decoder.layers[0].self_attn.scaling
        self._rotary: Any = decoder.rotary_emb
        self._embedding: Tensor = decoder.embed_tokens.weight.data
        self._norm: Tensor = decoder.norm.weight.data
        self._head = linear([model.module.lm_head])
        self._layers: list[DecodeLayer] = []
        for at, layer in enumerate(decoder.layers):
            self._layers.append(_take_layer(layer, model))
            decoder.layers[at] = nn.Identity()
        group = self.query_heads // self.kv_heads
        self.attend: Attention = fastest(self.kv_heads, group, self.head_dim, model.dtype, model.device)

    @torch.inference_mode()
    def step(self, rows: Sequence[DecodeRow]) -> Tensor:
        """Logits [rows, vocab] after each row's token, in the order given; its KV is in its slot afterwards."""
        order = sorted(range(len(rows)), key=lambda at: rows[at].slot)
        ranked = [rows[at] for at in order]
        runs = plan_runs(ranked, self.kv.shape)
        index = self.kv.write_index([row.slot for row in ranked], [row.position for row in ranked])
        hidden = self._embedding[torch.tensor([row.token_id for row in ranked]).to(self.device)]  # [rows, hidden]
        cos, sin = self._rotary_tables(hidden, [row.position for row in ranked])
        for number, layer in enumerate(self._layers):
            qkv = self._project(layer, hidden, cos, sin)
            self.kv.write(number, index, qkv[:, self.query_heads :])
            attended = self._attend(number, qkv[:, : self.query_heads], runs)
            hidden = hidden + layer.out(attended)
            gate, up = layer.gate_up(self._normed(hidden, layer.mlp_norm)).chunk(2, dim=-1)
            hidden = hidden + layer.down(layer.activation(gate) * up)
        back = sorted(range(len(order)), key=order.__getitem__)
        return self._head(self._normed(hidden, self._norm)[back])

    def _project(self, layer: DecodeLayer, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Queries, keys and values, the first two rotated: [rows, query_heads + 2 * kv_heads, head_dim]."""
        qkv = layer.qkv(self._normed(hidden, layer.attention_norm)).view(len(hidden), -1, self.head_dim)
        rotated = qkv[:, : self.query_heads + self.kv_heads]
        if layer.head_norm is not None:
            rotated.copy_(F.rms_norm(rotated, (self.head_dim,), None, self._eps) * layer.head_norm)
        part = rotated[..., : cos.shape[-1]]  # some families rotate only the first part of a head
        half = part.shape[-1] // 2
        turned = torch.cat((-part[..., half:], part[..., :half]), dim=-1)
        part.copy_(part * cos + turned * sin)
        return qkv

    def _attend(self, layer: int, query: Tensor, runs: Sequence[Run]) -> Tensor:
        """`query` [rows, query_heads, head_dim]; returns [rows, query_heads * head_dim]."""
        parts = []
        for run in runs:
            keys, values = self.kv.table(layer, run.slot_tokens, run.first, run.last, run.length)
            part = query[run.begin : run.end].reshape(
                -1, self.kv_heads, self.query_heads // self.kv_heads, self.head_dim
            )
            if run.places is not None:
                spread = part.new_zeros(len(keys), *part.shape[1:])
                spread[run.places] = part
                part = spread
            out = self.attend(part, keys, values, run.mask, self._scaling)
            parts.append(out if run.places is None else out[run.places])
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(len(query), -1)

    def _rotary_tables(self, hidden: Tensor, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Cosines and sines [rows, 1, rotary dim].

        `longrope` takes other frequencies for sequences beyond the original context, and would decide
        for the batch as a whole: so each row asks by itself.
        """
        ids = torch.tensor([positions]).to(self.device)
        alone = getattr(self._rotary, "rope_type", "default") == "longrope"
        tables = [self._rotary(hidden, part) for part in (torch.split(ids, 1, dim=1) if alone else (ids,))]
        cos, sin = (torch.cat(parts, dim=1) for parts in zip(*tables, strict=True))
        return cos[0].unsqueeze(1), sin[0].unsqueeze(1)

    def _normed(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(hidden, weight.shape, weight, self._eps)


def plan_runs(rows: Sequence[DecodeRow], shape: KvShape) -> list[Run]:
    """Group rows, which must be in the order of their slots, into few calls that compute little in vain."""
    runs: list[Run] = []
    begin = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or not _worth_joining(rows[begin:end], rows[end]):
            runs.append(_run(rows, begin, end, shape))
            begin = end
    return runs


def _worth_joining(held: Sequence[DecodeRow], new: DecodeRow) -> bool:
    first, last = held[0].slot, held[-1].slot
    if new.slot.tokens != first.tokens:
        return False
    length = max(row.position + 1 for row in held)
    apart = (last.row - first.row + 1) * length + new.position + 1
    joined = (new.slot.row - first.row + 1) * max(length, new.position + 1)
    return joined - apart <= CALL_TOKENS


def _run(rows: Sequence[DecodeRow], begin: int, end: int, shape: KvShape) -> Run:
    part = rows[begin:end]
    first, last = part[0].slot.row, part[-1].slot.row
    places = [row.slot.row - first for row in part]
    lengths = [row.position + 1 for row in part]
    count, longest = last - first + 1, max(lengths)
    mask = None
    if min(lengths) < longest:
        # Slots between the rows' attend to everything, and nobody reads what comes out.
        limits = torch.full((count,), longest)
        limits[places] = torch.tensor(lengths)
        hidden = torch.arange(longest) >= limits.unsqueeze(1)
        mask = torch.zeros(hidden.shape, dtype=shape.dtype).masked_fill_(hidden, float("-inf"))
        mask = mask.view(count, 1, 1, longest).to(shape.device)
    return Run(
        slot_tokens=part[0].slot.tokens,
        first=first,
        last=last,
        length=longest,
        begin=begin,
        end=end,
        places=None if count == len(part) else torch.tensor(places).to(shape.device),
        mask=mask,
    )


def linear(parts: Sequence[Any]) -> Linear:
    """One product for several `nn.Linear` of the same input, their outputs one after another.

    On a CPU the weight is stored anew in the blocked order of oneDNN's kernels, where torch has the
    operator (the one its own compiler uses): a bf16 product of few rows takes half the time.
    """
    biases = [part.bias for part in parts]
    weight = parts[0].weight.data if len(parts) == 1 else torch.cat([part.weight.data for part in parts])
    bias = None
    if any(one is not None for one in biases):
        filled = [part.weight.new_zeros(len(part.weight)) if part.bias is None else part.bias.data for part in parts]
        bias = torch.cat(filled)
    if not _can_pack(weight):
        return lambda x: F.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    product = torch.ops.mkldnn._linear_pointwise
    return lambda x: product(x, packed, bias, "none", [], "")


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return weight.dtype is torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _take_layer(layer: Any, model: LoadedModel) -> DecodeLayer:
    """The weights of one of transformers' decoder layers."""
    attention, mlp = layer.self_attn, layer.mlp
    fused_qkv, fused_mlp = hasattr(attention, "qkv_proj"), hasattr(mlp, "gate_up_proj")
    head_norm = None
    if hasattr(attention, "q_norm"):
        head_norm = torch.cat(
            [
                attention.q_norm.weight.data.expand(model.query_heads, -1),
                attention.k_norm.weight.data.expand(model.kv_heads, -1),
            ]
        )
    return DecodeLayer(
        qkv=linear([attention.qkv_proj] if fused_qkv else [attention.q_proj, attention.k_proj, attention.v_proj]),
        out=linear([attention.o_proj]),
        gate_up=linear([mlp.gate_up_proj] if fused_mlp else [mlp.gate_proj, mlp.up_proj]),
        down=linear([mlp.down_proj]),
        activation=mlp.activation_fn if hasattr(mlp, "activation_fn") else mlp.act_fn,
        attention_norm=layer.input_layernorm.weight.data,
        mlp_norm=layer.post_attention_layernorm.weight.data,
        head_norm=head_norm,
    )
