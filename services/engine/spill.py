"""Moves a sequence's KV out of the cache and back: to host memory, or to a file.

Nothing else touches the KV of a sequence that stands still, so it is copied in a thread of its own, piece by piece,
while passes of other sequences compute: no step waits for it, and a move that is not wanted any more ends with a piece.
The file has no name: nobody else can open it, and it is gone with the process that holds it, however that ends.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from common.errors import StartupError
from common.messages.locations import MovedTo
from common.settings import PrefillWorkerSettings
from common.units import RequestId
from services.engine.compute_thread import compute_thread
from services.engine.interface import EngineError, MoveStopped, SpillRefused
from services.engine.kv_cache import SequenceKv

T = TypeVar("T")

PIECE_BYTES = 8 * 2**20
"""Some milliseconds of copying; a disk may take longer for it."""


@dataclass(frozen=True, slots=True)
class SpillLimits:
    """Where KV may go, and how much of it at once."""

    to: MovedTo
    bytes_max: int
    folder: str = ""
    """Of the files; empty: the system's for temporary ones."""


class Place(Protocol):
    """Holds one sequence's KV. Called in the mover's thread."""

    def put(self, offset: int, piece: Tensor) -> None: ...

    def get(self, offset: int, piece: Tensor) -> None: ...

    def close(self) -> None: ...


class HostMemory:
    """Pinned where a GPU copies from it."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        """Raises: RuntimeError, if there is not so much."""
        self._bytes = torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")

    def put(self, offset: int, piece: Tensor) -> None:
        self._like(offset, piece).copy_(piece)

    def get(self, offset: int, piece: Tensor) -> None:
        piece.copy_(self._like(offset, piece))

    def close(self) -> None:
        self._bytes = self._bytes.new_empty(0)

    def _like(self, offset: int, piece: Tensor) -> Tensor:
        return self._bytes[offset : offset + piece.nbytes].view(piece.dtype).view(piece.shape)


class NamelessFile:
    """Room for all of it is taken at the start: a disk that is full says so before anything was moved."""

    def __init__(self, nbytes: int, folder: str) -> None:
        """Raises: OSError."""
        self._file = tempfile.TemporaryFile(dir=folder or None)  # noqa: SIM115 (it lives as long as this object)
        try:
            os.posix_fallocate(self._file.fileno(), 0, max(1, nbytes))
        except OSError:
            self._file.close()
            raise

    def put(self, offset: int, piece: Tensor) -> None:
        """Raises: OSError."""
        view = _bytes_of(piece.cpu().contiguous())
        while view:
            done = os.pwrite(self._file.fileno(), view, offset)
            view, offset = view[done:], offset + done

    def get(self, offset: int, piece: Tensor) -> None:
        """Raises: OSError."""
        landing = torch.empty(piece.shape, dtype=piece.dtype)
        view = _bytes_of(landing)
        while view:
            done = os.preadv(self._file.fileno(), [view], offset)
            if not done:
                raise OSError(f"the file ends at byte {offset}")
            view, offset = view[done:], offset + done
        piece.copy_(landing)

    def close(self) -> None:
        self._file.close()


def _bytes_of(tensor: Tensor) -> memoryview:
    """Of a contiguous one on the CPU, to read and write."""
    array: Any = tensor.flatten().view(torch.uint8).numpy()
    return memoryview(array).cast("B")


@dataclass(slots=True, eq=False)
class MovedKv:
    """A sequence's KV that lies elsewhere, or is on its way."""

    nbytes: int
    charged_tokens: int = 0
    """What its places in the cache count."""
    place: Place | None = None
    moving: bool = True
    unwanted: threading.Event = field(default_factory=threading.Event)
    """The move is to end."""


class KvMover:
    """Of one engine. Methods are called on the event loop's thread; one sequence moves at a time, others wait."""

    def __init__(self, limits: SpillLimits, device: torch.device) -> None:
        self.limits = limits
        self.used_bytes = 0
        """Of all that is elsewhere, or on its way; exact."""
        self._device = device
        self._moved: dict[RequestId, MovedKv] = {}
        self._thread = compute_thread("spill", 1, 0, device)

    def holds(self, request_id: RequestId) -> bool:
        return request_id in self._moved

    def is_moving(self, request_id: RequestId) -> bool:
        moved = self._moved.get(request_id)
        return moved is not None and moved.moving

    async def move_out(self, request_id: RequestId, kv: SequenceKv) -> MovedKv:
        """The KV is then elsewhere, and the cache's copy of no use. Raises: SpillRefused (it is where it was)."""
        nbytes = kv.written_bytes
        left = self.limits.bytes_max - self.used_bytes
        if nbytes > left:
            raise SpillRefused(f"{nbytes} bytes of KV; {left} of {self.limits.bytes_max} are left to move KV to")
        moved = self._moved[request_id] = MovedKv(nbytes)
        self.used_bytes += nbytes
        try:
            moved.place = await self._in_thread(moved, lambda: self._copy_out(moved, kv))
        except SpillRefused:
            self.forget(request_id)
            raise
        finally:
            moved.moving = False
        return moved

    async def bring_back(self, request_id: RequestId, kv: SequenceKv) -> None:
        """Raises: MoveStopped, EngineError (it is not all there: to be closed)."""
        moved = self._moved[request_id]
        moved.moving = True
        try:
            await self._in_thread(moved, lambda: self._copy_back(moved, kv))
        finally:
            moved.moving = False
        self.forget(request_id)

    def stop(self, request_id: RequestId) -> None:
        """Of its move, if there is one: it ends soon."""
        if self.is_moving(request_id):
            self._moved[request_id].unwanted.set()

    def charged_tokens(self, request_id: RequestId) -> int:
        return self._moved[request_id].charged_tokens

    def forget(self, request_id: RequestId) -> None:
        """Free what is elsewhere. Not while it moves. Idempotent."""
        moved = self._moved.pop(request_id, None)
        if moved is None:
            return
        self.used_bytes -= moved.nbytes
        if moved.place is not None:
            moved.place.close()

    async def close(self) -> None:
        """End every move, wait for the thread, free all."""
        for moved in self._moved.values():
            moved.unwanted.set()
        await asyncio.to_thread(self._thread.shutdown)
        for request_id in list(self._moved):
            self.forget(request_id)

    async def _in_thread(self, moved: MovedKv, work: Callable[[], T]) -> T:
        """A caller that is cancelled leaves when the thread has let go of the KV."""
        working = asyncio.get_running_loop().run_in_executor(self._thread, work)
        try:
            return await asyncio.shield(working)
        except asyncio.CancelledError:
            moved.unwanted.set()
            while not working.done():
                try:
                    await asyncio.wait([working])
                except asyncio.CancelledError:
                    continue
            if not working.cancelled():
                working.exception()
            raise

    # --- in the mover's thread ---

    def _copy_out(self, moved: MovedKv, kv: SequenceKv) -> Place:
        place: Place | None = None
        try:
            place = self._place(moved.nbytes)
            self._copy(moved, kv.pieces(PIECE_BYTES), place.put)
        except (OSError, RuntimeError, MoveStopped) as error:
            if place is not None:
                place.close()
            raise SpillRefused(f"cannot move {moved.nbytes} bytes of KV to {self.limits.to}: {error}") from error
        return place

    def _copy_back(self, moved: MovedKv, kv: SequenceKv) -> None:
        assert moved.place is not None
        try:
            self._copy(moved, kv.pieces(PIECE_BYTES), moved.place.get)
        except (OSError, RuntimeError) as error:
            raise EngineError(f"cannot read KV back from {self.limits.to}: {error}") from error

    def _copy(self, moved: MovedKv, pieces: Iterable[Tensor], copy: Callable[[int, Tensor], None]) -> None:
        """Raises: MoveStopped."""
        offset = 0
        for piece in pieces:
            if moved.unwanted.is_set():
                raise MoveStopped("it is not wanted any more")
            copy(offset, piece)
            offset += piece.nbytes

    def _place(self, nbytes: int) -> Place:
        """Raises: OSError, RuntimeError."""
        if self.limits.to == "disk":
            return NamelessFile(nbytes, self.limits.folder)
        return HostMemory(nbytes, self._device)


def spill_limits(settings: PrefillWorkerSettings) -> SpillLimits | None:
    """None: it moves nothing. Raises: StartupError."""
    if settings.spill == "off":
        return None
    if settings.spill == "disk" and settings.spill_dir and not os.access(settings.spill_dir, os.W_OK | os.X_OK):
        raise StartupError(f"cannot write files to {settings.spill_dir}; pass another --spill-dir")
    return SpillLimits(settings.spill, settings.spill_bytes_max, settings.spill_dir)
