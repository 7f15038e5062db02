"""One rank's part in the passes of a sequence that a group of workers computes together.

A chunk's tokens are split over the ranks, which stand in a mesh of nodes and places (`sp_shares.py`). Two things need
more than one's own tokens, and only there ranks exchange tensors. Attention: in a node by heads (`ulysses.py`, or
`megatron.py` with the projections), between nodes round a ring (`ring.py`). And linear work, where a node's ranks split
the weights rather than the tokens (`megatron.py`). Everything else transformers' modules do to the own tokens.
A token drawn goes through the modules of rank 0 alone; the others lend it their KV (`shard_decode.py`), or have brought
it to rank 0 layer by layer in a last common chunk (`Segment.gathers`), and are needed no more.

Every step begins with a message of rank 0 to each other rank, which also says whether the pass stops after it. Where
rank 0 has more to send to each of them in the same step, what it says last counts. A rank that stands neither in
rank 0's node nor at its place in another, and so exchanges no tensor with it, is told by a message of its own.

A stop asked for before rank 0's last word in a step of a chunk takes the step back, where rank 0 can still say so
before the larger part of it is computed: all stand before it, and it is computed anew later. So a pause waits for the
rest of a step that is nearly done, or for the beginning of one; never for both, and for a whole one only where it may
not be taken back: the first of a pass, one taken back before, one of so few tokens that a rank has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from common.messages.groups import Announcement
from common.policy.sp_shares import HeadShare
from services.engine.collectives import StepRecalled
from services.engine.kv_cache import SequenceKv
from services.engine.ring import ring_attention
from services.engine.shard_decode import ask, lend
from services.engine.shared_sequence import SharedSequence
from services.engine.ulysses import ulysses_attention
from services.engine.weight_shares import LayerShare


class GroupPass:
    """A shared sequence's part of one pass, on one rank. For one thread at a time."""

    def __init__(
        self,
        shared: SharedSequence,
        start: int,
        tokens: int,
        stop_wanted: Callable[[], bool],
        *,
        gathers: bool = False,
    ) -> None:
        self.shared = shared
        self.gathers = gathers
        """Rank 0 has the KV of all when this pass is done."""
        self.link = shared.share.link
        self.scheme, self.mesh = shared.share.scheme, shared.share.mesh
        self.rank, self.size = shared.share.rank, shared.share.size
        self.node, self.place = self.mesh.node(self.rank), self.mesh.place(self.rank)
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
        """Rank 0 has said its last word in this step; to a rank that computes no token, its first may be that."""
        self._recalled = 0
        """The step taken back last. It is not a second time, so that no row of pauses keeps the pass from moving; nor
        is the first, as a pass without a step done does not stand, but has not begun."""

    # --- who computes and keeps what ---

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

    @property
    def node_start(self) -> int:
        """Position of the first token computed in this node."""
        return self.start + self.bounds[self.mesh.rank(self.node, 0)]

    @property
    def node_tokens(self) -> int:
        return self.tokens_of(self.node)

    def part(self, rank: int) -> int:
        """Tokens that this rank computes."""
        return self.bounds[rank + 1] - self.bounds[rank]

    def tokens_of(self, node: int) -> int:
        """Tokens that the ranks of this node compute."""
        return self.bounds[self.mesh.rank(node + 1, 0)] - self.bounds[self.mesh.rank(node, 0)]

    def in_node(self, rank: int) -> slice:
        """Where this rank's tokens lie among its node's."""
        first = self.bounds[self.mesh.rank(self.mesh.node(rank), 0)]
        return slice(self.bounds[rank] - first, self.bounds[rank + 1] - first)

    def past(self, node: int) -> int:
        """Tokens before `start` whose KV this node keeps."""
        return self.mesh.owned_tokens(self.start, node)

    def kept(self, node: int) -> int:
        """Tokens of this pass whose KV this node keeps."""
        if self.is_row:
            return int(self.mesh.append_node(self.start) == node)
        return self.tokens_of(node)

    def heads_of(self, rank: int) -> HeadShare:
        """On which heads this rank attends, and keeps KV."""
        return self.shared.heads[self.mesh.place(rank)]

    @property
    def heads(self) -> HeadShare:
        """Of this rank."""
        return self.shared.heads[self.place]

    @property
    def splits_weights(self) -> bool:
        """Whether the ranks of a node share out linear work, in one stage or both."""
        stages = (self.scheme.attention, self.scheme.mlp)
        return not self.is_row and self.mesh.per_node > 1 and "megatron" in stages

    def weights(self, layer: int) -> LayerShare:
        """This rank's share of a layer's, where they are split."""
        assert self.shared.weights is not None
        return self.shared.weights.of(self.mesh.per_node, self.place)[layer]

    # --- the others: each list begins with the next one, so that not all ranks address the same at a time ---

    def others(self) -> list[int]:
        return [(self.rank + distance) % self.size for distance in range(1, self.size)]

    def mates(self) -> list[int]:
        """Of this node."""
        count = self.mesh.per_node
        return [self.mesh.rank(self.node, (self.place + distance) % count) for distance in range(1, count)]

    def peers(self) -> list[int]:
        """At the same place of the other nodes."""
        count = self.mesh.nodes
        return [self.mesh.rank((self.node + distance) % count, self.place) for distance in range(1, count)]

    # --- the pass, step by step ---

    def agreed(self, step: int) -> Announcement:
        """Loop thread, before the pass begins or goes on from this step. Raises: GroupBroken."""
        return self.shared.agreed(self.start, self.tokens, step, gathers=self.gathers)

    def open(self, announcement: Announcement) -> None:
        """Computing thread, before the first step, and before the next one when a stopped pass goes on."""
        self.stopping = False
        self.link.open_pass(announcement)

    def close(self) -> None:
        """Computing thread, after the last step."""
        self.link.close_pass()

    def begin_step(self, layer: int) -> None:
        """Raises: StepRecalled, GroupBroken."""
        self._step = layer
        self._decided = False
        self.maybe_recall()
        if self.rank == 0:
            self.stopping = self._stop_wanted()
            self._decided = not all(self.part(rank) for rank in range(self.size))

    def maybe_recall(self) -> None:
        """Within a step, as long as there is not much to be lost. Raises: StepRecalled, GroupBroken."""
        if self.rank:
            self.link.look(self._step)
        elif not (self.is_row or self._decided or self._step == self._recalled) and self._stop_wanted():
            raise StepRecalled

    def recall(self) -> None:
        """After `StepRecalled`: all ranks stop before this step. Raises: GroupBroken."""
        self.link.recall(self._step)
        self._recalled, self.stopping = self._step, True

    def end_step(self, kv: SequenceKv) -> None:
        """Raises: StepRecalled, GroupBroken."""
        if self.node and self.place and not self.is_row:
            self.stopping = self.link.receive(0, self._step)
        if self.gathers:
            self._gather(kv)

    def _gather(self, kv: SequenceKv) -> None:
        """Bring this layer's KV to rank 0: that of rank 1 behind its own, then that of rank 2, and so on. (Keys know
        their positions: to the attention of what comes after, their order means nothing.)"""
        layer, begin = self._step, self.mesh.owned_tokens(self.end, 0)
        if self.rank:
            self.send(0, [part[0] for part in kv.read(layer, 0, self.mesh.owned_tokens(self.end, self.rank))])
            return
        for rank in range(1, self.size):
            end = begin + self.mesh.owned_tokens(self.end, rank)
            like, _ = kv.read(layer, begin, end)
            key, value = self.receive(rank, [like.shape[1:]] * 2, like)
            kv.write(layer, begin, key, value)
            begin = end

    def attend(
        self,
        kv: SequenceKv,
        layer: int,
        query: Tensor,  # [1, query heads, tokens, head_dim]
        key: Tensor,  # [1, kv heads, tokens, head_dim]
        value: Tensor,  # [1, kv heads, tokens, head_dim]
        scaling: float,
    ) -> Tensor:
        """Attention to the whole sequence so far, of the shape of `query`: of the own tokens in all heads, or, where
        the projections are split (`megatron.py`), of the node's tokens in the heads of this place. The KV that this
        rank keeps is in its cache afterwards. Raises: StepRecalled, GroupBroken."""
        if self.is_row:
            if self.rank == 0:
                return ask(self, kv, layer, query, key, value, scaling)
            lend(self, kv, layer, query, key, value, scaling)
            return query
        if self.mesh.per_node > 1 and self.scheme.attention == "ulysses":
            attended = ulysses_attention(self, kv, layer, query, key, value, scaling)
        else:
            kv.write(layer, self.past(self.node), key[0], value[0])
            attended = ring_attention(self, kv, layer, query, scaling)
        if self.rank == 0:
            self._tell_the_distant()
        return attended

    def attend_nothing(
        self, kv: SequenceKv, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> None:
        """`attend` where nothing is computed here, for others' sake. The tensors have no tokens, and all heads."""
        if self.splits_weights and self.scheme.attention == "megatron":
            heads = self.heads
            query, key, value = query[:, slice(*heads.query)], key[:, slice(*heads.kv)], value[:, slice(*heads.kv)]
        self.attend(kv, layer, query, key, value, scaling)

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
        if self.rank == 0 and not self._decided:
            self.stopping = self.stopping or self._stop_wanted()
        self._decided = True

    def _tell_the_distant(self) -> None:
        distant = [rank for rank in range(self.size) if self.mesh.node(rank) and self.mesh.place(rank)]
        if distant:
            self.decide()
            for rank in distant:
                self.send(rank, [])

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
