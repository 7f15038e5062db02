"""Golden scenarios of the decode worker: events in, with the commands that came out below each.

A line `TIME VERB ARGS…` is an event; lines that start with `→` are what the core answered. `pytest
--golden-write` rewrites the answers; review the diff.
"""

from __future__ import annotations

from common.messages.decode import DecodeBusy, DecodeFailed, DecodeFinished, ExpectKv
from common.messages.prefill import DropRequest, KvReleased
from common.messages.requests import Prompt, RequestSpec, TokensGenerated
from common.policy.core import TimePassed
from common.policy.decode_events import (
    AcceptOffer,
    ActivateRow,
    DecodeCommand,
    DecodedToken,
    DecodeEvent,
    DecodeWorkerConfig,
    ForgetDecodeKv,
    KvArrived,
    KvBroken,
    KvOffered,
    KvReserved,
    PlaceDecodeKv,
    RefuseOffer,
    ReleaseKv,
    ReserveFailed,
    ReserveKv,
    RunStep,
    StepFailed,
    StepFinished,
    StopReceiving,
    StopRequested,
)
from common.policy.decode_worker import DecodeWorkerCore

CONFIG = DecodeWorkerConfig(
    worker_id="d1",
    layers=30,
    kv_capacity_tokens=1_000,
    rows_max=3,
    expect_s=30.0,
    early_s=2.0,
    crowded_itl_s=0.1,
)


def spec(request_id: str, tokens: int, *, max_tokens: int = 4, attempt: int = 0, router: str = "r", **more):
    return RequestSpec(
        request_id=request_id,
        attempt=attempt,
        router_id=router,
        prompt=Prompt(tokens=tokens, key=f"prompt:{request_id}"),
        max_tokens=max_tokens,
        **more,
    )


def expect(wanted: RequestSpec, *, epoch: int = 1, worker: str = "d1") -> ExpectKv:
    return ExpectKv(worker_id=worker, spec=wanted, prefill_worker_id="p1", epoch=epoch)


def parse_event(verb: str, args: list[str], options: dict[str, str]) -> DecodeEvent:
    attempt, epoch = int(options.get("attempt", "0")), int(options.get("epoch", "1"))
    name = args[0] if args else ""
    match verb:
        case "expect":
            wanted = spec(
                name,
                int(args[1]),
                max_tokens=int(options.get("max", "4")),
                attempt=attempt,
                router=options.get("router", "r"),
                generated_before=int(options.get("before", "0")),
                stop_token_ids=tuple(int(token) for token in options.get("stop", "").split(",") if token),
            )
            return expect(wanted, epoch=epoch, worker=options.get("worker", "d1"))
        case "drop":
            return DropRequest(worker_id="d1", request_id=name, attempt=attempt, epoch=epoch)
        case "reserved":
            return KvReserved(request_id=name, attempt=attempt)
        case "no-room":
            return ReserveFailed(request_id=name, attempt=attempt, reason="fragmented")
        case "offer":
            return KvOffered(request_id=name, attempt=attempt, tokens=int(args[1]))
        case "arrived":
            return KvArrived(
                request_id=name,
                attempt=attempt,
                first_token=int(options.get("first", "10")),
                first_layer_received_s=1,
                last_layer_received_s=2,
            )
        case "broken":
            return KvBroken(request_id=name, attempt=attempt, reason="connection lost")
        case "stepped":
            pairs = [word.split(":") for word in args]
            sampled = tuple(DecodedToken(request_id=r, token_id=int(t)) for r, t in pairs)
            return StepFinished(sampled=sampled, core_wait_s=float(options.get("wait", "0")))
        case "step-failed":
            return StepFailed(reason="cosmic ray")
        case "stop":
            return StopRequested()
        case "time":
            return TimePassed()
    raise ValueError(f"no such verb: {verb}")


def render(command: DecodeCommand) -> str:
    match command:
        case ReserveKv():
            return f"reserve {command.spec.request_id}/{command.spec.attempt} {command.spec.kv_tokens}"
        case AcceptOffer():
            return f"accept {command.request_id}/{command.attempt}"
        case RefuseOffer():
            return f"refuse {command.request_id}/{command.attempt}: {command.reason}"
        case StopReceiving():
            return f"stop-receiving {command.request_id}/{command.attempt}"
        case ActivateRow():
            return f"activate {command.request_id} with {command.first_token}"
        case RunStep():
            return f"step {' '.join(command.request_ids)}"
        case ReleaseKv():
            return f"release {command.request_id}/{command.attempt}"
        case PlaceDecodeKv(location=place):
            return f"place {place.request_id}/{place.attempt} {place.state} {place.tokens} of {place.reserved_tokens}"
        case ForgetDecodeKv():
            return f"forget {command.request_id}"
        case TokensGenerated():
            chunks = (
                f"{c.request_id}/{c.attempt}[{c.index}]={','.join(map(str, c.token_ids))}"
                + (f" {c.finish_reason}" if c.finish_reason else "")
                for c in command.chunks
            )
            return f"{command.router_id}: tokens {'; '.join(chunks)}"
        case DecodeFinished():
            done = f"{command.finish_reason} generated={command.generated} released {command.kv_tokens}"
            return f"scheduler: finished {command.request_id}/{command.attempt} {done}"
        case DecodeBusy():
            return f"scheduler: busy {command.request_id}/{command.attempt}"
        case DecodeFailed():
            return f"scheduler: failed {command.request_id}/{command.attempt}: {command.reason}"
        case KvReleased():
            return f"scheduler: released {command.request_id}/{command.attempt} {command.kv_tokens}"


def replay(text: str) -> str:
    """Run a scenario; return its text with the answers as they are now. `check()` runs after each event."""
    core = DecodeWorkerCore(CONFIG)
    out: list[str] = []
    for line in text.splitlines():
        if line.startswith("→"):
            continue
        out.append(line)
        if not line.strip() or line.startswith("#"):
            continue
        words = line.split()
        options = dict(w.split("=", 1) for w in words[2:] if "=" in w)
        args = [w for w in words[2:] if "=" not in w]
        commands = core.handle(parse_event(words[1], args, options), float(words[0]))
        core.check()
        out += [f"→ {render(c)}" for c in commands]
    return "\n".join(out) + "\n"
