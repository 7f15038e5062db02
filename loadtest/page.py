"""`python -m loadtest page`: what the live page costs the router, and how smoothly it runs.

A cluster of the timed engine, 60 prefill and 4 decode workers on this machine unless --serve says otherwise, under a
mixed load, and the page in headless Chromium (which must be on PATH). The router's processor time is read over a window
in which the page listens, then over one in which it is cut off from the router, and draws on; the difference is what
the page costs it. (A window before it is opened would be one with more of the cores to itself: a browser makes
everything beside it slower.) Frames are the browser's own (`requestAnimationFrame`), counted in the first window.
Everything runs on the same cores: on fewer cores than the load wants, all figures are worse than on a machine of their
own.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from loadtest import report
from loadtest.client import Client
from loadtest.cluster import Place, served
from loadtest.runner import MeasurementFailed, OpenLoopRun, run_open_loop
from loadtest.workload import Schedule, make_schedule
from services.router.activity_feed import LINGER_S

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER_FLAGS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync")
WORKERS = ("--prefill-workers", "60", "--decode-workers", "4")
FILL_S = 5.0
"""Before the first window: lanes fill."""
HUSH_S = LINGER_S + 2.0
"""Before the second: the router listens on for a while, should the page come back."""
OPEN_S = 15.0
"""How long the browser may take to begin."""
ANSWER_S = 60.0
FRAMES_TARGET = 20.0
COST_TARGET = 0.05
"""Of one core."""


@dataclass(frozen=True, slots=True)
class PageOptions:
    seed: int = 0
    window_s: float = 20.0
    short_rps: float = 20.0
    long_rps: float = 0.5
    screenshot: str = ""
    serve_flags: tuple[str, ...] = ()


def add_flags(parser: argparse.ArgumentParser) -> None:
    options = PageOptions()
    parser.add_argument("--seed", type=int, default=options.seed, help="of all that is random [0]")
    parser.add_argument("--window-s", type=_seconds, default=options.window_s, help="of each measurement [20]")
    parser.add_argument("--short-rps", type=_seconds, default=options.short_rps, help="arrivals per second [20]")
    parser.add_argument("--long-rps", type=_seconds, default=options.long_rps, help="arrivals per second [0.5]")
    parser.add_argument("--screenshot", default="", metavar="FILE", help="write what the page shows there (PNG)")
    parser.add_argument("--serve", default="", metavar="FLAGS", help="more flags for `pecsched serve`, as one argument")


def run_flags(flags: argparse.Namespace) -> dict[str, Any]:
    """Raises: MeasurementFailed, StartupError, ReportError."""
    report.check_writable(flags.screenshot, "--screenshot")
    options = PageOptions(
        seed=flags.seed,
        window_s=flags.window_s,
        short_rps=flags.short_rps,
        long_rps=flags.long_rps,
        screenshot=str(Path(flags.screenshot).expanduser()) if flags.screenshot else "",
        serve_flags=("--engine", "timed", *WORKERS, *shlex.split(flags.serve)),
    )
    return asyncio.run(_run(options))


async def _run(options: PageOptions) -> dict[str, Any]:
    chromium = next(filter(None, map(shutil.which, BROWSERS)), None)
    if chromium is None:
        raise MeasurementFailed("no Chromium on PATH (Debian: apt-get install chromium)")
    with report.progress() as bars, bars.waiting("cluster"):
        async with served(options.serve_flags, bars.say) as place:
            client = Client(place.url, timeout_s=ANSWER_S)
            try:
                return await _measure(options, place, client, chromium)
            finally:
                await client.close()


async def _measure(options: PageOptions, place: Place, client: Client, chromium: str) -> dict[str, Any]:
    router = _router()
    loading = asyncio.get_running_loop().create_task(run_open_loop(client, _schedule(options), lambda: None))
    try:
        async with _open(place.url, chromium) as page:
            await asyncio.sleep(FILL_S)
            before, begun_s = await _frames(page), time.monotonic()
            watched = await _busy_share(router, options.window_s)
            frames = (await _frames(page) - before) / (time.monotonic() - begun_s)
            lanes = await page.evaluate("() => window.pecsched.model.order.length")
            if options.screenshot:
                await page.screenshot(path=options.screenshot, full_page=True)
            await _cut_off(page)
            await asyncio.sleep(HUSH_S)
            alone = await _busy_share(router, options.window_s)
        load = await loading
    finally:
        loading.cancel()
        with suppress(asyncio.CancelledError):
            await loading
    return _figures(options, load) | {
        "lanes": lanes,
        "frames_per_s": frames,
        "router_share": {"alone": alone, "watched": watched, "page": max(0.0, watched - alone)},
    }


def _schedule(options: PageOptions) -> Schedule:
    lasting_s = OPEN_S + FILL_S + HUSH_S + 2 * options.window_s
    return make_schedule(
        options.seed,
        short_rps=options.short_rps,
        long_rps=options.long_rps,
        shorts_min=max(1, round(options.short_rps * lasting_s)),
        longs_min=max(1, round(options.long_rps * lasting_s)),
    )


def _figures(options: PageOptions, load: OpenLoopRun) -> dict[str, Any]:
    return {
        "window_s": options.window_s,
        "rps": {"short": load.rps("short"), "long": load.rps("long")},
        "failed": len(load.failures),
    }


def _router() -> psutil.Process:
    """The one of the cluster that this process started."""
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if child.cmdline()[-1] == "router":
                return child
    raise MeasurementFailed("the router's process was not found")


async def _busy_share(process: psutil.Process, window_s: float) -> float:
    """Processor seconds per second."""
    before, begun_s = process.cpu_times(), time.monotonic()
    await asyncio.sleep(window_s)
    after = process.cpu_times()
    used_s: float = after.user + after.system - before.user - before.system
    return used_s / (time.monotonic() - begun_s)


@asynccontextmanager
async def _open(url: str, chromium: str) -> AsyncIterator[Any]:
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=list(BROWSER_FLAGS))
        try:
            page = await browser.new_page(viewport={"width": 1440, "height": 900})
            await page.goto(url, timeout=OPEN_S * 1e3)
            await page.wait_for_function("() => window.pecsched.model.order.length > 0", timeout=OPEN_S * 1e3)
            yield page
        finally:
            await browser.close()


async def _cut_off(page: Any) -> None:
    """From its router, for good."""
    await page.context.set_offline(True)
    await page.evaluate("() => window.stop()")  # what is under way does not mind being offline
    await page.wait_for_function("() => document.getElementById('link').dataset.state === 'lost'", timeout=OPEN_S * 1e3)


async def _frames(page: Any) -> int:
    return int(await page.evaluate("() => window.pecsched.frames()"))


def _seconds(text: str) -> float:
    number = float(text)
    if not 0.0 < number < 1e6:
        raise argparse.ArgumentTypeError("must be more than 0")
    return number


def show(figures: dict[str, Any]) -> None:
    share = figures["router_share"]
    rows = [
        ["router, page cut off, of one core", f"{share['alone']:.1%}"],
        ["router, page listening", f"{share['watched']:.1%}"],
        ["the page's share of it", f"{share['page']:.1%}"],
        ["frames per second", f"{figures['frames_per_s']:.0f}"],
    ]
    rps = figures["rps"]
    title = f"{figures['lanes']} workers, {rps['short']:.1f} shorts and {rps['long']:.2f} longs a second"
    verdict = "met" if figures["frames_per_s"] >= FRAMES_TARGET else "MISSED"
    notes = [
        report.target("cost", share["page"], COST_TARGET, lambda part: f"{part:.1%}" if part is not None else "–"),
        f"frames: {figures['frames_per_s']:.0f} per second, target {FRAMES_TARGET:.0f} or more: {verdict}",
    ]
    if figures["failed"]:
        notes.append(f"{figures['failed']} requests failed")
    report.table(title, ["", ""], rows, ["", *notes])
