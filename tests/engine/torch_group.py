"""Torch engines as the ranks of a group: one sequence served with random chunks and stops, and rank 0 observed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch

from common.messages.cluster import StepCost
from common.units import RequestId
from services.engine.interface import Segment
from services.engine.model import LoadedModel
from services.engine.prefill import PassRun
from services.engine.sequence_parallel import GroupPass
from services.engine.torch_prefill import TorchPrefillEngine
from tests.engine.group_world import Ranks, doors
from tests.engine.models import VOCAB

COST = StepCost(pass_s=0.001, token_s=0.0001, pair_s=0.0)
CAPACITY = 2_000


async def stopped_again_and_again(group: Ranks, leads: Leads, name: str, tokens: int, draw: Callable[[], int]) -> int:
    """The prompt of `tokens` in one chunk and one token drawn, each stopped whenever `draw` says; how often."""
    stops = 0
    for start, count in ((0, tokens), (tokens, 1)):
        leads.stop_after = draw()
        result = await group.run([Segment(RequestId(name), start, count, True)])
        while not result.finished:
            stops += 1
            leads.stop_after = draw()
            result = await group.resume(name)
    return stops


class Leads:
    """Sees rank 0's steps, in the thread that runs them, and stops it there when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine: TorchPrefillEngine | None = None
        self.stop_after = 0
        """Ask for a stop during the step with this number, counted from now; 0: never."""
        self.asked = 0
        """How often it was asked for: in turn before the step, at points in it where it may be taken back, and when it
        is done."""
        self.recalled = 0
        """Steps taken back."""
        self._points_left: int | None = None
        self.logits: list[torch.Tensor] = []
        """Of every token that rank 0 draws of a shared sequence."""
        original, original_point = PassRun.step, GroupPass.maybe_recall

        def step(run: PassRun) -> bool:
            leads = run.group is not None and run.group.rank == 0
            if leads:
                self.stop_after -= 1
                if self.stop_after == 0 and self.engine is not None:
                    self._points_left, self.asked = self.asked % 4, self.asked + 1
            done = original(run)
            if leads:
                self.recalled += not done
                self._ask()
            if leads and run.logits is not None:
                shared = next(at for at, row in enumerate(run.batch.sampled) if row.group is not None)
                self.logits.append(run.logits[shared].clone())
            return done

        def point(group: GroupPass) -> None:
            if group.rank == 0 and self._points_left is not None:
                if self._points_left == 0:
                    self._ask()
                else:
                    self._points_left -= 1
            original_point(group)

        monkeypatch.setattr(PassRun, "step", step)
        monkeypatch.setattr(GroupPass, "maybe_recall", point)

    def _ask(self) -> None:
        if self._points_left is not None and self.engine is not None:
            self.engine.stop()
        self._points_left = None


def group_of(model: LoadedModel, size: int, kind: str = "tcp", *, silence_s: float = 5.0) -> Ranks:
    engines = [TorchPrefillEngine(model, COST, kv_capacity_tokens=CAPACITY) for _ in range(size)]
    return Ranks(engines, doors(kind, size, silence_s=silence_s))


def random_prompt(rng: random.Random, tokens: int) -> list[int]:
    return [rng.randrange(3, VOCAB) for _ in range(tokens)]


async def generate(
    group: Ranks,
    leads: Leads,
    rng: random.Random,
    name: str,
    prompt: Sequence[int],
    new_tokens: int,
    chunk_max: int,
    *,
    gathers: bool = False,
) -> tuple[list[int], int]:
    """Serve an open sequence in chunks of random size with random stops; its tokens, and how often it was stopped.
    `gathers`: the last chunk does."""
    leads.engine = group.leader  # type: ignore[assignment]
    drawn: list[int] = []
    computed = stops = 0
    while len(drawn) < new_tokens:
        left = len(prompt) - computed
        tokens = rng.randint(1, min(left, chunk_max)) if left > 0 else 1
        leads.stop_after = rng.choice([0, 1, 2, 3])
        last = tokens >= left
        result = await group.run([Segment(RequestId(name), computed, tokens, last, gathers and last)])
        while not result.finished:
            stops += 1
            leads.stop_after = rng.choice([0, 0, 1])
            result = await group.resume(name)
        computed += tokens
        drawn += [sampled.token_id for sampled in result.sampled]
    return drawn, stops
