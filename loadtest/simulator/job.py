"""A request on its way through the simulated cluster: what it asks for, and what has happened to it."""

from __future__ import annotations

from common.messages.requests import RequestSpec
from common.units import WorkerId


class Job:
    """Times are simulated seconds from the start of the run, None until it happens."""

    __slots__ = (
        "arrived_s",
        "decode_worker_id",
        "denied",
        "exclusive",
        "failure",
        "finished_s",
        "first_token_s",
        "is_long",
        "output_tokens",
        "pauses",
        "prefill_started_s",
        "received_s",
        "request_id",
        "sched_s",
        "spec",
        "suspended_s",
        "tokens",
    )

    def __init__(self, spec: RequestSpec, arrived_s: float, *, is_long: bool) -> None:
        self.spec = spec
        self.request_id = spec.request_id
        self.tokens = spec.prompt.tokens
        self.output_tokens = spec.max_tokens
        """It generates all it may: recorded lengths are what was generated."""
        self.is_long = is_long
        self.arrived_s = arrived_s
        self.received_s = 0.0
        """When its prefill worker got the order."""
        self.prefill_started_s: float | None = None
        self.first_token_s: float | None = None
        self.finished_s: float | None = None
        self.failure: str | None = None
        self.pauses = 0
        self.suspended_s = 0.0
        self.sched_s = 0.0
        """Real seconds in the scheduler's core, over all events about it."""
        self.decode_worker_id = WorkerId("")
        self.exclusive = False
        """Of a short: no long's decode may share its steps."""
        self.denied = False
        """Of a long: see `loadtest.simulator.usage`."""
