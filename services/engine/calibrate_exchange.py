"""Measures what it costs a rank of a group to swap tensors with another one of this machine, for the choice of a plan.

Over a TCP connection of this machine, as `collectives_tcp.py` makes them:

- *a message*: half of a round trip between two threads, with all that waking somebody takes;
- *a byte*: sent and received by one thread, which is what a rank of a group pays that sends as much as it receives. A
  copy into the kernel and one out of it; on another device than the CPU also those from and to its memory.
- *an element of a partial output*: merged into another by log-sum-exp.

Nobody else need be there, and all of it takes some hundredths of a second.
"""

from __future__ import annotations

import socket
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from common.messages.cluster import ExchangeCost
from services.engine.attention import merge_attention
from services.engine.calibrate import compute_clock
from services.engine.model import LoadedModel

_MESSAGE_BYTES = 64
_ROUND_TRIPS = 100
_PAYLOAD_BYTES = 1 << 22
"""More than a core keeps at hand: what a rank sends was just computed elsewhere in memory."""
_PAYLOADS = 12
_MERGES = 8
_MERGED_TOKENS = 128
_WARM_UP = 2
"""Of payloads and merges, how many are not counted."""
_BUDGET_S = 0.08
"""Of each of the three measurements; none begins another round after it."""
_SILENCE_S = 2.0
"""A machine so busy that a message takes this long says so by this figure."""


def measure_exchange_cost(model: LoadedModel) -> ExchangeCost:
    """Takes about a tenth of a second. Raises: OSError, if this machine has no loopback."""
    with _connected() as (here, there):
        message_s = _message_s(here, there)
        byte_s = _payload_s(here, there, model.device) / _PAYLOAD_BYTES
    return ExchangeCost(message_s=message_s, byte_s=byte_s, merge_element_s=_merge_element_s(model))


@contextmanager
def _connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        here = socket.create_connection(listener.getsockname(), timeout=_SILENCE_S)
        there, _ = listener.accept()
    with here, there:
        for end in (here, there):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            end.settimeout(_SILENCE_S)
        yield here, there


def _message_s(here: socket.socket, there: socket.socket) -> float:
    """The lower quartile of many: at the start of a cluster all workers measure at once."""
    echo = threading.Thread(target=_echo, args=(there,), daemon=True)
    echo.start()
    ping = bytes(_MESSAGE_BYTES)
    trips: list[float] = []
    begun_s = time.perf_counter()
    try:
        while len(trips) < _ROUND_TRIPS and time.perf_counter() - begun_s < _BUDGET_S:
            before_s = time.perf_counter()
            here.sendall(ping)
            _take(here, bytearray(_MESSAGE_BYTES))
            trips.append(time.perf_counter() - before_s)
        here.sendall(bytes([1]) * _MESSAGE_BYTES)
    except TimeoutError:
        trips.append(2 * _SILENCE_S)
    echo.join(_SILENCE_S)
    return sorted(trips)[len(trips) // 4] / 2


def _echo(end: socket.socket) -> None:
    """Until a message comes that is not empty, or none."""
    came = bytearray(_MESSAGE_BYTES)
    try:
        _take(end, came)
        while not any(came):
            end.sendall(came)
            _take(end, came)
    except (TimeoutError, ConnectionError):
        return


def _take(end: socket.socket, into: bytearray) -> None:
    """Fill it. Raises: TimeoutError, ConnectionError."""
    left = memoryview(into)
    while left:
        count = end.recv_into(left)
        if not count:
            raise ConnectionResetError("closed while measuring")
        left = left[count:]


def _payload_s(here: socket.socket, there: socket.socket, device: torch.device) -> float:
    """Seconds to send a payload and to receive one."""
    here.setblocking(False)
    there.setblocking(False)
    clock = compute_clock(device)
    tensor = torch.zeros(_PAYLOAD_BYTES, dtype=torch.uint8, device=device)
    landed = torch.empty(_PAYLOAD_BYTES, dtype=torch.uint8)
    times: list[float] = []
    begun_s = time.perf_counter()
    while len(times) < _PAYLOADS and (time.perf_counter() - begun_s < _BUDGET_S or len(times) <= _WARM_UP):
        before_s = clock()
        _swap(here, _memory(tensor.cpu()), there, _memory(landed))
        tensor = landed.to(device)
        times.append(clock() - before_s)
    return statistics.median(times[_WARM_UP:])


def _memory(tensor: torch.Tensor) -> memoryview:
    raw: Any = tensor.numpy()
    return memoryview(raw)


def _swap(here: socket.socket, unsent: memoryview, there: socket.socket, missing: memoryview) -> None:
    """Send all of it, and receive it as it comes. Raises: TimeoutError."""
    until_s = time.perf_counter() + _SILENCE_S
    while missing:
        with suppress(BlockingIOError):  # then what has come must be taken first
            unsent = unsent[here.send(unsent) :] if unsent else unsent
        try:
            missing = missing[there.recv_into(missing) :]
        except BlockingIOError:
            if time.perf_counter() > until_s:
                raise TimeoutError("the loopback of this machine does not deliver") from None


def _merge_element_s(model: LoadedModel) -> float:
    clock = compute_clock(model.device)
    out = torch.zeros(1, model.query_heads, _MERGED_TOKENS, model.head_dim, dtype=model.dtype, device=model.device)
    lse = torch.zeros(out.shape[:3], dtype=torch.float32, device=model.device)
    times = []
    with torch.inference_mode():
        for _ in range(_WARM_UP + _MERGES):
            before_s = clock()
            merge_attention(out, lse, out, lse)[1].cpu()  # the copy waits for the device
            times.append(clock() - before_s)
    return statistics.median(times[_WARM_UP:]) / out.numel()
