"""Drawing the next token from logits.

A draw uses one uniform number that depends on (seed, output index) alone, and the inverse of the
cumulative distribution: so a request served again elsewhere, in another batch, draws the same tokens
from the same logits. Truncation follows transformers: temperature, then top_k, then top_p.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from common.messages.requests import SamplingParams, TokenLogprob

GREEDY_BELOW = 1e-5
"""Temperatures below it are greedy: dividing by them would overflow."""

_CANDIDATES = 1024
"""top_p sorts this many likeliest tokens first, and the whole vocabulary only if they hold too little."""


def sample(
    logits: Tensor, params: Sequence[SamplingParams], indexes: Sequence[int]
) -> list[tuple[int, TokenLogprob | None]]:
    """One token per row of `logits` [rows, vocab]; `indexes` are the tokens' output indexes.

    Log-probabilities are those of the model itself, before temperature and truncation.
    """
    logits = logits.float()
    tokens = torch.argmax(logits, dim=-1)
    plain = [row for row, p in enumerate(params) if p.temperature >= GREEDY_BELOW and not _truncates(p, logits)]
    cut = [row for row, p in enumerate(params) if p.temperature >= GREEDY_BELOW and _truncates(p, logits)]
    for rows, draw in ((plain, _draw_plain), (cut, _draw_truncated)):
        if rows:
            chosen = [params[row] for row in rows]
            uniforms = torch.tensor(
                [uniform(params[row].seed, indexes[row]) for row in rows], dtype=torch.float64, device=logits.device
            )
            temperatures = torch.tensor([p.temperature for p in chosen], device=logits.device)
            tokens[rows] = draw(logits[rows] / temperatures.unsqueeze(-1), chosen, uniforms)
    token_ids = tokens.tolist()
    return list(zip(token_ids, _logprobs(logits, params, token_ids), strict=True))


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that depends on nothing else."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + index.to_bytes(8, "little"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 12) / 2**52


def _truncates(params: SamplingParams, logits: Tensor) -> bool:
    return params.top_p < 1.0 or 0 < params.top_k < logits.shape[-1]


def _draw_plain(scaled: Tensor, _params: Sequence[SamplingParams], uniforms: Tensor) -> Tensor:
    return _invert(torch.softmax(scaled, dim=-1), uniforms)


def _draw_truncated(scaled: Tensor, params: Sequence[SamplingParams], uniforms: Tensor) -> Tensor:
    """Draw among each row's likeliest tokens. `scaled` [rows, vocab]; returns token ids [rows]."""
    vocab = scaled.shape[-1]
    wanted = [p.top_k if 0 < p.top_k < vocab else min(_CANDIDATES, vocab) for p in params]
    total = torch.logsumexp(scaled, dim=-1, keepdim=True)
    values, ids = torch.topk(scaled, max(wanted), dim=-1)
    by_mass = torch.tensor([not 0 < p.top_k < vocab for p in params], device=scaled.device)
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=scaled.device)
    mass = torch.exp(values - total).double().sum(-1)
    if bool((by_mass & (mass < top_p)).any()):
        wanted = [vocab if flat else k for k, flat in zip(wanted, by_mass.tolist(), strict=True)]
        values, ids = torch.sort(scaled, dim=-1, descending=True)
    kept = torch.arange(values.shape[-1], device=scaled.device) < torch.tensor(wanted, device=scaled.device).unsqueeze(
        -1
    )
    total = torch.where(by_mass.unsqueeze(-1), total, values.masked_fill(~kept, -torch.inf).logsumexp(-1, keepdim=True))
    probabilities = torch.exp(values - total).double().masked_fill(~kept, 0.0)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= top_p.unsqueeze(-1), 0.0)
    place = _invert(probabilities, uniforms)
    return ids.gather(-1, place.unsqueeze(-1)).squeeze(-1)


def _invert(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """First index whose cumulated weight exceeds uniform x total. [rows, n], [rows] -> [rows] int64"""
    cumulated = probabilities.double().cumsum(-1)
    targets = (uniforms * cumulated[:, -1]).unsqueeze(-1)
    place = torch.searchsorted(cumulated, targets, right=True).squeeze(-1)
    return place.clamp(max=probabilities.shape[-1] - 1)


def _logprobs(logits: Tensor, params: Sequence[SamplingParams], token_ids: Sequence[int]) -> list[TokenLogprob | None]:
    found: list[TokenLogprob | None] = [None] * len(params)
    rows = [row for row, p in enumerate(params) if p.logprobs is not None]
    if not rows:
        return found
    logs = torch.log_softmax(logits[rows], dim=-1)
    most = min(max(params[row].logprobs or 0 for row in rows), logits.shape[-1])
    values, ids = torch.topk(logs, most, dim=-1)
    for at, row in enumerate(rows):
        count = params[row].logprobs or 0
        top = tuple(zip(ids[at, :count].tolist(), values[at, :count].tolist(), strict=True))
        found[row] = TokenLogprob(logprob=float(logs[at, token_ids[row]]), top=top)
    return found
