"""`loadtest mixed` end to end on a cluster with timed engines, and the keys of its JSON."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from common.errors import StartupError
from common.messages.sp import GroupPaused, GroupResumed
from loadtest import mixed
from loadtest.__main__ import main, parse
from loadtest.cluster import served
from loadtest.runner import MeasurementFailed

SETTING_KEYS = {
    "short_ttft_s": {"p50", "p95", "p99"},
    "short_rps": None,
    "long_jct_s": {"mean", "max"},
    "pauses": None,
    "pause_latency_s": {"p50", "p99"},
    "failed": None,
}


def keys_of(figures: dict[str, Any]) -> dict[str, set[str] | None]:
    return {key: set(value) if isinstance(value, dict) else None for key, value in figures.items()}


def test_three_settings_on_one_schedule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mixed.json"
    arguments = ["mixed", "--seed", "7", "--shorts", "10", "--longs", "1", "--short-rps", "6", "--long-rps", "2"]
    arguments += ["--short-tokens", "16-48", "--long-tokens", "2100-2200"]
    flags = "--engine timed --prefill-workers 1"
    assert main([*arguments, "--serve", flags, "--json", str(out)]) == 0

    figures = msgspec.json.decode(out.read_bytes())
    assert set(figures) == {"shorts_only", "fifo", "pecsched", "run"}
    assert "long_jct_groups_to_pecsched" not in figures["run"]
    for name in ("shorts_only", "fifo", "pecsched"):
        assert keys_of(figures[name]) == SETTING_KEYS
        assert figures[name]["failed"] == 0, figures["run"]["failures"]
        ttft = figures[name]["short_ttft_s"]
        assert 0 < ttft["p50"] <= ttft["p95"] <= ttft["p99"]
        assert figures["run"]["client_late_s_p99"][name] is not None
    assert figures["shorts_only"]["long_jct_s"] == {"mean": None, "max": None}
    assert figures["fifo"]["pauses"] == 0
    assert figures["fifo"]["pause_latency_s"] == {"p50": None, "p99": None}
    assert 0 < figures["fifo"]["long_jct_s"]["mean"] <= figures["fifo"]["long_jct_s"]["max"]
    # The only prefill worker has a long when the last shorts come.
    assert figures["pecsched"]["pauses"] > 0
    assert figures["pecsched"]["pause_latency_s"]["p99"] > 0
    assert figures["run"]["seed"] == 7
    assert figures["run"]["short_rate_rps"] == 6
    assert figures["run"]["short_p99_pecsched_to_alone"] == pytest.approx(
        figures["pecsched"]["short_ttft_s"]["p99"] / figures["shorts_only"]["short_ttft_s"]["p99"]
    )
    table = capsys.readouterr().out
    assert "mixed, PecSched" in table
    assert "PecSched's short p99 / shorts alone" in table


def test_groups_are_one_more_setting_of_the_same_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mixed.json"
    arguments = ["mixed", "--groups", "2", "--shorts", "6", "--longs", "1", "--short-rps", "6", "--long-rps", "2"]
    arguments += ["--short-tokens", "16-48", "--long-tokens", "2100-2200", "--rounds", "2"]
    assert main([*arguments, "--serve", "--engine timed --prefill-workers 2", "--json", str(out)]) == 0

    figures = msgspec.json.decode(out.read_bytes())
    assert keys_of(figures["groups"]) == SETTING_KEYS
    assert figures["groups"]["failed"] == 0, figures["run"]["failures"]
    workers = figures["run"]["workers_per_long"]
    assert workers["shorts_only"] is None
    assert 1 == workers["pecsched"] < workers["groups"] <= 2
    rounds = figures["run"]["rounds"]
    assert len(rounds) == 2
    assert rounds[0] == {name: figures[name] for name in ("pecsched", "groups")}
    assert rounds[1]["pecsched"]["long_jct_s"] != rounds[0]["pecsched"]["long_jct_s"]
    ratios = [each["groups"]["long_jct_s"]["mean"] / each["pecsched"]["long_jct_s"]["mean"] for each in rounds]
    assert figures["run"]["long_jct_groups_to_pecsched"] == pytest.approx(sum(ratios) / 2)
    table = capsys.readouterr().out
    assert "medians of 2 rounds" in table
    assert "mean long JCT with groups of up to 2 / without" in table
    assert "short p99 with groups of up to 2 / without" in table


async def test_a_cluster_that_cannot_start_says_why() -> None:
    said: list[str] = []
    async with asyncio.timeout(60):
        with pytest.raises(StartupError, match="did not start") as caught:
            async with served(("--threshold-tokens", "many"), said.append):
                pytest.fail("it started")
    assert "--threshold-tokens" in str(caught.value).splitlines()[-1]


def test_flags_for_a_cluster_that_runs_already_are_refused() -> None:
    with pytest.raises(MeasurementFailed, match="leave them out with --url"):
        mixed.run(mixed.MixedOptions(url="http://127.0.0.1:1", pecsched_flags=("--group-max", "2")))
    with pytest.raises(MeasurementFailed, match="say --groups N"):
        mixed.run(mixed.MixedOptions(rounds=2))
    with pytest.raises(MeasurementFailed, match="--groups starts a cluster of its own"):
        mixed.run(mixed.MixedOptions(url="http://127.0.0.1:1", groups=2))


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["unknown"],
        ["mixed", "--shorts", "0"],
        ["mixed", "--short-tokens", "9-3"],
        ["mixed", "--long-rps", "0"],
        ["mixed", "--groups", "1"],
        ["pause", "--dtype", "int8"],
    ],
)
def test_a_mistake_on_the_command_line_is_status_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(arguments)
    assert caught.value.code == 2


def test_a_json_file_that_cannot_be_written_is_found_out_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["engine", "--json", str(tmp_path / "missing" / "out.json")]) == 1
    assert "there is no folder" in capsys.readouterr().err


def test_a_pause_that_is_told_again_is_one_pause() -> None:
    def paused(latency_s: float, name: str = "a") -> GroupPaused:
        return GroupPaused(request_id=name, attempt=0, step=3, prefilled_tokens=0, pause_latency_s=latency_s)

    resumed = GroupResumed(request_id="a", attempt=0)
    heard = [paused(0.02), paused(0.02), paused(0.05, "b"), paused(0.02), resumed, paused(0.03), paused(0.05, "b")]
    assert mixed.pause_latencies_s(heard) == (0.02, 0.05, 0.03)
