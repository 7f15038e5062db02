"""What the router measures and tells of its requests: what their clients see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from common.messages.requests import FinishReason
from common.metrics import (
    CLASSES,
    E2E,
    FAILURE,
    GENERATION_TOKENS,
    IN_HAND,
    ITL,
    PROMPT_TOKENS,
    SUCCESS,
    TTFT,
    Metrics,
)
from common.tracing import Span, Tracer, new_trace, parse_traceparent
from common.units import RequestId
from services.router.api_errors import REFUSALS, ApiError
from services.router.tickets import Choice, RequestTrace, Ticket
from services.router.validate import ChatPrompt, Plan

ABORTED = "abort"
"""vLLM's word for a request whose client left, or that was cancelled."""
ENDS = ("stop", "length", ABORTED)
CANCELLED = "request_cancelled"
UNKNOWN = "unknown"
"""The class of a request whose acceptance was never heard."""


class ClassSeries:
    """What is measured of requests of one length class."""

    __slots__ = ("e2e", "generation_tokens", "itl", "prompt_tokens", "success", "ttft")

    def __init__(self, metrics: Metrics, length_class: str) -> None:
        self.ttft = metrics.histogram(TTFT, length_class)
        self.itl = metrics.histogram(ITL, length_class)
        self.e2e = metrics.histogram(E2E, length_class)
        self.prompt_tokens = metrics.counter(PROMPT_TOKENS, length_class)
        self.generation_tokens = metrics.counter(GENERATION_TOKENS, length_class)
        self.success = {reason: metrics.counter(SUCCESS, length_class, reason) for reason in ENDS}


class RouterTelemetry:
    """`in_hand`: how many requests the router answers, asked at every scrape. `model`: its name in traces."""

    def __init__(self, metrics: Metrics, tracer: Tracer | None, model: str, in_hand: Callable[[], int]) -> None:
        self._metrics = metrics
        self._tracer = tracer
        self._model = model
        self._classes = {each: ClassSeries(metrics, each) for each in CLASSES}
        for _, code in REFUSALS.values():
            metrics.counter(FAILURE, code)
        metrics.read(IN_HAND, lambda: {(): in_hand()})

    def begin(self, plan: Plan, traceparent: str) -> RequestTrace | None:
        """The span of a request that just came; None: it is not traced."""
        if self._tracer is None:
            return None
        client = parse_traceparent(traceparent)
        if client is not None and not client.sampled:
            return None
        operation = "chat" if isinstance(plan.prompts[0], ChatPrompt) else "text_completion"
        context = new_trace() if client is None else client.child()
        return RequestTrace(context, "" if client is None else client.span_id, operation)

    def delivered(self, choice: Choice, tokens: int, finish: FinishReason | None, now_s: float) -> None:
        """So many tokens, just now; with a reason: the last ones."""
        series = self._series_of(choice)
        if tokens:
            if choice.last_s is None:
                choice.first_s = now_s
                series.ttft.observe(now_s - choice.opened_s)
                series.prompt_tokens.value += len(choice.draft.prompt_ids)
            else:
                series.itl.observe((now_s - choice.last_s) / tokens)
            choice.last_s = now_s
            series.generation_tokens.value += tokens
        if finish is not None:
            series.e2e.observe(now_s - choice.opened_s)
            series.success[finish].inc()

    def refused(self, request_id: RequestId, error: ApiError, trace: RequestTrace | None, times: Times) -> None:
        """It never came to a ticket."""
        self._metrics.counter(FAILURE, error.code).inc()
        if trace is not None:
            self._tell(Told(trace, self._model, request_id, times, (), error.code))

    def closed(self, ticket: Ticket, now_s: float) -> None:
        """Nothing more is delivered of it."""
        failure = "" if ticket.error is None else ticket.error.code
        if not ticket.ended or failure == CANCELLED:
            failure = ABORTED
            self._series_of(ticket.choices[0]).success[ABORTED].inc()
        elif failure:
            self._metrics.counter(FAILURE, failure).inc()
        if ticket.trace is not None:
            times = Times(ticket.opened_s, now_s)
            self._tell(Told(ticket.trace, self._model, ticket.request_id, times, ticket.choices, failure))

    def _series_of(self, choice: Choice) -> ClassSeries:
        series = self._classes.get(choice.length_class or UNKNOWN)
        if series is None:
            series = self._classes[UNKNOWN] = ClassSeries(self._metrics, UNKNOWN)
        return series

    def _tell(self, told: Told) -> None:
        if self._tracer is not None:
            self._tracer.tell(partial(told.spans, self._tracer.offset_s()))


@dataclass(frozen=True, slots=True)
class Times:
    """By the event loop's clock."""

    opened_s: float
    ended_s: float


@dataclass(frozen=True, slots=True)
class Told:
    """A request that ended, to be told as a span."""

    trace: RequestTrace
    model: str
    request_id: RequestId
    times: Times
    choices: Sequence[Choice]
    failure: str
    """Its error's code; empty: it has all its tokens."""

    def spans(self, offset_s: float) -> list[Span]:
        """One. `offset_s`: from the loop's clock to Unix time."""
        name = f"{self.trace.operation} {self.model}"
        start_s, end_s = self.times.opened_s + offset_s, self.times.ended_s + offset_s
        context, parent = self.trace.context, self.trace.parent_id
        return [Span(name, context, parent, start_s, end_s, self._attributes(), self.failure, serves=True)]

    def _attributes(self) -> dict[str, str | int | float | bool]:
        """Names of OpenTelemetry's conventions for generative AI, where they have one."""
        found: dict[str, str | int | float | bool] = {
            "gen_ai.operation.name": self.trace.operation,
            "gen_ai.provider.name": "pecsched",
            "gen_ai.request.model": self.model,
            "pecsched.request_id": self.request_id,
        }
        if not self.choices:
            return found
        first_s = [choice.first_s for choice in self.choices if choice.first_s is not None]
        if first_s:
            found["pecsched.time_to_first_token_s"] = min(first_s) - self.times.opened_s
        return found | {
            "gen_ai.usage.input_tokens": len(self.choices[0].draft.prompt_ids),
            "gen_ai.usage.output_tokens": sum(choice.generated for choice in self.choices),
            "pecsched.length_class": self.choices[0].length_class or UNKNOWN,
        }
