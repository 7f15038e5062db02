"""One run of `loadtest run`: prompts prepared, sent by a process of their own, listened to, put together."""

from __future__ import annotations

import asyncio
import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from uuid import uuid4

import msgspec

from common.messages.requests import LengthClass
from loadtest import report
from loadtest.cluster import Place, observing
from loadtest.fitting import FitFacts
from loadtest.live_lanes import KINDS, SUBJECTS, Lanes, life_of, shifted
from loadtest.run_report.record import Recorded, load_facts
from loadtest.runner import MeasurementFailed
from loadtest.sender import Answered, Done, Failed, Said, Send, SendPlan, Sent, Via, WarmedUp
from loadtest.simulator.result import Outcome
from loadtest.simulator.workload import Workload, WorkloadError
from loadtest.workload import FIRST_ID, VOCAB, http_body, nats_body
from services.children import LAUNCHER

WARM_UP_TOKENS, WARM_UP_OUTPUT = 64, 4
SETTLE_S = 0.3
"""After the last answer: what the roles still say of it."""
BODIES_BYTES_MAX = 2 * 1024**3
TOKEN_BYTES = 6
"""Of a token id in JSON, about."""
LINE_BYTES_MAX = 256 * 1024**2
KILL_S = 5.0

_decode_said = msgspec.json.Decoder(Said).decode


@dataclass(frozen=True, slots=True)
class Target:
    """What is asked, and how."""

    place: Place
    cluster: str
    """In a line."""
    api_key: str
    timeout_s: float
    warm_up: int
    seed: int
    listen: bool


@dataclass(frozen=True, slots=True)
class Replay:
    """One run, one way in."""

    target: Target
    workload: Workload
    facts: FitFacts
    via: Via

    async def perform(self, bars: report.Bars) -> Recorded:
        """Raises: MeasurementFailed, StartupError."""
        with bars.counting(f"preparing {len(self.workload.arrivals)} prompts", len(self.workload.arrivals)) as step:
            plan = self._plan(step)
        lanes = Lanes()
        place = self.target.place if self.target.listen else Place(self.target.place.url)
        async with observing(place, SUBJECTS, *KINDS, tell=lanes.hear) as listening:
            with bars.counting(f"{self.via}: {len(plan.sends)} requests", len(plan.sends)) as step:
                zero_s, done = await send(plan, step)
            await asyncio.sleep(SETTLE_S)
        lanes.close(asyncio.get_running_loop().time())
        return self._recorded(plan, lanes, zero_s, done, listened=listening is not None)

    def _plan(self, step: Callable[[], None]) -> SendPlan:
        self._check_size()
        rng = random.Random(f"{self.target.seed}/prompts")
        threshold = self.workload.threshold_tokens
        run_id = uuid4().hex[:8]
        sends = []
        for number, (at_s, prompt, output) in enumerate(self.workload.arrivals):
            kind: LengthClass = "long" if prompt > threshold else "short"
            sends.append(self._send(rng, f"load-{run_id}-{number}", at_s, kind, prompt, output))
            step()
        return SendPlan(
            via=self.via,
            url=self.target.place.url if self.via == "http" else self.target.place.nats_url,
            api_key=self.target.api_key,
            timeout_s=self.target.timeout_s,
            warm_up=tuple(self._warm_up(f"warm-{run_id}")),
            sends=tuple(sends),
        )

    def _warm_up(self, name: str) -> Iterator[Send]:
        """First uses cost more than all later ones: connections, code, memory."""
        if not self.target.warm_up:
            return
        rng = random.Random(f"{self.target.seed}/warm-up")
        for number in range(self.target.warm_up):
            tokens = min(WARM_UP_TOKENS, self.workload.threshold_tokens)
            yield self._send(rng, f"{name}-{number}", 0.0, "short", tokens, WARM_UP_OUTPUT)
        longs = [a.prompt_tokens for a in self.workload.arrivals if a.prompt_tokens > self.workload.threshold_tokens]
        if longs:
            yield self._send(rng, f"{name}-long", 0.0, "long", min(longs), WARM_UP_OUTPUT)

    def _send(
        self, rng: random.Random, name: str, at_s: float, kind: LengthClass, prompt_tokens: int, output_tokens: int
    ) -> Send:
        prompt = rng.choices(range(FIRST_ID, VOCAB), k=prompt_tokens)
        over_http = self.via == "http"
        body = http_body(prompt, output_tokens) if over_http else nats_body(prompt, output_tokens, name)
        return Send(
            at_s=at_s,
            kind=kind,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            request_id=name,
            body=body,
        )

    def _check_size(self) -> None:
        """Raises: WorkloadError, if the prompts do not fit into memory."""
        total = TOKEN_BYTES * sum(arrival.prompt_tokens for arrival in self.workload.arrivals)
        if total > BODIES_BYTES_MAX:
            said = f"{len(self.workload.arrivals)} prompts are {total / 1024**3:.1f} GiB, prepared in memory"
            raise WorkloadError(f"{said}: take less of the trace (--first, --keep)")

    def _recorded(self, plan: SendPlan, lanes: Lanes, zero_s: float, done: Done, *, listened: bool) -> Recorded:
        outcomes = [outcome_of(each, sent, lanes, zero_s) for each, sent in zip(plan.sends, done.sent, strict=True)]
        return Recorded(
            label=self.via,
            kind="live",
            cluster=self.target.cluster,
            load=load_facts(self.workload, self.target.seed, self.facts.lines()),
            outcomes=outcomes,
            spans=shifted(lanes.spans, zero_s),
            late_s=[sent.sent_s - each.at_s for each, sent in zip(plan.sends, done.sent, strict=True)],
            client_busy=done.busy,
            listened=listened,
            notes=tuple(_doubts(outcomes, lanes)) if listened else ("nobody listened on NATS: no queueing delays",),
        )


def outcome_of(send: Send, sent: Sent, lanes: Lanes, zero_s: float) -> Outcome:
    """One request, as the client saw it and as it was overheard."""
    life = life_of(lanes.lives, send.request_id)
    return Outcome(
        request_id=send.request_id,
        long=send.kind == "long",
        arrived_s=send.at_s,
        prompt_tokens=send.prompt_tokens,
        output_tokens=send.output_tokens,
        prefill_started_s=None if life.started_s is None else life.started_s - zero_s,
        first_token_s=sent.first_s,
        finished_s=sent.last_s if sent.failure is None else None,
        failure=sent.failure,
        pauses=life.pauses,
        suspended_s=life.suspended_s,
    )


def _doubts(outcomes: list[Outcome], lanes: Lanes) -> Iterator[str]:
    """What the bus told otherwise than was thought."""
    answered = [outcome for outcome in outcomes if outcome.failure is None]
    if answered and all(outcome.prefill_started_s is None for outcome in answered):
        yield "nothing was heard of these requests on NATS: is --nats-url that of the cluster?"
    wrong = sum(bool(life_of(lanes.lives, o.request_id).members) != o.long for o in answered if o.prefill_started_s)
    if wrong:
        yield f"{wrong} requests were of the other class to the scheduler: is --threshold-tokens that of the cluster?"
    if lanes.dropped:
        yield f"the lanes end early: {lanes.dropped} further spans were not kept"


async def send(plan: SendPlan, step: Callable[[], None]) -> tuple[float, Done]:
    """Have it performed by a process of its own: time zero, and what came of it. Raises: MeasurementFailed."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", str(LAUNCHER), str(os.getpid())),
        *(sys.executable, "-P", "-m", "loadtest.sender"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=LINE_BYTES_MAX,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(msgspec.msgpack.encode(plan))
        process.stdin.close()
        return await _heard(process.stdout, step)
    finally:
        if process.returncode is None:
            process.kill()
        async with asyncio.timeout(KILL_S):
            await process.wait()


async def _heard(lines: asyncio.StreamReader, step: Callable[[], None]) -> tuple[float, Done]:
    zero_s: float | None = None
    async for line in lines:
        said: Said = _decode_said(line)
        match said:
            case WarmedUp(zero_s=at_s):
                zero_s = at_s
            case Answered():
                step()
            case Failed(reason=reason):
                raise MeasurementFailed(reason)
            case Done() as done:
                assert zero_s is not None
                return zero_s, done
    raise MeasurementFailed("the process that sends ended before its plan was done")
