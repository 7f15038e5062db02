"""One short's KV on its way to the decode worker, from the first layer computed to the receiver's word."""

from __future__ import annotations

from services.engine.data_plane import DataPlane, KvHeader, KvOutgoing, KvTrailer, TransferFailed
from services.engine.interface import LayerKv


class Handoff:
    """Opens its stream with the first piece: a stream that is open and silent would time out while its
    request waits in the queue."""

    def __init__(self, plane: DataPlane, address: str, header: KvHeader) -> None:
        self.finishing = False
        """`finish` was called: its caller hears how the stream ends, also when it is aborted."""
        self._plane = plane
        self._address = address
        self._header = header
        self._outgoing: KvOutgoing | None = None

    def push(self, kv: LayerKv) -> None:
        """The engine's `KvSink`."""
        self._stream().push(kv)

    async def finish(self, trailer: KvTrailer) -> None:
        """Raises: TransferFailed. However it ends, no view of the KV is touched any more."""
        self.finishing = True
        try:
            await self._stream().finish(trailer)
        except TransferFailed:
            await self.abort()
            raise

    async def abort(self) -> None:
        if self._outgoing is not None:
            await self._outgoing.abort()

    def _stream(self) -> KvOutgoing:
        if self._outgoing is None:
            self._outgoing = self._plane.send(self._address, self._header)
        return self._outgoing
