"""The DataPlane port: KV from worker to worker, past the bus. TCP (`transport.py`) and an in-memory
twin (`transport_memory.py`) pass one contract suite.

One stream carries the KV of one sequence: a header, layers in order as they are computed, a trailer.
The receiver names the memory each layer is received into. It answers the trailer once length, layers
and checksum are verified; until then nothing may decode from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from common.messages.base import Record
from common.messages.requests import TokenLogprob
from common.units import Attempt, RequestId, TokenId, Tokens, WorkerId
from services.engine.interface import LayerKv


class TransferFailed(Exception):
    """The peer is gone, refused, answered nothing within the bound, or the bytes do not match."""


class PeerLost(TransferFailed):
    """Not this transfer failed but the peer: nobody answers there. Others should not be sent to it."""


class KvHeader(Record, frozen=True, kw_only=True):
    request_id: RequestId
    attempt: Attempt
    sender: WorkerId
    model_fingerprint: str
    """The receiver refuses another model's KV."""
    layers: int
    tokens: Tokens
    """Of the whole prompt."""


class KvTrailer(Record, frozen=True, kw_only=True):
    """Layers, lengths and the checksum are the transport's own; this is what the decoder needs to go on."""

    first_token: TokenId
    first_logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class KvArrival:
    """A verified transfer. Times are readings of the host's monotonic clock."""

    header: KvHeader
    trailer: KvTrailer
    first_layer_received_s: float
    last_layer_received_s: float


class KvReceiver(Protocol):
    """The receiving worker's side. Called on the event loop's thread; must not block.

    Every stream that was accepted ends in exactly one of `arrived` and `broken`; after either, no memory
    named by `buffers` is touched any more.
    """

    async def accept(self, header: KvHeader) -> str | None:
        """None: go on. A reason: refuse the transfer (unknown request, older attempt, other model).

        May wait within a bound, because the order that announces a request comes another way and can be
        later than its KV; no byte of a layer is sent before the answer. Cancelled if the sender is gone."""
        ...

    def buffers(self, header: KvHeader, layer: int, start: int, tokens: int) -> tuple[memoryview, ...] | None:
        """Where to receive this piece (order and shapes of `LayerKv.buffers`); None: no longer wanted
        (cancelled), refuse the rest."""
        ...

    def arrived(self, arrival: KvArrival) -> None:
        """Everything is here and verified."""
        ...

    def broken(self, header: KvHeader, reason: str) -> None:
        """The transfer ended before that."""
        ...


class KvOutgoing(Protocol):
    """The sending worker's side of one stream."""

    def push(self, kv: LayerKv) -> None:
        """Queue one layer's piece; returns at once. The views must stay valid until `finish` or `abort` ended."""
        ...

    async def finish(self, trailer: KvTrailer) -> None:
        """Send the rest and wait, within a bound, for the receiver to verify it. Raises: TransferFailed."""
        ...

    async def abort(self) -> None:
        """End the stream; the receiver hears `broken`. After it returns no view is touched any more."""
        ...


class DataPlane(Protocol):
    @property
    def address(self) -> str:
        """host:port under which peers reach this worker."""
        ...

    def send(self, address: str, header: KvHeader) -> KvOutgoing:
        """Open a stream to a peer. Connects as needed (one connection per pair, kept open); a failure
        shows in `finish`."""
        ...

    def refuse(self, request_id: RequestId, attempt: Attempt) -> None:
        """Receive no more of this sequence: its stream, if one is accepted, ends in `broken`, at once or when
        the piece now being received is done. (Its memory must not be given away before that.)"""
        ...

    async def close(self) -> None:
        """End every stream and every connection; accepted streams hear `broken`."""
        ...


DataPlaneFactory = Callable[[KvReceiver | None], DataPlane]
"""Opens the data plane of this worker, listening; called on the event loop. None: nothing is received here.
Raises: OSError, if the address is taken."""
