"""Who is there: leases of workers, routers and the coordinator, and roles that nobody fills."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from common.policy.cluster import Cluster
from common.policy.scheduler_config import SchedulerConfig
from common.policy.timers import Timers
from common.units import CoordinatorId, RouterId, WorkerId

Role = Literal["prefill worker", "decode worker", "SP coordinator"]
_Lease = tuple[Literal["worker", "router", "coordinator"], str]


@dataclass(slots=True)
class Lost:
    """Whose lease ran out."""

    workers: list[WorkerId] = field(default_factory=list)
    routers: list[RouterId] = field(default_factory=list)
    coordinator: bool = False


class Leases:
    """A lease is renewed by a heartbeat; a role is missing when nobody filled it for `no_worker_s`."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._leases: Timers[_Lease] = Timers()
        self._missing_since: dict[Role, float] = {}
        self._wake: Timers[Role] = Timers()
        self.routers: set[RouterId] = set()
        self._spoke_s: dict[RouterId, float] = {}
        """Last word of a router since its timer was set."""
        self._coordinator: tuple[CoordinatorId, str] | None = None

    def started(self, now_s: float) -> None:
        """The first event: from now on every role that is not filled is missing."""
        for role in ("prefill worker", "decode worker", "SP coordinator"):
            self._begin_missing(role, now_s)

    def _begin_missing(self, role: Role, now_s: float) -> None:
        self._missing_since[role] = now_s
        self._wake.at(now_s + self._config.no_worker_s, role)

    def roles_changed(self, cluster: Cluster, now_s: float) -> None:
        filled: dict[Role, bool] = {
            "prefill worker": bool(cluster.replicas),
            "decode worker": bool(cluster.decoders),
            "SP coordinator": cluster.can_form_groups,
        }
        for role, there in filled.items():
            if there:
                self._missing_since.pop(role, None)
                self._wake.drop(role)
            elif role not in self._missing_since:
                self._begin_missing(role, now_s)

    def missing_role(self, now_s: float, *, is_long: bool) -> Role | None:
        """A role such a request needs and that nobody has filled for too long."""
        if not self._missing_since:
            return None
        second: Role = "SP coordinator" if is_long else "decode worker"
        needed: tuple[Role, ...] = ("prefill worker", second)
        if not is_long and not self._config.disaggregation:
            needed = ("prefill worker",)
        for role in needed:
            since_s = self._missing_since.get(role)
            if since_s is not None and now_s - since_s >= self._config.no_worker_s:
                return role
        return None

    # --- leases ----------------------------------------------------------------------------------

    def worker_heard(self, worker_id: WorkerId, now_s: float) -> None:
        self._leases.at(now_s + self._config.lease_s, ("worker", worker_id))

    def worker_gone(self, worker_id: WorkerId) -> None:
        self._leases.drop(("worker", worker_id))

    def router_heard(self, router_id: RouterId, now_s: float) -> None:
        self.routers.add(router_id)
        self._leases.at(now_s + self._config.lease_s, ("router", router_id))

    def router_spoke(self, router_id: RouterId, now_s: float) -> None:
        """As `router_heard`, for what comes often: the timer of a known router is moved only when it has come."""
        if router_id in self.routers:
            self._spoke_s[router_id] = now_s
        else:
            self.router_heard(router_id, now_s)

    def router_gone(self, router_id: RouterId) -> None:
        self.routers.discard(router_id)
        self._spoke_s.pop(router_id, None)
        self._leases.drop(("router", router_id))

    def coordinator_heard(self, coordinator_id: CoordinatorId, incarnation: str, now_s: float) -> bool:
        """True: another one than before, which knows none of the groups."""
        replaced = self._coordinator is not None and self._coordinator != (coordinator_id, incarnation)
        self._coordinator = (coordinator_id, incarnation)
        self._leases.at(now_s + self._config.lease_s, ("coordinator", ""))
        return replaced

    def coordinator_gone(self) -> None:
        self._leases.drop(("coordinator", ""))

    @property
    def anybody_missing(self) -> bool:
        """Whether some role is not filled, for however short a time."""
        return bool(self._missing_since)

    def expired(self, now_s: float) -> Lost:
        lost = Lost()
        for kind, name in self._leases.due(now_s):
            if kind == "worker":
                lost.workers.append(WorkerId(name))
            elif kind == "router":
                until_s = self._spoke_s.pop(RouterId(name), -math.inf) + self._config.lease_s
                if until_s > now_s:
                    self._leases.at(until_s, (kind, name))
                else:
                    lost.routers.append(RouterId(name))
            else:
                self._coordinator = None
                lost.coordinator = True
        for _ in self._wake.due(now_s):
            pass  # due: `missing_role` now says so
        return lost

    def next_deadline_s(self) -> float | None:
        lease_s, wake_s = self._leases.next_s(), self._wake.next_s()
        if lease_s is None or wake_s is None:
            return wake_s if lease_s is None else lease_s
        return min(lease_s, wake_s)
