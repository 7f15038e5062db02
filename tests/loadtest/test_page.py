"""`loadtest page`: the load lasts for both windows, figures are set beside what was promised, and bad input. What the
page costs is measured on a quiet machine, not here."""

from __future__ import annotations

import pytest

from loadtest import page
from loadtest.__main__ import main


def figures(share: float, frames: float, failed: int = 0) -> dict:
    return {
        "lanes": 64,
        "rps": {"short": 20.0, "long": 0.5},
        "window_s": 10.0,
        "failed": failed,
        "frames_per_s": frames,
        "router_share": {"alone": 0.1, "watched": 0.1 + share, "page": share},
    }


def test_the_load_lasts_until_the_second_window_ends() -> None:
    options = page.PageOptions(window_s=7.0, short_rps=30.0, long_rps=0.4)
    schedule = page._schedule(options)
    needed_s = page.OPEN_S + 2 * (page.FILL_S + options.window_s)
    assert schedule.duration_s > 0.8 * needed_s  # arrivals are random: some seconds less, or more
    assert schedule.count("short") >= 30 * needed_s
    assert schedule.count("long") >= 1


def test_figures_stand_beside_what_was_promised(capsys: pytest.CaptureFixture[str]) -> None:
    page.show(figures(share=0.012, frames=41.0))
    met = capsys.readouterr().out
    assert "64 workers" in met
    assert "cost: 1.2%, target 5.0%: met" in met
    assert "frames: 41 per second, target 20 or more: met" in met
    page.show(figures(share=0.09, frames=12.0, failed=3))
    missed = capsys.readouterr().out
    assert missed.count("MISSED") == 2
    assert "3 requests failed" in missed


def test_without_a_browser_it_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(page.shutil, "which", lambda name: None)
    assert main(["page"]) == 1
    assert capsys.readouterr().err == "loadtest page: no Chromium on PATH (Debian: apt-get install chromium)\n"


@pytest.mark.parametrize(
    ("flags", "status", "says"),
    [(["--window-s", "0"], 2, "more than 0"), (["--screenshot", "/no/such/shot.png"], 1, "there is no folder")],
)
def test_bad_input_is_one_line(flags: list[str], status: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        found = main(["page", *flags])
    except SystemExit as left:
        found = int(str(left.code))
    assert found == status
    assert says in capsys.readouterr().err.splitlines()[-1]
