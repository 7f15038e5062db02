"""The receiving end of one KV stream, whatever carries the bytes: TCP or memory.

    offered ──accept──▶ receiving ──last piece, trailer, checksum──▶ ended (`arrived`)
       └──reason──▶ ended          └──anything else──▶ ended (`broken`)

Pieces of one layer must follow each other without gap or overlap; layers may come in any order. The
checksum is CRC-32 over all payload in wire order, computed by both sides as the bytes pass.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from services.engine.data_plane import KvArrival, KvHeader, KvReceiver, KvTrailer, TransferFailed

STREAMS_MAX = 256
"""Streams in flight on one connection."""
PIECES_MAX = 65_536
"""Pieces of one stream that wait to be sent."""
PIECE_BYTES_MAX = 1 << 30


class StreamRefused(TransferFailed):
    """The receiver does not want the rest of this stream; the connection is fine."""


def checksum(buffers: Sequence[memoryview], crc: int = 0) -> int:
    """CRC-32 of these bytes after those that gave `crc`."""
    for buffer in buffers:
        crc = zlib.crc32(buffer, crc)
    return crc


class IncomingStream:
    """Verifies one stream and tells the receiver exactly once how it ended."""

    def __init__(self, header: KvHeader, receiver: KvReceiver) -> None:
        self.header = header
        self.receiving = False
        """Accepted and not ended."""
        self.in_piece = False
        """Memory of the receiver is being written."""
        self.unwanted: str | None = None
        """Why the receiver wants no more; heeded when the piece is done, or its answer heard."""
        self._receiver = receiver
        self._received = [0] * header.layers
        self._crc = 0
        self._bytes = 0
        self._first_layer_s: float | None = None
        self._last_piece_s = 0.0

    def __repr__(self) -> str:
        return f"IncomingStream({self.header.request_id!r}, attempt={self.header.attempt}, bytes={self._bytes})"

    async def open(self) -> str | None:
        """Ask the receiver. None: it accepts; a reason: it does not."""
        reason = await self._receiver.accept(self.header)
        self.receiving = reason is None
        if self.receiving and self.unwanted is not None:  # it changed its mind before its answer was heard
            self.end(self.unwanted)
            return self.unwanted
        return reason

    def begin_piece(self, layer: int, start: int, tokens: int, nbytes: int) -> tuple[memoryview, ...]:
        """Where to receive this piece. Raises: StreamRefused."""
        header = self.header
        if not 0 <= layer < header.layers:
            raise StreamRefused(f"layer {layer} of {header.layers}")
        if start != self._received[layer] or start + tokens > header.tokens or tokens < 1:
            raise StreamRefused(
                f"layer {layer}: tokens [{start}, {start + tokens}) do not follow the {self._received[layer]}"
                f" received of {header.tokens}"
            )
        views = self._receiver.buffers(header, layer, start, tokens)
        if views is None:
            raise StreamRefused("no longer wanted")
        if sum(view.nbytes for view in views) != nbytes:
            raise StreamRefused(f"{nbytes} bytes for a piece of {sum(view.nbytes for view in views)}")
        self.in_piece = True
        return views

    def end_piece(self, layer: int, tokens: int, views: Sequence[memoryview], now_s: float) -> None:
        """The views are filled. Raises: StreamRefused, if the receiver changed its mind meanwhile."""
        self.in_piece = False
        self._crc = checksum(views, self._crc)
        self._bytes += sum(view.nbytes for view in views)
        self._received[layer] += tokens
        self._last_piece_s = now_s
        if self._first_layer_s is None and self._received[layer] == self.header.tokens:
            self._first_layer_s = now_s
        if self.unwanted is not None:
            raise StreamRefused(self.unwanted)

    def finish(self, trailer: KvTrailer, payload_bytes: int, crc: int) -> None:
        """Verify, and hand over. Raises: StreamRefused."""
        short = [layer for layer, tokens in enumerate(self._received) if tokens != self.header.tokens]
        if short:
            raise StreamRefused(
                f"layer {short[0]} has {self._received[short[0]]} of {self.header.tokens} tokens"
                f" ({len(short)} of {self.header.layers} layers are incomplete)"
            )
        if (payload_bytes, crc) != (self._bytes, self._crc):
            raise StreamRefused(f"checksum: sent {payload_bytes} bytes {crc:08x}, got {self._bytes} {self._crc:08x}")
        self.receiving = False
        first_s = self._last_piece_s if self._first_layer_s is None else self._first_layer_s
        self._receiver.arrived(
            KvArrival(
                header=self.header,
                trailer=trailer,
                first_layer_received_s=first_s,
                last_layer_received_s=self._last_piece_s,
            )
        )

    def end(self, reason: str) -> None:
        """The stream is over without its end. Idempotent; does nothing after `finish`."""
        self.in_piece = False
        if self.receiving:
            self.receiving = False
            self._receiver.broken(self.header, reason)
