"""A ragged batch: new tokens of several sequences packed one after another, without padding.

`packed` tokens are the rows of every tensor of a pass; a `Packed` row says which of them belong to
which sequence. Only attention looks at sequences; everything else in a layer works token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.messages.requests import RequestSpec
from services.engine.interface import EngineError, KvSink, Segment
from services.engine.kv_cache import SequenceKv

if TYPE_CHECKING:
    from services.engine.collectives import GroupLink
    from services.engine.prefill import PassRun
    from services.engine.sequence_parallel import GroupPass
    from services.engine.shared_sequence import SharedSequence


class HeldSequence:
    """A sequence the engine holds: its tokens so far, its KV, and how far it is computed."""

    __slots__ = (
        "active_pass",
        "computed",
        "kv",
        "layer_tokens",
        "parted",
        "prompt_tokens",
        "shared",
        "sink",
        "spec",
        "token_ids",
    )

    def __init__(self, spec: RequestSpec, token_ids: Sequence[int], kv: SequenceKv, sink: KvSink | None) -> None:
        self.spec = spec
        self.token_ids = list(token_ids)
        """Prompt and every token drawn since."""
        self.prompt_tokens = len(self.token_ids)
        self.kv = kv
        self.sink = sink
        self.shared: SharedSequence | None = None
        """Set if a group of workers computes it: `kv` is this rank's part then, and a follower knows no token drawn."""
        self.parted: GroupLink | None = None
        """Of the group that prefilled it, when this worker has gathered all its KV."""
        self.computed = 0
        """Tokens that have been through all layers (on whichever rank)."""
        self.layer_tokens = 0
        """Tokens computed here, summed over the layers: layers x tokens, unless something was computed twice."""
        self.active_pass: PassRun | None = None
        """The pass, running or stopped, that contains it."""

    @property
    def output_index(self) -> int:
        """Index of the next token to draw, counted over all attempts."""
        return self.spec.generated_before + len(self.token_ids) - self.prompt_tokens


@dataclass(frozen=True, slots=True)
class Packed:
    """One segment and its place in the packed batch: rows [offset, offset + tokens). Of a shared sequence only the
    part that this rank computes, maybe no tokens."""

    sequence: HeldSequence
    start: int
    tokens: int
    sample: bool
    offset: int
    group: GroupPass | None = None

    @property
    def end(self) -> int:
        """Position after the segment's last token."""
        return self.start + self.tokens if self.group is None else self.group.end


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """What a pass computes. Immutable; dropping a sequence makes another one."""

    rows: tuple[Packed, ...]
    token_ids: Tensor  # [1, tokens] int64
    positions: Tensor  # [1, tokens] int64

    @property
    def tokens(self) -> int:
        return self.token_ids.shape[1]

    @property
    def sampled(self) -> tuple[Packed, ...]:
        return tuple(row for row in self.rows if row.sample)

    @property
    def shared(self) -> Packed | None:
        """The row of a sequence that a group computes, if one is in the batch."""
        return next((row for row in self.rows if row.group is not None), None)

    def without(self, sequence: HeldSequence) -> tuple[RaggedBatch, Tensor]:
        """The batch less one sequence, and the packed indexes that stay, [kept tokens] int64."""
        stay = [row for row in self.rows if row.sequence is not sequence]
        kept = torch.cat([torch.arange(row.offset, row.offset + row.tokens) for row in stay])
        kept = kept.to(self.token_ids.device)
        return RaggedBatch(_placed(stay), self.token_ids[:, kept], self.positions[:, kept]), kept


def pack(
    segments: Sequence[tuple[HeldSequence, Segment]], device: torch.device, group: GroupPass | None = None
) -> RaggedBatch:
    """`group`: the pass of the shared sequence among them, if there is one. Raises: EngineError (no segment, a
    sequence twice or in another pass, tokens not next in line)."""
    if not segments:
        raise EngineError("a pass needs at least one segment")
    seen: set[int] = set()
    for sequence, segment in segments:
        _refuse_misfit(sequence, segment, id(sequence) in seen)
        seen.add(id(sequence))
    rows = _placed([_own_part(held, part, group) for held, part in segments])
    ids = [token for row in rows for token in row.sequence.token_ids[row.start : row.start + row.tokens]]
    positions = torch.cat([torch.arange(row.start, row.start + row.tokens) for row in rows])
    return RaggedBatch(rows, torch.tensor([ids], dtype=torch.int64).to(device), positions.unsqueeze(0).to(device))


def node_batch(row: Packed, device: torch.device) -> RaggedBatch:
    """All tokens of a shared sequence's row that the ranks of this node compute."""
    assert row.group is not None
    start, tokens = row.group.node_start, row.group.node_tokens
    ids = row.sequence.token_ids[start : start + tokens]
    positions = torch.arange(start, start + tokens)
    placed = Packed(row.sequence, start, tokens, False, 0, row.group)
    token_ids = torch.tensor([ids], dtype=torch.int64)
    return RaggedBatch((placed,), token_ids.to(device), positions.unsqueeze(0).to(device))


def _own_part(sequence: HeldSequence, segment: Segment, group: GroupPass | None) -> Packed:
    if sequence.shared is None or group is None:
        return Packed(sequence, segment.start, segment.tokens, segment.sample, 0)
    return Packed(sequence, group.own_start, group.own_tokens, segment.sample, 0, group)


def _refuse_misfit(sequence: HeldSequence, segment: Segment, twice: bool) -> None:
    name, end = segment.request_id, segment.start + segment.tokens
    if twice or sequence.active_pass is not None:
        raise EngineError(f"request {name} is already part of a pass")
    if segment.start != sequence.computed:
        raise EngineError(f"request {name}: segment starts at {segment.start}, computed are {sequence.computed} tokens")
    if sequence.shared is not None:
        _refuse_misshared(sequence.shared, sequence, segment)
        return
    if segment.gathers:
        raise EngineError(f"request {name} is computed here alone: there is nothing to gather")
    if segment.tokens < 1 or end > len(sequence.token_ids):
        raise EngineError(f"request {name}: no tokens [{segment.start}, {end}), it has {len(sequence.token_ids)}")
    if end > sequence.kv.capacity_tokens:
        raise EngineError(f"request {name}: KV is reserved for {sequence.kv.capacity_tokens} tokens, not {end}")
    if segment.sample and end != len(sequence.token_ids):
        raise EngineError(f"request {name}: the token after {end} is known, there is none to draw")


def _refuse_misshared(shared: SharedSequence, sequence: HeldSequence, segment: Segment) -> None:
    """A follower does not know the tokens drawn, and a rank keeps no more than its part of the KV."""
    name, end = segment.request_id, segment.start + segment.tokens
    leads, in_prompt = shared.share.rank == 0, end <= shared.prompt_tokens
    if segment.gathers and not (in_prompt and shared.share.scheme.gathers):
        raise EngineError(f"request {name}: rank 0 has no room for all KV, or [{segment.start}, {end}) is no chunk")
    if segment.tokens < 1 or end > shared.kv_tokens or not (in_prompt or segment.tokens == 1):
        raise EngineError(f"request {name}: [{segment.start}, {end}) is neither a chunk of its prompt nor one token")
    if leads and end > len(sequence.token_ids):
        raise EngineError(f"request {name}: no tokens [{segment.start}, {end}), it has {len(sequence.token_ids)}")
    if segment.sample and (not leads or end != len(sequence.token_ids)):
        raise EngineError(f"request {name}: rank {shared.share.rank} draws no token after {end}")


def _placed(rows: Sequence[Packed]) -> tuple[Packed, ...]:
    """The same rows, packed one after another."""
    offsets = [0]
    for row in rows:
        offsets.append(offsets[-1] + row.tokens)
    return tuple(
        Packed(row.sequence, row.start, row.tokens, row.sample, begin, row.group)
        for row, (begin, _end) in zip(rows, pairwise(offsets), strict=True)
    )
