"""A request's life in the scheduler as what followed what, without a gap: for metrics and for traces. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from common.policy.lifecycle import RequestState
from common.policy.scheduler_io import RequestLife
from common.tracing import Span, TraceContext
from common.units import RequestId

QUEUE = "queue"
FORM = "form group"
PREFILL = "prefill"
PAUSE = "pause"
HANDOFF = "handoff"
DECODE = "decode"
INTERRUPTED = "interrupted"

S = RequestState
STAGE_OF: Mapping[str, str] = {
    S.QUEUED: QUEUE,
    S.FORMING: FORM,
    S.PREFILLING: PREFILL,
    S.RUNNING: PREFILL,
    S.PAUSING: PREFILL,
    S.PAUSED: PAUSE,
    S.SPILLING: PAUSE,
    S.SPILLED: PAUSE,
    S.RESTORING: PAUSE,
    S.RESUMING: PAUSE,
    S.HANDOFF: HANDOFF,
    S.DECODING: DECODE,
    S.INTERRUPTED: INTERRUPTED,
}
"""PAUSING: it computes until it stands. RESUMING: it stands until all ranks have said that they run."""


class Stage(NamedTuple):
    name: str
    from_s: float
    to_s: float


def stages_of(life: RequestLife) -> list[Stage]:
    """From arrival to end, in order. States that make one stage are one; what took no time is left out."""
    stages: list[Stage] = []
    former = ""
    for name, from_s, to_s in parts_of(life):
        if name == former:
            stages[-1] = Stage(name, stages[-1].from_s, to_s)
        else:
            stages.append(Stage(name, from_s, to_s))
        former = name
    return [stage for stage in stages if stage.to_s > stage.from_s]


def parts_of(life: RequestLife) -> list[tuple[str, float, float]]:
    """Each state's part in a stage: its name, from when, to when."""
    parts = []
    state, from_s = str(S.QUEUED), life.arrived_s
    for following, to_s in (*life.phases, ("", life.ended_s)):
        first_s = life.first_step_s
        if state == S.PREFILLING and first_s is not None and from_s < first_s < to_s:
            parts += [(QUEUE, from_s, first_s), (PREFILL, first_s, to_s)]  # first in its worker's own queue
        else:
            parts.append((STAGE_OF[state], from_s, to_s))
        state, from_s = following, to_s
    return parts


def spans_of(request_id: RequestId, life: RequestLife, request: TraceContext, offset_s: float) -> list[Span]:
    """One per stage, parts of the request's own span. `offset_s`: from the scheduler's clock to Unix time."""
    about: dict[str, str | int | float | bool] = {
        "pecsched.request_id": request_id,
        "pecsched.attempt": life.attempt,
        "pecsched.length_class": life.length_class,
    }
    return [
        Span(
            name=stage.name,
            context=request.child(),
            parent_id=request.span_id,
            start_s=stage.from_s + offset_s,
            end_s=stage.to_s + offset_s,
            attributes=about | _where(stage.name, life),
            error=INTERRUPTED if stage.name == INTERRUPTED else "",
        )
        for stage in stages_of(life)
    ]


def _where(stage: str, life: RequestLife) -> dict[str, str | int | float | bool]:
    """Who worked on it. (Of earlier attempts that is not known any more.)"""
    if stage in (QUEUE, INTERRUPTED) or not life.workers:
        return {}
    if life.length_class == "long":
        return {"pecsched.workers": ",".join(life.workers), "pecsched.scheme": life.scheme}
    first, last = life.workers[0], life.workers[-1]
    if stage == HANDOFF:
        return {"pecsched.from_worker": first, "pecsched.to_worker": last}
    return {"pecsched.worker_id": first if stage == PREFILL else last}
