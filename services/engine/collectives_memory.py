"""Group links inside one process: for tests, with threads that compute or, under virtual time, without.

They keep the promises of the TCP links and break in the same ways. What is sent is copied only when it is received
or the pass is closed, so that memory changed too early is seen.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from common.messages.groups import Announcement
from services.engine.collectives import GroupBroken, GroupKey, StepRecalled
from services.engine.collectives_door import JOIN_S, GroupLinksFactory


@dataclass(slots=True, eq=False)
class _Message:
    """One of four kinds: a call, a `joined`, a `recall`, or (with none of these) a message of a step."""

    pass_no: int
    step: int
    stop: bool = False
    payload: list[memoryview] = field(default_factory=list)
    call: Announcement | None = None
    joined: bool = False
    recall: bool = False

    def matches(self, wanted: _Message) -> bool:
        mine, theirs = (
            (each.pass_no, each.step, each.joined, each.recall, each.call is None, each.nbytes)
            for each in (self, wanted)
        )
        return mine == theirs

    def is_of(self, other: _Message) -> bool:
        """Of the same step."""
        mine, theirs = ((each.pass_no, each.step, each.joined, each.call) for each in (self, other))
        return mine == theirs

    @property
    def nbytes(self) -> int:
        return sum(view.nbytes for view in self.payload)


class _Group:
    """What the links of one group share."""

    def __init__(self, size: int) -> None:
        self.links: dict[int, MemoryGroupLink] = {}
        self.size = size
        self.changed = threading.Condition()
        self.why_broken: str | None = None
        self.lanes: dict[tuple[int, int], deque[_Message]] = {
            pair: deque() for pair in itertools.permutations(range(size), 2)
        }

    def break_off(self, reason: str) -> GroupBroken:
        with self.changed:
            if self.why_broken is None:
                self.why_broken = reason
            self.changed.notify_all()
        for link in self.links.values():
            link.stir()
        return GroupBroken(f"the group is broken: {self.why_broken}")


class MemoryGroupLink:
    """A `GroupLink` of a `MemoryGroupHub`."""

    def __init__(self, group: _Group, rank: int, silence_s: float, is_silenced: Callable[[], bool]) -> None:
        self.rank = rank
        self._is_silenced = is_silenced
        self._group = group
        self._silence_s = silence_s
        self._loop = asyncio.get_running_loop()
        self._pass_no = 0
        self._idle = True
        self._callback: Callable[[Announcement], None] | None = None
        self._lost: Callable[[str], None] | None = None
        self._stirred = asyncio.Event()
        self._recalled: set[int] = set()
        """Ranks that have said in the present pass that a step is taken back: the last of it."""
        group.links[rank] = self

    def __repr__(self) -> str:
        state = "broken" if self._group.why_broken is not None else "whole"
        return f"MemoryGroupLink(rank={self.rank}/{self.size}, {state}, pass_no={self._pass_no})"

    @property
    def size(self) -> int:
        return self._group.size

    # --- the event loop's side ---

    def on_call(self, callback: Callable[[Announcement], None]) -> None:
        self._callback = callback
        self._hear()

    def on_lost(self, callback: Callable[[str], None]) -> None:
        self._lost = callback

    def begin(self) -> None:
        self._require_whole()
        self._idle = False

    def end(self) -> None:
        self._idle = True
        self.stir()

    def close(self) -> None:
        self._callback = self._lost = None
        self.abort()

    def stir(self) -> None:
        """Any thread: something has changed."""
        try:
            here = asyncio.get_running_loop()
        except RuntimeError:  # a computing thread
            here = None
        if here is self._loop:
            self._loop.call_soon(self._hear)
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._hear)

    def _hear(self) -> None:
        self._stirred.set()
        if not self._idle or self._callback is None:
            return
        with self._group.changed:
            lane = self._group.lanes.get((0, self.rank), deque())
            call = lane[0].call if lane and self._group.why_broken is None else None
            if call is not None:
                lane.popleft()
        if call is not None:
            self._idle = False
            self._callback(call)
        elif self._group.why_broken is not None and self._lost is not None:
            lost, self._lost = self._lost, None
            lost(self._group.why_broken)

    async def opened(self, announcement: Announcement) -> None:
        for rank in self._open(announcement):
            await self._received(rank, _Message(self._pass_no, 0, joined=True))

    async def received(self, rank: int, step: int) -> bool:
        return await self._received(rank, _Message(self._pass_no, step))

    async def recalled(self, step: int) -> None:
        for rank in self._recall(step):
            await self._received(rank, _Message(self._pass_no, step, recall=True))

    async def _received(self, rank: int, wanted: _Message) -> bool:
        try:
            async with asyncio.timeout(self._silence_s):
                while (came := self._taken(rank, wanted)) is None:
                    self._stirred.clear()
                    await self._stirred.wait()
        except TimeoutError:
            raise self._group.break_off(f"rank {rank} is silent for {self._silence_s} s") from None
        return came.stop

    # --- the computing thread's side ---

    def open_pass(self, announcement: Announcement) -> None:
        for rank in self._open(announcement):
            self._receive(rank, _Message(self._pass_no, 0, joined=True))

    def send(self, rank: int, step: int, parts: Sequence[memoryview] = (), *, stop: bool = False) -> None:
        self._post(rank, _Message(self._pass_no, step, stop, [part.cast("B") for part in parts if part.nbytes]))

    def receive(self, rank: int, step: int, into: Sequence[memoryview] = ()) -> bool:
        views = [view.cast("B") for view in into if view.nbytes]
        return self._receive(rank, _Message(self._pass_no, step, payload=views))

    def look(self, step: int) -> None:
        with self._group.changed:
            self._require_whole()
            lane = self._group.lanes[0, self.rank]
            if lane and lane[0].recall and lane[0].step == step:
                self._taken(0, _Message(self._pass_no, step))

    def recall(self, step: int) -> None:
        for rank in self._recall(step):
            self._receive(rank, _Message(self._pass_no, step, recall=True))

    def close_pass(self) -> None:
        self._require_whole()
        with self._group.changed:
            for rank in range(self.size):
                for message in self._group.lanes.get((self.rank, rank), ()):
                    message.payload = [memoryview(bytes(view)) for view in message.payload]

    def abort(self) -> None:
        self._lost = None
        self._group.break_off(f"given up by rank {self.rank}")

    # --- inside ---

    def _require_whole(self) -> None:
        if self._group.why_broken is not None:
            self._lost = None  # whoever is told by an exception need not be told again
            raise GroupBroken(f"the group is broken: {self._group.why_broken}")

    def _open(self, announcement: Announcement) -> Iterator[int]:
        """Yields whom to wait for."""
        self._require_whole()
        self._pass_no = announcement.pass_no
        self._recalled.clear()
        last = self.size - 1
        if self.rank > 0:
            if self.rank < last:
                self._post(0, _Message(self._pass_no, 0, joined=True))
            return
        for rank in range(1, self.size):
            self._post(rank, _Message(self._pass_no, 0, call=announcement))
            if rank < last:
                yield rank

    def _recall(self, step: int) -> Iterator[int]:
        """Yields whom to wait for."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        for rank in others:
            self._post(rank, _Message(self._pass_no, step, recall=True))
        for rank in others:
            if rank not in self._recalled:
                yield rank

    def _post(self, rank: int, message: _Message) -> None:
        self._require_whole()
        if self._is_silenced():
            return
        with self._group.changed:
            self._group.lanes[self.rank, rank].append(message)
            self._group.changed.notify_all()
        self._group.links[rank].stir()

    def _receive(self, rank: int, wanted: _Message) -> bool:
        patience_until_s = time.monotonic() + self._silence_s
        with self._group.changed:
            while (came := self._taken(rank, wanted)) is None:
                if not self._group.changed.wait(max(0.0, patience_until_s - time.monotonic())):
                    raise self._group.break_off(f"rank {rank} is silent for {self._silence_s} s")
        return came.stop

    def _taken(self, rank: int, wanted: _Message) -> _Message | None:
        """The next message of that rank, which must be this one, received into the memory that this one names. None:
        nothing has come. Raises: GroupBroken, StepRecalled."""
        with self._group.changed:
            self._require_whole()
            lane = self._group.lanes[rank, self.rank]
            while lane and wanted.recall and lane[0].is_of(wanted) and not lane[0].recall:
                lane.popleft()  # sent before its rank heard
            if not lane:
                return None
            came = lane.popleft()
            if came.recall and came.is_of(wanted) and not wanted.recall:
                self._recalled.add(rank)
                raise StepRecalled
            if not came.matches(wanted):
                raise self._group.break_off(f"rank {rank} is out of step: {came} instead of {wanted}")
            data = b"".join(came.payload)
        at = 0
        for view in wanted.payload:
            view[:] = data[at : at + view.nbytes]
            at += view.nbytes
        return came


@dataclass(slots=True, eq=False)
class _Meeting:
    """The ranks of a group that have come so far."""

    addresses: tuple[str, ...]
    doors: dict[int, MemoryGroupLinks] = field(default_factory=dict)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    """Complete, or never to be."""
    group: _Group | None = None

    @property
    def size(self) -> int:
        return len(self.addresses)


class MemoryGroupLinks:
    """A `GroupLinks` of a `MemoryGroupHub`."""

    def __init__(self, hub: MemoryGroupHub, address: str, silence_s: float, join_s: float) -> None:
        self.address = address
        self.silence_s = silence_s
        self._hub = hub
        self._join_s = join_s

    async def join(self, key: GroupKey, rank: int, addresses: Sequence[str]) -> MemoryGroupLink:
        name = f"rank {rank} could not join {key.request_id}/{key.attempt}"
        if gone := self._hub.gone.intersection(addresses):
            raise GroupBroken(f"{name}: nobody answers at {', '.join(sorted(gone))}")
        meeting = self._hub.meetings.setdefault(key, _Meeting(tuple(addresses)))
        if meeting.size != len(addresses) or not 0 <= rank < meeting.size or rank in meeting.doors:
            raise GroupBroken(f"{name}: it does not fit, or comes twice")
        meeting.doors[rank] = self
        if len(meeting.doors) == meeting.size:
            meeting.group = _Group(meeting.size)
            for at, door in sorted(meeting.doors.items()):
                self._hub.connect(meeting.group, at, door)
            meeting.over.set()
        try:
            async with asyncio.timeout(self._join_s):
                await meeting.over.wait()
        except TimeoutError:
            raise GroupBroken(f"{name}: not all ranks came within {self._join_s} s") from None
        finally:
            meeting.doors.pop(rank, None)
            if not meeting.doors and self._hub.meetings.get(key) is meeting:
                del self._hub.meetings[key]
        if meeting.group is None:
            raise GroupBroken(f"{name}: a worker is gone")
        return meeting.group.links[rank]

    async def close(self) -> None:
        self._hub.shut(self.address)


@dataclass(slots=True, eq=False)
class MemoryGroupHub:
    """The network that the doors of one process share; all of one event loop."""

    meetings: dict[GroupKey, _Meeting] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    """Doors at which nobody answers any more."""
    silenced: set[str] = field(default_factory=set)
    """Doors whose workers hang: nothing that they send arrives."""
    _links: dict[str, list[MemoryGroupLink]] = field(default_factory=dict)
    _ports: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def links(self, *, silence_s: float = 5.0, join_s: float = JOIN_S) -> GroupLinksFactory:
        """A factory of doors of this hub."""
        return lambda: MemoryGroupLinks(self, f"memory-group:{next(self._ports)}", silence_s, join_s)

    def connect(self, group: _Group, rank: int, door: MemoryGroupLinks) -> None:
        """Make this worker a rank of the group."""
        address = door.address
        link = MemoryGroupLink(group, rank, door.silence_s, lambda: address in self.silenced)
        self._links.setdefault(address, []).append(link)

    def sever(self, address: str) -> None:
        """The worker at this address is gone, and with it its groups."""
        self.shut(address)
        for link in self._links.pop(address, []):
            link.abort()

    def shut(self, address: str) -> None:
        """Nobody answers at this door any more: who waits there for a group waits no longer."""
        self.gone.add(address)
        for meeting in self.meetings.values():
            if address in meeting.addresses:
                meeting.over.set()
