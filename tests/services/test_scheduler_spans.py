"""From the states a request came to, to stages without a gap."""

from __future__ import annotations

import pytest

from common.policy.lifecycle import RequestState
from common.policy.scheduler_io import RequestLife
from common.tracing import new_trace
from common.units import RequestId, WorkerId
from services.scheduler.spans import STAGE_OF, spans_of, stages_of
from tests.traces import sum_s

S = RequestState
LONG = (
    *((S.FORMING, 1.0), (S.RUNNING, 1.5), (S.PAUSING, 3.0), (S.PAUSED, 3.25), (S.RESUMING, 4.0)),
    *((S.RUNNING, 4.5), (S.DECODING, 6.0)),
)
SHORT = ((S.PREFILLING, 1.0), (S.HANDOFF, 3.0), (S.DECODING, 3.5))


def life(phases: tuple[tuple[RequestState, float], ...], *, first_step_s: float | None = None) -> RequestLife:
    long = phases and phases[0][0] is S.FORMING
    return RequestLife(
        attempt=0,
        length_class="long" if long else "short",
        how="finished",
        traceparent="",
        arrived_s=0.5,
        phases=tuple((str(state), at_s) for state, at_s in phases),
        ended_s=9.0,
        first_step_s=first_step_s,
        workers=(WorkerId("p0"), WorkerId("p1" if long else "d0")),
        scheme="ring 2" if long else "",
    )


def told(of: RequestLife) -> list[tuple[str, float, float]]:
    return [(stage.name, stage.from_s, stage.to_s) for stage in stages_of(of)]


def test_every_state_belongs_to_a_stage():
    assert set(STAGE_OF) == set(RequestState)


def test_a_long_computes_while_it_is_being_stopped_and_stands_until_all_run_again():
    assert told(life(LONG)) == [
        ("queue", 0.5, 1.0),
        ("form group", 1.0, 1.5),
        ("prefill", 1.5, 3.25),
        ("pause", 3.25, 4.5),
        ("prefill", 4.5, 6.0),
        ("decode", 6.0, 9.0),
    ]


@pytest.mark.parametrize(
    ("first_step_s", "queue_s"), [(None, 0.5), (0.7, 0.5), (1.0, 0.5), (2.25, 1.75), (3.0, 0.5), (8.0, 0.5)]
)
def test_a_short_waits_in_its_workers_queue_too(first_step_s: float | None, queue_s: float):
    """What its worker says of another attempt's time is not used."""
    stages = told(life(SHORT, first_step_s=first_step_s))
    assert stages[0] == ("queue", 0.5, 0.5 + queue_s)
    assert stages[1:] == [("prefill", 0.5 + queue_s, 3.0), ("handoff", 3.0, 3.5), ("decode", 3.5, 9.0)]


def test_parts_of_different_attempts_are_different_parts():
    phases = (*SHORT[:1], (S.INTERRUPTED, 2.0), (S.QUEUED, 2.0), (S.PREFILLING, 2.0), *SHORT[1:])
    assert [name for name, _, _ in told(life(phases))] == ["queue", "prefill", "prefill", "handoff", "decode"]


def test_one_that_never_ran_only_waited():
    assert told(life(())) == [("queue", 0.5, 9.0)]


@pytest.mark.parametrize("phases", [LONG, SHORT])
def test_spans_are_the_stages_by_the_clock_of_the_world(phases: tuple[tuple[RequestState, float], ...]):
    of, request = life(phases, first_step_s=2.0), new_trace()
    spans = spans_of(RequestId("q"), of, request, offset_s=1_000.0)
    assert sum_s(spans) == pytest.approx(of.ended_s - of.arrived_s)
    assert [(s.name, s.start_s, s.end_s) for s in spans] == [(n, a + 1_000.0, b + 1_000.0) for n, a, b in told(of)]
    for span in spans:
        assert (span.context.trace_id, span.parent_id) == (request.trace_id, request.span_id)
        assert span.attributes["pecsched.request_id"] == "q"
    assert len({span.context.span_id for span in spans}) == len(spans)
    where = spans[-1].attributes
    if phases is LONG:
        assert (where["pecsched.workers"], where["pecsched.scheme"]) == ("p0,p1", "ring 2")
    else:
        assert where["pecsched.worker_id"] == "d0"


def test_a_pause_during_which_kv_was_elsewhere_is_one_pause():
    moved = ((S.SPILLING, 3.0), (S.SPILLED, 3.5), (S.RESTORING, 4.5), (S.PAUSED, 5.0))
    phases = ((S.FORMING, 1.0), (S.RUNNING, 1.5), (S.PAUSING, 2.0), (S.PAUSED, 2.5), *moved, (S.RESUMING, 5.5))
    stages = told(life((*phases, (S.RUNNING, 6.0), (S.DECODING, 7.0))))
    assert [stage for stage in stages if stage[0] == "pause"] == [("pause", 2.5, 6.0)]
    assert set(STAGE_OF) == set(RequestState)
