"""The client against a server that answers badly, slowly or in odd pieces."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from loadtest.client import Client, ClientError
from loadtest.runner import run_open_loop
from loadtest.workload import Arrival, Ask, Schedule, make_ask

OUTPUT_TOKENS = 3
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def event(tokens: str, finish: str = "null") -> bytes:
    return b'data: {"choices": [{"text": "", "finish_reason": %s, "logprobs": {"tokens": %s}}]}\n\n' % (
        finish.encode(),
        tokens.encode(),
    )


WHOLE = (event('["a"]'), event('["b"]'), event('["c"]', '"length"'), b"data: [DONE]\n\n")


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class Server:
    """Answers every request with the same bytes."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces
        self.connections = 0
        self.hang_up = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
                for piece in self.pieces:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
                if self.hang_up:
                    return
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()


@asynccontextmanager
async def talking_to(server: Server, *, timeout_s: float = 5.0) -> AsyncIterator[Client]:
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    client = Client(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", timeout_s=timeout_s)
    try:
        yield client
    finally:
        await client.close()
        listening.close()
        await listening.wait_closed()


def ask() -> Ask:
    return make_ask(random.Random(0), "short", 10, OUTPUT_TOKENS)


async def test_a_stream_cut_anywhere_is_counted_the_same() -> None:
    data = HEAD + b"".join(chunk(each) for each in WHOLE) + b"0\r\n\r\n"
    rng = random.Random(4)
    for _ in range(20):
        cuts = sorted({0, len(data), *(rng.randrange(len(data)) for _ in range(6))})
        pieces = [data[begin:end] for begin, end in itertools.pairwise(cuts)]
        async with talking_to(Server(pieces)) as client:
            answer = await client.complete(ask(), "r")
        assert answer.failure(ask()) is None
        assert answer.tokens == OUTPUT_TOKENS
        assert answer.first_s is not None
        assert answer.last_s is not None
        assert answer.sent_s <= answer.first_s <= answer.last_s


async def test_a_connection_is_kept_and_one_that_was_closed_is_replaced() -> None:
    server = Server([HEAD + b"".join(chunk(each) for each in WHOLE) + b"0\r\n\r\n"])
    async with talking_to(server) as client:
        for _ in range(3):
            assert (await client.complete(ask(), "r")).failure(ask()) is None
        assert server.connections == 1
        server.hang_up = True
        assert (await client.complete(ask(), "r")).failure(ask()) is None
        await asyncio.sleep(0.05)  # the end of the connection travels by itself
        assert (await client.complete(ask(), "r")).failure(ask()) is None
        assert server.connections == 2


@pytest.mark.parametrize(
    ("pieces", "reason"),
    [
        ([b"HTTP/1.1 429 Too Many\r\nContent-Length: 4\r\n\r\nfull"], "status 429: full"),
        ([HEAD + chunk(WHOLE[0]) + chunk(WHOLE[3]) + b"0\r\n\r\n"], "1 tokens of 3"),
        ([HEAD + chunk(WHOLE[0]) + b"0\r\n\r\n"], "before its end mark"),
        ([HEAD + chunk(b'data: {"error": {"message": "lost"}}\n\n') + chunk(WHOLE[3]) + b"0\r\n\r\n"], "lost"),
        ([HEAD + chunk(b"data: nonsense\n\n")], "unreadable"),
        ([b"nonsense\r\n\r\n"], "unreadable"),
        ([HEAD + chunk(WHOLE[0])], "connection lost"),
    ],
)
async def test_anything_less_than_the_whole_answer_is_a_failure(pieces: list[bytes], reason: str) -> None:
    server = Server(pieces)
    server.hang_up = True
    async with talking_to(server) as client:
        failure = (await client.complete(ask(), "r")).failure(ask())
    assert failure is not None
    assert reason in failure


async def test_silence_ends_in_a_failure() -> None:
    async with talking_to(Server([HEAD]), timeout_s=0.1) as client:
        answer = await client.complete(ask(), "r")
    assert answer.error is not None
    assert "within 0.1 s" in answer.error


async def test_nobody_there() -> None:
    client = Client("http://127.0.0.1:1", timeout_s=1.0)
    assert "cannot be reached" in str((await client.complete(ask(), "r")).error)
    with pytest.raises(ClientError, match="is needed"):
        Client("here", timeout_s=1.0)


async def test_latency_counts_from_the_intended_time() -> None:
    """A client that is blocked for a while must not make the cluster look better."""
    server = Server([HEAD + b"".join(chunk(each) for each in WHOLE) + b"0\r\n\r\n"])
    blocked: list[float] = []

    def block() -> None:
        """Once, right after the first answer: the second request is then sent late."""
        if not blocked:
            loop = asyncio.get_running_loop()
            blocked.append(loop.time())
            while loop.time() < blocked[0] + 0.3:
                pass

    async with talking_to(server) as client:
        schedule = Schedule((Arrival(0.0, ask()), Arrival(0.1, ask())))
        measured = await run_open_loop(client, schedule, block)
    assert measured.failures == []
    late = measured.samples[1].sent_s - measured.samples[1].intended_s
    assert late > 0.1
    assert measured.samples[1].ttft_s >= late
    assert measured.late_s_p99 == pytest.approx(late, rel=0.1)
