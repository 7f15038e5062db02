"""Where the KV of decoding sequences lies: one contiguous slot per sequence in per-layer tensors of fixed size.

A slot holds a power of two of tokens, at least `UNIT_TOKENS`. Slots are cut from the pool by the buddy
system (Knuth, TAOCP 1, 2.5): a block of twice the size is split in two, and joined again when both
halves are free. A slot of n tokens starts at a multiple of n, so the pool is also a plain table of
slots of any one size, and neighbouring slots of one size are attended to in one batched call.

    tokens 0        512       1024                2048
           | 256|256 |   512    |       1024        |      one pool, four slots, three sizes

The lowest place is taken first: it keeps the slots in use together.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.engine.interface import EngineError, KvFull
from services.engine.kv_cache import KvShape

UNIT_TOKENS = 256
"""Smallest slot."""


@dataclass(frozen=True, slots=True, order=True)
class Slot:
    """Tokens [start, start + tokens) of the pool; `start` is a multiple of `tokens`."""

    tokens: int
    start: int

    @property
    def row(self) -> int:
        """Its number among the slots of its size."""
        return self.start // self.tokens


class SlotPool:
    """Hands out slots under one hard capacity. Knows no tensors."""

    def __init__(self, capacity_tokens: int) -> None:
        """The capacity is rounded down to whole units. Raises: EngineError (less than one unit)."""
        if capacity_tokens < UNIT_TOKENS:
            raise EngineError(
                f"a KV capacity of {capacity_tokens} tokens is too small, it must be {UNIT_TOKENS} at least"
            )
        self.capacity_tokens = capacity_tokens // UNIT_TOKENS * UNIT_TOKENS
        self.largest_tokens = _power_below(self.capacity_tokens)
        """The longest sequence that can ever be held."""
        self._used_tokens = 0
        self._free: dict[int, list[int]] = {}  # size -> heap of starts
        start = 0
        while start < self.capacity_tokens:
            size = _power_below(self.capacity_tokens - start)
            self._free.setdefault(size, []).append(start)
            start += size

    @property
    def used_tokens(self) -> int:
        """Of the slots handed out; exact."""
        return self._used_tokens

    def take(self, tokens: int) -> Slot:
        """The lowest free slot that holds so many tokens. Raises: KvFull."""
        wanted = max(UNIT_TOKENS, 1 << (tokens - 1).bit_length())
        sizes = [size for size, starts in self._free.items() if starts and size >= wanted]
        if not sizes:
            raise KvFull(
                f"no free slot for {tokens} tokens of KV: {self._used_tokens} of {self.capacity_tokens} are reserved"
            )
        size = min(sizes)
        start = heapq.heappop(self._free[size])
        while size > wanted:
            size //= 2
            heapq.heappush(self._free.setdefault(size, []), start + size)
        self._used_tokens += wanted
        return Slot(wanted, start)

    def give_back(self, slot: Slot) -> None:
        """Free a slot that `take` handed out."""
        self._used_tokens -= slot.tokens
        size, start = slot.tokens, slot.start
        while (buddy := start ^ size) in self._free.get(size, ()):
            self._free[size].remove(buddy)
            heapq.heapify(self._free[size])
            start, size = min(start, buddy), size * 2
        heapq.heappush(self._free.setdefault(size, []), start)


class SlotKv:
    """The tensors behind a pool. Memory is reserved whole at the start and never grows.

    Layout of a layer: [2, kv_heads * capacity, head_dim], keys then values; within it a slot is
    [kv_heads, slot tokens, head_dim], so that a head of one sequence is one contiguous piece of bytes.
    """

    def __init__(self, shape: KvShape, pool: SlotPool, *, staged: bool | None = None) -> None:
        """`staged`: receive into host memory first; by default where the CPU cannot write to the cache."""
        self.shape = shape
        self._staged = shape.device.type != "cpu" if staged is None else staged
        self._capacity = pool.capacity_tokens
        size = (2, shape.kv_heads * pool.capacity_tokens, shape.head_dim)
        # Zeros, not empty: what is masked still enters a sum with weight zero, and 0 * NaN is NaN.
        self._layers = [torch.zeros(size, dtype=shape.dtype, device=shape.device) for _ in range(shape.layers)]
        self._landing: dict[Slot, Tensor] = {}

    def table(self, layer: int, slot_tokens: int, first: int, last: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the slots [first, last] of one size, cut to `length` tokens: views
        [last - first + 1, kv_heads, length, head_dim]."""
        heads, dim = self.shape.kv_heads, self.shape.head_dim
        part = self._layers[layer][:, first * slot_tokens * heads : (last + 1) * slot_tokens * heads]
        keys, values = part.view(2, last - first + 1, heads, slot_tokens, dim)[:, :, :, :length]
        return keys, values

    def write_index(self, slots: Sequence[Slot], positions: Sequence[int]) -> Tensor:
        """Where `write` puts one token per slot: int64 [2 * slots * kv_heads]."""
        heads = self.shape.kv_heads
        starts = torch.tensor([slot.start * heads for slot in slots])
        strides = torch.tensor([slot.tokens for slot in slots])
        places = (starts + torch.tensor(positions)).unsqueeze(1) + strides.unsqueeze(1) * torch.arange(heads)
        keys_then_values = torch.stack([places, places + heads * self._capacity], dim=1)  # [slots, 2, kv_heads]
        return keys_then_values.flatten().to(self.shape.device)

    def write(self, layer: int, index: Tensor, key_value: Tensor) -> None:
        """`key_value`: [slots, 2 * kv_heads, head_dim], the keys of all heads, then the values."""
        dim = self.shape.head_dim
        self._layers[layer].view(-1, dim).index_copy_(0, index, key_value.reshape(-1, dim))

    def buffers(self, slot: Slot, layer: int, start: int, tokens: int) -> tuple[memoryview, ...]:
        """Writable bytes of tokens [start, start + tokens), in the order of `LayerKv.buffers`: the cache
        itself on a CPU, host memory that `land` moves on otherwise."""
        part = self._slot(self._host(slot), slot, layer)[:, :, start : start + tokens]
        raw = part.view(torch.uint8)  # [2, kv_heads, tokens, head_dim * itemsize]
        return tuple(memoryview(head.numpy()).cast("B") for which in raw for head in which)

    def land(self, slot: Slot, tokens: int) -> None:
        """The first `tokens` tokens of a slot were received whole: bring them to the device."""
        landed = self._landing.pop(slot, None)
        if landed is None:
            return
        for layer in range(self.shape.layers):
            self._slot(None, slot, layer)[:, :, :tokens] = landed[layer][:, :, :tokens].to(self.shape.device)

    def wipe(self, slot: Slot) -> None:
        """Zero a slot that may hold values that are no numbers."""
        self._landing.pop(slot, None)
        for layer in range(self.shape.layers):
            self._slot(None, slot, layer).zero_()

    def _slot(self, host: Tensor | None, slot: Slot, layer: int) -> Tensor:
        """View [2, kv_heads, slot tokens, head_dim]."""
        if host is not None:
            return host[layer]
        heads = self.shape.kv_heads
        part = self._layers[layer][:, slot.start * heads : (slot.start + slot.tokens) * heads]
        return part.view(2, heads, slot.tokens, self.shape.head_dim)

    def _host(self, slot: Slot) -> Tensor | None:
        """Where a slot is received if not in the cache itself: [layers, 2, kv_heads, slot tokens, head_dim]."""
        if not self._staged:
            return None
        if slot not in self._landing:
            shape = self.shape
            size = (shape.layers, 2, shape.kv_heads, slot.tokens, shape.head_dim)
            self._landing[slot] = torch.zeros(size, dtype=shape.dtype)
        return self._landing[slot]


def _power_below(number: int) -> int:
    return 1 << (number.bit_length() - 1)
