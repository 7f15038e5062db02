"""Shapes of the models that are simulated, and the sizes that follow from a shape."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

from common.messages.base import Record


class PlanRefused(ValueError):
    """A long cannot be prefilled this way; the text says why."""


class HeadSplit(NamedTuple):
    """Query heads dealt out to processors as evenly as they go, neighbours together, each with the KV heads its
    queries need: one that two need is on both."""

    heads_max: int
    """Query heads of the busiest."""
    kv_heads_max: int
    kv_copies: int
    """KV heads summed over the processors; more than there are where they are replicated."""


@lru_cache(maxsize=1024)
def split_heads(heads: int, kv_heads: int, processors: int) -> HeadSplit:
    """Raises: PlanRefused with more processors than heads."""
    if processors > heads:
        raise PlanRefused(f"{heads} heads do not reach for {processors} processors of a node")
    group = heads // kv_heads
    shares = []
    kv_shares = []
    first = 0
    for rank in range(processors):
        share = heads // processors + (rank < heads % processors)
        shares.append(share)
        kv_shares.append((first + share - 1) // group - first // group + 1)
        first += share
    return HeadSplit(max(shares), max(kv_shares), sum(kv_shares))


class ModelShape(Record, frozen=True, kw_only=True):
    """What a decoder-only transformer's costs depend on. Embedding and output head are separate matrices."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    """Width of the MLP."""
    vocab: int
    gated: bool = True
    """The MLP has a gate beside its up projection (SwiGLU): three matrices, not two."""
    dtype_bytes: int = 2

    @property
    def qkv_weights(self) -> int:
        """Elements of the query, key and value projections of one layer."""
        return self.hidden * (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def out_weights(self) -> int:
        """Elements of the output projection of one layer's attention."""
        return self.heads * self.head_dim * self.hidden

    @property
    def mlp_weights(self) -> int:
        """Elements of one layer's MLP."""
        return (3 if self.gated else 2) * self.hidden * self.ffn

    @property
    def linear_macs_per_token(self) -> int:
        """Multiply-adds (counted once) of one layer's matmuls for one token: one per weight."""
        return self.qkv_weights + self.out_weights + self.mlp_weights

    @property
    def head_weights(self) -> int:
        """Elements of the output head; the embedding has as many."""
        return self.hidden * self.vocab

    @property
    def activation_width(self) -> int:
        """Elements per token and layer that tensor parallelism splits and that pass through kernels other than
        matmuls: rotated queries and keys, the MLP's activation."""
        return (self.heads + self.kv_heads) * self.head_dim + (2 if self.gated else 1) * self.ffn

    @property
    def weight_bytes(self) -> int:
        """Of the whole model: layers with their two norms, embedding, head, last norm."""
        layer = self.linear_macs_per_token + 2 * self.hidden
        return self.dtype_bytes * (self.layers * layer + 2 * self.head_weights + self.hidden)

    @property
    def kv_bytes_per_layer(self) -> int:
        """Of one token in one layer, keys and values."""
        return 2 * self.kv_heads * self.head_dim * self.dtype_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """Of one token in all layers."""
        return self.layers * self.kv_bytes_per_layer


def _shape(name: str, layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocab: int) -> ModelShape:
    return ModelShape(
        name=name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        ffn=ffn,
        vocab=vocab,
    )


MODELS: Mapping[str, ModelShape] = MappingProxyType(
    {
        shape.name: shape
        for shape in (
            _shape("mistral-7b", 32, 4096, 32, 8, 14336, 32768),  # Mistral-7B-v0.3
            _shape("phi-3-14b", 40, 5120, 40, 10, 17920, 32064),  # Phi-3-medium-128k
            _shape("yi-34b", 60, 7168, 56, 8, 20480, 64000),  # Yi-34B-200K
            _shape("llama-3.1-70b", 80, 8192, 64, 8, 28672, 128256),
        )
    }
)
"""From the models' published `config.json`."""
