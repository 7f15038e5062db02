"""Draws follow the distribution asked for, and depend on (seed, index) alone."""

from __future__ import annotations

import math

import pytest
import torch

from common.messages.requests import SamplingParams
from services.engine.sampler import sample, uniform

DRAWS = 4_000


def draws(logits: torch.Tensor, params: SamplingParams, count: int = DRAWS) -> torch.Tensor:
    """Counts per token id over many indexes, as one batch. [vocab]"""
    rows = logits.expand(count, -1)
    tokens = [token for token, _ in sample(rows, [params] * count, range(count))]
    return torch.bincount(torch.tensor(tokens), minlength=logits.shape[-1])


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Per degree of freedom; a right distribution gives about 1."""
    some = expected > 0
    assert counts[~some].sum() == 0
    wanted = expected[some] * counts.sum()
    return float(((counts[some] - wanted) ** 2 / wanted).sum()) / (int(some.sum()) - 1)


LOGITS = torch.tensor([1.0, 2.0, 0.0, -1.0, 1.5, 0.5, -0.5, 0.2])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_temperature(temperature: float) -> None:
    counts = draws(LOGITS, SamplingParams(temperature=temperature, seed=1))
    assert chi_square(counts, torch.softmax(LOGITS / temperature, 0)) < 2.5


def test_a_wrong_distribution_would_be_noticed() -> None:
    counts = draws(LOGITS, SamplingParams(temperature=1.2, seed=1))
    assert chi_square(counts, torch.softmax(LOGITS, 0)) > 5


def test_top_k() -> None:
    counts = draws(LOGITS, SamplingParams(top_k=3, seed=2))
    kept = torch.softmax(LOGITS.masked_fill(LOGITS < 1.0, -torch.inf), 0)
    assert chi_square(counts, kept) < 2.5


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1])
    counts = draws(probabilities.log(), SamplingParams(top_p=0.7, seed=3))
    assert chi_square(counts, torch.tensor([2 / 3, 1 / 3, 0.0, 0.0])) < 3


def test_top_p_counts_within_what_top_k_left() -> None:
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1])
    # Of top_k = 2: 4/7 and 3/7; 0.55 is reached by the first alone (of the whole it would take both).
    counts = draws(probabilities.log(), SamplingParams(top_k=2, top_p=0.55, seed=3), 200)
    assert counts.tolist() == [200, 0, 0, 0]


def test_top_p_over_a_flat_large_vocabulary_is_exact() -> None:
    """More tokens are needed than are sorted at first."""
    logits = torch.zeros(5_000)
    logits[:10] = 1.0
    counts = draws(logits, SamplingParams(top_p=0.9, seed=4), 1_000)
    mass = 10 * math.e + 4_990
    assert counts[:10].sum() > 0
    assert (counts > 0).sum() > 700
    assert (counts > 0).sum() <= 10 + math.ceil(0.9 * mass - 10 * math.e)


def test_greedy_whatever_the_seed() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    got = sample(logits, [SamplingParams(temperature=0.0, seed=s, top_p=0.5) for s in range(6)], range(6))
    assert [token for token, _ in got] == logits.argmax(-1).tolist()


def test_tiny_temperature_does_not_overflow() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]] * 2)
    params = [SamplingParams(temperature=1e-300), SamplingParams(temperature=2e-5)]
    assert [token for token, _ in sample(logits, params, [0, 0])] == [1, 1]


def test_a_draw_depends_on_seed_and_index_alone() -> None:
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(1)).expand(4, -1)
    kinds = [
        SamplingParams(seed=5),
        SamplingParams(seed=5, top_k=40),
        SamplingParams(seed=5, top_p=0.9),
        SamplingParams(temperature=0.0),
    ]
    together = [token for token, _ in sample(logits, kinds, [7, 7, 7, 7])]
    alone = [sample(logits[:1], [kind], [7])[0][0] for kind in kinds]
    assert together == alone
    by_index = [sample(logits[:1], [kinds[0]], [index])[0][0] for index in range(20)]
    by_seed = [sample(logits[:1], [SamplingParams(seed=seed)], [7])[0][0] for seed in range(20)]
    assert len(set(by_index)) > 10
    assert len(set(by_seed)) > 10


def test_uniform_is_uniform_and_fixed() -> None:
    values = torch.tensor([uniform(seed, index) for seed in range(50) for index in range(40)])
    counts = torch.histc(values, bins=20, min=0.0, max=1.0)
    assert chi_square(counts, torch.full((20,), 0.05)) < 2
    # Fixed for ever: a request may be continued by a worker of a later version.
    assert uniform(0, 0) == pytest.approx(FIRST)
    assert uniform(2**63 - 1, 10) != uniform(2**63 - 1, 11)


FIRST = 0.0564663990004608


def test_logprobs_are_the_models_own() -> None:
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(2))
    params = [
        SamplingParams(temperature=0.3, top_k=5, seed=1, logprobs=4),
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.0, seed=9, logprobs=0),
    ]
    (token_a, first), (_, second), (token_c, third) = sample(logits, params, [0, 0, 0])
    logs = torch.log_softmax(logits, -1)
    assert first is not None
    assert third is not None
    assert second is None
    assert first.logprob == pytest.approx(float(logs[0, token_a]))
    best = logs[0].topk(4)
    assert [token for token, _ in first.top] == best.indices.tolist()
    assert [value for _, value in first.top] == pytest.approx(best.values.tolist())
    assert third.logprob == pytest.approx(float(logs[2, token_c]))
    assert third.top == ()
