"""Where KV comes in: the data plane's questions become events of the core, the core's answers go back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from common.policy.decode_events import KvArrived, KvBroken, KvOffered
from common.policy.decode_worker import DecodeWorkerCore
from common.units import Attempt, RequestId
from services.engine.data_plane import KvArrival, KvHeader
from services.engine.interface import DecodeEngine, EngineError


class KvDoor:
    """Implements `KvReceiver`."""

    def __init__(
        self, core: DecodeWorkerCore, engine: DecodeEngine, tell: Callable[[KvOffered | KvArrived | KvBroken], None]
    ) -> None:
        self._core = core
        self._engine = engine
        self._tell = tell
        self._offers: dict[tuple[RequestId, Attempt], asyncio.Future[str | None]] = {}

    async def accept(self, header: KvHeader) -> str | None:
        profile = self._engine.profile
        if header.model_fingerprint != profile.model_fingerprint or header.layers != profile.layers:
            return f"KV of another model: {header.model_fingerprint}; here {profile.model_fingerprint}"
        key = (header.request_id, header.attempt)
        if key in self._offers:
            return "it is being offered already"
        answer: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._offers[key] = answer
        self._tell(KvOffered(request_id=header.request_id, attempt=header.attempt, tokens=header.tokens))
        try:
            return await answer
        except asyncio.CancelledError:
            # The core may have accepted meanwhile; nothing was received, and nothing will be.
            self.broken(header, "the sender is gone")
            raise
        finally:
            del self._offers[key]

    def answer(self, request_id: RequestId, attempt: Attempt, reason: str | None) -> None:
        """The core's word on an offer; None: accepted."""
        offer = self._offers.get((request_id, attempt))
        if offer is not None and not offer.done():
            offer.set_result(reason)

    def buffers(self, header: KvHeader, layer: int, start: int, tokens: int) -> tuple[memoryview, ...] | None:
        if not self._core.receives(header.request_id, header.attempt):
            return None
        try:
            return self._engine.layer_buffers(header.request_id, layer, start, tokens)
        except EngineError:
            return None

    def arrived(self, arrival: KvArrival) -> None:
        self._tell(
            KvArrived(
                request_id=arrival.header.request_id,
                attempt=arrival.header.attempt,
                first_token=arrival.trailer.first_token,
                first_layer_received_s=arrival.first_layer_received_s,
                last_layer_received_s=arrival.last_layer_received_s,
            )
        )

    def broken(self, header: KvHeader, reason: str) -> None:
        self._tell(KvBroken(request_id=header.request_id, attempt=header.attempt, reason=reason))
