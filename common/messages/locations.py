"""Records kept in the store, under the keys that `common.runtime.keys` names."""

from __future__ import annotations

from typing import Literal

from common.messages.base import Record
from common.messages.cluster import WorkerProfile
from common.units import Attempt, RequestId, RouterId, Tokens, WorkerId

KvState = Literal["filling", "paused", "spilled", "handoff", "receiving", "decoding"]
"""`filling`: a prefill computes it. `paused`: a prefill stopped, its KV stays. `spilled`: and was moved away
(`moved_to`). `handoff`: complete, being sent. `receiving`: reserved, arriving. `decoding`: complete, grows by a token
per step."""

MovedTo = Literal["memory", "disk"]


class KvLocation(Record, frozen=True, kw_only=True):
    """Where KV lies: written by the worker that holds it, deleted by it when freed."""

    request_id: RequestId
    attempt: Attempt
    worker_id: WorkerId
    state: KvState
    tokens: Tokens
    """Tokens of KV present, from `first_token` on."""
    first_token: Tokens = 0
    """Position of the first of them; above 0 on later ranks of an SP group."""
    layers: int
    """How many layers have KV for these tokens; the model's count once the prefill is done."""
    reserved_tokens: Tokens = 0
    moved_to: MovedTo | None = None
    """Of what is spilled: where it lies, on the worker's machine."""


class WorkerLease(Record, frozen=True, kw_only=True):
    """Sign of life of a worker, for those who only read; it expires with the worker."""

    profile: WorkerProfile


class RouterLease(Record, frozen=True, kw_only=True):
    """Sign of life of a router."""

    router_id: RouterId
    address: str
    """host:port of its HTTP door."""
