"""What `make compose-test` says and counts, without an engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from services.embedded import free_port
from tests.compose import engine, prove
from tests.compose.engine import NoEngine, Project, free_ports
from tests.compose.load import Load

WHOLE = [{"choices": [{"text": "a", "finish_reason": None}]}, {"choices": [{"text": "b", "finish_reason": "length"}]}]


def write_docker(folder: Path, script: str) -> None:
    """A docker command that does what the script says."""
    command = folder / "docker"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (None, "there is no docker command: install"),
        ("echo 'Cannot connect to the Docker daemon' >&2; exit 1", "no Docker engine answers: Cannot connect"),
        ("test $1 = version && echo 25.0 || exit 1", "docker has no compose command"),
        ("test $1 = version && echo 25.0 || echo 2.3.1", "Compose 2.3.1 is too old: 2.24"),
    ],
)
def test_what_is_missing_is_said_in_one_line(
    script: str | None,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if script is not None:
        write_docker(tmp_path, script)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert prove.main([]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"compose-test: {said}")
    assert err.count("\n") == 1


def test_an_engine_that_will_do_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_docker(tmp_path, "test $1 = version && echo 27.1 || echo v2.40.3")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert engine.require_engine() == "Docker Engine 27.1, Compose v2.40.3"


def test_a_command_that_fails_says_which_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_docker(tmp_path, "echo pulling; echo 'port is already allocated' >&2; echo; exit 3")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(engine.DockerFailed, match=r"docker compose .* up: port is already allocated"):
        Project("p", {}, on_host=False).compose("up")


def test_ports_in_a_row_are_free() -> None:
    first = free_ports(3)
    assert free_ports(3) == first
    assert 0 < first < 32_000
    with pytest.raises(NoEngine, match="in a row"):
        free_ports(20_000)


# --- the load -------------------------------------------------------------------------------------


@asynccontextmanager
async def router(events: Sequence[object], *, status: int = 200, leaves: bool = False) -> AsyncIterator[str]:
    """Answers every question with this stream; its address."""
    stream = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    close = "Connection: close\r\n" if leaves else ""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                if "content-length: " in head:
                    await reader.readexactly(int(head.partition("content-length: ")[2].split("\r")[0]))
                code, body = (200, "{}") if head.startswith("get /live") else (status, stream)
                writer.write(f"HTTP/1.1 {code} X\r\nContent-Length: {len(body)}\r\n{close}\r\n{body}".encode())
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def tally_of(urls: Sequence[str]) -> tuple[dict[str, int], list[str]]:
    """What a load counts at these addresses until each kind has something to tell."""
    load = Load(urls, "nats://nowhere")
    async with asyncio.timeout(20), load.running(over_nats=False) as tally:
        while True:
            await asyncio.sleep(0.01)
            if tally.failed or {"short", "long"} <= tally.whole.keys():
                break
    return dict(load.tally.whole), load.tally.failed


async def test_whole_answers_are_counted_by_kind() -> None:
    async with router(WHOLE) as url:
        whole, failed = await tally_of([url])
    assert min(whole["short"], whole["long"]) >= 1
    assert failed == []


async def test_who_is_refused_goes_to_the_next_router() -> None:
    async with router(WHOLE) as url, router([], leaves=True) as leaving:
        whole, failed = await tally_of([f"http://127.0.0.1:{free_port()}", leaving, url])
    assert whole["short"] >= 1
    assert failed == []


async def test_when_all_refuse_the_request_has_failed() -> None:
    whole, failed = await tally_of([f"http://127.0.0.1:{free_port()}"])
    assert whole == {}
    assert all("no router takes requests" in each for each in failed)


@pytest.mark.parametrize(
    ("events", "status", "why"),
    [
        (WHOLE[:1], 200, "the stream ended with None"),
        ([{"error": {"message": "a rank was lost"}}], 200, "a rank was lost"),
        (WHOLE, 503, "HTTP 503"),
        ([{"choices": [{"text": "", "finish_reason": "stop"}]}], 200, "ended with stop"),
    ],
)
async def test_an_answer_that_is_not_whole_has_failed(events: list[object], status: int, why: str) -> None:
    async with router(events, status=status) as url:
        whole, failed = await tally_of([url])
    assert whole == {}
    assert all(why in each for each in failed)
