"""Golden scenarios: a text file of events in, with the commands that came out below each.

A line `TIME VERB ARGS…` is an event; lines that start with `→` are what the scheduler answered. `pytest
--golden-write` rewrites the answers; review the diff.

`set KEY=VALUE…` sets fields of `SchedulerConfig`; `set group_max=N tokens_per_replica=T` lets longs take groups: one
replica per T tokens of prompt (`T-or_fewer`: or as many as there are).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from common.messages.cluster import (
    CoordinatorHeartbeat,
    Holding,
    RouterHeartbeat,
    RouterLeft,
    StepCost,
    WorkerHeartbeat,
    WorkerLeft,
    WorkerProfile,
)
from common.messages.decode import DecodeBusy, DecodeFailed, DecodeFinished, ExpectKv
from common.messages.prefill import DropRequest, KvReleased, PrefillFailed, PrefillFinished, RunPrefill
from common.messages.requests import Prompt, RequestSpec
from common.messages.scheduling import (
    CancelRequested,
    RequestAccepted,
    RequestFailed,
    RequestInterrupted,
    RequestRefused,
    RequestSubmitted,
)
from common.messages.sp import (
    DissolveGroup,
    FormGroup,
    GroupFailed,
    GroupFinished,
    GroupFormed,
    GroupGrown,
    GroupNotSpilled,
    GroupPaused,
    GroupPrefillFinished,
    GroupResumed,
    GroupSpilled,
    GrowGroup,
    PartGroup,
    PauseGroup,
    RestoreGroup,
    ResumeGroup,
    SpillGroup,
)
from common.policy.core import TimePassed
from common.policy.long_planner import Layout
from common.policy.scheduler import Scheduler
from common.policy.scheduler_config import SchedulerConfig
from common.policy.scheduler_io import (
    EndBusRequest,
    ForgetRequest,
    SaveRequest,
    SchedulerCommand,
    SchedulerEvent,
    WorkerKeptOut,
)

COST = StepCost(pass_s=0.02, token_s=0.0007, pair_s=8e-8)


def profile(
    worker_id: str,
    role: str = "prefill",
    *,
    kv: int = 32_768,
    incarnation: str = "1",
    rows: int = 32,
    node: str = "n0",
    spill_bytes: int = 0,
) -> WorkerProfile:
    return WorkerProfile(
        worker_id=worker_id,
        role=role,
        incarnation=incarnation,
        node=node,
        replica=worker_id,
        model_id="m",
        model_fingerprint="f",
        layers=30,
        kv_bytes_per_token=1,
        kv_capacity_tokens=kv,
        context_tokens=8_192,
        rows_max=rows if role == "decode" else 1,
        data_address=f"{worker_id}:1",
        step_cost=COST,
        spill_bytes_max=spill_bytes,
    )


class PerReplicaPlanner:
    """So many tokens to a replica, if their KV has room; each prefills 1,000 tokens a second. `or_fewer`: where there
    are fewer replicas, those."""

    degree_max = 1_000

    def __init__(self, tokens_per_replica: int, *, or_fewer: bool = False) -> None:
        self._tokens_per_replica = tokens_per_replica
        self._or_fewer = or_fewer

    def degree(self, tokens: int, kv_tokens: int, free_by_node: Sequence[int], kv_free_tokens: int) -> int:
        needed = math.ceil(tokens / self._tokens_per_replica)
        needed = min(needed, sum(free_by_node)) if self._or_fewer else needed
        return needed if needed <= sum(free_by_node) and kv_tokens <= needed * kv_free_tokens else 0

    def prefill_s(self, tokens: int, layout: Layout) -> float:
        return tokens / sum(layout) / 1_000

    def took(self, degree: int, expected_s: float, ran_s: float) -> None:
        pass


def spec(request_id: str, tokens: int, *, max_tokens: int = 16, attempt: int = 0, router: str = "r", **more):
    return RequestSpec(
        request_id=request_id,
        attempt=attempt,
        router_id=router,
        prompt=Prompt(tokens=tokens, key=f"prompt:{request_id}"),
        max_tokens=max_tokens,
        **more,
    )


def parse_event(verb: str, args: list[str], options: dict[str, str]) -> SchedulerEvent:
    attempt = int(options.get("attempt", "0"))
    name = args[0] if args else ""

    def at(worker: str, request: str) -> dict[str, object]:
        return {"worker_id": worker, "request_id": request, "attempt": attempt}

    def group(request: str) -> dict[str, object]:
        return {"request_id": request, "attempt": attempt}

    match verb:
        case "worker":
            role, kv = options.get("role", "prefill"), int(options.get("kv", "32768"))
            holdings = tuple(
                Holding(request_id=r, attempt=attempt, phase="expected", kv_tokens=256)
                for r in options.get("holds", "").split(",")
                if r
            )
            node, spill_bytes = options.get("node", "n0"), int(options.get("spill", "0"))
            incarnation = options.get("incarnation", "1")
            me = profile(name, role, kv=kv, incarnation=incarnation, node=node, spill_bytes=spill_bytes)
            return WorkerHeartbeat(profile=me, holdings=holdings, leaving="leaving" in options)
        case "left":
            return WorkerLeft(worker_id=name, incarnation="1")
        case "router":
            return RouterHeartbeat(router_id=name, waiting=tuple((r, attempt) for r in args[1:]))
        case "router-left":
            return RouterLeft(router_id=name)
        case "coordinator":
            driving = tuple((r, attempt) for r in args[1:])
            return CoordinatorHeartbeat(
                coordinator_id=name, incarnation=options.get("incarnation", "1"), driving=driving
            )
        case "submit":
            return RequestSubmitted(
                spec=spec(
                    name,
                    int(args[1]),
                    max_tokens=int(options.get("max", "16")),
                    attempt=attempt,
                    router=options.get("router", "r"),
                    reply_inbox=options.get("inbox"),
                    deadline_s=float(options["deadline"]) if "deadline" in options else None,
                )
            )
        case "cancel":
            return CancelRequested(request_id=name, router_id=options.get("router", "r"))
        case "prefilled":
            return PrefillFinished(
                **at(name, args[1]), compute_s=0.1, last_layer_computed_s=0, finish_reason=options.get("finish")
            )
        case "prefill-failed":
            suspect = options.get("suspect")
            return PrefillFailed(
                **at(name, args[1]), reason="cosmic ray", retryable="fatal" not in options, suspect_worker_id=suspect
            )
        case "released":
            return KvReleased(**at(name, args[1]))
        case "decoded":
            return DecodeFinished(**at(name, args[1]), finish_reason="length", generated=16)
        case "busy":
            return DecodeBusy(**at(name, args[1]))
        case "decode-failed":
            return DecodeFailed(**at(name, args[1]), reason="checksum")
        case "formed":
            return GroupFormed(**group(name))
        case "paused":
            return GroupPaused(**group(name), step=7, prefilled_tokens=512, pause_latency_s=0.02)
        case "grown":
            at_token = int(options.get("at", "0"))
            members, growth = tuple(args[1:]), int(options["growth"])
            return GroupGrown(**group(name), growth=growth, members=members, prefilled_tokens=at_token)
        case "spilled":
            return GroupSpilled(**group(name))
        case "not-spilled":
            return GroupNotSpilled(**group(name), reason="no room")
        case "resumed":
            return GroupResumed(**group(name))
        case "group-prefilled":
            return GroupPrefillFinished(**group(name), compute_s=9, finish_reason=options.get("finish"))
        case "group-finished":
            return GroupFinished(**group(name), finish_reason="length", generated=16)
        case "group-failed":
            return GroupFailed(**group(name), reason="rank lost", retryable="fatal" not in options)
        case "time":
            return TimePassed()
    raise ValueError(f"no such verb: {verb}")


def render(command: SchedulerCommand) -> str:
    match command:
        case SaveRequest(record=r):
            return f"save {r.spec.request_id} {r.state}" + "".join(f" {w}" for w in r.workers)
        case ForgetRequest():
            return f"forget {command.request_id}"
        case EndBusRequest():
            return f"end {command.reply_inbox}: {command.message}"
        case WorkerKeptOut():
            return f"kept out {command.worker_id}: {command.reason}"
        case RequestAccepted():
            return f"{command.router_id}: accepted {command.request_id}"
        case RequestRefused():
            return f"{command.router_id}: refused {command.request_id} {command.code}: {command.message}"
        case RequestInterrupted():
            return f"{command.router_id}: interrupted {command.request_id} attempt={command.attempt}: {command.reason}"
        case RequestFailed():
            return f"{command.router_id}: failed {command.request_id} retryable={command.retryable}: {command.message}"
        case ExpectKv():
            return f"{command.worker_id}: expect {command.spec.request_id}"
        case RunPrefill():
            alone = ", longs wait" if command.exclusive else ""
            return f"{command.worker_id}: prefill {command.spec.request_id} for {command.decode_worker_id}{alone}"
        case DropRequest():
            return f"{command.worker_id}: drop {command.request_id} attempt={command.attempt}"
        case FormGroup():
            return f"coordinator: form {command.spec.request_id} on {' '.join(command.members)}"
        case GrowGroup():
            return f"coordinator: grow {command.request_id} to {' '.join(command.members)}, try {command.growth}"
        case PartGroup() | PauseGroup() | ResumeGroup() | SpillGroup() | RestoreGroup() | DissolveGroup():
            return f"coordinator: {type(command).__name__.removesuffix('Group').lower()} {command.request_id}"


def replay(text: str) -> str:
    """Run a scenario; return its text with the answers as they are now. `check()` runs after each event."""
    settings: dict[str, object] = {}
    planner: PerReplicaPlanner | None = None
    scheduler: Scheduler | None = None
    out: list[str] = []
    for line in text.splitlines():
        if line.startswith("→"):
            continue
        out.append(line)
        if not line.strip() or line.startswith("#"):
            continue
        words = line.split()
        if words[0] == "set":
            for word in words[1:]:
                key, value = word.split("=")
                if key == "tokens_per_replica":
                    tokens, _, or_fewer = value.partition("-")
                    planner = PerReplicaPlanner(int(tokens), or_fewer=or_fewer == "or_fewer")
                    continue
                settings[key] = msgspec.convert(value, type(getattr(SchedulerConfig(), key)), strict=False)
            continue
        if scheduler is None:
            scheduler = Scheduler(SchedulerConfig(**settings), epoch=1, planner=planner)
        options = dict(w.split("=", 1) for w in words[2:] if "=" in w)
        args = [w for w in words[2:] if "=" not in w]
        commands = scheduler.handle(parse_event(words[1], args, options), float(words[0]))
        scheduler.check()
        out += [f"→ {render(c)}" for c in commands]
    return "\n".join(out) + "\n"
