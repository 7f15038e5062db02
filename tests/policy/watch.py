"""What must hold between the scheduler and its world, each by its name: seen from outside, by events, commands and
time alone. (`common/policy/invariants.py` says what holds of the books by themselves.)"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.messages.scheduling import RequestFailed, RequestInterrupted, RequestRefused
from common.messages.sp import GroupPaused, PauseGroup, ResumeGroup
from common.policy.cluster import Request
from common.policy.core import require
from common.policy.lifecycle import IN_GROUP, RequestState
from common.policy.scheduler import Scheduler
from common.policy.scheduler_config import SchedulerConfig
from common.policy.scheduler_io import SchedulerCommand, SchedulerEvent

Key = tuple[str, int]

ROUNDING_S = 1e-5


@dataclass
class Yielded:
    """What one long prefill has yielded so far."""

    started_s: float
    """Its group was formed."""
    ordered_s: float | None = None
    """A pause was ordered, and no end of it."""
    heard_s: float | None = None
    """Its group said that it stands."""
    stood_s: float = 0.0
    """Sum of the pauses, each from the order to pause to the order to resume."""
    answers_s: float = 0.0
    """Sum of what it took to hear that they had begun."""
    pauses: int = 0
    late_s: float = 0.0
    """By how much the pause that is on exceeds its bound, because its KV is elsewhere: not there yet, or on its way, or
    shorts have its room still."""
    late_in_all_s: float = 0.0
    """The same of the sum."""
    waits: bool = False
    """For its KV, since the last event."""


class PauseWatch:
    """Suspension bounds, from order to order.

    A pause takes at most `pause_max_s` from the moment the scheduler hears that the group stands to its order to
    resume; so, from order to order, that and what the answer took. The same of the sum: at most
    `share * (elapsed + pause_max_s)` and what the answers took, at every moment. Who is spilled and has room on all its
    members is no exception: it is called back. Only waiting for the room, or for the word that its KV was moved, may
    take longer.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self.of: dict[Key, Yielded] = {}

    def saw(
        self, scheduler: Scheduler, event: SchedulerEvent, commands: Sequence[SchedulerCommand], now_s: float
    ) -> None:
        known = {r.key: r for r in scheduler.cluster.requests.values() if r.is_long and r.state in IN_GROUP}
        for yielded in self.of.values():
            self._forgive(yielded, now_s)
        self._hear(known, event, now_s)
        for command in commands:
            if isinstance(command, PauseGroup):
                self._ordered((command.request_id, command.attempt), now_s)
        for command in commands:
            if isinstance(command, ResumeGroup):
                self._resumed((command.request_id, command.attempt), now_s)
        for key in [k for k in self.of if k not in known or known[k].state is RequestState.DECODING]:
            del self.of[key]
        for key, yielded in self.of.items():
            yielded.waits = _waits_for_its_kv(scheduler, known[key])
            self._forgive(yielded, now_s)
            self._bounds_hold(yielded, now_s)

    def _forgive(self, yielded: Yielded, now_s: float) -> None:
        """What it is late because it waits."""
        if yielded.waits:
            late_s, late_in_all_s = self._late_s(yielded, now_s)
            yielded.late_s = max(yielded.late_s, late_s)
            yielded.late_in_all_s = max(yielded.late_in_all_s, late_in_all_s)

    def _ordered(self, key: Key, now_s: float) -> None:
        self.nobody_is_paused_without_preemption()
        yielded = self.of[key]
        if yielded.ordered_s is None:  # else: said again, because it was not answered
            yielded.ordered_s = now_s
            yielded.pauses += 1

    def nobody_is_paused_without_preemption(self) -> None:
        require(self._config.policy == "pecsched" and self._config.preemption, "a long is paused without preemption")

    def _hear(self, known: dict[Key, Request], event: SchedulerEvent, now_s: float) -> None:
        for key, request in known.items():
            if key not in self.of and request.state not in (RequestState.FORMING, RequestState.DECODING):
                self.of[key] = Yielded(started_s=now_s)
        if isinstance(event, GroupPaused):
            yielded = self.of.get((event.request_id, event.attempt))
            if yielded is not None and yielded.ordered_s is not None and yielded.heard_s is None:
                yielded.heard_s = now_s

    def _resumed(self, key: Key, now_s: float) -> None:
        yielded = self.of[key]
        if yielded.ordered_s is None:
            return  # said again
        assert yielded.heard_s is not None, "nobody is resumed who does not stand"
        self._bounds_hold(yielded, now_s)
        yielded.stood_s += now_s - yielded.ordered_s
        yielded.answers_s += yielded.heard_s - yielded.ordered_s
        yielded.ordered_s = yielded.heard_s = None
        yielded.late_s = 0.0

    def _bounds_hold(self, yielded: Yielded, now_s: float) -> None:
        late_s, late_in_all_s = self._late_s(yielded, now_s)
        require(late_s <= yielded.late_s + ROUNDING_S, f"a pause exceeds its bound by {late_s} s")
        require(late_in_all_s <= yielded.late_in_all_s + ROUNDING_S, f"pauses exceed their bound by {late_in_all_s} s")

    def _late_s(self, yielded: Yielded, now_s: float) -> tuple[float, float]:
        """By how much the pause that is on exceeds its bound, and the sum of all theirs; negative: by how much not."""
        stood_s, answers_s, late_s = yielded.stood_s, yielded.answers_s, -math.inf
        if yielded.ordered_s is not None and yielded.heard_s is not None:
            single_s, answer_s = now_s - yielded.ordered_s, yielded.heard_s - yielded.ordered_s
            late_s = single_s - self._config.pause_max_s - answer_s
            stood_s, answers_s = stood_s + single_s, answers_s + answer_s
        elapsed_s = now_s - yielded.started_s
        bound_s = self._config.pause_share_max * (elapsed_s + self._config.pause_max_s) + answers_s
        return late_s, stood_s - bound_s


def _waits_for_its_kv(scheduler: Scheduler, request: Request) -> bool:
    if request.state in (RequestState.SPILLING, RequestState.RESTORING):
        return True
    if request.state is not RequestState.SPILLED or request.pauses is None:
        return False
    members = [scheduler.cluster.replicas[worker_id] for worker_id in request.members]
    return any(member.kv_free < share for member, share in zip(members, request.pauses.spilled, strict=True))


class RequestWatch:
    """No request is lost: whoever has not ended is known to the scheduler, or its router was just told to ask again,
    or a message about it was lost (then the next heartbeats mend it)."""

    def __init__(self) -> None:
        self._mending: dict[str, int] = {}
        """A fault befell these; they need not be known until this attempt of them is."""

    def submission_lost(self, name: str, attempt: int) -> None:
        self._mending[name] = attempt

    def answer_lost(self, command: SchedulerCommand) -> None:
        if isinstance(command, RequestFailed | RequestRefused | RequestInterrupted):
            self._mending[command.request_id] = command.attempt + 1

    def router_lost(self, alive: set[str]) -> None:
        """It was silent for its lease: all it waits for was cancelled."""
        for name in alive:
            self._mending.setdefault(name, 0)

    def nobody_is_lost(self, known: Mapping[str, int], alive: set[str], submitted: set[str]) -> None:
        """`known`: the attempt of each; `alive`: those that have not ended; `submitted`: their submission is under
        way."""
        for name in [n for n, attempt in self._mending.items() if known.get(n, -1) >= attempt]:
            del self._mending[name]
        lost = alive - known.keys() - submitted - self._mending.keys()
        require(not lost, f"lost: {sorted(lost)}")
