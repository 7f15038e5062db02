"""Workloads of the simulator: from trace files, from the generator, and what is made of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from loadtest.simulator.synthetic import CODE_PROMPT, CONV_PROMPT, HOUR_S, TRACE_RPS, synthetic
from loadtest.simulator.traces import read_azure, read_trace
from loadtest.simulator.workload import Arrival, Workload, WorkloadError, make_workload, rewrite_longs
from loadtest.stats import percentile

Write = Callable[..., Path]
"""Writes a file, and says where."""

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
CONV = f"""{HEADER}
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:50.9951690,1020,7
"""
CODE = f"{HEADER}\r\n2023-11-16 18:15:47.6805900,4808,10\r\n2023-11-16 18:15:48.1805900,3180,8"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(text: str | bytes, name: str = "trace.csv") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return written


def refusal(path: Path) -> str:
    """What is said of it, without its folder; always one line."""
    with pytest.raises(WorkloadError) as caught:
        read_trace([path])
    said = str(caught.value)
    assert "\n" not in said
    return said.replace(f"{path.parent}/", "")


def at_percent(values: Iterable[float], percent: float) -> float:
    found = percentile(values, percent)
    assert found is not None
    return found


def ramp(count: int = 100) -> Workload:
    """Prompts of 1 to `count` tokens, one a second, the longest first."""
    return make_workload("ramp", (Arrival(float(at), count - at, at + 1) for at in range(count)))


# --- traces ------------------------------------------------------------------------------------------


def test_azure_counts_from_its_first_request(write: Write) -> None:
    workload = read_azure(write(CONV))
    assert [(round(at_s, 6), *rest) for at_s, *rest in workload.arrivals] == [
        (0.0, 374, 44),
        (4.314579, 396, 109),
        (4.314579, 1020, 7),
    ]
    assert workload.name == "trace"


def test_azure_files_are_merged_by_time(write: Write, tmp_path: Path) -> None:
    conv, code = write(CONV, "conv.csv"), write(CODE, "code.csv")
    merged = read_azure(conv, code)
    assert [arrival.prompt_tokens for arrival in merged.arrivals] == [374, 4808, 3180, 396, 1020]
    assert [round(arrival.at_s, 3) for arrival in merged.arrivals] == [0.0, 1.0, 1.5, 4.315, 4.315]
    assert sorted(read_azure(tmp_path).arrivals) == sorted(merged.arrivals)


def test_azure_columns_are_found_by_name_and_zones_are_heeded(write: Write) -> None:
    text = (
        "\ufeffGeneratedTokens,Model,TIMESTAMP,ContextTokens\n"
        "5,a,2024-05-10 02:00:00+02:00,100\n\n"
        "6,b,2024-05-10 00:00:01.5,200\n"
    )
    assert read_azure(write(text)).arrivals == (Arrival(0.0, 100, 5), Arrival(1.5, 200, 6))


def test_mooncake_is_in_milliseconds(write: Write) -> None:
    lines = (
        '{"timestamp": 3000, "input_length": 6758, "output_length": 500, "hash_ids": [1, 2]}\n'
        '{"timestamp": 3052.5, "input_length": 7322, "output_length": 490}\n'
    )
    workload = read_trace([write(lines, "trace.jsonl")])
    assert [arrival[1:] for arrival in workload.arrivals] == [(6758, 500), (7322, 490)]
    assert [arrival.at_s for arrival in workload.arrivals] == pytest.approx([0.0, 0.0525])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "trace.csv: the file is empty"),
        (f"{HEADER}\n", "trace.csv: a header and no requests"),
        (
            "TIMESTAMP,Context,GeneratedTokens\n",
            "trace.csv:1: column 'ContextTokens' is missing; the header is 'TIMESTAMP,Context,GeneratedTokens'",
        ),
        (
            f"{HEADER},TIMESTAMP\n",
            f"trace.csv:1: column 'TIMESTAMP' is there twice; the header is '{HEADER},TIMESTAMP'",
        ),
        (f"{CONV}soon,1,1\n", "trace.csv:5: TIMESTAMP: 'soon' is not a time"),
        (f"{CONV}2023-11-16 18:15:51,many,1\n", "trace.csv:5: ContextTokens: 'many' is not a whole number"),
        (f"{CONV}2023-11-16 18:15:51,1.5,1\n", "trace.csv:5: ContextTokens: '1.5' is not a whole number"),
        (f"{CONV}2023-11-16 18:15:51,1,-3\n", "trace.csv:5: GeneratedTokens: -3 is not between 1 and 1000000000"),
        (f"{CONV}2023-11-16 18:15:51,0,3\n", "trace.csv:5: ContextTokens: 0 is not between 1 and 1000000000"),
        (f"{CONV}2023-11-16 18:15:51,7\n", "trace.csv:5: 2 columns, and the header has more"),
        (
            f"{CONV}2023-11-16 18:15:50.1,7,7\n",
            "trace.csv:5: TIMESTAMP: 2023-11-16 18:15:50.1 is before the line above",
        ),
        (b"TIMESTAMP,\xff\n", "trace.csv: not UTF-8: invalid start byte at byte 10"),
        (f'{CONV}"2023\n', "trace.csv:5: not CSV: unexpected end of data"),
    ],
)
def test_a_wrong_azure_trace_is_named_with_its_line(write: Write, text: str | bytes, said: str) -> None:
    assert refusal(write(text)) == said


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "no requests"),
        ("timestamp", ":1: JSON is malformed: invalid character (byte 4)"),
        ('{"timestamp": 1, "input_length": 2}', ":1: Object missing required field `output_length`"),
        (
            '{"timestamp": 1, "input_length": "x", "output_length": 2}',
            ":1: Expected `int`, got `str` - at `$.input_length`",
        ),
        (
            '{"timestamp": 1, "input_length": 5, "output_length": -1}',
            ":1: Expected `int` >= 1 - at `$.output_length`",
        ),
        (
            '{"timestamp": 9, "input_length": 5, "output_length": 1}\n'
            '{"timestamp": 8, "input_length": 5, "output_length": 1}',
            ":2: timestamp: 8 is before the line above",
        ),
    ],
)
def test_a_wrong_mooncake_trace_is_named_with_its_line(write: Write, line: str, said: str) -> None:
    assert refusal(write(line, "trace.jsonl")).removeprefix("trace.jsonl").removeprefix(": ") == said


def test_what_is_not_there_is_named(write: Write, tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.csv") == "none.csv: No such file or directory"
    assert refusal(tmp_path / "none.jsonl") == "none.jsonl: No such file or directory"
    with pytest.raises(WorkloadError, match=r"no \*.csv in this folder"):
        read_trace([tmp_path])
    with pytest.raises(WorkloadError, match=r"a.jsonl: a Mooncake trace is read alone"):
        read_trace([write(CONV), tmp_path / "a.jsonl"])


# --- what is made of a workload ----------------------------------------------------------------------


def test_the_longest_five_percent_become_longs_and_keep_the_rest() -> None:
    before = ramp()
    after = rewrite_longs(before, low=1_000, high=2_000, seed=3)
    assert after.threshold_tokens == before.threshold_tokens == 95
    assert (after.longs, after.shorts) == (5, 95)
    assert all(1_000 <= arrival.prompt_tokens <= 2_000 for arrival in after.arrivals[:5])
    assert after.arrivals[5:] == before.arrivals[5:]
    assert [(a.at_s, a.output_tokens) for a in after.arrivals] == [(a.at_s, a.output_tokens) for a in before.arrivals]


def test_longs_are_uniform_and_seeded() -> None:
    many = ramp(40_000)
    lengths = [a.prompt_tokens for a in rewrite_longs(many, seed=1).arrivals if a.prompt_tokens > 50_000]
    assert len(lengths) == 2_000
    assert min(lengths) < 101_000 < 499_000 < max(lengths)
    assert abs(statistics.mean(lengths) - 300_000) < 10_000
    assert abs(at_percent(lengths, 25) - 200_000) < 15_000
    assert rewrite_longs(many, seed=1) == rewrite_longs(many, seed=1) != rewrite_longs(many, seed=2)


def test_a_rewrite_that_makes_no_longs_is_refused() -> None:
    with pytest.raises(WorkloadError, match="longs of 90 to 200 tokens are not longer than the shorts"):
        rewrite_longs(ramp(), low=90, high=200)
    with pytest.raises(WorkloadError, match="the range is empty"):
        rewrite_longs(ramp(), low=300, high=200)
    with pytest.raises(WorkloadError, match="percentile of 101"):
        rewrite_longs(ramp(), percentile=101)


def test_without_longs_the_shorts_come_when_they_came() -> None:
    mixed = rewrite_longs(ramp(), low=1_000, high=2_000)
    alone = mixed.without_longs()
    assert alone.arrivals == mixed.arrivals[5:]
    assert (alone.longs, alone.threshold_tokens) == (0, 95)


def test_scaling_changes_times_alone() -> None:
    fast = ramp().scaled(4.0)
    assert [a.at_s * 4 for a in fast.arrivals] == [a.at_s for a in ramp().arrivals]
    assert [a[1:] for a in fast.arrivals] == [a[1:] for a in ramp().arrivals]
    assert ramp().scaled(1.0) == ramp()
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="rate scale"):
            ramp().scaled(wrong)


def test_the_first_seconds_end_before_their_last_moment() -> None:
    cut = ramp().first(10.0)
    assert [a.at_s for a in cut.arrivals] == [float(at) for at in range(10)]
    assert cut.threshold_tokens == 95  # of the whole: the same request is long in both
    assert ramp().first(ramp().duration_s) != ramp()  # its last arrival is at that very moment
    assert ramp().first(ramp().duration_s + 0.1) == ramp()


def test_a_workload_that_ends_early_says_how_far_it_went() -> None:
    cut = ramp().first(600.0)
    assert cut.arrivals == ramp().arrivals
    assert cut.name.endswith("ends after 99 s of 600 s")
    with pytest.raises(WorkloadError, match="nothing arrives in the first 5 s"):
        Workload("late", (Arrival(6.0, 1, 1),), 1).first(5.0)


def test_a_thinned_workload_keeps_a_share_of_the_requests_at_their_times() -> None:
    many = Workload("many", tuple(Arrival(float(at), at + 1, 1) for at in range(2000)), 1900)
    some = many.thinned(0.25, seed=3)
    assert 0.2 < len(some.arrivals) / len(many.arrivals) < 0.3
    assert set(some.arrivals) < set(many.arrivals)
    assert list(some.arrivals) == sorted(some.arrivals)
    assert some.threshold_tokens == 1900
    assert many.thinned(0.25, seed=3) == some != many.thinned(0.25, seed=4)
    assert many.thinned(1.0, seed=3) is many
    with pytest.raises(WorkloadError, match="is none"):
        many.thinned(1e-9, seed=3)


# --- the generator -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hour() -> Workload:
    return synthetic(seed=5)


def test_the_default_hour_has_the_traces_requests_and_percentiles(hour: Workload) -> None:
    assert len(hour.arrivals) == 28_185
    assert hour.arrivals == tuple(sorted(hour.arrivals))
    assert 3_590.0 < hour.duration_s < HOUR_S
    prompts = [arrival.prompt_tokens for arrival in hour.arrivals]
    outputs = [arrival.output_tokens for arrival in hour.arrivals]
    # The trace's percentiles, and how far from them this generator may be.
    for percent, trace in ((50, 1046), (80, 2170), (95, 4141), (99, 7435)):
        assert abs(at_percent(prompts, percent) / trace - 1) < 0.02
    for percent, trace in ((50, 90), (80, 387), (95, 433), (99, 581)):
        assert abs(at_percent(outputs, percent) / trace - 1) < 0.08
    assert abs(sum(prompt < 2_000 for prompt in prompts) / len(prompts) - 0.78) < 0.01
    assert min(prompts) >= CONV_PROMPT.values[0]
    assert max(prompts) <= max(*CONV_PROMPT.values, *CODE_PROMPT.values)


def test_its_arrivals_are_as_bursty_as_the_traces(hour: Workload) -> None:
    """Variance over mean of arrivals per window; the trace: 5.1 per second, 26 per 10 s; Poisson: 1."""
    for window_s, low, high in ((1.0, 3.5, 6.0), (10.0, 16.0, 36.0)):
        counts = [0] * int(HOUR_S / window_s)
        for arrival in hour.arrivals:
            counts[int(arrival.at_s / window_s)] += 1
        assert low < statistics.pvariance(counts) / statistics.mean(counts) < high


def test_a_seed_is_a_workload(hour: Workload) -> None:
    assert synthetic(5) == hour
    assert synthetic(6, 60.0).arrivals != hour.first(60.0).arrivals


def test_a_shorter_one_is_the_beginning_and_a_longer_one_goes_on(hour: Workload) -> None:
    assert synthetic(5, 600.0).arrivals == hour.first(600.0).arrivals
    longer = synthetic(5, 5_400.0)
    assert longer.first(HOUR_S).arrivals == hour.arrivals
    assert longer.duration_s > 5_300.0


def test_another_rate_is_the_same_at_another_speed(hour: Workload) -> None:
    fast = synthetic(5, 360.0, 10 * TRACE_RPS)
    assert len(fast.arrivals) == 28_185
    assert [a[1:] for a in fast.arrivals] == [a[1:] for a in hour.arrivals]
    assert fast.arrivals[1_000].at_s == pytest.approx(hour.arrivals[1_000].at_s / 10)
    for seconds, rate in ((0.0, 1.0), (1.0, 0.0), (1.0, float("inf"))):
        with pytest.raises(ValueError, match="must be more than 0"):
            synthetic(5, seconds, rate)
