"""`GET /metrics` of a role without an HTTP door: answers scrapes, bounds everything else."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import httpx
import pytest

from common.errors import StartupError
from common.metrics import CONTENT_TYPE, WAITING, Metrics
from common.runtime import exporter
from common.runtime.exporter import ScrapeAddress, exporting
from services.embedded import free_port
from services.ports import ReservedPorts
from tests.exposition import Scrape

HOST = "127.0.0.1"


def somewhere() -> ScrapeAddress:
    return ScrapeAddress(HOST, free_port())


async def get(at: ScrapeAddress, path: str = "/metrics", method: str = "GET") -> httpx.Response:
    async with httpx.AsyncClient(trust_env=False, timeout=10.0) as http:
        return await http.request(method, f"http://{at.host}:{at.port}{path}")


async def test_a_scrape_is_answered_in_prometheus_format() -> None:
    metrics, at = Metrics("scheduler", "s"), somewhere()
    async with exporting(metrics, at):
        response = await get(at)
        assert (response.status_code, response.headers["content-type"]) == (200, CONTENT_TYPE)
        assert Scrape(response.text).sum_of("pecsched_role_info", role="scheduler", name="s") == 1.0
        assert (await get(at, "/metrics?name=x")).status_code == 200
        head = await get(at, method="HEAD")
        assert (head.status_code, head.text) == (200, "")
    with pytest.raises(httpx.ConnectError):
        await get(at)


@pytest.mark.parametrize(("path", "method", "status"), [("/", "GET", 404), ("/metrics", "POST", 405)])
async def test_anything_else_is_told_where_to_look(path: str, method: str, status: int) -> None:
    at = somewhere()
    async with exporting(Metrics("scheduler"), at):
        response = await get(at, path, method)
    assert response.status_code == status
    assert "/metrics" in response.text


@pytest.mark.parametrize("sent", [b"nonsense\r\n\r\n", b"GET /metrics\r\n\r\n", b"\x16\x03\x01\r\n\r\n"])
async def test_what_is_not_http_is_refused(sent: bytes) -> None:
    at = somewhere()
    async with exporting(Metrics("scheduler"), at):
        reader, writer = await asyncio.open_connection(at.host, at.port)
        writer.write(sent)
        assert (await reader.read()).startswith(b"HTTP/1.1 400")
        writer.close()


async def test_who_sends_too_much_or_nothing_is_cut_off_and_others_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "REQUEST_S", 0.2)
    at = somewhere()
    async with exporting(Metrics("scheduler"), at):
        silent = await asyncio.open_connection(at.host, at.port)
        endless = await asyncio.open_connection(at.host, at.port)
        endless[1].write(b"GET /metrics HTTP/1.1\r\n" + b"X-Padding: x\r\n" * 4_000)
        assert (await get(at)).status_code == 200
        async with asyncio.timeout(10.0):
            for reader, writer in (silent, endless):
                with contextlib.suppress(ConnectionResetError):  # what it had sent was not read
                    assert await reader.read() == b""
                writer.close()


async def test_more_connections_than_the_bound_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "CONNECTIONS_MAX", 2)
    at = somewhere()
    async with exporting(Metrics("scheduler"), at):
        held = [await asyncio.open_connection(at.host, at.port) for _ in range(3)]
        async with asyncio.timeout(10.0):
            assert await held[2][0].read() == b""
        for _, writer in held:
            writer.close()


async def test_the_end_of_the_role_does_not_wait_for_a_scraper() -> None:
    at = somewhere()
    async with asyncio.timeout(exporter.REQUEST_S / 2):
        async with exporting(Metrics("scheduler"), at):
            _, writer = await asyncio.open_connection(at.host, at.port)
            assert (await get(at)).status_code == 200
        writer.close()


async def test_a_metric_that_cannot_be_read_is_a_500_and_not_the_end() -> None:
    metrics, at = Metrics("scheduler"), somewhere()
    metrics.read(WAITING, lambda: {(): 1 / 0})
    async with exporting(metrics, at):
        assert (await get(at)).status_code == 500
        metrics.read(WAITING, dict)
        assert (await get(at)).status_code == 200


async def test_a_port_that_is_taken_is_one_line_that_says_what_to_do() -> None:
    with socket.create_server((HOST, 0)) as other:
        at = ScrapeAddress(HOST, other.getsockname()[1])
        with pytest.raises(StartupError, match=r"cannot listen on 127.0.0.1:\d+ for metrics: .*--metrics-port"):
            async with exporting(Metrics("scheduler"), at):
                pass


async def test_port_0_is_no_metrics() -> None:
    async with exporting(Metrics("scheduler"), ScrapeAddress("no.such.host.invalid", 0)):
        pass


async def test_reserved_ports_are_for_the_roles_alone() -> None:
    reserved = ReservedPorts(HOST, 3)
    try:
        assert len(set(reserved.ports)) == 3
        with socket.socket() as other, pytest.raises(OSError):
            other.bind((HOST, reserved.ports[0]))
        reserved.before_roles_start()
        for _ in range(2):  # a role that is started again too
            async with exporting(Metrics("scheduler"), at := ScrapeAddress(HOST, reserved.ports[0])):
                assert (await get(at)).status_code == 200
                with pytest.raises(StartupError, match=f"{HOST}:{at.port} for metrics: .*--metrics-port"):
                    ReservedPorts(HOST, 2, first=at.port - 1)
    finally:
        reserved.close()


def two_in_a_row(tries: int = 10) -> tuple[int, ...]:
    """The port after a free one may be another test's."""
    first = free_port()
    try:
        reserved = ReservedPorts(HOST, 2, first=first)
    except StartupError:
        if tries == 1:
            raise
        return two_in_a_row(tries - 1)
    reserved.close()
    assert reserved.ports[0] == first
    return reserved.ports


def test_ports_that_are_asked_for_follow_one_another() -> None:
    ports = two_in_a_row()
    assert ports[1] == ports[0] + 1
    with pytest.raises(StartupError, match="up to 65536"):
        ReservedPorts(HOST, 2, first=65_535)
    with pytest.raises(StartupError, match="for metrics"):
        ReservedPorts("no.such.host.invalid", 1)
