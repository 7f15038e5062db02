"""How the ranks of a group find each other over TCP: every worker has a door, at which higher ranks call.

    rank j > i                      door of rank i
           ── connect, handshake of the data plane ──▶
           ── JoinGroup(key, rank, size) ────────────▶   kept until this worker joins the same group, `join_s` at most
           ◀───────────────────────────── Joined ────
           ── Present ───────────────────────────────▶   so that nobody counts who has given up meanwhile

    rank i                               door of rank j > i
           ── connect, handshake, Attend ────────────▶   held open until rank i hangs up

The order to join reaches the ranks at different times, so a caller may come before its group is known here. The
second connection carries nothing: by its end a rank that waits to be called learns that the caller is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from common.logs import get_logger
from common.messages.base import Message
from common.messages.groups import RANKS_MAX
from services.engine.collectives import GroupBroken, GroupKey, GroupLinks
from services.engine.collectives_tcp import TcpGroupLink
from services.engine.owned_tasks import OwnedTasks
from services.engine.transport_frames import (
    HELLO_BYTES_MAX,
    Channel,
    ConnectionBroken,
    admit,
    connections,
    dial,
    greet,
    listen,
)

CONNECTIONS_MAX = 1024
JOIN_S = 10.0

log = get_logger(__name__)

GroupLinksFactory = Callable[[], GroupLinks]
"""Opens the door; called on the event loop. Raises: OSError, if the address is taken."""


class JoinGroup(Message, frozen=True, kw_only=True):
    key: GroupKey
    rank: int
    size: int


class Joined(Message, frozen=True, kw_only=True):
    pass


class Present(Message, frozen=True, kw_only=True):
    pass


class Attend(Message, frozen=True, kw_only=True):
    pass


@dataclass(slots=True, eq=False)
class _Gathering:
    """A group whose ranks are about to meet here."""

    rank: int = 0
    size: int = 0
    """0: this worker has not been told of it yet."""
    known: asyncio.Event = field(default_factory=asyncio.Event)
    arrived: dict[int, Channel] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    callers: int = 0
    over: bool = False

    def takes(self, order: JoinGroup) -> bool:
        return not self.over and order.size == self.size and self.rank < order.rank < self.size


class TcpGroupLinks:
    """A `GroupLinks`. Made by `open_group_links`."""

    def __init__(self, listener: socket.socket, *, secret: str, silence_s: float, join_s: float) -> None:
        host, port = listener.getsockname()[:2]
        self._address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._listener = listener
        self._secret = secret
        self._silence_s = silence_s
        self._join_s = join_s
        self._gatherings: dict[GroupKey, _Gathering] = {}
        self._connections = 0
        self._tasks = OwnedTasks()
        self._tasks.spawn(self._answer_the_door(), "group door")

    def __repr__(self) -> str:
        return f"TcpGroupLinks({self._address}, gathering={len(self._gatherings)})"

    @property
    def address(self) -> str:
        return self._address

    async def join(self, key: GroupKey, rank: int, addresses: Sequence[str]) -> TcpGroupLink:
        size = len(addresses)
        if not 0 <= rank < size <= RANKS_MAX:
            raise GroupBroken(f"no rank {rank} in a group of {size} (at most {RANKS_MAX})")
        gathering = self._gatherings.setdefault(key, _Gathering())
        if gathering.size:
            raise GroupBroken(f"{key.request_id}/{key.attempt} is being joined already")
        gathering.rank, gathering.size = rank, size
        gathering.known.set()
        calls = [asyncio.create_task(self._call(key, rank, size, at, addresses[at])) for at in range(rank)]
        higher = range(rank + 1, size)
        meeting = asyncio.create_task(self._all_met(calls, gathering, higher))
        watches = [asyncio.create_task(self._watch(at, addresses[at])) for at in higher]
        try:
            async with asyncio.timeout(self._join_s):
                await asyncio.wait([meeting, *watches], return_when=asyncio.FIRST_COMPLETED)
            ended = [task for task in (meeting, *watches) if task.done()]
            ended[0].result()
            await _end(watches)  # from here to the return nothing is awaited: nobody can cancel, and lose the link
        except (TimeoutError, ConnectionBroken) as error:
            reason = str(error) or f"not all ranks came within {self._join_s} s"
            raise GroupBroken(f"rank {rank} could not join {key.request_id}/{key.attempt}: {reason}") from error
        else:
            called = {at: call.result() for at, call in enumerate(calls)}
            sockets = {at: channel.release() for at, channel in (called | gathering.arrived).items()}
            gathering.arrived.clear()
            return TcpGroupLink(rank, sockets, silence_s=self._silence_s)
        finally:
            gathering.over = True
            gathering.known.set()
            if self._gatherings.get(key) is gathering:
                del self._gatherings[key]
            for channel in gathering.arrived.values():
                channel.close()
            for call in calls:  # does nothing to one whose socket is released
                call.add_done_callback(_hang_up)
            await _end([*calls, meeting, *watches])

    async def close(self) -> None:
        await self._tasks.cancel()
        self._listener.close()

    # --- towards lower ranks ---

    async def _call(self, key: GroupKey, rank: int, size: int, at: int, address: str) -> Channel:
        """Raises: ConnectionBroken."""
        try:
            channel = await dial(address, self._silence_s)
        except ConnectionBroken as error:
            raise ConnectionBroken(f"rank {at} at {address}: {error}") from error
        try:
            await greet(channel, self._secret)
            await channel.send(JoinGroup(key=key, rank=rank, size=size))
            await channel.receive(Joined, patience_s=self._join_s, bytes_max=HELLO_BYTES_MAX)
            await channel.send(Present())
        except ConnectionBroken as error:
            channel.close()
            raise ConnectionBroken(f"rank {at} at {address}: {error}") from error
        except asyncio.CancelledError:
            channel.close()
            raise
        return channel

    async def _watch(self, at: int, address: str) -> None:
        """As long as somebody is there. Raises: ConnectionBroken."""
        try:
            channel = await dial(address, self._silence_s)
            try:
                await greet(channel, self._secret)
                await channel.send(Attend())
                await channel.receive(Attend, patience_s=None, bytes_max=HELLO_BYTES_MAX)
            finally:
                channel.close()
        except ConnectionBroken as error:
            raise ConnectionBroken(f"rank {at} at {address}: {error}") from error

    async def _all_met(self, calls: Sequence[asyncio.Task[Channel]], gathering: _Gathering, ranks: range) -> None:
        """Raises: ConnectionBroken."""
        await asyncio.gather(*calls)
        while not all(rank in gathering.arrived for rank in ranks):
            gathering.changed.clear()
            await gathering.changed.wait()

    # --- from higher ranks ---

    async def _answer_the_door(self) -> None:
        async for sock, peer in connections(self._listener, "group", lambda: CONNECTIONS_MAX - self._connections):
            self._tasks.spawn(self._receive(Channel(sock, silence_s=self._silence_s), peer), f"group from {peer}")

    async def _receive(self, channel: Channel, peer: str) -> None:
        self._connections += 1
        handed_over = False
        try:
            await admit(channel, self._secret)
            order: JoinGroup | Attend = await channel.receive(
                JoinGroup | Attend, patience_s=self._silence_s, bytes_max=HELLO_BYTES_MAX
            )
            if isinstance(order, Attend):
                await self._attend(channel)
            else:
                handed_over = await self._bring_together(order, channel)
        except (ConnectionBroken, TimeoutError) as error:
            log.info("a rank did not reach its group", peer=peer, reason=str(error) or "nobody joined it here")
        finally:
            self._connections -= 1
            if not handed_over:
                channel.close()

    async def _attend(self, channel: Channel) -> None:
        """Be there, until nobody watches any more; for longer than anybody joins."""
        with contextlib.suppress(ConnectionBroken):
            await channel.receive(Attend, patience_s=2 * self._join_s, bytes_max=HELLO_BYTES_MAX)

    async def _bring_together(self, order: JoinGroup, channel: Channel) -> bool:
        """Whether the channel is the group's now. Raises: ConnectionBroken, TimeoutError."""
        gathering = self._gatherings.setdefault(order.key, _Gathering())
        gathering.callers += 1
        try:
            async with asyncio.timeout(self._join_s):
                await gathering.known.wait()
        finally:
            gathering.callers -= 1
            if not gathering.size and not gathering.callers and self._gatherings.get(order.key) is gathering:
                del self._gatherings[order.key]
        if not gathering.takes(order):
            raise ConnectionBroken(f"rank {order.rank} of {order.size} does not fit the group")
        await channel.send(Joined())
        await channel.receive(Present, patience_s=self._silence_s, bytes_max=HELLO_BYTES_MAX)
        if not gathering.takes(order) or order.rank in gathering.arrived:
            raise ConnectionBroken(f"rank {order.rank} comes too late or twice")
        gathering.arrived[order.rank] = channel
        gathering.changed.set()
        return True


async def _end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel them, and wait for that, if it takes any time; what they raised is nobody's."""
    for task in tasks:
        task.cancel()
    if running := [task for task in tasks if not task.done()]:
        await asyncio.wait(running)
    for task in tasks:
        if not task.cancelled():
            task.exception()


def _hang_up(call: asyncio.Task[Channel]) -> None:
    if not call.cancelled() and call.exception() is None:
        call.result().close()


def open_group_links(
    *, host: str = "127.0.0.1", port: int = 0, secret: str = "", silence_s: float = 5.0, join_s: float = JOIN_S
) -> Callable[[], TcpGroupLinks]:
    """A factory of doors that listen on this address (port 0: any free one)."""

    def make() -> TcpGroupLinks:
        return TcpGroupLinks(listen(host, port), secret=secret, silence_s=silence_s, join_s=join_s)

    return make
