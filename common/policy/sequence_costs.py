"""What one layer of a long's prefill takes, when its sequence is split over a group of replicas.

Notation of the PecSched paper (sections 4.2, 5.3): T tensor-parallel size, G processors of the group in one node,
s tokens per processor, d hidden size, N_h and N_kv query and KV heads, d_h head size. A layer has two stages, and each
starts and ends with the tokens split evenly over all processors, so that the stages are chosen independently:

| stage | scheme | elements moved in one node | multiply-adds of one processor, attention aside |
|---|---|---|---|
| attention | Megatron | 2·s·d·(T−1)·G | s·T · (d·(N_h+2·N_kv)·d_h + d·N_h·d_h) / T |
| attention | Ulysses | 2·s·(N_h+N_kv)·d_h·(G−1) + weights·G·(T−1)/T | s · (d·(N_h+2·N_kv)·d_h + d·N_h·d_h) |
| MLP | Megatron | 2·s·d·(T−1)·G | s·T · MLP/T |
| MLP | Ulysses | MLP·G·(T−1)/T | s · MLP |

- *Megatron*: the replica all-gathers its tokens, each processor computes its share of heads or columns, a
  reduce-scatter splits the result. Attention covers the replica's own s·T tokens: the replicas, also those of one node,
  form a ring.
- *Ulysses*: an all-to-all turns a split by tokens into a split by heads over the whole node, and back; every
  processor needs the whole weights and fetches the T−1 parts it lacks. The nodes form a ring. What stays as the KV
  cache is the split by tokens; the split by heads lives for one layer.
- *Plain ring*, for comparison: tensor parallelism with all-reduces (every rank computes the norms whole), and a ring
  of all replicas.

Where the paper and arithmetic disagree, arithmetic is followed: 4.2 swaps the names of the schemes (5.3 has them
right); its QKV terms count the KV heads once (keys and values are two: N_h + 2·N_kv); its attention is not causal (half
the pairs) and leaves out what arrives round the ring, without which a group would attend to its own tokens alone; its
MLP is the 8d² of a GELU layer (gated ones have three matrices of d·ffn).

**Ring.** KV blocks travel round the members; while one is attended to, the next arrives: a step takes the longer of
the two, the last one no transfer. A member waits for blocks, not for its neighbour's computing. *Zigzag* gives member i
of n the chunks i and 2n−1−i: every step has as many pairs, half of those of two whole blocks. *Contiguous* is ring
attention as published (Liu et al. 2023): the last member attends to every block whole, so the ring takes 2 − 1/n times
as long, which Brandon et al. 2023 (Striped Attention) found and repaired.

**Queries for keys.** Where a chunk has a past, the KV lies where it was computed and the queries travel instead: what
is sent then grows with the prompt, not with its square. Workers that prefill a long chunk by chunk do this.

**What short blocks lose**, per step: merging a partial output into the running one (memory traffic), the last wave of
tiles, filled half on average, and the launches. Public measurements of ring-flash-attention (8 x A100, 32/8 heads of
128, 8K tokens each): zigzag reaches 82 %, contiguous 51 % of what one GPU's kernel does; this model says 91 % and 50 %.

Assumptions, besides those in the coefficients: the constants below; a group has the links to itself; exchanges
take no arithmetic from the processors; the tokens of a group divide as evenly as its processors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, Protocol

from common.policy.long_planner import Layout
from common.policy.model_shapes import HeadSplit, ModelShape, PlanRefused, split_heads
from common.policy.processors import Link

__all__ = ["HeadSplit", "PlanRefused", "split_heads"]

Scheme = Literal["megatron", "ulysses"]
Ring = Literal["zigzag", "contiguous"]

TILE_ROWS = 128
"""Queries of one tile of the attention kernel. ASSUMPTION: FlashAttention-2's for heads of 128."""
TILES_AT_ONCE = 120
"""Tiles a GPU computes at the same time. ASSUMPTION: one per multiprocessor; an A100 has 108, an H100 132."""
MERGE_BYTES = 12
"""Per element of a partial output: read it and the running one, write that, in fp32."""
ZIGZAG_SHARE = 0.75
"""Of a zigzag step's queries, and of its keys: half of the steps take all queries and half of the keys, half of them
the reverse."""


class StageTime(NamedTuple):
    """Of one stage of one layer."""

    seconds: float
    step_s: float
    """The longest piece that nothing interrupts: of a kernel, as bounded by `CostModel.step_s_max`, or an exchange."""


class Rates(Protocol):
    """What the kernels of a processor and its links take. Fields as in `Coefficients`."""

    @property
    def layer_s(self) -> float: ...

    @property
    def other_s(self) -> float: ...

    @property
    def norm_element_s(self) -> float: ...

    @property
    def activation_element_s(self) -> float: ...

    @property
    def memory_bytes_s(self) -> float: ...

    @property
    def all_reduce(self) -> Link: ...

    @property
    def intra_node(self) -> Link: ...

    @property
    def inter_node(self) -> Link: ...


class SequenceModel(Protocol):
    """A model on processors of which `tp` are a replica. `CostModel` speaks for GPUs, `LiveModel` for workers that
    measured themselves."""

    @property
    def shape(self) -> ModelShape: ...

    @property
    def coefficients(self) -> Rates: ...

    @property
    def tp(self) -> int: ...

    @property
    def step_s_max(self) -> float: ...

    @property
    def weights_whole(self) -> bool:
        """Every processor has all weights, and fetches none."""
        ...

    def matmul_s(self, weights: float, tokens: float) -> float: ...

    def attention_s(self, pairs: float, heads: float) -> float: ...


def gathered_elements(shape: ModelShape, tp: int, tokens: float) -> float:
    """What one processor receives in Megatron's all-gather and reduce-scatter of a stage, `tokens` tokens each; times G
    it is the table's volume. An all-reduce of the whole moves as much."""
    return 2 * tokens * shape.hidden * (tp - 1)


def exchanged_elements(shape: ModelShape, processors: int, tokens: float) -> float:
    """What the busiest processor receives in the two all-to-alls of Ulysses: queries, keys and values there, outputs
    back. Where heads divide evenly, times G it is the table's volume.

    Raises: PlanRefused."""
    split = split_heads(shape.heads, shape.kv_heads, processors)
    return 2 * tokens * (split.heads_max + split.kv_heads_max) * shape.head_dim * (processors - 1)


def fetched_elements(weights: int, tp: int) -> float:
    """Weights one processor fetches to have the whole stage's; none with T = 1."""
    return weights * (tp - 1) / tp


def mlp_stage(model: SequenceModel, tokens: float, degree: int, scheme: Scheme) -> StageTime:
    """The MLP of one layer on a group of `degree` replicas."""
    per_gpu = tokens / (degree * model.tp)
    return _linear_stage(model, model.shape.mlp_weights, model.shape.mlp_weights / model.tp, per_gpu, scheme)


def attention_stage(
    model: SequenceModel,
    tokens: float,
    layout: Layout,
    scheme: Scheme,
    ring: Ring = "zigzag",
    *,
    past: float | None = None,
) -> StageTime:
    """Attention of one layer with its projections. `ring` is the order of a Megatron ring of replicas; that of
    Ulysses between nodes is always zigzag. With a `past`, tokens whose KV the members of the ring keep already, queries
    travel and not keys. Raises: PlanRefused."""
    shape = model.shape
    per_gpu = tokens / (sum(layout) * model.tp)
    weights = shape.qkv_weights + shape.out_weights
    linear = _linear_stage(model, weights, weights * _split(model, model.tp).heads_max / shape.heads, per_gpu, scheme)
    if scheme == "megatron":
        if past is None:
            attended = _replica_ring(model, tokens, layout, ring)
        else:
            attended = _query_ring(model, tokens, past, sum(layout), _split(model, model.tp))
        return StageTime(linear.seconds + attended.seconds, max(linear.step_s, attended.step_s))
    exchange_s = max(_all_to_all_s(model, replicas * model.tp, per_gpu) for replicas in set(layout))
    if past is None:
        attended = _node_ring(model, tokens, layout)
    else:
        attended = _query_ring(model, tokens, past, len(layout), _split(model, layout[0] * model.tp))
    seconds = linear.seconds + 2 * exchange_s + attended.seconds
    return StageTime(seconds, max(linear.step_s, exchange_s, attended.step_s))


def elementwise_stage(model: SequenceModel, tokens: float, degree: int, *, whole_norms: bool) -> StageTime:
    """Norms, rotations and activations of one layer. With `whole_norms` every rank computes the norms of its
    replica's tokens (tensor parallelism without sequence parallelism), else of its own."""
    shape, c = model.shape, model.coefficients
    per_gpu = tokens / (degree * model.tp)
    norm_tokens = per_gpu * model.tp if whole_norms else per_gpu
    seconds = norm_tokens * c.norm_element_s * shape.hidden + per_gpu * c.activation_element_s * shape.activation_width
    return _in_pieces(model, seconds, c.other_s)


def decode_exchange_s(model: SequenceModel, layout: Layout) -> float:
    """One layer of a distributed decode step: the query to every other shard, partial outputs and their
    log-sum-exp (fp32, one per head) back, and the merge. The replica that runs the layers is of the largest node; its
    messages to one kind of link queue up, the two kinds do not disturb each other."""
    shape, c = model.shape, model.coefficients
    neighbours, remote = layout[0] - 1, sum(layout) - layout[0]
    if neighbours + remote == 0:
        return 0.0
    query = shape.heads * shape.head_dim * shape.dtype_bytes
    total_s = c.other_s
    for size in (query, query + 4 * shape.heads):
        near_s = c.intra_node.seconds(neighbours * size / model.tp) if neighbours else 0.0
        far_s = c.inter_node.seconds(remote * size) if remote else 0.0
        total_s += max(near_s, far_s)
    return total_s


def _split(model: SequenceModel, processors: int) -> HeadSplit:
    return split_heads(model.shape.heads, model.shape.kv_heads, processors)


def _linear_stage(model: SequenceModel, weights: int, share: float, per_gpu: float, scheme: Scheme) -> StageTime:
    """`share`: of the weights, on the processor of a replica that has the most."""
    shape, tp = model.shape, model.tp
    if scheme == "megatron":
        elements = gathered_elements(shape, tp, per_gpu)
        matmul_s = model.matmul_s(share, per_gpu * tp)
    else:
        elements = 0.0 if model.weights_whole else fetched_elements(weights, tp)
        matmul_s = model.matmul_s(weights, per_gpu)
    # Both are collectives of one replica, whose fitted link is the all-reduce's; it counts what a rank's link carries.
    moved_s = model.coefficients.all_reduce.seconds(elements * shape.dtype_bytes) if tp > 1 else 0.0
    work = _in_pieces(model, matmul_s, model.coefficients.layer_s)
    return StageTime(work.seconds + moved_s, max(work.step_s, moved_s))


def _all_to_all_s(model: SequenceModel, processors: int, per_gpu: float) -> float:
    """One of the two: they move as much."""
    if processors == 1:
        return 0.0
    size = exchanged_elements(model.shape, processors, per_gpu) * model.shape.dtype_bytes
    return model.coefficients.intra_node.seconds(size / 2)


def _replica_ring(model: SequenceModel, tokens: float, layout: Layout, ring: Ring) -> StageTime:
    """Attention over a ring of all replicas, each with as many tokens and its heads split T ways."""
    members = sum(layout)
    block = tokens / members
    heads = model.shape.heads / model.tp
    own = _block(model, block, block, heads, merged=False)
    if members == 1:
        return own
    # Round a contiguous ring the last member needs every block whole, and the others wait for it at the layer's end.
    other = _block(model, block, block, heads, whole=ring == "contiguous")
    transfer_s = _replica_hop_s(model, block, between_nodes=len(layout) > 1)
    first_s, later_s = max(own.seconds, transfer_s), max(other.seconds, transfer_s)
    return StageTime(first_s + (members - 2) * later_s + other.seconds, max(own.step_s, other.step_s))


def _query_ring(model: SequenceModel, chunk: float, past: float, members: int, split: HeadSplit) -> StageTime:
    """One chunk's attention where each of the members (each processor of it, for its heads) keeps its part of the KV,
    is sent the queries of all others, and sends back partial outputs with their log-sum-exp (fp32).

    The parts of a chunk lie one after another in time, so the first member has the most to do: all others attend to
    its part whole, too. Arithmetic does not hide the exchange: where this is done, a processor does both."""
    shape, heads = model.shape, split.heads_max
    own = chunk / members
    pairs = chunk * past / members + own * own / 2 + (members - 1) * own * own
    attended_s = model.attention_s(pairs, heads)
    if members == 1:
        return StageTime(attended_s, attended_s)
    query = own * heads * shape.head_dim * shape.dtype_bytes
    link = model.coefficients.inter_node
    moved_s = (members - 1) * (link.seconds(query) + link.seconds(query + 4 * own * heads))
    seconds = attended_s + moved_s + (members - 1) * _merge_s(model, own * heads)
    return StageTime(seconds, seconds)


def _replica_hop_s(model: SequenceModel, block: float, *, between_nodes: bool) -> float:
    """The slowest hop sets the ring's pace. Replicas stand node by node, so one block at a time crosses a node's link;
    inside, every rank sends its KV heads over its own."""
    c = model.coefficients
    size = block * model.shape.kv_bytes_per_layer
    inside_s = c.intra_node.seconds(size / model.tp)
    return max(inside_s, c.inter_node.seconds(size)) if between_nodes else inside_s


def _node_ring(model: SequenceModel, tokens: float, layout: Layout) -> StageTime:
    """Zigzag over the nodes, which hold tokens as they have replicas, heads split over each node's processors.
    Replicated KV heads travel as often as they are held. Raises: PlanRefused."""
    nodes = {replicas: _Node.of(model, tokens, layout, replicas) for replicas in set(layout)}
    alike = len(nodes) == 1
    times = [nodes[layout[place]].in_ring(layout, place) for place in range(1 if alike else len(layout))]
    return StageTime(max(time.seconds for time in times), max(time.step_s for time in times))


class _Node(NamedTuple):
    """A node with so many of the group's replicas: what it takes with its own block, and with another's, by the
    replicas there (hence by its size)."""

    own: StageTime
    kernels: Mapping[int, StageTime]
    transfers_s: Mapping[int, float]

    @classmethod
    def of(cls, model: SequenceModel, tokens: float, layout: Layout, replicas: int) -> _Node:
        split = _split(model, replicas * model.tp)
        blocks = {size: tokens * size / sum(layout) for size in set(layout)}
        queries = blocks[replicas]
        return cls(
            _block(model, queries, queries, split.heads_max, merged=False),
            {size: _block(model, queries, block, split.heads_max) for size, block in blocks.items()},
            {size: _node_hop_s(model, block, split) for size, block in blocks.items()},
        )

    def in_ring(self, layout: Layout, place: int) -> StageTime:
        """Its own block first, then its predecessors' as they arrive."""
        arriving = [layout[place - hop] for hop in range(1, len(layout))]
        computed = [self.own, *(self.kernels[replicas] for replicas in arriving)]
        steps_s = sum(
            max(kernel.seconds, self.transfers_s[replicas])
            for kernel, replicas in zip(computed, arriving, strict=False)
        )
        return StageTime(steps_s + computed[-1].seconds, max(kernel.step_s for kernel in computed))


def _node_hop_s(model: SequenceModel, block: float, split: HeadSplit) -> float:
    copies = split.kv_copies / model.shape.kv_heads
    return model.coefficients.inter_node.seconds(block * model.shape.kv_bytes_per_layer * copies)


def _block(
    model: SequenceModel, queries: float, keys: float, heads: float, *, whole: bool = False, merged: bool = True
) -> StageTime:
    """One layer's attention of `queries` tokens to one block of `keys` tokens on one processor: every pair if `whole`,
    else half of them (a zigzag step, or the causal block of one's own)."""
    c = model.coefficients
    share = 1.0 if whole else ZIGZAG_SHARE
    pairs = queries * keys * (1.0 if whole else 0.5)
    tail_s = 0.5 * model.attention_s(TILE_ROWS * TILES_AT_ONCE * share * keys, 1)
    merge_s = _merge_s(model, share * queries * heads) if merged else 0.0
    # ASSUMPTION: attention, merge and exchange launch as many kernels as a layer's norms and activations do.
    kernel_s = model.attention_s(pairs, heads) + tail_s + merge_s + c.other_s
    return _in_pieces(model, kernel_s, _attention_cut_s(model))


def _merge_s(model: SequenceModel, rows: float) -> float:
    """To merge a partial output of so many rows (one token's, in one head) into the running one."""
    return rows * model.shape.head_dim * MERGE_BYTES / model.coefficients.memory_bytes_s


def _attention_cut_s(model: SequenceModel) -> float:
    """What one more piece of an attention kernel costs: half a wave that idles, a merge, launches.

    A piece of p seconds may be m waves of queries by as many keys as fit: p/(2m) idles, m waves are merged. The best m
    makes the two equal."""
    idle_s = model.step_s_max / 2
    wave_merge_s = _merge_s(model, TILE_ROWS * TILES_AT_ONCE)
    return 2 * math.sqrt(idle_s * wave_merge_s) + model.coefficients.other_s


def _in_pieces(model: SequenceModel, kernel_s: float, cut_s: float) -> StageTime:
    """A kernel cut into equal pieces below `step_s_max`, so that a pause waits for one of them; where a cut costs more
    than half of that, pieces are longer."""
    useful_s = max(model.step_s_max - cut_s, model.step_s_max / 2)
    pieces = max(1, math.ceil(kernel_s / useful_s))
    seconds = kernel_s + (pieces - 1) * cut_s
    return StageTime(seconds, seconds / pieces)
