"""What a scheduling policy decides, and the interface behind which policies are exchanged.

A policy keeps the requests that wait. The scheduler tells it what happened and asks for one decision
at a time; it applies each to the `Cluster` before it asks for the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import msgspec

from common.policy.cluster import Cluster, Request
from common.units import RequestId, WorkerId


class PlaceShort(msgspec.Struct, frozen=True):
    """Prefill here, decode there; `pause`: the long that prefills here must stop first."""

    request: Request
    replica: WorkerId
    decoder: WorkerId
    rule: str
    pause: RequestId | None = None


class PlaceLong(msgspec.Struct, frozen=True):
    request: Request
    members: tuple[WorkerId, ...]


class PauseLong(msgspec.Struct, frozen=True):
    request: Request


class ResumeLong(msgspec.Struct, frozen=True):
    request: Request


class GrowLong(msgspec.Struct, frozen=True):
    """Take more replicas into the group that prefills it."""

    request: Request
    newcomers: tuple[WorkerId, ...]


class PartLong(msgspec.Struct, frozen=True):
    """Its group gives back all replicas but the first, which goes on alone."""

    request: Request


class SpillLong(msgspec.Struct, frozen=True):
    """Move the KV of this paused long out of its replicas."""

    request: Request


class RestoreLong(msgspec.Struct, frozen=True):
    """Bring it back: there is room."""

    request: Request


Decision = PlaceShort | PlaceLong | PauseLong | ResumeLong | GrowLong | PartLong | SpillLong | RestoreLong


class SchedulingPolicy(Protocol):
    def admit(self, request: Request, cluster: Cluster) -> None:
        """A request waits (for the first time or again)."""
        ...

    def forget(self, request: Request) -> None:
        """It waits no more: placed by a decision, cancelled, failed."""
        ...

    def worker_added(self, worker_id: WorkerId, cluster: Cluster) -> None: ...

    def worker_lost(self, worker_id: WorkerId, cluster: Cluster) -> None: ...

    def replica_eased(self, worker_id: WorkerId, cluster: Cluster) -> None:
        """Something left this prefill worker: a prefill ended, KV was freed, its long moved on."""
        ...

    def decoder_eased(self) -> None:
        """Room on a decode worker."""
        ...

    def long_changed(self, request: Request) -> None:
        """A long changed its state."""
        ...

    def decide(self, cluster: Cluster, now_s: float) -> Decision | None:
        """The next decision; None: nothing more to do before the next event or deadline."""
        ...

    def next_deadline_s(self) -> float | None: ...

    def waiting(self, count: int) -> Iterator[Request]:
        """The first `count` that wait, for people."""
        ...

    def waiting_shorts(self) -> int: ...

    def waiting_longs(self) -> int: ...

    def waiting_tokens(self) -> int: ...
