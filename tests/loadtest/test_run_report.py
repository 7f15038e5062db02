"""Figures, table, plots and page of a run: a good one, one that failed, one that nobody listened to."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from loadtest.run_report.outputs import write_files
from loadtest.run_report.page import page
from loadtest.run_report.plots import LANES_MAX, lanes_shown, pauses_window
from loadtest.run_report.record import Recorded, Spread, figures_of, load_facts
from loadtest.run_report.table import notes_of, rows_of, show
from loadtest.simulator.result import Outcome, Span
from loadtest.simulator.workload import Arrival, Workload

WORKLOAD = Workload("small", (Arrival(0.0, 10, 5), Arrival(1.0, 10, 5), Arrival(2.0, 100, 3)), 50)


def short(number: int, *, ttft_s: float = 0.2, failure: str | None = None) -> Outcome:
    at_s = float(number)
    ended_s = None if failure else at_s + ttft_s + 0.4
    return Outcome(f"s{number}", False, at_s, 10, 5, at_s + 0.1, at_s + ttft_s, ended_s, failure)


LONG = Outcome("l", True, 2.0, 100, 3, 2.5, 6.0, 7.0, None, pauses=2, suspended_s=0.6)
SPANS = [
    Span("prefill-0", "long prefill", 2.5, 3.0, "l"),
    Span("prefill-0", "paused", 3.0, 3.2, "l"),
    Span("prefill-0", "short prefill", 3.0, 3.2, "s1"),
    Span("prefill-0", "long prefill", 3.2, 4.0, "l"),
    Span("prefill-0", "paused", 4.0, 4.4, "l"),
    Span("prefill-0", "long decode", 6.0, 7.0, "l"),
    Span("decode-0 decode", "short decode", 1.0, 2.0, "s0"),
    Span("decode-0 decode", "short decode", 1.5, 2.5, "s1"),
]


def recorded(
    *outcomes: Outcome, label: str = "http", listened: bool = True, late_s: tuple[float, ...] = ()
) -> Recorded:
    return Recorded(
        label=label,
        kind="live",
        cluster="a model, 1 prefill and 1 decode workers, policy pecsched",
        load=load_facts(WORKLOAD, 3, ("1 prompts became longs of 100 to 100 tokens",)),
        outcomes=outcomes,
        spans=SPANS if listened else [],
        late_s=late_s,
        client_busy=0.02,
        listened=listened,
    )


GOOD = recorded(short(0), short(1, ttft_s=0.3), LONG, late_s=(0.001, 0.002, 0.003))
FAILED = recorded(*(short(number, failure="status 503") for number in range(3)))


def test_latencies_count_from_the_arrival_per_class() -> None:
    figures = figures_of(GOOD)
    assert figures.short.ttft_s.p50 == pytest.approx(0.25)
    assert figures.short.ttft_s.p99 == pytest.approx(0.299)
    assert figures.short.ttft_s.max == pytest.approx(0.3)
    assert figures.short.queueing_delay_s.max == pytest.approx(0.1)
    assert figures.short.itl_s.mean == pytest.approx(0.1)
    assert figures.long.ttft_s.p50 == 4.0
    assert figures.long.jct_s.p50 == 5.0
    assert figures.long.itl_s.p50 == 0.5
    assert (figures.short.requests, figures.long.requests, figures.answered) == (2, 1, 3)
    assert (figures.pauses, figures.suspended_s.mean) == (2, 0.6)
    assert figures.tokens_per_s == pytest.approx(13 / 7)
    assert not figures.lagged


def test_a_failed_request_is_counted_and_in_no_latency() -> None:
    figures = figures_of(recorded(short(0), short(1, failure="status 503"), short(2, failure="status 503")))
    assert (figures.short.requests, figures.short.failed, figures.short.answered) == (3, 2, 1)
    assert figures.short.ttft_s == Spread.of([0.2])
    assert figures.failures == ("status 503",)


def test_a_client_that_lagged_says_so() -> None:
    figures = figures_of(recorded(short(0), late_s=(0.5,)))
    assert figures.lagged
    assert any("the client itself lagged" in note for note in notes_of([figures]))
    assert any("MISSED" in note for note in notes_of([figures]))


def test_what_nobody_listened_to_is_missing_not_zero() -> None:
    figures = figures_of(recorded(short(0), LONG, listened=False))
    assert figures.pauses is None
    assert figures.suspended_s.mean is None
    assert ("pauses", "", "–") in rows_of([figures])


def test_loads_are_told_apart_by_any_time_or_length() -> None:
    moved = dataclasses.replace(WORKLOAD, arrivals=(*WORKLOAD.arrivals[:2], Arrival(2.0, 100, 4)))
    assert load_facts(WORKLOAD, 3).digest == load_facts(WORKLOAD, 4).digest != load_facts(moved, 3).digest


def test_the_page_has_the_plots_and_every_row_of_the_table() -> None:
    html = page([GOOD, recorded(short(0), short(1), LONG, label="nats")])
    assert html.count("<svg") == 1 + 2 * 3
    for text in ("http, shorts", "nats, shorts", "queueing delay p99", "stood still, mean", "1 prompts became longs"):
        assert text in html
    assert "&gt;" not in html[html.index("<style>") : html.index("</style>")]
    identities = re.findall(r'<clipPath id="(\w+)"', html)
    assert len(identities) == len(set(identities))


def test_a_run_without_answers_has_a_page_that_says_so() -> None:
    html = page([FAILED])
    assert "<svg" not in html
    assert "no request was answered: there is nothing to tell of it" in html
    assert "status 503" in html


def test_a_run_without_lanes_shows_times_to_the_first_token() -> None:
    html = page([recorded(short(0), listened=False)])
    assert html.count("<svg") == 2
    assert "Time to first token over the run" in html


def test_a_run_of_one_request_at_time_zero_can_be_drawn(tmp_path: Path) -> None:
    alone = dataclasses.replace(WORKLOAD, arrivals=WORKLOAD.arrivals[:1])
    run = dataclasses.replace(recorded(short(0)), load=load_facts(alone, 0))
    write_files([run], html=str(tmp_path / "one.html"))
    assert "<svg" in (tmp_path / "one.html").read_text(encoding="utf-8")


def test_several_runs_have_files_of_their_own(tmp_path: Path) -> None:
    runs = [GOOD, dataclasses.replace(GOOD, label="nats")]
    write_files(runs, csv=str(tmp_path / "r.csv"), perfetto=str(tmp_path / "t.json.gz"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "r-http.csv",
        "r-nats.csv",
        "t-http.json.gz",
        "t-nats.json.gz",
    ]
    assert (tmp_path / "r-http.csv").read_text(encoding="utf-8").count("\n") == 4


def test_the_window_holds_the_closest_pauses_of_the_long_with_most() -> None:
    assert pauses_window(SPANS) == pytest.approx((2.79, 4.61))
    assert pauses_window([span for span in SPANS if span.kind != "paused"]) is None
    close = [Span("w", "paused", at_s, at_s + 0.1, "m") for at_s in (1.0, 20.0, 20.5, 21.0, 21.5, 22.0, 60.0)]
    window = pauses_window([*SPANS, *close])
    assert window is not None
    assert 19.0 < window[0] < 20.0
    assert 22.1 < window[1] < 23.0


def test_of_many_workers_those_with_pauses_and_longs_are_drawn() -> None:
    busy = [Span(f"w{number}", "short prefill", 0.0, 1.0, "s") for number in range(100)]
    spans = [*busy, Span("w99", "paused", 0.0, 1.0, "l"), Span("w50", "long prefill", 0.0, 1.0, "l")]
    shown = lanes_shown(spans)
    assert len(shown) == LANES_MAX
    assert shown[-2:] == ["w50", "w99"]
    assert lanes_shown(SPANS) == ["prefill-0", "decode-0 decode"]


def test_the_table_stands_on_a_console(capsys: pytest.CaptureFixture[str]) -> None:
    show([figures_of(GOOD)])
    out = capsys.readouterr().out
    assert "small: 2 shorts, 1 longs in 2 s" in out
    assert re.search(r"TTFT p50 +250\.0 ms +4\.00 s", out)
    assert "http: the client was late at sending, p99: 3.0 ms, target 10.0 ms: met" in out
