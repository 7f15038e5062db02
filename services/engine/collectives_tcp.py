"""A group link over TCP: one connection per pair of ranks, made and admitted by `collectives_door.py`.

Every message is a fixed header and its payload, sent from and received into the tensors' own memory. The sockets
never block: while the computing thread waits for one rank it goes on sending to all. They change hands: the event
loop reads rank 0's call, to the last byte of it and no further, and leaves what follows to the computing thread. Of
the others' connections it sees only that they end.

A rank that gives up shuts its sockets down. So whoever waits for it sees the end of the stream at once, gives up in
its turn, and all who wait for each other are free within milliseconds. Who is merely silent is given up after
`silence_s`.
"""

from __future__ import annotations

import asyncio
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from common.messages.groups import Announcement
from common.runtime.wire import WireError, decode_record, encode_record
from services.engine.collectives import GroupBroken, StepRecalled
from services.engine.transport_frames import VIEWS_MAX, advance

HEADER = struct.Struct(">BBIIQ")
"""Kind, stop, number of the pass, step, bytes of payload."""
STEP, CALL, JOINED, RECALL = range(4)
CALL_BYTES_MAX = 4096
THROWN_AWAY_BYTES_MAX = 1 << 30
"""In one message of a step taken back: far above any, and no reason to allocate whatever a header says."""


class _Peer:
    """The connection to one rank."""

    def __init__(self, rank: int, sock: socket.socket) -> None:
        self.rank = rank
        self.sock = sock
        self.unsent: list[memoryview] = []
        self.recalled = -1
        """The step in the present pass that it has said is taken back."""

    def push(self) -> bool:
        """Send what the socket takes. Returns whether it took anything. Raises: OSError."""
        moved = False
        while self.unsent:
            try:
                count = self.sock.sendmsg(self.unsent[:VIEWS_MAX])
            except (BlockingIOError, InterruptedError):
                break
            advance(self.unsent, count)
            moved = True
        return moved


class TcpGroupLink:
    """A `GroupLink`. Made on the event loop's thread."""

    def __init__(self, rank: int, peers: Mapping[int, socket.socket], *, silence_s: float) -> None:
        self.rank = rank
        self.size = len(peers) + 1
        self.waited_s = 0.0
        """Spent waiting in `receive` and `close_pass`, for measurements."""
        self._silence_s = silence_s
        self._peers = {other: _Peer(other, sock) for other, sock in peers.items()}
        self._loop = asyncio.get_running_loop()
        self._pass_no = 0
        self._why_broken: str | None = None
        self._breaking = threading.Lock()
        self._closed = self._in_pass = False
        self._watched: set[int] = set()
        """Ranks whose connections the event loop watches."""
        self._callback: Callable[[Announcement], None] | None = None
        self._lost: Callable[[str], None] | None = None
        self._call = bytearray()
        """What has come of rank 0's next call."""

    def __repr__(self) -> str:
        state = "broken" if self._why_broken is not None else "whole"
        return f"TcpGroupLink(rank={self.rank}/{self.size}, {state}, pass_no={self._pass_no})"

    # --- the event loop's side ---

    def on_call(self, callback: Callable[[Announcement], None]) -> None:
        self._callback = callback
        self._listen()

    def on_lost(self, callback: Callable[[str], None]) -> None:
        self._lost = callback

    def begin(self) -> None:
        self._require_whole()
        self._deafen()
        self._in_pass = True

    def end(self) -> None:
        self._in_pass = False
        if self._closed:
            self._let_go()
        elif self._why_broken is None:
            self._listen()

    def close(self) -> None:
        self.abort()
        self._deafen()
        self._closed = True
        if not self._in_pass:  # else the computing thread may be waiting on the sockets
            self._let_go()

    def _let_go(self) -> None:
        for peer in self._peers.values():
            peer.sock.close()

    def _listen(self) -> None:
        if self._callback is None or self._closed:
            return
        for rank in self._peers.keys() - self._watched:
            heard = self._hear if rank == 0 else partial(self._sense, rank)
            self._loop.add_reader(self._peers[rank].sock, heard)
            self._watched.add(rank)

    def _deafen(self, *ranks: int) -> None:
        """To these ranks; without any, to all."""
        for rank in self._watched.intersection(ranks) if ranks else tuple(self._watched):
            self._loop.remove_reader(self._peers[rank].sock)
            self._watched.discard(rank)

    def _hear(self) -> None:
        """Rank 0's socket is readable: take in its call, and not a byte more."""
        try:
            announcement = self._hear_call()
        except (GroupBroken, OSError, WireError) as error:
            self._lose(f"rank 0: {error}")
            return
        if announcement is not None and self._callback is not None:
            self._deafen(0)
            self._callback(announcement)

    def _sense(self, rank: int) -> None:
        """A socket on which nothing is due while no pass runs here is readable: that rank is gone, or it is in the next
        pass already; then rank 0, which is in it too, sees it go."""
        try:
            data = self._peers[rank].sock.recv(1, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._lose(f"rank {rank}: connection lost: {error}")
            return
        if data:
            self._deafen(rank)
        else:
            self._lose(f"rank {rank}: connection closed")

    def _lose(self, reason: str) -> None:
        """While no pass runs here."""
        told = self._why_broken is not None
        self._break(reason)
        self._deafen()
        if self._lost is not None and not told:
            self._lost(reason)

    def _hear_call(self) -> Announcement | None:
        """None: not all of it has come. Raises: GroupBroken, OSError, WireError."""
        while True:
            missing = HEADER.size - len(self._call)
            if missing <= 0:
                kind, _stop, _pass_no, _step, nbytes = HEADER.unpack_from(self._call)
                if kind != CALL or nbytes > CALL_BYTES_MAX:
                    raise GroupBroken(f"a message of kind {kind} and {nbytes} bytes outside of a pass")
                missing += nbytes
                if missing == 0:
                    data = bytes(self._call[HEADER.size :])
                    self._call.clear()
                    return decode_record(data, Announcement)
            try:
                data = self._peers[0].sock.recv(missing)
            except (BlockingIOError, InterruptedError):
                return None
            if not data:
                raise GroupBroken("connection closed")
            self._call += data

    # --- the computing thread's side ---

    def open_pass(self, announcement: Announcement) -> None:
        self._require_whole()
        self._pass_no = announcement.pass_no
        for peer in self._peers.values():
            peer.recalled = -1
        last = self.size - 1
        if self.rank > 0:
            if self.rank < last:
                self._post(self._peers[0], JOINED, 0, (), stop=False)
            return
        call = memoryview(encode_record(announcement))
        for rank in range(1, self.size):
            self._post(self._peers[rank], CALL, 0, (call,), stop=False)
            if rank < last:
                self._take(rank, JOINED, 0, ())

    def send(self, rank: int, step: int, parts: Sequence[memoryview] = (), *, stop: bool = False) -> None:
        self._require_whole()
        self._post(self._peers[rank], STEP, step, parts, stop=stop)

    def receive(self, rank: int, step: int, into: Sequence[memoryview] = ()) -> bool:
        return self._take(rank, STEP, step, into)

    def look(self, step: int) -> None:
        self._require_whole()
        try:
            data = self._peers[0].sock.recv(HEADER.size, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            raise self._broken(f"rank 0: connection lost: {error}") from error
        if len(data) == HEADER.size and HEADER.unpack(data) == (RECALL, 0, self._pass_no, step, 0):
            self._take(0, STEP, step, ())

    def recall(self, step: int) -> None:
        self._require_whole()
        for peer in self._peers.values():
            self._post(peer, RECALL, step, (), stop=False)
        for rank, peer in self._peers.items():
            while peer.recalled != step:
                self._throw_away(rank, step)

    async def opened(self, announcement: Announcement) -> None:
        await asyncio.to_thread(self.open_pass, announcement)

    async def received(self, rank: int, step: int) -> bool:
        return await asyncio.to_thread(self.receive, rank, step)

    async def recalled(self, step: int) -> None:
        await asyncio.to_thread(self.recall, step)

    def close_pass(self) -> None:
        patience_until_s = time.monotonic() + self._silence_s
        while any(peer.unsent for peer in self._peers.values()):
            if self._wait(None, patience_until_s):
                patience_until_s = time.monotonic() + self._silence_s
        self._require_whole()

    def abort(self) -> None:
        self._break("given up by this rank")

    # --- inside ---

    def _require_whole(self) -> None:
        if self._why_broken is not None:
            raise GroupBroken(f"the group is broken: {self._why_broken}")

    def _break(self, reason: str) -> None:
        """Any thread. A socket that is shut down wakes whoever polls it, on both sides."""
        with self._breaking:
            if self._why_broken is not None:
                return
            self._why_broken = reason
        for peer in self._peers.values():
            try:
                peer.sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # gone already

    def _broken(self, reason: str) -> GroupBroken:
        """Break off; the error to raise tells the first reason there was."""
        self._break(reason)
        return GroupBroken(f"the group is broken: {self._why_broken}")

    def _post(self, peer: _Peer, kind: int, step: int, parts: Sequence[memoryview], *, stop: bool) -> None:
        payload = [part.cast("B") for part in parts if part.nbytes]
        header = HEADER.pack(kind, stop, self._pass_no, step, sum(map(len, payload)))
        peer.unsent += [memoryview(header), *payload]
        try:
            peer.push()
        except OSError as error:
            raise self._broken(f"rank {peer.rank}: connection lost: {error}") from error

    def _take(self, rank: int, kind: int, step: int, into: Sequence[memoryview]) -> bool:
        """The next message of this rank, which must be this one. Returns its `stop`. Raises: StepRecalled."""
        views = [view.cast("B") for view in into if view.nbytes]
        wanted = (kind, self._pass_no, step, sum(map(len, views)))
        came, stop = self._next_header(rank)
        if came == (RECALL, self._pass_no, step, 0):
            self._peers[rank].recalled = step
            raise StepRecalled
        if came != wanted:
            raise self._out_of_step(rank, came, wanted)
        self._fill(self._peers[rank], views)
        return stop

    def _throw_away(self, rank: int, step: int) -> None:
        """The next message of this rank, of a step that was taken back."""
        came, _ = self._next_header(rank)
        kind, pass_no, at_step, nbytes = came
        if (pass_no, at_step) != (self._pass_no, step) or kind not in (STEP, RECALL) or nbytes > THROWN_AWAY_BYTES_MAX:
            raise self._out_of_step(rank, came, (RECALL, self._pass_no, step, 0))
        if kind == RECALL:
            self._peers[rank].recalled = step
        elif nbytes:
            self._fill(self._peers[rank], [memoryview(bytearray(nbytes))])

    def _next_header(self, rank: int) -> tuple[tuple[int, int, int, int], bool]:
        """Kind, pass, step, bytes; and `stop`."""
        header = bytearray(HEADER.size)
        self._fill(self._peers[rank], [memoryview(header)])
        kind, stop, pass_no, step, nbytes = HEADER.unpack(header)
        return (kind, pass_no, step, nbytes), bool(stop)

    def _out_of_step(self, rank: int, came: tuple[int, ...], wanted: tuple[int, ...]) -> GroupBroken:
        return self._broken(f"rank {rank} is out of step: (kind, pass, step, bytes) {came} instead of {wanted}")

    def _fill(self, peer: _Peer, views: list[memoryview]) -> None:
        """Receive exactly this many bytes of that rank, sending to all meanwhile."""
        patience_until_s: float | None = None
        while views:
            try:
                count = peer.sock.recvmsg_into(views[:VIEWS_MAX])[0]
            except (BlockingIOError, InterruptedError):
                if patience_until_s is None:
                    patience_until_s = time.monotonic() + self._silence_s
                if self._wait(peer, patience_until_s):
                    patience_until_s = None
                continue
            except OSError as error:
                raise self._broken(f"rank {peer.rank}: connection lost: {error}") from error
            if count == 0:
                raise self._broken(f"rank {peer.rank}: connection closed")
            advance(views, count)
            patience_until_s = None

    def _wait(self, reading: _Peer | None, patience_until_s: float) -> bool:
        """Until a socket that is read from or has bytes to take is ready. Returns whether anything was sent."""
        self._require_whole()
        begun_s = time.monotonic()
        poll = select.poll()
        for peer in self._peers.values():
            events = (select.POLLIN if peer is reading else 0) | (select.POLLOUT if peer.unsent else 0)
            if events:
                poll.register(peer.sock, events)
        ready = poll.poll(max(0.0, patience_until_s - begun_s) * 1e3)
        self.waited_s += time.monotonic() - begun_s
        if not ready:
            who = "a rank takes nothing" if reading is None else f"rank {reading.rank} is silent"
            raise self._broken(f"{who} for {self._silence_s} s")
        moved = False
        for peer in self._peers.values():
            try:
                moved = peer.push() or moved
            except OSError as error:
                raise self._broken(f"rank {peer.rank}: connection lost: {error}") from error
        return moved
