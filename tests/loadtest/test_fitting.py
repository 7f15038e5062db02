"""Lengths of a trace on a cluster that takes less."""

from __future__ import annotations

import pytest

from loadtest.fitting import Room, Scales, fit, long_range
from loadtest.simulator.scenario import WorkloadSpec
from loadtest.simulator.workload import Arrival, Workload, WorkloadError, make_workload

ROOM = Room(context_tokens=8192, threshold_tokens=2048)
PROMPTS = tuple(range(100, 10_100, 100))
TRACE = make_workload("trace", (Arrival(float(at), prompt, 100) for at, prompt in enumerate(PROMPTS)))


def test_prompts_above_the_percentile_become_longs_and_the_others_stay_short() -> None:
    fitted, facts = fit(TRACE, WorkloadSpec(), set(), ROOM, Scales(), seed=1)
    assert [a.at_s for a in fitted.arrivals] == [a.at_s for a in TRACE.arrivals]
    assert fitted.threshold_tokens == 2048
    assert [a.prompt_tokens for a in fitted.arrivals[:95]] == [min(prompt, 2048) for prompt in PROMPTS[:95]]
    assert all(6144 <= a.prompt_tokens <= 7373 for a in fitted.arrivals[95:])
    assert fitted.longs == facts.rewritten == 5
    assert facts.clipped_prompts == sum(prompt > 2048 for prompt in PROMPTS[:95])
    assert facts.clipped_outputs == 0
    assert facts.lines() == [
        "5 prompts became longs of 6144 to 7373 tokens",
        "75 of 100 prompts were clipped to 2048 tokens",
    ]


def test_scales_come_before_clipping_and_leave_longs_alone() -> None:
    fitted, facts = fit(TRACE, WorkloadSpec(), set(), ROOM, Scales(prompt=0.2, output=0.5), seed=1)
    assert [a.prompt_tokens for a in fitted.arrivals[:95]] == [round(prompt * 0.2) for prompt in PROMPTS[:95]]
    assert facts.clipped_prompts == 0
    assert {a.output_tokens for a in fitted.arrivals} == {50}
    assert fitted.arrivals[95:] == tuple(
        a._replace(output_tokens=50) for a in fit(TRACE, WorkloadSpec(), set(), ROOM, Scales(), seed=1)[0].arrivals[95:]
    )


def test_prompt_and_output_fit_the_context_together() -> None:
    chatty = make_workload("chatty", (Arrival(0.0, prompt, 9000) for prompt in PROMPTS))
    fitted, facts = fit(chatty, WorkloadSpec(), set(), ROOM, Scales(), seed=1)
    assert {a.prompt_tokens + a.output_tokens for a in fitted.arrivals} == {8192}
    assert facts.clipped_outputs == len(PROMPTS)
    assert "100 of 100 outputs were clipped to what the context leaves" in facts.lines()


def test_without_rewriting_prompts_are_clipped_to_the_context_alone() -> None:
    fitted, facts = fit(TRACE, WorkloadSpec(rewrite=False), {"rewrite"}, ROOM, Scales(), seed=1)
    assert [a.prompt_tokens for a in fitted.arrivals] == [min(prompt, 8191) for prompt in PROMPTS]
    assert min(a.output_tokens for a in fitted.arrivals) == 1
    assert facts.rewritten == 0
    assert fitted.longs == sum(prompt > 2048 for prompt in PROMPTS)


def test_the_percentile_is_that_of_the_whole_trace_after_a_cut() -> None:
    first = TRACE.first(50.0)
    fitted, facts = fit(first, WorkloadSpec(), set(), ROOM, Scales(), seed=1)
    assert facts.rewritten == 0
    assert fitted.longs == 0


def test_lengths_follow_from_the_seed() -> None:
    def lengths(seed: int) -> list[int]:
        return [a.prompt_tokens for a in fit(TRACE, WorkloadSpec(), set(), ROOM, Scales(), seed)[0].arrivals]

    assert lengths(1) == lengths(1) != lengths(2)


def test_longs_of_a_said_range() -> None:
    spec = WorkloadSpec(long_low=3000, long_high=3000)
    assert long_range(spec, {"long_low", "long_high"}, ROOM) == (3000, 3000)
    assert long_range(WorkloadSpec(long_low=8000), {"long_low"}, ROOM) == (8000, 8000)


@pytest.mark.parametrize(
    ("low", "high", "why"),
    [
        (3000, 2900, "the range is empty"),
        (2048, 3000, "prompts are short to the scheduler"),
        (3000, 8192, "do not fit"),
    ],
)
def test_longs_that_cannot_be_are_refused_in_one_line(low: int, high: int, why: str) -> None:
    with pytest.raises(WorkloadError, match=why) as caught:
        fit(TRACE, WorkloadSpec(long_low=low, long_high=high), {"long_low", "long_high"}, ROOM, Scales(), seed=1)
    assert "\n" not in str(caught.value)


def test_an_output_is_one_token_at_least() -> None:
    tiny = Workload("tiny", (Arrival(0.0, 1, 1),), 5)
    fitted, _ = fit(tiny, WorkloadSpec(), set(), ROOM, Scales(prompt=0.001, output=0.001), seed=1)
    assert fitted.arrivals == (Arrival(0.0, 1, 1),)
