"""Keys and values of the sequences a worker holds: one contiguous block per sequence, reserved whole
when the sequence is opened, so that a prefill once begun never runs out of room, and freed whole.

Contiguous rather than paged: gathering pages costs as much as the attention itself on a CPU, and the
bytes of one KV head of one layer can be sent from where they lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.units import RequestId
from services.engine.interface import EngineError, KvFull


@dataclass(frozen=True, slots=True)
class KvShape:
    """What the model fixes about its KV."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


class SequenceKv:
    """KV of one sequence. Tokens are written in any order of layers, in rising order within a layer."""

    def __init__(self, shape: KvShape, capacity_tokens: int) -> None:
        self.capacity_tokens = capacity_tokens
        self._shape = shape
        self._written = [0] * shape.layers
        """Tokens of each layer, from the first on."""
        self._data = self._allocate()

    def _allocate(self) -> Tensor:
        shape = self._shape
        size = (shape.layers, 2, shape.kv_heads, self.capacity_tokens, shape.head_dim)
        return torch.empty(size, dtype=shape.dtype, device=shape.device)

    def clear(self) -> None:
        """Zero everything: for measurements that read what nobody wrote."""
        self._data.zero_()

    def write(self, layer: int, start: int, key: Tensor, value: Tensor) -> None:
        """`key`, `value`: [kv_heads, n, head_dim], for tokens [start, start + n)."""
        part = slice(start, start + key.shape[1])
        self._data[layer, 0, :, part] = key
        self._data[layer, 1, :, part] = value
        self._written[layer] = max(self._written[layer], part.stop)

    def read(self, layer: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Views of keys and values [1, kv_heads, end - start, head_dim]."""
        return self._data[layer, 0:1, :, start:end], self._data[layer, 1:2, :, start:end]

    def buffers(self, layer: int, start: int, tokens: int) -> tuple[memoryview, ...]:
        """Bytes of tokens [start, start + tokens) in the order of `LayerKv.buffers`: views of the cache
        itself on a CPU, copies from another device."""
        part = self._data[layer, :, :, start : start + tokens]
        if part.device.type != "cpu":
            part = part.cpu()
        raw = part.view(torch.uint8)  # [2, kv_heads, tokens, head_dim * itemsize]
        return tuple(memoryview(head.numpy()).cast("B") for which in raw for head in which)

    # --- moved elsewhere and back (`spill.py`) ---

    @property
    def written_bytes(self) -> int:
        return sum(self._written) * self._token_bytes

    @property
    def _token_bytes(self) -> int:
        """Of a token in one layer."""
        return 2 * self._shape.kv_heads * self._shape.head_dim * self._shape.dtype.itemsize

    def pieces(self, bytes_max: int) -> Iterator[Tensor]:
        """All that is written, always in the same order: views [2, kv_heads, n, head_dim] of so many bytes at most (or
        of one token)."""
        step = max(1, bytes_max // self._token_bytes)
        for layer, written in enumerate(self._written):
            for start in range(0, written, step):
                yield self._data[layer, :, :, start : min(written, start + step)]

    def leave(self) -> None:
        """Free the memory."""
        self._data = self._data.new_empty(0)

    def come_back(self) -> None:
        """Memory again, to be written to what was. Raises: RuntimeError (out of memory)."""
        self._data = self._allocate()


class KvStore:
    """The sequences' KV under one hard capacity in tokens."""

    def __init__(self, shape: KvShape, capacity_tokens: int) -> None:
        self.shape = shape
        self.capacity_tokens = capacity_tokens
        self._held: dict[RequestId, int] = {}
        """Tokens charged."""
        self._used_tokens = 0

    @property
    def used_tokens(self) -> int:
        """Reserved, not merely written; exact."""
        return self._used_tokens

    def reserve(
        self, request_id: RequestId, tokens: int, *, kv_heads: int | None = None, charged: int | None = None
    ) -> SequenceKv:
        """KV of so many tokens, in all heads or in some, for which fewer tokens are charged.
        Raises: KvFull, EngineError (already reserved)."""
        charged = tokens if charged is None else charged
        if request_id in self._held:
            raise EngineError(f"request {request_id} already holds KV")
        self._charge(request_id, charged)
        shape = self.shape if kv_heads is None else replace(self.shape, kv_heads=kv_heads)
        return SequenceKv(shape, tokens)

    def leave(self, request_id: RequestId) -> int:
        """Its KV is elsewhere. Returns what was charged for it."""
        charged = self._held.pop(request_id)
        self._used_tokens -= charged
        return charged

    def come_back(self, request_id: RequestId, charged: int) -> None:
        """Raises: KvFull."""
        self._charge(request_id, charged)

    def _charge(self, request_id: RequestId, charged: int) -> None:
        free = self.capacity_tokens - self._used_tokens
        if charged > free:
            raise KvFull(
                f"request {request_id} needs KV for {charged} tokens, {free} of {self.capacity_tokens} are free"
            )
        self._held[request_id] = charged
        self._used_tokens += charged

    def free(self, request_id: RequestId) -> None:
        """Idempotent."""
        self._used_tokens -= self._held.pop(request_id, 0)
