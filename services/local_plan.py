"""What `pecsched serve` runs: which roles, under which names, with which settings. Starts nothing."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.messages.base import Record
from common.runtime.cores import usable_cores
from common.settings import (
    CoordinatorSettings,
    DecodeWorkerSettings,
    PrefillWorkerSettings,
    RouterSettings,
    SchedulerSettings,
    ServeSettings,
)
from common.settings_loader import SettingsError, environment, load
from services.children import ChildSpec


@dataclass(frozen=True, slots=True)
class Role:
    """One process: the command of `pecsched` it runs, and where its settings differ from serve's own."""

    name: str
    command: str
    settings: type[Record]
    instead: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Plan:
    """All role processes, and the order in which they are drained."""

    scheduler: Role
    coordinator: Role
    workers: tuple[Role, ...]
    router: Role

    @property
    def roles(self) -> tuple[Role, ...]:
        """In the order of their start: who is to be found first."""
        return (self.scheduler, self.coordinator, *self.workers, self.router)

    @property
    def metrics_ports(self) -> dict[str, int]:
        """Of the roles that have one of their own; the router answers at its HTTP port."""
        ports = {role.name: role.instead.get("metrics_port") for role in self.roles}
        return {name: port for name, port in ports.items() if isinstance(port, int) and port}

    @property
    def drain_order(self) -> tuple[tuple[str, ...], ...]:
        """The door first, so that nothing new comes in; what still runs needs all the others."""
        workers = tuple(worker.name for worker in self.workers)
        return ((self.router.name,), workers, (self.coordinator.name,), (self.scheduler.name,))


def make_plan(settings: ServeSettings, port: int, metrics_ports: Sequence[int] = ()) -> Plan:
    """The roles of one machine; `port` is the router's, already found free, `metrics_ports` those of the others in the
    order of their start (none: no metrics of theirs). Raises: SettingsError."""
    nodes = node_names(settings)
    per_node = workers_per_node(settings)
    threads = settings.threads or threads_per_worker(len(nodes) * per_node + settings.decode_workers, usable_cores())
    shared: dict[str, object] = {"threads": threads, "data_secret": secrets.token_hex(16)}
    scrapes = iter(metrics_ports)

    def measured(**instead: object) -> dict[str, object]:
        return {**instead, "metrics_port": next(scrapes, 0)}

    def worker(kind: str, number: int, node: int, cls: type[Record]) -> Role:
        name = f"{kind}-{number}"
        return Role(name, f"{kind}-worker", cls, measured(**shared, worker_id=name, node=nodes[node]))

    return Plan(
        scheduler=Role("scheduler", "scheduler", SchedulerSettings, measured()),
        coordinator=Role("sp-coordinator", "sp-coordinator", CoordinatorSettings, measured()),
        workers=(
            *(
                worker("prefill", number, number // per_node, PrefillWorkerSettings)
                for number in range(len(nodes) * per_node)
            ),
            *(
                worker("decode", number, number % len(nodes), DecodeWorkerSettings)
                for number in range(settings.decode_workers)
            ),
        ),
        router=Role("router", "router", RouterSettings, {"port": port}),
    )


def measured_roles(settings: ServeSettings) -> int:
    """How many metrics ports they need. Raises: SettingsError."""
    return len(make_plan(settings, 0).roles) - 1


def node_names(settings: ServeSettings) -> tuple[str, ...]:
    """Raises: SettingsError."""
    if settings.nodes == 1:
        return (settings.node,)
    if settings.node != ServeSettings().node:
        raise SettingsError(f"--node {settings.node}: names one node, and --nodes asks for {settings.nodes}")
    return tuple(f"node-{number}" for number in range(settings.nodes))


def workers_per_node(settings: ServeSettings) -> int:
    """Prefill workers of each node. Raises: SettingsError."""
    if settings.tp != 1:
        raise SettingsError(
            f"--tp {settings.tp}: a live worker holds the whole model, so only --tp 1 works; groups split heads and "
            f"columns of a long among workers by themselves (--group-max), the simulator takes any --tp"
        )
    if settings.workers_per_node:
        return settings.workers_per_node
    per_node, left = divmod(settings.prefill_workers, settings.nodes)
    if left or not per_node:
        raise SettingsError(
            f"--nodes {settings.nodes}: {settings.prefill_workers} prefill workers cannot be shared out evenly; "
            f"say --workers-per-node"
        )
    return per_node


def role_environment(
    role: Role, settings: ServeSettings, env: Mapping[str, str], nats_url: str, redis_url: str
) -> dict[str, str]:
    """The environment of a role's process: serve's own, overlaid by serve's settings."""
    instead = {"nats_url": nats_url, "redis_url": redis_url, **role.instead}
    for name in ("journal", "alive_file"):
        if file := getattr(settings, name):
            instead[name] = f"{file}.{role.name}"
    overlay = environment(settings, role.settings, **instead)
    if "threads" in role.instead:
        overlay["OMP_NUM_THREADS"] = str(role.instead["threads"])
    return {**env, **overlay}


def check_roles(plan: Plan, settings: ServeSettings, env: Mapping[str, str]) -> None:
    """Raises: SettingsError, if a variable that serve passes on would be refused by a role."""
    for role in plan.roles:
        load(role.settings, [], role_environment(role, settings, env, "nats://", "redis://"))


def role_spec(
    role: Role, settings: ServeSettings, env: Mapping[str, str], nats_url: str, redis_url: str, log_dir: Path
) -> ChildSpec:
    """How to start the role. `-P`: a folder named `services` where the user stands is not ours."""
    return ChildSpec(
        name=role.name,
        command=(sys.executable, "-P", "-m", "services.cli", role.command),
        log=log_dir / f"{role.name}.log",
        env=role_environment(role, settings, env, nats_url, redis_url),
    )


def threads_per_worker(workers: int, cores: int) -> int:
    """The cores, shared out; at least one each (the system then shares them in time)."""
    return max(1, cores // workers)
