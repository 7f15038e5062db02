"""The benchmark of the control plane: its clients believe nothing, and a small run of it is real."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import msgspec
import pytest

from common.runtime import subjects
from common.runtime.bus_memory import MemoryBroker, MemoryBus
from common.runtime.store_memory import MemoryStore
from common.runtime.virtual_time import virtual
from common.settings_loader import SettingsError, load
from loadtest import __main__ as command
from loadtest import control
from loadtest.control import TARGETS, Bench, ControlOptions
from loadtest.control_client import HttpDoor, NatsDoor, Question, Stream, make_questions
from loadtest.control_cluster import Cluster, Sizes
from loadtest.control_workers import ControlWorkersSettings, make_workers
from loadtest.report import progress
from loadtest.runner import MeasurementFailed
from services.engine.timed_language import TimedShape, expected_tokens
from tests.services.router_world import ids_of, tiny_text

QUESTION = Question(b'{"prompt": "x"}', "Paris", (7, 8))
END = b"data: [DONE]\n\n"
HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(text: str, finish: str | None = None) -> bytes:
    return b"data: " + msgspec.json.encode({"choices": [{"text": text, "finish_reason": finish}]}) + b"\n\n"


def stream_of(*parts: bytes) -> bytes:
    return HEAD + b"".join(map(chunk, parts)) + chunk(b"")


@asynccontextmanager
async def http_door(answer: bytes, *, hang_up: bool = False):
    """A door to a server that answers everything with the same bytes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(len(QUESTION.body))
                for at in range(0, len(answer), 7):  # torn apart anywhere
                    writer.write(answer[at : at + 7])
                    await writer.drain()
                if hang_up:
                    return
        except asyncio.IncompleteReadError:
            return
        finally:
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        door = HttpDoor([f"http://127.0.0.1:{port}"], timeout_s=5.0)
        yield door
        await door.close()


async def test_a_whole_stream_is_one_whose_every_token_is_right():
    whole = stream_of(event("Pa"), event("ri") + event("s", "length"), END)
    async with http_door(whole) as door:
        for _ in range(3):
            stream = await door.ask(QUESTION)
            assert stream.failure is None
            assert stream.sent_s <= stream.first_s <= stream.last_s
        assert len(door._idle[0]) == 1, "one connection, kept open"


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        (stream_of(event("Pa"), event("s", "length"), END), "another answer"),
        (stream_of(event("Paris", "stop"), END), "another answer"),
        (stream_of(event("Paris", "length")), "another answer"),
        (stream_of(b'data: {"error": {"code": "interrupted"}}\n\n', END), "interrupted"),
        (stream_of(b"data: nonsense\n\n", END), "unreadable"),
        (b"HTTP/1.1 429 Busy\r\nContent-Length: 5\r\n\r\nlater", "status 429: later"),
        (b"SMTP\r\n\r\n", "unreadable"),
    ],
)
async def test_a_stream_that_is_not_whole_says_why(answer: bytes, failure: str):
    async with http_door(answer) as door:
        stream = await door.ask(QUESTION)
        assert failure in (stream.failure or "")


async def test_a_lost_connection_and_nobody_there_are_failures_of_their_streams():
    async with http_door(stream_of(event("Paris", "length"))[:-5], hang_up=True) as door:
        assert "connection lost" in ((await door.ask(QUESTION)).failure or "")
    assert "cannot be reached" in ((await door.ask(QUESTION)).failure or "")


@virtual
async def test_over_nats_ids_are_compared_and_silence_is_a_failure():
    broker = MemoryBroker()
    server, client = MemoryBus(broker, "router"), MemoryBus(broker, "client")
    answers = [
        [{"token_ids": [7]}, {"token_ids": [8], "finish_reason": "length"}, {"done": True}],
        [{"token_ids": [7, 8], "finish_reason": "length", "done": True}],
        [{"token_ids": [7, 9], "finish_reason": "length"}, {"done": True}],
        [{"error": {"code": "busy"}, "done": True}],
        [{"token_ids": [7]}],
    ]

    async def answer(delivery):
        for part in answers.pop(0):
            await server.publish(delivery.reply, msgspec.json.encode(part))

    await server.subscribe(subjects.GENERATE, answer)
    door = NatsDoor(client, timeout_s=5.0)
    await door.listen()
    failures = [(await door.ask(QUESTION)).failure for _ in range(5)]
    assert failures[:2] == [None, None]
    for failure, expected in zip(
        failures[2:], ("another answer than expected", "busy", "no whole answer"), strict=True
    ):
        assert expected in (failure or "")
    assert not door._streams
    await door.close()


def test_questions_come_with_the_answers_of_the_timed_engine():
    first, again = (make_questions(tiny_text(), 16, seed=3, count=4) for _ in range(2))
    assert first == again
    assert len({question.body for question in first}) == 4
    for question in first:
        body = msgspec.json.decode(question.body)
        assert body["max_tokens"] == len(question.token_ids) == 16
        ids = ids_of(body["prompt"])
        assert list(question.token_ids) == expected_tokens(
            ids, 16, TimedShape().vocab, tiny_text().facts.stop_token_ids
        )


class FakeDoor:
    """Answers after a tenth of a second; the answer number `fails_at` is none."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.asked = self.at_once = self.at_once_max = 0
        self.fails_at = fails_at

    async def ask(self, question: Question) -> Stream:
        loop = asyncio.get_running_loop()
        self.asked += 1
        stream = Stream(question, loop.time(), loop.create_future())
        stream.failure = "broken" if self.asked == self.fails_at else None
        self.at_once += 1
        self.at_once_max = max(self.at_once, self.at_once_max)
        await asyncio.sleep(0.1)
        self.at_once -= 1
        stream.first_s, stream.last_s = loop.time() - 0.05, loop.time()
        return stream

    async def close(self) -> None: ...


def bench(door: FakeDoor, **options) -> Bench:
    with progress() as bars:
        return Bench(ControlOptions(**options), Cluster((), "", {}), door, [QUESTION], bars)


@virtual
async def test_the_search_ends_where_more_clients_bring_nothing_and_the_open_loop_takes_half():
    door = FakeDoor()
    figures, _ = await bench(door, seconds=4.0, levels=(4, 8, 8, 8, 16), streams=20).measure("http")
    assert figures["levels"] == {name: pytest.approx(10 * int(name), rel=0.05) for name in ("4", "8", "20")}
    assert figures["clients"] == 20, "the streams are a level, too"
    assert figures["tokens_per_s"] == 16 * figures["requests_per_s"]
    assert figures["open_loop"]["requests_per_s"] == figures["levels"]["8"] / 2
    assert figures["open_loop"]["requests"] == pytest.approx(160, rel=0.25)
    assert figures["added_ms"]["p50"] == pytest.approx(100, rel=0.02)
    assert figures["added_first_ms"]["p50"] == pytest.approx(50, rel=0.02)
    assert figures["streams"]["lost"] == 0
    assert door.at_once_max == 20


@virtual
async def test_the_open_loop_takes_no_more_than_half_of_what_was_promised():
    figures, _ = await bench(FakeDoor(), seconds=2.0, levels=(40,), streams=2).measure("http")
    assert figures["levels"]["40"] == pytest.approx(400, rel=0.05)
    assert figures["open_loop"]["requests_per_s"] == TARGETS["http"] / 2


@virtual
async def test_one_stream_that_is_not_whole_and_there_is_no_figure():
    with pytest.raises(MeasurementFailed, match="not whole: broken"):
        await bench(FakeDoor(fails_at=30)).closed_loop(4, 2.0)


def test_workers_are_those_that_serve_and_forget_what_they_computed():
    settings = load(ControlWorkersSettings, ["--prefill", "3", "--decode", "2", "--rows", "5"], {})
    workers = make_workers(settings, MemoryBus(MemoryBroker(), "workers"), MemoryStore())
    assert [worker.worker_id for worker in workers] == ["prefill-0", "prefill-1", "prefill-2", "decode-0", "decode-1"]
    assert workers[-1].core.config.rows_max == 5
    with pytest.raises(SettingsError):
        load(ControlWorkersSettings, ["--prefill", "0"], {})


@pytest.mark.parametrize("flags", [["--levels", "0"], ["--levels", "1,x"], ["--seconds", "0"], ["--transport", "smtp"]])
def test_bad_flags_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as error:
        command.parse(["control", *flags])
    assert error.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_a_small_run_on_real_processes(tmp_path, capsys):
    """One router, a scheduler, eight workers: every token of every stream is right, and the report is whole."""
    options = ControlOptions(streams=32, seconds=0.6, levels=(4,), sizes=Sizes(prefill=6, decode=2, rows=16))
    figures = control.run(options)
    for transport in ("http", "nats"):
        assert figures[transport]["requests_per_s"] > 0
        assert figures[transport]["streams"]["lost"] == 0
        assert {"scheduler", "workers", "router-0"} <= figures["rss_mb"][transport].keys()
        assert set(figures[transport]["added_ms"]) == {"p50", "p99"}
        costs = figures[transport]["cpu_ms_per_request"]
        assert {"scheduler", "workers", "router-0", "nats-server", "redis-server", "client"} == costs.keys()
    control.show(figures)
    shown = capsys.readouterr().out
    assert "over HTTP" in shown
    assert "over NATS" in shown
