"""The servers that come from wheels."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.errors import StartupError
from common.runtime.bus import BusError
from common.runtime.bus_nats import connect_nats
from common.runtime.store import Put
from common.runtime.store_redis import connect_redis
from services.embedded import EmbeddedServer, nats_server_path, redis_server_path


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_binaries_are_found() -> None:
    assert os.access(nats_server_path(), os.X_OK)
    assert os.access(redis_server_path(), os.X_OK)


async def test_a_server_ends_with_its_block() -> None:
    async with EmbeddedServer.nats() as server:
        pid = server.pid
        assert pid is not None
        assert alive(pid)
    assert not alive(pid)
    assert server.pid is None


async def test_redis_keeps_its_data_over_a_crash_and_a_restart(tmp_path: Path) -> None:
    async with EmbeddedServer.redis(folder=tmp_path / "data") as server:
        store = await connect_redis(server.url)
        await store.commit([Put("k", b"v")])
        await server.stop()
        await server.start()
        assert await store.get("k") == b"v"
        await store.close()
    assert (tmp_path / "data").is_dir()


async def test_a_killed_server_can_be_started_again_on_its_port() -> None:
    async with EmbeddedServer.nats() as server:
        first = server.pid
        await server.kill()
        assert await server.wait() != 0
        await server.start()
        assert server.pid not in (None, first)
        await (await connect_nats(server.url, "test")).close()


async def test_a_taken_port_is_named() -> None:
    async with EmbeddedServer.nats() as first:
        second = EmbeddedServer.nats(port=first.port)
        with pytest.raises(StartupError, match=f"port {first.port} is taken"):
            await second.start()
        assert second.pid is None


async def test_a_server_that_cannot_start_says_why() -> None:
    server = EmbeddedServer.nats(max_payload=100_000_000)
    with pytest.raises(StartupError, match=r"nats-server ended with status 1: .*max_payload") as error:
        async with server:
            pass
    assert "\n" not in str(error.value)


async def test_the_payload_limit_is_the_servers() -> None:
    async with EmbeddedServer.nats(max_payload=1_000) as server:
        bus = await connect_nats(server.url, "test")
        assert bus.max_payload == 1_000
        with pytest.raises(BusError, match="at most 1000"):
            await bus.publish("a", bytes(1_001))
        await bus.close()


@pytest.mark.skipif(sys.platform != "linux", reason="SCHED_BATCH and /proc are Linux's")
def test_nats_yields_to_its_clients_whoever_starts_it(tmp_path: Path) -> None:
    """`command_line` is what other supervisors run, so what it sets is in the command."""
    with subprocess.Popen(EmbeddedServer.nats().command_line(tmp_path), stderr=subprocess.DEVNULL) as process:
        about = Path(f"/proc/{process.pid}")
        try:
            give_up_s = time.monotonic() + 20
            while (about / "comm").read_text().strip() != "nats-server" and time.monotonic() < give_up_s:
                time.sleep(0.02)
            assert os.sched_getscheduler(process.pid) == os.SCHED_BATCH
            variables = (about / "environ").read_bytes().split(b"\0")
            assert f"GOMAXPROCS={os.environ.get('GOMAXPROCS', '1')}".encode() in variables
        finally:
            process.kill()
