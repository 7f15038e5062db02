"""Slots of KV: exact books, no overlap, joined again when free."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from services.engine.interface import EngineError, KvFull
from services.engine.kv_cache import KvShape
from services.engine.slots import UNIT_TOKENS, Slot, SlotKv, SlotPool

SHAPE = KvShape(layers=2, kv_heads=3, head_dim=4, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("tokens", "slot"), [(1, 256), (256, 256), (257, 512), (600, 1024), (1024, 1024), (2049, 4096)]
)
def test_a_slot_is_the_next_power_of_two(tokens: int, slot: int) -> None:
    pool = SlotPool(8192)
    assert pool.take(tokens).tokens == slot
    assert pool.used_tokens == slot


@pytest.mark.parametrize("capacity", [256, 8192, 5000, 32_768, 7 * 256 + 3])
def test_random_use_keeps_exact_books(capacity: int) -> None:
    rng = random.Random(capacity)
    pool = SlotPool(capacity)
    assert pool.capacity_tokens == capacity // UNIT_TOKENS * UNIT_TOKENS
    held: list[Slot] = []
    refused = 0
    for _ in range(2_000):
        if held and rng.random() < 0.5:
            pool.give_back(held.pop(rng.randrange(len(held))))
        else:
            try:
                held.append(pool.take(rng.choice([1, 200, 256, 300, 1000, 2000])))
            except KvFull:
                refused += 1
        places = sorted(held, key=lambda slot: slot.start)
        assert all(slot.start % slot.tokens == 0 for slot in places)
        assert all(a.start + a.tokens <= b.start for a, b in itertools.pairwise(places))
        assert not places or places[-1].start + places[-1].tokens <= pool.capacity_tokens
        assert pool.used_tokens == sum(slot.tokens for slot in held)
    assert refused
    for slot in held:
        pool.give_back(slot)
    assert pool.used_tokens == 0
    assert pool.take(pool.largest_tokens).start == 0, "free neighbours were not joined"


def test_every_unit_can_be_used_and_not_one_more() -> None:
    pool = SlotPool(4096)
    slots = [pool.take(UNIT_TOKENS) for _ in range(16)]
    assert [slot.row for slot in slots] == list(range(16))
    with pytest.raises(KvFull, match="4096 of 4096"):
        pool.take(1)
    pool.give_back(slots[3])
    pool.give_back(slots[4])
    with pytest.raises(KvFull):
        pool.take(UNIT_TOKENS + 1)  # two free units, but not of one block
    assert pool.take(1).row == 3


def test_too_small_a_capacity_is_refused() -> None:
    with pytest.raises(EngineError, match="too small"):
        SlotPool(UNIT_TOKENS - 1)


def test_what_is_written_is_what_the_table_shows() -> None:
    pool = SlotPool(2048)
    kv = SlotKv(SHAPE, pool)
    slots = [pool.take(100), pool.take(100), pool.take(300)]
    positions = [7, 0, 299]
    new = torch.randn(3, 2 * SHAPE.kv_heads, SHAPE.head_dim)
    kv.write(1, kv.write_index(slots, positions), new)
    for slot, position, row in zip(slots, positions, new, strict=True):
        keys, values = kv.table(1, slot.tokens, slot.row, slot.row, position + 1)
        assert keys.shape == (1, SHAPE.kv_heads, position + 1, SHAPE.head_dim)
        assert torch.equal(keys[0, :, position], row[: SHAPE.kv_heads])
        assert torch.equal(values[0, :, position], row[SHAPE.kv_heads :])
    written = sum(int((kv.table(layer, 256, 0, 7, 256)[which] != 0).sum()) for layer in (0, 1) for which in (0, 1))
    assert written == new.numel(), "written elsewhere too"


def test_staged_bytes_reach_the_cache_when_they_land() -> None:
    pool = SlotPool(512)
    kv = SlotKv(SHAPE, pool, staged=True)
    pool.take(1)
    slot = pool.take(1)
    source = torch.randn(SHAPE.layers, 2 * SHAPE.kv_heads, 10, SHAPE.head_dim)
    for layer in range(SHAPE.layers):
        for begin, end in ((0, 4), (4, 10)):
            for buffer, head in zip(kv.buffers(slot, layer, begin, end - begin), source[layer], strict=True):
                buffer[:] = head[begin:end].numpy().tobytes()
    assert not kv.table(0, 256, 1, 1, 10)[0].any()
    kv.land(slot, 10)
    for layer in range(SHAPE.layers):
        keys, values = kv.table(layer, 256, 1, 1, 10)
        assert torch.equal(torch.cat([keys[0], values[0]]), source[layer])
        assert not kv.table(layer, 256, 0, 0, 256)[0].any(), "another slot was touched"


def test_buffers_are_the_cache_itself_one_contiguous_piece_per_head() -> None:
    pool = SlotPool(1024)
    kv = SlotKv(SHAPE, pool)
    pool.take(1)
    slot = pool.take(400)
    buffers = kv.buffers(slot, 0, start=5, tokens=10)
    assert len(buffers) == 2 * SHAPE.kv_heads
    source = torch.randn(2, SHAPE.kv_heads, 10, SHAPE.head_dim)
    for buffer, head in zip(buffers, source.flatten(0, 1), strict=True):
        assert buffer.nbytes == 10 * SHAPE.head_dim * 4
        assert not buffer.readonly
        buffer[:] = head.numpy().tobytes()
    keys, values = kv.table(0, slot.tokens, slot.row, slot.row, 15)
    assert torch.equal(keys[0, :, 5:], source[0])
    assert torch.equal(values[0, :, 5:], source[1])
    kv.wipe(slot)
    assert not keys.any()
    assert not values.any()
