"""Requests in hand, from submission to their end. Pure: facts and the time go in, effects come out.

    submitted ──accepted, or a first token──▶ running ──last token──▶ ended
        ▲                                        │
        └──── interrupted, or a gap in the tokens ┘   (attempt + 1, tokens so far at the prompt's end)

Every request leaves by exactly one of: `Deliver` with a finish reason, `Fail`, `withdraw`. A token is
delivered once, whatever is lost, doubled or served again: output indexes count over all attempts.
"""

from __future__ import annotations

import heapq
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from common.messages.requests import FinishReason, Prompt, RequestSpec, TokenChunk, TokenLogprob
from common.messages.scheduling import RequestAccepted, RequestFailed, RequestInterrupted, RequestRefused
from common.runtime import keys
from common.units import Attempt, RequestId, RouterId
from services.router.api_errors import ApiError, refusal
from services.router.validate import Draft

RESEND_S = 0.5
"""A submission that nobody answered is sent again after this long."""
ATTEMPTS_MAX = 16
"""The scheduler gives up earlier; this bounds what the router starts by itself, at gaps in the tokens."""


@dataclass(frozen=True, slots=True)
class Submit:
    """Send this request, at this attempt, to the scheduler."""

    request_id: RequestId
    attempt: Attempt


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Tell the scheduler that nobody waits for this request any more."""

    request_id: RequestId


@dataclass(frozen=True, slots=True)
class Deliver:
    """New tokens, in order and each once. With a finish reason: the last ones."""

    request_id: RequestId
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class Fail:
    """The request ended without its tokens."""

    request_id: RequestId
    error: ApiError


Effect = Submit | Withdraw | Deliver | Fail


@dataclass(slots=True, eq=False)
class Generation:
    """One request in hand."""

    request_id: RequestId
    draft: Draft
    reply_inbox: str | None
    traceparent: str
    heard_s: float
    """Last sign of this request; at first, its submission."""
    resend_s: float
    attempt: Attempt = 0
    running: bool = False
    submitted_s: float = 0.0
    delivered: list[int] = field(default_factory=list)
    sent: bool = False
    """A submission has left: the scheduler may know of it."""

    @property
    def remaining(self) -> int:
        return self.draft.max_tokens - len(self.delivered)


class Desk:
    """All requests in hand of one router."""

    def __init__(self, *, patience_s: float, stall_s: float) -> None:
        self._patience_s = patience_s
        self._stall_s = stall_s
        self._by_id: dict[RequestId, Generation] = {}
        self._timers: list[tuple[float, RequestId]] = []
        """At least one entry per request, at or before the time it is due; others are stale."""

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._by_id

    def get(self, request_id: RequestId) -> Generation | None:
        return self._by_id.get(request_id)

    def waiting(self) -> tuple[tuple[RequestId, Attempt], ...]:
        """What a heartbeat names. Not what the scheduler cannot know yet: it would call that lost."""
        return tuple((g.request_id, g.attempt) for g in self._by_id.values() if g.sent)

    # --- what happens ----------------------------------------------------------------------------

    def open(
        self,
        request_id: RequestId,
        draft: Draft,
        now_s: float,
        *,
        reply_inbox: str | None = None,
        traceparent: str = "",
    ) -> list[Effect]:
        if request_id in self._by_id:
            raise ValueError(f"{request_id} is in hand already")
        generation = Generation(request_id, draft, reply_inbox, traceparent, now_s, now_s)
        self._by_id[request_id] = generation
        return self._submit(generation, now_s)

    def tokens(self, chunk: TokenChunk, now_s: float) -> list[Effect]:
        generation = self._by_id.get(chunk.request_id)
        if generation is None or chunk.attempt != generation.attempt:
            return []
        generation.heard_s = now_s
        generation.running = True
        seen = len(generation.delivered)
        if chunk.index > seen:
            return self._again(generation, now_s, f"tokens {seen} to {chunk.index - 1} were lost")
        known = seen - chunk.index
        fresh = chunk.token_ids[known : known + generation.remaining]
        generation.delivered.extend(fresh)
        if chunk.finish_reason == "cancelled":
            return self._fail(generation, ApiError(400, "request_cancelled", "the request was cancelled"))
        # A last chunk that repeats only part of what is here is an old one; the real end is still to come.
        finish: FinishReason | None = chunk.finish_reason if len(chunk.token_ids) >= known else None
        finish = finish or self._finish_by_content(generation, fresh)
        if finish is not None:
            del self._by_id[generation.request_id]
        elif not fresh:
            return []
        logprobs = chunk.logprobs[known : known + len(fresh)]
        return [Deliver(generation.request_id, fresh, logprobs, finish)]

    def accepted(self, event: RequestAccepted, now_s: float) -> list[Effect]:
        generation = self._current(event.request_id, event.attempt)
        if generation is not None:
            generation.heard_s = now_s
            generation.running = True
        return []

    def refused(self, event: RequestRefused) -> list[Effect]:
        generation = self._current(event.request_id, event.attempt)
        # `not_found` answers a cancel; what is in hand was not cancelled.
        if generation is None or event.code == "not_found":
            return []
        return self._fail(generation, refusal(event.code, event.message, event.retry_after_s), tell_scheduler=False)

    def interrupted(self, event: RequestInterrupted, now_s: float) -> list[Effect]:
        generation = self._current(event.request_id, event.attempt)
        return [] if generation is None else self._again(generation, now_s, event.reason)

    def failed(self, event: RequestFailed) -> list[Effect]:
        generation = self._by_id.get(event.request_id)
        if generation is None or event.attempt > generation.attempt:
            return []
        status, code = (503, "temporarily_unavailable") if event.retryable else (500, "generation_failed")
        return self._fail(generation, ApiError(status, code, event.message), tell_scheduler=False)

    def withdraw(self, request_id: RequestId) -> list[Effect]:
        """Nobody waits for it any more. Nothing happens if it has ended."""
        return [] if self._by_id.pop(request_id, None) is None else [Withdraw(request_id)]

    def give_up(self, request_id: RequestId, error: ApiError) -> list[Effect]:
        generation = self._by_id.get(request_id)
        return [] if generation is None else self._fail(generation, error)

    def scheduler_lost(self, now_s: float) -> list[Effect]:
        """No scheduler answers: nobody will serve again what is lost. What still gets tokens goes on."""
        silent = [g for g in self._by_id.values() if now_s - g.heard_s >= self._patience_s]
        error = ApiError(503, "no_scheduler", "no scheduler answers; try again later")
        return [effect for generation in silent for effect in self._fail(generation, error)]

    # --- time ------------------------------------------------------------------------------------

    def next_deadline_s(self) -> float | None:
        while self._timers and self._timers[0][1] not in self._by_id:
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else None

    def time_passed(self, now_s: float) -> list[Effect]:
        effects: list[Effect] = []
        while self._timers and self._timers[0][0] <= now_s:
            _, request_id = heapq.heappop(self._timers)
            generation = self._by_id.get(request_id)
            if generation is None:
                continue
            if self._due_s(generation) <= now_s:
                effects += self._overdue(generation, now_s)
            if request_id in self._by_id:
                heapq.heappush(self._timers, (self._due_s(generation), request_id))
        return effects

    def _due_s(self, generation: Generation) -> float:
        if generation.running:
            return generation.heard_s + self._stall_s
        return min(generation.resend_s, generation.submitted_s + self._patience_s)

    def _overdue(self, generation: Generation, now_s: float) -> list[Effect]:
        if generation.running:
            message = f"nothing was heard of the request for {self._stall_s:g} s; try again later"
            return self._fail(generation, ApiError(503, "stalled", message))
        if now_s >= generation.submitted_s + self._patience_s:
            message = f"no scheduler answered within {self._patience_s:g} s; try again later"
            return self._fail(generation, ApiError(503, "no_scheduler", message))
        generation.resend_s = now_s + RESEND_S
        return [Submit(generation.request_id, generation.attempt)]

    # --- parts -----------------------------------------------------------------------------------

    def _current(self, request_id: RequestId, attempt: Attempt) -> Generation | None:
        generation = self._by_id.get(request_id)
        return generation if generation is not None and generation.attempt == attempt else None

    def _submit(self, generation: Generation, now_s: float) -> list[Effect]:
        generation.running = False
        generation.submitted_s = generation.heard_s = now_s
        generation.resend_s = now_s + RESEND_S
        heapq.heappush(self._timers, (self._due_s(generation), generation.request_id))
        return [Submit(generation.request_id, generation.attempt)]

    def _again(self, generation: Generation, now_s: float, reason: str) -> list[Effect]:
        if generation.attempt >= ATTEMPTS_MAX:
            message = f"the request was interrupted {ATTEMPTS_MAX + 1} times, at last because {reason}"
            return self._fail(generation, ApiError(503, "interrupted", message))
        generation.attempt += 1
        return self._submit(generation, now_s)

    def _fail(self, generation: Generation, error: ApiError, *, tell_scheduler: bool = True) -> list[Effect]:
        del self._by_id[generation.request_id]
        fail = Fail(generation.request_id, error)
        return [Withdraw(generation.request_id), fail] if tell_scheduler else [fail]

    @staticmethod
    def _finish_by_content(generation: Generation, fresh: Sequence[int]) -> FinishReason | None:
        """The end as the tokens themselves tell it, should the worker's word on it be lost."""
        if fresh and fresh[-1] in generation.draft.stop_token_ids:
            return "stop"
        return "length" if fresh and generation.remaining == 0 else None


def int32_bytes(token_ids: Iterable[int]) -> bytes:
    """Little-endian int32, as prompts travel."""
    words = array("i", token_ids)
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()


def submission(generation: Generation, router_id: RouterId, inline_tokens_max: int) -> tuple[RequestSpec, bytes | None]:
    """What to submit for the current attempt; and the prompt's bytes, if it is to lie in the store."""
    draft = generation.draft
    data = int32_bytes(draft.prompt_ids) + int32_bytes(generation.delivered)
    tokens = len(data) // 4
    inline = tokens <= inline_tokens_max
    spec = RequestSpec(
        request_id=generation.request_id,
        attempt=generation.attempt,
        router_id=router_id,
        prompt=Prompt(
            tokens=tokens,
            inline=data if inline else None,
            key=None if inline else keys.prompt(generation.request_id, generation.attempt),
        ),
        max_tokens=generation.remaining,
        sampling=draft.sampling,
        stop_token_ids=draft.stop_token_ids,
        generated_before=len(generation.delivered),
        deadline_s=draft.deadline_s,
        reply_inbox=generation.reply_inbox,
        traceparent=generation.traceparent,
    )
    return spec, None if inline else data
