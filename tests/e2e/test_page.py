"""The live page over a real cluster: a long paused for shorts, a prompt sent from the box, a router that is lost."""

from __future__ import annotations

import asyncio

import pytest

from tests.browser import needs_chromium, tab
from tests.e2e.served import Served, clients, serving

pytestmark = [needs_chromium, pytest.mark.asyncio(loop_scope="module")]

PAUSES = """() => {
  const { model } = window.pecsched;
  const found = [];
  for (const lane of model.order) {
    const all = [...lane.segments.values()];
    for (const pause of all.filter((s) => s.kind === "pause" && s.end !== null)) {
      const of = (kind) => all.filter((s) => s.kind === kind && s.request === pause.request);
      const before = of("part").some((s) => s.end === pause.begin);
      const after = of("part").some((s) => s.begin === pause.end);
      const meanwhile = all.filter((s) => s.kind === "prefill" && s.begin < pause.end && s.end > pause.begin).length;
      if (before && after && meanwhile) found.push({ lane: lane.name, meanwhile });
    }
  }
  return found.length ? found : null;
}"""
ALL_ENDED = """() => [...window.pecsched.model.lanes.values()]
  .every((lane) => [...lane.segments.values()].every((s) => s.end !== null))"""
"""Nothing goes on where nothing runs."""
KINDS = "() => [...window.pecsched.model.lanes.values()].flatMap((l) => [...l.segments.values()].map((s) => s.kind))"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory):
    with serving(tmp_path_factory.mktemp("page")) as found:
        yield found


async def load(served: Served) -> None:
    """Longs on every prefill worker, and shorts that must pause them."""
    for _ in range(3):
        served.ask(5_000, 8)
    for _ in range(40):
        served.ask(120, 24)
        await asyncio.sleep(0.1)


async def test_a_mixed_run_is_seen_as_it_happens(chromium, running):
    async with clients(running) as served, tab(chromium, running.address("router")) as page:
        await page.until("() => window.pecsched.model.order.length === 3")
        assert await page.text("#about") == "smollm2-135m-instruct · policy pecsched"
        loading = asyncio.get_running_loop().create_task(load(served))
        pauses = await page.until(PAUSES)
        assert {pause["lane"] for pause in pauses} <= {"prefill-0", "prefill-1"}
        await loading
        assert {"part", "pause", "prefill", "handoff", "decode"} <= set(await page.ask(KINDS))
        for _ in range(2):
            await page.page.click("#zoom-in")
        await page.shot("mixed-run")
        await served.ended(served.asked, 60.0)
        await page.until("() => document.querySelector('#f-running').innerText === '0'")
        assert not [q.error for q in served.asked if q.error]
        await page.until(ALL_ENDED)
        assert await page.text("#f-ttft-long") != "–"
        assert int(await page.text("#f-pauses")) > 0


async def test_a_prompt_from_the_box_is_followed_on_its_way(chromium, running):
    async with tab(chromium, running.address("router"), color_scheme="dark") as page:
        await page.until("() => window.pecsched.model.order.length === 3")
        await page.page.fill("#prompt", "What is the capital of France?")
        await page.page.select_option("#tokens", "32")
        await page.page.click("#send")
        await page.until("() => document.querySelector('#stop').hidden && document.querySelector('#answer').innerText")
        await page.until("() => document.querySelectorAll('#way li').length >= 4")
        said = await page.text("#way")
        for step in ("queued at the scheduler", "short prefill", "KV handoff", "decode"):
            assert step in said, said
        await page.page.click("#story summary")
        await page.until("() => document.querySelector('#story-lines').innerText.includes('RunPrefill')")
        await page.shot("watched-dark")
        await page.page.select_option("#length", "2600")
        await page.page.click("#send")
        await page.until("() => document.querySelector('#way').innerText.includes('long prefill')")
        await page.page.click("#stop")
        await page.until("() => document.querySelector('#stop').hidden")
        assert await page.text("#ask-error") == ""


async def test_a_lost_router_is_said_and_found_again(chromium, running):
    async with clients(running) as served, tab(chromium, running.address("router")) as page:
        await page.until("() => window.pecsched.model.order.length === 3")
        assert served.kill("router")
        await page.until("() => document.querySelector('#link').dataset.state === 'lost'")
        assert "tries again by itself" in await page.text("#notice")
        await page.until("() => document.querySelector('#link').dataset.state === 'live'")
        await page.until("() => document.querySelector('#notice').hidden")
        page.errors = [error for error in page.errors if "ERR_" not in error]  # the browser's own word on it
