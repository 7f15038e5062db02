"""Golden scenarios of the activity: messages in, what a page is told below each.

    TIME VERB REQUEST [on=WORKER] [KEY=VALUE…]

A line that starts with `→` is a row that changed: `lane kind request begin–end detail`.
"""

from __future__ import annotations

from collections.abc import Callable

from common.messages.base import Message
from common.messages.cluster import WorkerLeft
from common.messages.decode import DecodeBusy, DecodeFailed, DecodeFinished
from common.messages.prefill import KvReleased, PrefillFailed, PrefillFinished, RunPrefill
from common.messages.scheduling import RequestSubmitted
from common.messages.sp import (
    FormGroup,
    GroupFailed,
    GroupFinished,
    GroupPrefillFinished,
    SegmentDropped,
    SegmentFailed,
    SegmentFinished,
    SegmentPaused,
    SegmentPrefilled,
    SegmentRunning,
)
from common.messages.views import ClusterView, RequestView, WorkerView
from services.router.activity import Activity
from services.router.activity_records import Change
from tests.policy.scenario import profile, spec

Options = dict[str, str]


def _number(options: Options, name: str, default: str = "0") -> float:
    return float(options.get(name, default))


def _spec(name: str, options: Options):
    attempt, before = int(options.get("attempt", "0")), int(options.get("before", "0"))
    return spec(name, int(options.get("tokens", "100")), attempt=attempt, generated_before=before)


def _at(name: str, options: Options) -> dict[str, object]:
    return {"worker_id": options["on"], **_who(name, options)}


def _who(name: str, options: Options) -> dict[str, object]:
    return {"request_id": name, "attempt": int(options.get("attempt", "0"))}


def _prefilled(name: str, options: Options) -> PrefillFinished:
    return PrefillFinished(
        **_at(name, options),
        compute_s=_number(options, "compute"),
        waited_s=_number(options, "waited"),
        in_worker_s=_number(options, "in_worker"),
        last_layer_computed_s=0.0,
        finish_reason=options.get("finish"),
    )


MAKERS: dict[str, Callable[[str, Options], Message]] = {
    "submitted": lambda n, o: RequestSubmitted(spec=_spec(n, o)),
    "run": lambda n, o: RunPrefill(
        worker_id=o["on"], spec=_spec(n, o), decode_worker_id=o.get("to", "d1"), decode_address="x:1"
    ),
    "prefilled": _prefilled,
    "prefill-failed": lambda n, o: PrefillFailed(**_at(n, o), reason="lost"),
    "released": lambda n, o: KvReleased(**_at(n, o)),
    "decoded": lambda n, o: DecodeFinished(**_at(n, o), finish_reason="stop", generated=9),
    "decode-busy": lambda n, o: DecodeBusy(**_at(n, o)),
    "decode-failed": lambda n, o: DecodeFailed(**_at(n, o), reason="lost"),
    "form": lambda n, o: FormGroup(spec=_spec(n, o), members=tuple(o["on"].split(","))),
    "running": lambda n, o: SegmentRunning(**_at(n, o)),
    "paused": lambda n, o: SegmentPaused(
        **_at(n, o), step=1, prefilled_tokens=int(_number(o, "done")), pause_latency_s=0.0
    ),
    "segment-prefilled": lambda n, o: SegmentPrefilled(**_at(n, o), steps=1, compute_s=1.0),
    "group-prefilled": lambda n, o: GroupPrefillFinished(**_who(n, o), compute_s=1.0),
    "segment-finished": lambda n, o: SegmentFinished(**_at(n, o), finish_reason="stop", generated=9),
    "segment-failed": lambda n, o: SegmentFailed(**_at(n, o), reason="lost"),
    "segment-dropped": lambda n, o: SegmentDropped(**_at(n, o)),
    "group-finished": lambda n, o: GroupFinished(**_who(n, o), finish_reason="stop", generated=9),
    "group-failed": lambda n, o: GroupFailed(**_who(n, o), reason="lost"),
    "left": lambda n, o: WorkerLeft(worker_id=n, incarnation="1"),
}


def view(workers: dict[str, str], requests: list[RequestView] | None = None) -> ClusterView:
    """`workers`: name → ids of what it holds, separated by commas. Names that begin with d are decode workers."""
    return ClusterView(
        policy="pecsched",
        workers=tuple(
            WorkerView(
                profile=profile(name, "decode" if name.startswith("d") else "prefill"),
                requests=tuple(r for r in held.split(",") if r),
                queued_tokens=0,
                kv_reserved_tokens=0,
                silent_s=0.0,
            )
            for name, held in workers.items()
        ),
        routers=(),
        coordinator_present=True,
        queued_shorts=1,
        queued_longs=2,
        queued_tokens=300,
        requests=tuple(requests or ()),
        counters={"pauses": 3},
    )


def request_view(name: str, kind: str, state: str, workers: str, *, age_s: float = 10.0) -> RequestView:
    return RequestView(
        request_id=name,
        attempt=0,
        length_class=kind,
        state=state,
        prompt_tokens=5_000 if kind == "long" else 100,
        age_s=age_s,
        workers=tuple(workers.split(",")),
    )


def _view(args: list[str], options: Options) -> ClusterView:
    """`view p1=a,b d1=`; a request `a` is added by `a:short:decoding:p1,d1:AGE` among the arguments."""
    found = [entry.split(":") for entry in args]
    requests = [request_view(n, kind, state, workers, age_s=float(age)) for n, kind, state, workers, age in found]
    return view(options, requests)


class Player:
    """Plays lines; knows the names behind the numbers."""

    def __init__(self) -> None:
        self.activity = Activity(0.0)
        self.lanes: dict[int, str] = {}
        self.requests: dict[int, str] = {}

    def play(self, line: str) -> list[str]:
        at, verb, *rest = line.split()
        args = [part for part in rest if "=" not in part]
        options = dict(part.split("=", 1) for part in rest if "=" in part)
        now_s = float(at)
        if verb == "view":
            self.activity.reconcile(_view(args, options), now_s)
        elif verb == "silence":
            self.activity.scheduler_lost(now_s)
        else:
            self.activity.handle(MAKERS[verb](args[0], options), now_s)
        return self.tell(self.activity.take_change(now_s))

    def tell(self, change: Change) -> list[str]:
        self.lanes.update({lane.number: lane.worker_id for lane in self.activity._lanes.values()})
        self.requests.update({row.request: row.request_id for row in change.requests})
        told = [f"→ request {r.request_id} {r.length_class} {r.prompt_tokens} {r.submitted_s}" for r in change.requests]
        for row in change.segments:
            end = "…" if row.end_s is None else f"{row.end_s:g}"
            detail = self.lanes[row.detail] if row.kind == "handoff" else str(row.detail)
            name = self.requests[row.request]
            told.append(f"→ {self.lanes[row.lane]} {row.kind} {name} {row.begin_s:g}–{end} {detail}")
        if change.summary is not None:
            here = " ".join(f"{lane.worker_id}{'' if lane.here else ' (gone)'}" for lane in change.summary.lanes)
            told.append(f"→ lanes {here or 'none'}; {change.summary.sample}")
        return told


def replay(text: str) -> str:
    player, lines = Player(), []
    for line in text.splitlines():
        if line.startswith("→"):
            continue
        lines.append(line)
        if line and not line.startswith("#"):
            lines += player.play(line)
    return "\n".join(lines) + "\n"
