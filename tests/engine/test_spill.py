"""KV moved out of the cache and back, in both engines: the same tokens, exact books, whatever interrupts it."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from common.units import RequestId
from services.engine import spill
from services.engine.interface import EngineError, KvFull, SpillRefused
from services.engine.model import LoadedModel, load_model
from services.engine.spill import SpillLimits
from services.engine.timed_language import TimedShape, expected_tokens
from services.engine.timed_prefill import TimedPrefillEngine
from services.engine.torch_prefill import TorchPrefillEngine
from tests.engine.models import VOCAB, reference_greedy, reference_model, tiny_model
from tests.engine.test_engine_contract import (
    CAPACITY,
    COST,
    EngineKit,
    opened,
    segment,
    stopped_pass,
    timed_kit,
    tokens_of,
)

A = RequestId("a")
B = RequestId("b")
MIB = 2**20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("spill-model"), num_hidden_layers=24)


@lru_cache(maxsize=1)
def models(folder: Path) -> tuple[LoadedModel, Any]:
    """Engines do not change the one, nor the tests the other."""
    return load_model(folder, dtype="float32", device="cpu"), reference_model(folder)


def torch_kit(folder: Path, limits: SpillLimits | None) -> EngineKit:
    model, reference = models(folder)
    engine = TorchPrefillEngine(model, COST, kv_capacity_tokens=CAPACITY, spill=limits)
    follow: Callable[..., list[int]] = lambda prompt, count: reference_greedy(reference, prompt, count)[0]  # noqa: E731
    return EngineKit(prefill=engine, decode=None, vocab=VOCAB, follow=follow)  # type: ignore[arg-type]


@pytest.fixture(params=["timed", "memory", "disk"])
async def kit(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> AsyncIterator[EngineKit]:
    if request.param == "timed":
        made = timed_kit(folder)
    else:
        made = torch_kit(folder, SpillLimits(request.param, 64 * MIB, str(tmp_path)))
    yield made
    await made.prefill.shutdown()
    assert not await asyncio.to_thread(lambda: list(tmp_path.iterdir())), "a file is left"


async def spilled_halfway(kit: EngineKit, tokens: int = 60) -> list[int]:
    """A sequence whose pass was stopped, moved out. Returns its prompt."""
    prompt = opened(kit, "a", tokens)
    assert not (await stopped_pass(kit, [segment("a", 0, tokens)])).finished
    await kit.prefill.spill(A)
    return prompt


async def test_what_was_moved_goes_on_where_it_stood(kit: EngineKit):
    prompt = await spilled_halfway(kit)
    assert kit.prefill.kv_used_tokens == 0
    other = opened(kit, "b", CAPACITY // 8, max_tokens=1)
    assert tokens_of(await kit.prefill.run([segment("b", 0, CAPACITY // 8)])) == kit.follow(other, 1)
    await kit.prefill.restore(A)
    assert kit.prefill.kv_used_tokens == 68 + CAPACITY // 8 + 1
    tokens = tokens_of(await kit.prefill.resume(A))
    tokens += tokens_of(await kit.prefill.run([segment("a", 60, 1)]))
    assert tokens == kit.follow(prompt, 2)


async def test_it_can_be_in_no_pass_meanwhile(kit: EngineKit):
    await spilled_halfway(kit)
    for refused in (kit.prefill.resume(A), kit.prefill.run([segment("a", 0, 60)]), kit.prefill.spill(A)):
        with pytest.raises(EngineError):
            await refused
    await kit.prefill.restore(A)
    with pytest.raises(EngineError):
        await kit.prefill.restore(A)
    assert (await kit.prefill.resume(A)).finished


async def test_it_comes_back_when_there_is_room(kit: EngineKit):
    prompt = await spilled_halfway(kit)
    for number in range(4):
        opened(kit, f"s{number}", 500, max_tokens=8)
    used = kit.prefill.kv_used_tokens
    with pytest.raises(KvFull):
        await kit.prefill.restore(A)
    assert kit.prefill.kv_used_tokens == used
    kit.prefill.close(RequestId("s0"))
    await kit.prefill.restore(A)
    assert tokens_of(await kit.prefill.resume(A)) == kit.follow(prompt, 1)


async def test_what_is_elsewhere_is_closed_like_any_other(kit: EngineKit):
    await spilled_halfway(kit)
    kit.prefill.close(A)
    assert kit.prefill.kv_used_tokens == 0
    prompt = await spilled_halfway(kit)
    await kit.prefill.restore(A)
    assert tokens_of(await kit.prefill.resume(A)) == kit.follow(prompt, 1)


async def test_a_move_that_is_not_wanted_any_more_ends(kit: EngineKit):
    """Out or back: stopped before its first piece, or done before the stop is heard."""
    opened(kit, "a", 60)
    await kit.prefill.run([segment("a", 0, 30, sample=False)])
    moving = asyncio.ensure_future(kit.prefill.spill(A))
    await asyncio.sleep(0)
    with pytest.raises(EngineError, match="moved"):
        kit.prefill.close(A)
    kit.prefill.stop_move(A)
    try:
        await moving
    except SpillRefused:
        assert kit.prefill.kv_used_tokens == 68
        await kit.prefill.spill(A)
    assert kit.prefill.kv_used_tokens == 0
    moving = asyncio.ensure_future(kit.prefill.restore(A))
    await asyncio.sleep(0)
    kit.prefill.stop_move(A)
    await asyncio.gather(moving, return_exceptions=True)
    kit.prefill.close(A)
    assert kit.prefill.kv_used_tokens == 0
    kit.prefill.stop_move(A)


async def test_who_does_not_stand_alone_is_not_moved(kit: EngineKit):
    opened(kit, "a", 30)
    opened(kit, "b", 30)
    running = asyncio.ensure_future(kit.prefill.run([segment("a", 0, 30), segment("b", 0, 30)]))
    await asyncio.sleep(0)
    with pytest.raises(EngineError):
        await kit.prefill.spill(A)
    kit.prefill.stop()
    assert not (await running).finished
    with pytest.raises(EngineError):
        await kit.prefill.spill(A)
    assert (await kit.prefill.resume(A)).finished
    with pytest.raises(EngineError):
        await kit.prefill.spill(RequestId("unknown"))


async def test_passes_of_others_run_while_it_moves(kit: EngineKit):
    opened(kit, "a", 60)
    other = opened(kit, "b", 20)
    await stopped_pass(kit, [segment("a", 0, 60)])
    moved, ran = await asyncio.gather(kit.prefill.spill(A), kit.prefill.run([segment("b", 0, 20)]))
    assert moved.kv_bytes > 0
    assert tokens_of(ran) == kit.follow(other, 1)


async def test_nothing_computed_is_nothing_moved(kit: EngineKit):
    prompt = opened(kit, "a", 10)
    assert (await kit.prefill.spill(A)).kv_bytes == 0
    await kit.prefill.restore(A)
    assert tokens_of(await kit.prefill.run([segment("a", 0, 10)])) == kit.follow(prompt, 1)


@pytest.mark.parametrize("kind", ["timed", "memory", "disk"])
async def test_a_bound_on_what_is_moved_is_kept(kind: str, folder: Path, tmp_path: Path):
    if kind == "timed":
        shape = TimedShape(step_cost=COST, layers=3, kv_capacity_tokens=CAPACITY, vocab=VOCAB)
        shape = replace(shape, spill_bytes_max=40 * shape.kv_bytes_per_token)
        engine = TimedPrefillEngine(shape)
        kit = EngineKit(engine, None, VOCAB, lambda prompt, count: expected_tokens(prompt, count, VOCAB))  # type: ignore[arg-type]
    else:
        kit = torch_kit(folder, None)
        size = 40 * kit.prefill.profile.kv_bytes_per_token
        kit = torch_kit(folder, SpillLimits("disk" if kind == "disk" else "memory", size, str(tmp_path)))
    for name in ("a", "b"):
        opened(kit, name, 60)
        await kit.prefill.run([segment(name, 0, 25, sample=False)])
    assert (await kit.prefill.spill(A)).kv_bytes == 25 * kit.prefill.profile.kv_bytes_per_token
    with pytest.raises(SpillRefused, match="left"):
        await kit.prefill.spill(B)
    assert kit.prefill.kv_used_tokens == 68
    kit.prefill.close(A)
    assert (await kit.prefill.spill(B)).kv_bytes == 25 * kit.prefill.profile.kv_bytes_per_token
    await kit.prefill.shutdown()


async def test_an_engine_that_moves_nothing_says_so(folder: Path):
    kit = torch_kit(folder, None)
    assert kit.prefill.profile.spill_bytes_max == 0
    opened(kit, "a", 10)
    with pytest.raises(SpillRefused, match="--spill off"):
        await kit.prefill.spill(A)
    kit.prefill.stop_move(A)
    with pytest.raises(EngineError):
        await kit.prefill.restore(A)
    await kit.prefill.shutdown()


async def test_a_full_disk_refuses_before_anything_was_moved(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    kit = torch_kit(folder, SpillLimits("disk", MIB, str(tmp_path)))
    prompt = opened(kit, "a", 60)
    await stopped_pass(kit, [segment("a", 0, 60)])
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SpillRefused, match="No space left"):
        await kit.prefill.spill(A)
    assert kit.prefill.kv_used_tokens == 68
    assert tokens_of(await kit.prefill.resume(A)) == kit.follow(prompt, 1), "as if nothing had been"
    monkeypatch.undo()
    assert (await kit.prefill.spill(A)).moved_to == "disk", "and it holds no room of what was refused"
    await kit.prefill.shutdown()


async def test_a_file_that_cannot_be_read_back_loses_the_sequence_and_nothing_else(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    kit = torch_kit(folder, SpillLimits("disk", MIB, str(tmp_path)))
    await spilled_halfway(kit)
    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(EngineError, match="Input/output error"):
        await kit.prefill.restore(A)
    kit.prefill.close(A)
    assert kit.prefill.kv_used_tokens == 0
    await kit.prefill.shutdown()


@pytest.mark.parametrize("to", ["memory", "disk"])
async def test_tokens_are_equal_with_moves_at_random_stops(
    to: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In pieces of a few tokens, so that layers, heads and pieces do not fall together. Nothing is computed twice."""
    monkeypatch.setattr(spill, "PIECE_BYTES", 5_000)
    kit = torch_kit(folder, SpillLimits("disk" if to == "disk" else "memory", 64 * MIB, str(tmp_path)))
    engine = kit.prefill
    assert isinstance(engine, TorchPrefillEngine)
    dice = random.Random(to)
    moves = 0
    for number in range(4):
        name, tokens = f"q{number}", dice.randrange(100, 300)
        prompt, done = opened(kit, name, tokens), 0
        while done < tokens:
            chunk = min(tokens - done, dice.randrange(20, 120))
            result = await stopped_pass(kit, [segment(name, done, chunk, sample=done + chunk == tokens)])
            while not result.finished:
                if dice.random() < 0.7:
                    await engine.spill(RequestId(name))
                    torch.full((MIB,), float("nan"))  # whoever reads what was freed reads no numbers
                    await engine.restore(RequestId(name))
                    moves += 1
                resuming = asyncio.ensure_future(engine.resume(RequestId(name)))
                await asyncio.sleep(0)
                engine.stop()
                result = await resuming
            done += chunk
        assert tokens_of(result) == kit.follow(prompt, 1)
        assert engine.tokens_computed(RequestId(name)) == tokens * engine.profile.layers, "computed twice"
        engine.close(RequestId(name))
    assert moves > 20
    assert engine.kv_used_tokens == 0
    await engine.shutdown()
