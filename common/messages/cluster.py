"""Who is there and what they hold: heartbeats. A lease in the store says the same to those who only read."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from common.messages.base import Message, Record
from common.units import Attempt, Bytes, CoordinatorId, RequestId, RouterId, Seconds, Tokens, WorkerId

WorkerRole = Literal["prefill", "decode"]


class StepCost(Record, frozen=True, kw_only=True):
    """Time of a forward pass over n new tokens with p tokens before them:
    `pass_s + token_s * n + pair_s * n * (p + n / 2)` seconds. Measured by the worker at start."""

    pass_s: Seconds
    token_s: Seconds
    pair_s: Seconds


class LayerShape(Record, frozen=True, kw_only=True):
    """A layer of the model, as far as those who share its work must know. The MLP is a gated one."""

    query_heads: Annotated[int, Meta(ge=1)]
    kv_heads: Annotated[int, Meta(ge=1)]
    head_dim: Annotated[int, Meta(ge=1)]
    hidden: Annotated[int, Meta(ge=1)]
    """Width of the hidden state."""
    intermediate: Annotated[int, Meta(ge=1)]
    """Width of the MLP."""


class ExchangeCost(Record, frozen=True, kw_only=True):
    """What it costs a worker to compute one sequence together with others of its machine. Measured by the worker at
    start."""

    message_s: Seconds
    """From sending a small message to its being read."""
    byte_s: Seconds
    """To send one byte and to receive one."""
    merge_element_s: Seconds
    """To merge one element of a partial attention output into another."""


class WorkerProfile(Record, frozen=True, kw_only=True):
    """What a worker is. Constant over one incarnation."""

    worker_id: WorkerId
    role: WorkerRole
    incarnation: str
    """New at every start of the process."""
    node: str
    """Workers of one node share fast links."""
    replica: str
    """Workers of one replica hold shards of one copy of the weights (tensor parallelism)."""
    tp_rank: int = 0
    tp_size: int = 1
    model_id: str
    model_fingerprint: str
    """Hash of configuration, dtype and weights' sizes: KV moves only between equal ones."""
    layers: int
    kv_bytes_per_token: Bytes
    kv_capacity_tokens: Tokens
    context_tokens: Tokens
    rows_max: int = 1
    """Decode worker: sequences in one batch."""
    data_address: str
    """host:port of its data plane."""
    group_address: str = ""
    """host:port where the other ranks of a group reach it; empty: it serves longs alone."""
    step_cost: StepCost
    layer: LayerShape | None = None
    """None: not said; then its heads are not split."""
    exchange: ExchangeCost | None = None
    """None: not measured."""
    core_share: Annotated[float, Meta(ge=0.0)] = 0.0
    """Of its node's processor cores, how many it computes on; 0: not said, or it computes on none."""
    spill_bytes_max: Bytes = 0
    """KV of paused longs that it may move out of its places at once; 0: it moves none."""


HoldingPhase = Literal["queued", "prefill", "handoff", "expected", "decode"]


class Holding(Record, frozen=True, kw_only=True):
    """A request that a worker has in hand."""

    request_id: RequestId
    attempt: Attempt
    phase: HoldingPhase
    kv_tokens: Tokens
    """KV reserved for it on this worker."""


class WorkerHeartbeat(Message, frozen=True, kw_only=True):
    """Worker → scheduler, about once a second, at start, and after the bus came back: who I am and
    all that I hold. The scheduler mends its view from it, so that a lost message costs seconds, not a hang."""

    profile: WorkerProfile
    holdings: tuple[Holding, ...] = ()
    leaving: bool = False
    """It is to stop: it ends what it holds, and should get nothing new. `WorkerLeft` follows."""


class WorkerLeft(Message, frozen=True, kw_only=True):
    """Worker → scheduler: stops by its own will; whatever it held is gone."""

    worker_id: WorkerId
    incarnation: str


class RouterHeartbeat(Message, frozen=True, kw_only=True):
    """Router → scheduler: the requests it still waits for, by id and attempt."""

    router_id: RouterId
    waiting: tuple[tuple[RequestId, Attempt], ...] = ()


class RouterLeft(Message, frozen=True, kw_only=True):
    """Router → scheduler: stops by its own will; its requests are to be cancelled."""

    router_id: RouterId


class CoordinatorHeartbeat(Message, frozen=True, kw_only=True):
    """Coordinator → scheduler: the long requests whose groups it drives, by id and attempt."""

    coordinator_id: CoordinatorId
    incarnation: str
    driving: tuple[tuple[RequestId, Attempt], ...] = ()


class CoordinatorLeft(Message, frozen=True, kw_only=True):
    """Coordinator → scheduler: stops by its own will and dissolves its groups; form no more here."""

    coordinator_id: CoordinatorId
    incarnation: str
