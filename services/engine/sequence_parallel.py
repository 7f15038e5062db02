"""One rank's part in the passes of a sequence that a group of workers computes together.

A chunk's tokens are split over the ranks (`sp_shares.py`); each puts its own through transformers' modules. Only
attention needs the others, and only there they exchange tensors, by one of two schemes (`ring.py`, `ulysses.py`).
A token drawn goes through the modules of rank 0 alone; the others lend it their KV.

Every step begins with a message of rank 0 to each other rank, which also says whether the pass stops after it. Where
rank 0 has more to send to each of them in the same step, what it says last counts: a stop asked for while it
computed its attention takes effect one step sooner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from common.messages.groups import Announcement
from common.policy.sp_shares import append_rank, owned_tokens
from services.engine.kv_cache import SequenceKv
from services.engine.ring import ring_attention
from services.engine.shared_sequence import SharedSequence
from services.engine.ulysses import ulysses_attention


class GroupPass:
    """A shared sequence's part of one pass, on one rank. For one thread at a time."""

    def __init__(self, shared: SharedSequence, start: int, tokens: int, stop_wanted: Callable[[], bool]) -> None:
        self.shared = shared
        self.link = shared.share.link
        self.rank, self.size = shared.share.rank, shared.share.size
        self.start, self.tokens = start, tokens
        self.is_row = start >= shared.prompt_tokens
        """One token drawn, not a part of the prompt."""
        self.bounds = shared.bounds(start, tokens)
        """Who computes which tokens, counted from `start`."""
        self.stopping = False
        """Rank 0 has said in the step just done that the pass stops after it."""
        self._stop_wanted = stop_wanted
        self._step = 0
        self._decided = False
        """Rank 0 has said its last word in this step."""

    @property
    def end(self) -> int:
        return self.start + self.tokens

    @property
    def own_start(self) -> int:
        """Position of the first token computed here."""
        return self.start + self.bounds[self.rank]

    @property
    def own_tokens(self) -> int:
        return self.part(self.rank)

    def part(self, rank: int) -> int:
        """Tokens that this rank computes."""
        return self.bounds[rank + 1] - self.bounds[rank]

    def others(self) -> list[int]:
        """All other ranks, from the next one on, so that not all ranks address the same at a time."""
        return [(self.rank + distance) % self.size for distance in range(1, self.size)]

    def past(self, rank: int) -> int:
        """Tokens before `start` whose KV this rank keeps, where tokens are split."""
        return owned_tokens(self.start, self.size, rank)

    def kept(self, rank: int) -> int:
        """Tokens of this pass whose KV this rank keeps, where tokens are split."""
        if self.is_row:
            return int(append_rank(self.start, self.size) == rank)
        return self.part(rank)

    # --- the pass, step by step ---

    def agreed(self, step: int) -> Announcement:
        """Loop thread, before the pass begins or goes on from this step. Raises: GroupBroken."""
        return self.shared.agreed(self.start, self.tokens, step)

    def open(self, announcement: Announcement) -> None:
        """Computing thread, before the first step, and before the next one when a stopped pass goes on."""
        self.stopping = False
        self.link.open_pass(announcement)

    def close(self) -> None:
        """Computing thread, after the last step."""
        self.link.close_pass()

    def attend(
        self,
        kv: SequenceKv,
        layer: int,
        query: Tensor,  # [1, query_heads, own tokens, head_dim]
        key: Tensor,  # [1, kv_heads, own tokens, head_dim]
        value: Tensor,  # [1, kv_heads, own tokens, head_dim]
        scaling: float,
    ) -> Tensor:
        """Attention of the own tokens to the whole sequence so far, [1, query_heads, own tokens, head_dim]; the KV
        that this rank keeps is in its cache afterwards. Raises: GroupBroken."""
        self._step = layer
        self._decided = False
        if self.rank == 0:
            self.stopping = self._stop_wanted()
        scheme = ring_attention if self.shared.share.scheme.per_node == 1 else ulysses_attention
        return scheme(self, kv, layer, query, key, value, scaling)

    def last_hidden(self, hidden: Tensor | None, layers: int, like: Tensor) -> Tensor | None:
        """After the last layer: bring the hidden state of the sequence's last token to rank 0, if this pass has it.

        `hidden`: [own tokens, hidden] of this sequence, None for no tokens; `like`: [hidden], for its type. Returns
        it [hidden] on rank 0, None elsewhere. Raises: GroupBroken."""
        self._step = layers
        if not self.is_row and self.end < self.shared.prompt_tokens:
            return None
        holder = max(rank for rank in range(self.size) if self.part(rank))
        if holder == self.rank:
            assert hidden is not None
            if holder == 0:
                return hidden[-1]
            self.send(0, [hidden[-1]])
        elif self.rank == 0:
            return self.receive(holder, [like.shape], like)[0]
        return None

    def decide(self) -> None:
        """Rank 0, before it sends its last message of a step to the first of the others: the same to all."""
        if self.rank == 0 and not self._decided and all(self.part(rank) for rank in range(self.size)):
            self.stopping = self.stopping or self._stop_wanted()
        self._decided = True

    # --- tensors ---

    def send(self, rank: int, tensors: Sequence[Tensor]) -> None:
        """They must not be written to afterwards."""
        self.link.send(rank, self._step, [_bytes_of(tensor) for tensor in tensors], stop=self.stopping)

    def receive(
        self, rank: int, shapes: Sequence[Sequence[int]], like: Tensor, *, lse: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Tensors of these shapes, of the type and on the device of `like`, then one of float32 of the shape `lse`."""
        came = [torch.empty(tuple(shape), dtype=like.dtype) for shape in shapes]
        if lse is not None:
            came.append(torch.empty(tuple(lse), dtype=torch.float32))
        stop = self.link.receive(rank, self._step, [_bytes_of(tensor) for tensor in came])
        if rank == 0:
            self.stopping = stop
        return [tensor.to(like.device) for tensor in came]


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor itself on a CPU; a copy of any other."""
    raw: Any = tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy()
    return memoryview(raw)
