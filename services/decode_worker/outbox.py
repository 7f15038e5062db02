"""Tokens on their way to routers: steps that follow each other faster than anybody reads share a message. Pure.

A token leaves at once if the last message to its router is long enough ago, and at once if it ends its request (the
scheduler is told of the end right after, and must not be the first to hear). Otherwise it waits for those of the next
steps. The last message may be another worker's: a request's first token, from where its prompt was computed.
With steps slower than `gather_s` nothing ever waits, but for a second token that follows the first as quickly.
"""

from __future__ import annotations

import msgspec

from common.messages.requests import TokenChunk, TokensGenerated
from common.units import RequestId, RouterId


class TokenOutbox:
    def __init__(self, gather_s: float) -> None:
        """`gather_s`: between two messages to one router, unless a request ends."""
        self._gather_s = gather_s
        self._held: dict[RouterId, TokensGenerated] = {}
        self._next_s: dict[RouterId, float] = {}
        """When the next message to a router may leave."""

    def sent_elsewhere(self, router_id: RouterId, now_s: float) -> None:
        """Another worker has just sent this router a message. What waits here already waits no longer for it."""
        if router_id not in self._held:
            self._next_s[router_id] = now_s + self._gather_s

    def put(self, tokens: TokensGenerated, now_s: float) -> TokensGenerated | None:
        """What is to be sent now; None: it waits, until `next_deadline_s` at most."""
        router, held = tokens.router_id, self._held.pop(tokens.router_id, None)
        whole = tokens if held is None else _joined(held, tokens)
        ends = any(chunk.finish_reason is not None for chunk in tokens.chunks)
        if not ends and now_s < self._next_s.get(router, now_s):
            self._held[router] = whole
            return None
        self._next_s[router] = now_s + self._gather_s
        return whole

    def next_deadline_s(self) -> float | None:
        return min((self._next_s[router] for router in self._held), default=None)

    def take_due(self, now_s: float) -> list[TokensGenerated]:
        """What has waited long enough. Forgets routers that nothing was sent to for a while."""
        due = [self._held.pop(router) for router in list(self._held) if self._next_s[router] <= now_s]
        for router in [router for router, next_s in self._next_s.items() if next_s <= now_s]:
            del self._next_s[router]
        self._next_s.update({tokens.router_id: now_s + self._gather_s for tokens in due})
        return due


def _joined(first: TokensGenerated, second: TokensGenerated) -> TokensGenerated:
    """Chunks of one attempt that follow each other become one; the others stay apart, in order."""
    chunks: dict[tuple[RequestId, int], TokenChunk] = {}
    rest: list[TokenChunk] = []
    for chunk in (*first.chunks, *second.chunks):
        key = chunk.request_id, chunk.attempt
        before = chunks.get(key)
        if before is None:
            chunks[key] = chunk
        elif before.index + len(before.token_ids) == chunk.index:
            chunks[key] = TokenChunk(
                request_id=chunk.request_id,
                attempt=chunk.attempt,
                index=before.index,
                token_ids=before.token_ids + chunk.token_ids,
                logprobs=before.logprobs + chunk.logprobs,
                finish_reason=chunk.finish_reason,
            )
        else:
            rest.append(chunk)
    return msgspec.structs.replace(second, chunks=(*chunks.values(), *rest))
