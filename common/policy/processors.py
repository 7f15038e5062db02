"""What a kind of processor can do, in coefficients: what `cost_model.py` counts with.

Nothing here reads files: `common.coefficients` does.
"""

from __future__ import annotations

import msgspec

from common.messages.base import Record
from common.units import Seconds


class Link(Record, frozen=True, kw_only=True):
    """A way between processors."""

    latency_s: Seconds
    bytes_s: float
    """Bytes per second, one direction."""

    def seconds(self, size: float) -> float:
        """To move `size` bytes in one message."""
        return self.latency_s + size / self.bytes_s


class Coefficients(Record, frozen=True, kw_only=True):
    """Of one kind of processor. `sources` says for each field where its value is from."""

    name: str
    source: str
    """Of the fitted ones, as a whole."""
    sources: dict[str, str]
    """Field → fit, data sheet or ASSUMPTION, in words."""
    memory_bytes: int
    """Of one processor. Data sheet."""
    peak_flops: float
    """Dense bf16 FLOP/s. Data sheet; nothing here reaches it."""
    memory_share: float
    """Of the memory, for weights and KV; the rest is activations and buffers. ASSUMPTION."""
    linear_flops: float
    """FLOP/s that large matmuls reach (a multiply-add counts 2). Fitted."""
    memory_bytes_s: float
    """Bytes per second that small matmuls reach reading weights. Fitted; taken for reading KV too."""
    layer_s: Seconds
    """Fixed part of one layer's matmuls: launches, and tiles not filled. Fitted."""
    other_s: Seconds
    """Fixed part of one layer's norms, rotations, activations, additions. Fitted."""
    other_tokens: float
    """Below so many tokens those kernels take as long as with so many. Fitted."""
    norm_element_s: float
    """Of those kernels, per token and element of the hidden state, which every rank computes whole. Fitted."""
    activation_element_s: float
    """Of those kernels, per token and element of `ModelShape.activation_width` / T. Fitted."""
    attention_flops: float
    """FLOP/s of causal attention in prefill, over the pairs it needs. ASSUMPTION: 60 % of `peak_flops`."""
    all_reduce: Link
    """Inside a node; `bytes_s` is of a rank's own link, which a ring loads with 2(w−1)/w of the message. Fitted."""
    intra_node: Link
    """From one processor to another of its node, send/receive. Fitted."""
    inter_node: Link
    """Latency fitted; `bytes_s` is of a whole node, shared by its processors. ASSUMPTION: 400 Gb/s."""

    def assuming(
        self,
        *,
        attention_share: float | None = None,
        inter_node_bytes_s: float | None = None,
        memory_share: float | None = None,
    ) -> Coefficients:
        """The same with other assumptions; None keeps one. `attention_share`: of `peak_flops`."""
        changed = self
        if attention_share is not None:
            changed = changed._with("attention_flops", attention_share * self.peak_flops)
        if inter_node_bytes_s is not None:
            changed = changed._with("inter_node", msgspec.structs.replace(self.inter_node, bytes_s=inter_node_bytes_s))
        if memory_share is not None:
            changed = changed._with("memory_share", memory_share)
        return changed

    def _with(self, field: str, value: float | Link) -> Coefficients:
        sources = {**self.sources, field: "ASSUMPTION, set by the user"}
        return msgspec.structs.replace(self, sources=sources, **{field: value})
