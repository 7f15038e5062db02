"""Tokens on their way to routers: steps that follow each other faster than anybody reads share a message. Pure.

A token leaves at once if the last message to its router is long enough ago; and at once, with what waited of its
request, if it ends that (the scheduler is told of the end right after, and must not be the first to hear). Otherwise it
waits for those of the next steps. The last message may be another worker's: a request's first token, from where its
prompt was computed.

What a token costs a router and its client is a share in a message, so a crowded batch gathers longer: `ROW_S`
for each row, `GATHER_MAX_S` at most. A worker thus says 1 / `ROW_S` times a second that some row has gone on, however
many it has and however fast it steps; with steps slower than that nothing ever waits, but for a second token that
follows the first as quickly.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from common.messages.requests import TokenChunk, TokensGenerated
from common.units import RequestId, RouterId

ROW_S = 0.004
GATHER_MAX_S = 0.020
"""Text that grows fifty times a second is as smooth as a screen shows it."""


class TokenOutbox:
    def __init__(self, gather_s: float) -> None:
        """`gather_s`: between two messages to one router, at least, but for ends of requests; 0: nothing waits."""
        self._gather_s = gather_s
        self._held: dict[RouterId, list[TokensGenerated]] = {}
        """In order; joined when they leave, not at every step."""
        self._next_s: dict[RouterId, float] = {}
        """When the next message to a router may leave."""

    def sent_elsewhere(self, router_id: RouterId, now_s: float) -> None:
        """Another worker has just sent this router a message. What waits here already waits no longer for it."""
        if router_id not in self._held:
            self._next_s[router_id] = now_s + self._gather_s

    def put(self, tokens: TokensGenerated, now_s: float, *, rows: int) -> TokensGenerated | None:
        """What is to be sent now; None: it waits, until `next_deadline_s` at most. `rows`: in the batch, whoever's."""
        router = tokens.router_id
        if now_s >= self._next_s.get(router, now_s):
            self._next_s[router] = now_s + self._window_s(rows)
            return _joined([*self._held.pop(router, ()), tokens])
        held = self._held.setdefault(router, [])
        held.append(tokens)
        ended = {_key(chunk) for chunk in tokens.chunks if chunk.finish_reason is not None}
        if not ended:
            return None
        whole = _joined(held)
        leave = tuple(chunk for chunk in whole.chunks if _key(chunk) in ended)
        stay = tuple(chunk for chunk in whole.chunks if _key(chunk) not in ended)
        if stay:
            self._held[router] = [msgspec.structs.replace(whole, chunks=stay)]
        else:
            del self._held[router]
        return msgspec.structs.replace(whole, chunks=leave)

    def next_deadline_s(self) -> float | None:
        return min((self._next_s[router] for router in self._held), default=None)

    def take_due(self, now_s: float, *, rows: int) -> list[TokensGenerated]:
        """What has waited long enough. Forgets routers that nothing was sent to for a while."""
        due = [_joined(self._held.pop(router)) for router in list(self._held) if self._next_s[router] <= now_s]
        for router in [router for router, next_s in self._next_s.items() if next_s <= now_s]:
            del self._next_s[router]
        self._next_s.update({tokens.router_id: now_s + self._window_s(rows) for tokens in due})
        return due

    def _window_s(self, rows: int) -> float:
        return max(self._gather_s, min(rows * ROW_S, GATHER_MAX_S)) if self._gather_s else 0.0


def _key(chunk: TokenChunk) -> tuple[RequestId, int]:
    return chunk.request_id, chunk.attempt


def _joined(messages: Sequence[TokensGenerated]) -> TokensGenerated:
    """As one, the last one's but for the chunks: those of one attempt that follow each other become one, the others
    stay apart, in order."""
    if len(messages) == 1:
        return messages[0]
    runs: dict[tuple[RequestId, int], list[TokenChunk]] = {}
    rest: list[TokenChunk] = []
    for chunk in (chunk for message in messages for chunk in message.chunks):
        run = runs.setdefault(_key(chunk), [])
        follows = not run or run[-1].index + len(run[-1].token_ids) == chunk.index
        (run if follows else rest).append(chunk)
    return msgspec.structs.replace(messages[-1], chunks=(*map(_one, runs.values()), *rest))


def _one(run: list[TokenChunk]) -> TokenChunk:
    """Of chunks that follow each other."""
    if len(run) == 1:
        return run[0]
    return TokenChunk(
        request_id=run[0].request_id,
        attempt=run[0].attempt,
        index=run[0].index,
        token_ids=tuple(token_id for chunk in run for token_id in chunk.token_ids),
        logprobs=tuple(logprob for chunk in run for logprob in chunk.logprobs),
        finish_reason=run[-1].finish_reason,
    )
