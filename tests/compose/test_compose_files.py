"""The compose files say what they should: every service is watched, bounded and kept from what it does not need, and
every setting reaches the roles. What runs is proved by `make compose-test`."""

from __future__ import annotations

import os
import re
import subprocess
import time
from functools import cache
from typing import Any

import pytest
import yaml

from common.settings import (
    CommonSettings,
    CoordinatorSettings,
    DecodeWorkerSettings,
    PrefillWorkerSettings,
    RouterSettings,
    SchedulerSettings,
    WorkerSettings,
)
from common.settings_loader import PREFIX, load, refuse_unknown_variables, settings_of
from tests.compose.engine import FOLDER, ROOT

ROLES: dict[str, type[CommonSettings]] = {
    "router": RouterSettings,
    "scheduler": SchedulerSettings,
    "sp-coordinator": CoordinatorSettings,
    "prefill-worker": PrefillWorkerSettings,
    "decode-worker": DecodeWorkerSettings,
    "timed-prefill-worker": PrefillWorkerSettings,
    "timed-decode-worker": DecodeWorkerSettings,
}
METRICS_PORT = 9100
ONE_SHOT = {"model"}
WITHOUT_PRIVATE_NETWORK = {"model", "prometheus", "grafana"}
"""Services that compose.host.yaml leaves as they are."""
NOT_PASSED_ON = {
    "PECSCHED_HOST": "where this machine is listened on; a container listens everywhere",
    "PECSCHED_PORT": "the same",
    "PECSCHED_REUSE_PORT": "between containers nobody shares a port",
    "PECSCHED_JOURNAL": "a file in a container that cannot be written",
    "PECSCHED_WORKER_ID": "the same for all of them",
    "PECSCHED_REPLICA": "the same for all of them",
    "PECSCHED_DATA_PORT": "any free one does in a container, and on the host no two workers can have the same",
}


class Loader(yaml.SafeLoader):
    """Knows compose's own tag: `!reset` takes away what the file below has."""


Loader.add_constructor("!reset", lambda loader, node: None)


@cache
def parsed(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.load((FOLDER / name).read_text(), Loader)
    return found


@cache
def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = parsed("compose.yaml")["services"]
    return found


def filled_in(text: str, variables: dict[str, str]) -> str:
    """As compose does: `${NAME:-default}`."""
    return re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", lambda m: variables.get(m[1]) or m[2] or "", text)


def environment(service: dict[str, Any], variables: dict[str, str]) -> dict[str, str]:
    """What the container gets when `variables` are set in the shell."""
    named = {name: variables.get(name) if value is None else value for name, value in service["environment"].items()}
    return {name: filled_in(value, variables) for name, value in named.items() if value is not None}


every_service = pytest.mark.parametrize("name", sorted(services()))
every_role = pytest.mark.parametrize("name", sorted(ROLES))


@every_service
def test_it_is_watched_started_again_and_bounded(name: str) -> None:
    service = services()[name]
    limits = service["deploy"]["resources"]["limits"]
    assert set(limits) == {"cpus", "memory", "pids"}
    if name in ONE_SHOT:
        assert service["restart"].startswith("on-failure:")
        return
    assert service["restart"] == "unless-stopped"
    assert {"test", "interval", "timeout", "retries"} <= set(service["healthcheck"])


@every_service
def test_it_can_do_no_more_than_it_must(name: str) -> None:
    service = services()[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "network_mode", "pid", "cap_add", "devices"} & set(service)
    assert service["logging"]["options"]["max-size"], "logs are bounded"
    if not service["image"].startswith("pecsched-"):  # those have a user of their own
        assert str(service["user"]) not in ("root", "0", "0:0")


@every_service
def test_its_image_is_pinned_or_built_here(name: str) -> None:
    image = services()[name]["image"]
    builders = {each["image"]: each["build"] for each in services().values() if "build" in each}
    if image in builders:
        assert builders[image]["target"] == image.removeprefix("pecsched-")
    else:
        assert re.search(r":v?\d", image), f"{image} has no version"


def test_the_dockerfile_pins_its_base_and_runs_as_nobody_in_particular() -> None:
    lines = (FOLDER / "Dockerfile").read_text().splitlines()
    stages = [line.split() for line in lines if line.startswith("FROM ")]
    bases = {stage[1] for stage in stages} - {stage[3] for stage in stages}
    assert bases == {"python:3.11-slim-bookworm"}
    assert sum(line.startswith("USER 10001") for line in lines) == sum(
        stage[3] in ("control", "worker", "load") for stage in stages
    )
    installs = " ".join(lines).replace("\\", "")
    assert installs.count("pip install") == installs.count("-c constraints.txt") + installs.count(
        "install -q --no-deps"
    )


@every_service
def test_who_starts_after_whom(name: str) -> None:
    service = services()[name]
    for before, how in service.get("depends_on", {}).items():
        wanted = "service_completed_successfully" if before in ONE_SHOT else "service_healthy"
        assert how["condition"] == wanted
        assert "profiles" not in services()[before] or service["profiles"] == services()[before]["profiles"]
    if name in ROLES:
        assert {"nats", "redis"} <= set(service["depends_on"])


def test_published_ports_can_be_changed_and_are_this_machines_own() -> None:
    for name, service in services().items():
        for port in service.get("ports", ()):
            assert re.match(r"127\.0\.0\.1|\$\{PECSCHED_HOST:-127\.0\.0\.1\}", port), f"{name}: {port}"
            assert re.search(r":\$\{[A-Z_]+PORT:-\d+\}:\d+$", port), f"{name}: {port}"


# --- settings -------------------------------------------------------------------------------------


@every_role
def test_the_environment_is_one_that_the_role_takes(name: str) -> None:
    settings = load(ROLES[name], [], environment(services()[name], {}))
    assert (settings.nats_url, settings.redis_url) == ("nats://nats:4222", "redis://redis:6379/0")
    assert settings.alive_file == "/tmp/alive"
    if isinstance(settings, WorkerSettings | RouterSettings):
        assert settings.drain_s < float(services()[name]["stop_grace_period"].removesuffix("s"))
    if isinstance(settings, WorkerSettings):
        assert settings.data_host == "auto"
        assert settings.data_secret
        assert settings.engine == ("timed" if name.startswith("timed") else "torch")
    if isinstance(settings, RouterSettings):
        assert (settings.host, settings.port) == ("0.0.0.0", 8000)
    else:
        assert (settings.metrics_host, settings.metrics_port) == ("0.0.0.0", METRICS_PORT)


def test_prometheus_finds_every_role_where_it_answers() -> None:
    found = {}
    for job in yaml.safe_load((FOLDER / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]:
        (names,) = job["dns_sd_configs"]
        found |= dict.fromkeys(names["names"], names["port"])
    assert found == {name: 8000 if ROLES[name] is RouterSettings else METRICS_PORT for name in ROLES}


def test_every_setting_of_a_role_is_passed_on() -> None:
    """One that is set and has no effect would be worse than none. A new setting wants a line in `x-settings`."""
    known = {setting.variable for cls in set(ROLES.values()) for setting in settings_of(cls)}
    passed = {name for name in parsed("compose.yaml")["x-settings"] if name.startswith(PREFIX)}
    assert known - NOT_PASSED_ON.keys() == passed


def test_a_setting_in_the_shell_reaches_its_role() -> None:
    shell = {"PECSCHED_POLICY": "fifo", "PECSCHED_DRAIN_S": "7", "PECSCHED_DATA_SECRET": "s"}
    scheduler = load(SchedulerSettings, [], environment(services()["scheduler"], shell))
    worker = load(DecodeWorkerSettings, [], environment(services()["decode-worker"], shell))
    assert (scheduler.policy, worker.drain_s, worker.data_secret) == ("fifo", 7.0, "s")


@pytest.mark.parametrize("file", ["compose.yaml", "compose.host.yaml", "compose.gpu.yaml"])
def test_no_file_names_a_setting_that_does_not_exist(file: str) -> None:
    named = set(re.findall(r"PECSCHED_[A-Z_]+", (FOLDER / file).read_text()))
    assert named
    refuse_unknown_variables(dict.fromkeys(named, ""))


# --- on the host's network ------------------------------------------------------------------------


def test_on_the_host_everything_is_on_the_loopback() -> None:
    over = parsed("compose.host.yaml")["services"]
    assert set(over) == set(services()) - WITHOUT_PRIVATE_NETWORK
    for name, service in over.items():
        assert service["network_mode"] == "host"
        assert ("ports" in service) == ("ports" in services()[name]), f"{name}: ports mean nothing there"
        text = filled_in(yaml.safe_dump(service), {})
        assert "0.0.0.0" not in text
        assert "nats://127.0.0.1" in text or name in ("nats", "redis")


@every_role
def test_on_the_host_the_environment_is_one_that_the_role_takes(name: str) -> None:
    over = parsed("compose.host.yaml")["services"][name]["environment"]
    both = {"environment": services()[name]["environment"] | over}
    settings = load(ROLES[name], [], environment(both, {"PECSCHED_PORT": "9000", "NATS_PORT": "4333"}))
    assert settings.nats_url == "nats://127.0.0.1:4333"
    if isinstance(settings, RouterSettings):
        assert (settings.host, settings.port, settings.reuse_port) == ("127.0.0.1", 9000, True)
    else:
        assert settings.metrics_port == 0, "of several processes on one network only one could have it"


def test_on_gpus_workers_have_one_and_know_it() -> None:
    for service in parsed("compose.gpu.yaml")["services"].values():
        assert service["environment"] == {"PECSCHED_DEVICE": "cuda"}
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])


# --- the sign of life -----------------------------------------------------------------------------


@pytest.mark.parametrize(("age_s", "well"), [(0.0, True), (3.0, True), (60.0, False), (None, False)])
def test_the_health_check_looks_at_the_age_of_the_sign_of_life(tmp_path: Any, age_s: float | None, well: bool) -> None:
    shell, command = services()["scheduler"]["healthcheck"]["test"]
    assert shell == "CMD-SHELL"
    file = tmp_path / "alive"
    if age_s is not None:
        file.touch()
        os.utime(file, (time.time() - age_s,) * 2)
    command = command.replace("$$", "$").replace("/tmp/alive", str(file))
    assert (subprocess.run(["/bin/sh", "-c", command], capture_output=True).returncode == 0) is well
    assert 2 * CommonSettings().heartbeat_s < 10, "and is patient enough for the heartbeat"


def test_the_build_takes_the_packages_and_nothing_else() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split("\n")
    assert "*" in ignored
    taken = {line[1:] for line in ignored if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (FOLDER / "Dockerfile").read_text(), re.MULTILINE)
    assert taken == {name for line in copied for name in line.split()}
    assert all((ROOT / name).exists() for name in taken)
    assert "**/_compiled*" in ignored, "cores compiled on this machine are for its Python and its C library"


def test_settings_of_compose_itself_are_not_taken_for_settings_of_a_role() -> None:
    """They may stand in the same .env: only what begins with the prefix may be a setting, and is checked."""
    for cls in set(ROLES.values()):
        assert load(cls, [], {"NATS_PORT": "1", "WORKER_CPUS": "2", "MODELS": "/m"}) == cls()
