"""The port by which the ranks of a group compute one sequence together. TCP (`collectives_tcp.py`) and an in-memory
twin (`collectives_memory.py`) pass one contract suite.

Rank 0 leads. It alone begins a pass and decides when it stops; the others, the *followers*, join what it has begun, so
that no two ranks can disagree:

    rank 0                               follower
    begin, open_pass ── Announcement ──▶ called(announcement): the worker begins a pass of the same tokens
                     ◀── joined ──────── begin, open_pass
    send(step, stop) ──────────────────▶ receive(step) -> stop      once per step, before anything else of the step
                     ◀─── tensors, any way ───▶
    recall(step)     ──── recalled ────▶ receive, look raise        instead, if rank 0 takes the step back
                     ◀─── recalled, from each to all ───▶
    close_pass, end                      close_pass, end

Followers are called one after another, each when the one before has joined. If all groups name their members in the
same order of workers, no two groups that overlap can wait for each other in a circle.

Rank 0 may take a step back as long as it owes each follower a message of it: nobody can have ended the step then. Each
rank says to all that it has heard so, and throws away what the others sent before they did; so all stand before the
step, and nothing of it is left on the way.

A link belongs to the event loop's thread, and between `begin` and `end` to the one thread that computes the pass. Its
ranks are connected in pairs; what one sends another arrives in order. Sizes are known to both sides. Where anything
is amiss (a peer is gone, silent for longer than the bound, at another step, of another opinion about sizes) the link
is broken for good, and so, within milliseconds, are its peers'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from common.messages.base import Record
from common.messages.groups import Announcement, GroupScheme
from common.policy.sp_shares import Mesh, misfit
from common.units import Attempt, RequestId
from services.engine.interface import EngineError


class GroupBroken(EngineError):
    """The group of this sequence is no more: a rank is gone, silent for too long, out of step, or gave up."""


class StepRecalled(Exception):
    """Rank 0 takes the step back: whoever hears it, from whichever rank, answers with `GroupLink.recall`."""


class GroupKey(Record, frozen=True, kw_only=True):
    """Which group a connection is for."""

    request_id: RequestId
    attempt: Attempt
    growth: int = 0
    """How often it has tried to grow: the ranks of a larger group meet anew."""


class GroupLink(Protocol):
    """One rank's connections to all others of its group. Everything but `abort` raises GroupBroken once it is broken;
    `on_call`, `end`, `abort` and `close` never raise."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def on_call(self, callback: Callable[[Announcement], None]) -> None:
        """Loop thread, follower: whom to tell that rank 0 has begun a pass. Never told of a second one before the
        pass of the first has ended here."""
        ...

    def on_lost(self, callback: Callable[[str], None]) -> None:
        """Loop thread: whom to tell, once, that another rank is gone, with the reason, if that shows while no pass runs
        here and `on_call` has been called. (In a pass it raises; and what this rank broke or closed itself is told to
        nobody.)"""
        ...

    def begin(self) -> None:
        """Loop thread: from now on the link is the computing thread's."""
        ...

    def open_pass(self, announcement: Announcement) -> None:
        """Rank 0: call the others. Follower: join the pass it was called to, which is this one."""
        ...

    def send(self, rank: int, step: int, parts: Sequence[memoryview] = (), *, stop: bool = False) -> None:
        """Never waits: what the connection does not take now it takes while this rank waits in `receive` or
        `close_pass`. The memory must not change before that."""
        ...

    def receive(self, rank: int, step: int, into: Sequence[memoryview] = ()) -> bool:
        """Wait for the next message of that rank, into place. Returns its `stop`. Raises: StepRecalled."""
        ...

    def look(self, step: int) -> None:
        """Follower, without waiting. Raises: StepRecalled, if rank 0 has said so, and all that it sent before in this
        step has been received."""
        ...

    def recall(self, step: int) -> None:
        """Take the step back, or answer that it is; wait until all others have answered. The pass stops before it."""
        ...

    async def opened(self, announcement: Announcement) -> None:
        """`open_pass`, for an engine that computes nothing and lives on the event loop."""
        ...

    async def received(self, rank: int, step: int) -> bool:
        """`receive` of a message without parts, for such an engine."""
        ...

    async def recalled(self, step: int) -> None:
        """`recall`, for such an engine."""
        ...

    def close_pass(self) -> None:
        """Wait until everything sent is on its way."""
        ...

    def end(self) -> None:
        """Loop thread: the pass ended here, well or badly; the link is the loop's again."""
        ...

    def abort(self) -> None:
        """Any thread: break the link; whoever waits in it, here or elsewhere, raises within milliseconds."""
        ...

    def close(self) -> None:
        """Loop thread: as `abort`, and let go of the connections (at the end of a pass under way). Idempotent."""
        ...


class GroupLinks(Protocol):
    """A worker's door for groups, and its way to others'."""

    @property
    def address(self) -> str:
        """host:port under which the other ranks reach this worker."""
        ...

    async def join(self, key: GroupKey, rank: int, addresses: Sequence[str]) -> GroupLink:
        """Connect to every other rank of the group, of which `addresses` are the doors in rank order; all must join
        within `join_s` of each other. Raises: GroupBroken, at once if nobody answers at one of the doors (any more)."""
        ...

    async def close(self) -> None:
        """Let nobody in any more. Links that were joined stay with who holds them."""
        ...


OnCalled = Callable[[RequestId, Announcement], None]
"""A follower hears that rank 0 has begun a pass: it must run (step 0) or resume (above) that very segment soon, in a
pass that may hold rows of its own beside it. On the event loop's thread."""


@dataclass(frozen=True, slots=True)
class GroupShare:
    """This worker's part in the group that computes a sequence."""

    rank: int
    size: int
    scheme: GroupScheme
    link: GroupLink
    base: int = 0
    """Tokens computed before the group grew to this size."""
    before: tuple[int, ...] = ()
    """By rank: of how many of these it keeps the KV; empty: the group has not grown."""

    def __post_init__(self) -> None:
        if refusal := misfit(self.scheme, self.size):
            raise EngineError(refusal)

    @property
    def mesh(self) -> Mesh:
        return replace(Mesh.of(self.scheme, self.size), base=self.base, before=self.before)
