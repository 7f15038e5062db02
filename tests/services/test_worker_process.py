"""A worker as a process: the address at which its peers find it."""

from __future__ import annotations

import socket

import pytest

from common.errors import StartupError
from common.settings import PrefillWorkerSettings, WorkerSettings
from services.worker import process
from services.worker.process import data_host_of


def settings(data_host: str, nats_url: str = "nats://127.0.0.1:4222") -> WorkerSettings:
    return PrefillWorkerSettings(data_host=data_host, nats_url=nats_url)


def test_an_address_that_is_set_is_taken() -> None:
    assert data_host_of(settings("10.1.2.3")) == "10.1.2.3"
    assert data_host_of(PrefillWorkerSettings()) == "127.0.0.1", "who says nothing is reached by nobody else"


@pytest.mark.parametrize(
    "nats_url",
    [
        "nats://127.0.0.1:4222",
        "nats://user:password@127.0.0.1:4222",
        "nats://127.0.0.1",
        "nats://127.0.0.1:4222,nats://elsewhere:4222",
    ],
)
def test_auto_is_the_address_from_which_nats_is_reached(nats_url: str) -> None:
    assert data_host_of(settings("auto", nats_url)) == "127.0.0.1"


def test_auto_asks_the_system_for_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container the way to NATS begins at the container's own address, which no setting could name."""

    class Probe:
        def __init__(self, *kind: object) -> None:
            self.target: object = None

        def __enter__(self) -> Probe:
            return self

        def __exit__(self, *error: object) -> None:
            return

        def connect(self, target: object) -> None:
            self.target = target

        def getsockname(self) -> tuple[str, int]:
            return {("172.18.0.2", 4333): ("172.18.0.9", 50_000)}[self.target]  # type: ignore[index]

    def resolve(host: str, port: int, **kind: object) -> list[tuple[object, ...]]:
        assert (host, port) == ("nats", 4333)
        return [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("172.18.0.2", 4333))]

    monkeypatch.setattr(process.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(process.socket, "socket", Probe)
    assert data_host_of(settings("auto", "nats://nats:4333")) == "172.18.0.9"


@pytest.mark.parametrize("nats_url", ["nats://no-such-host.invalid:4222", "nats://127.0.0.1:none"])
def test_no_way_to_nats_is_one_clear_line(nats_url: str) -> None:
    with pytest.raises(StartupError, match=r"--data-host auto: no way .*pass this worker's address") as caught:
        data_host_of(settings("auto", nats_url))
    assert "\n" not in str(caught.value)
