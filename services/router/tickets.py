"""A client's request as its handler sees it: a stream of pieces, bounded, ending in a last piece or an error."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from common.messages.requests import FinishReason, LengthClass, TokenLogprob
from common.tracing import TraceContext
from common.units import RequestId
from services.router.api_errors import ApiError
from services.router.text import Decode, TextStream
from services.router.validate import Draft

PIECES_MAX = 2_048
"""Pieces that wait for a slow client; then its request is cancelled."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What one choice gained. `token_ids` has every generated token, stop tokens too; `text` leaves those out."""

    choice: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    """One per token, or none."""
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int

    @property
    def as_dict(self) -> dict[str, int]:
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


@dataclass(frozen=True, slots=True)
class RequestTrace:
    """The request's own span, which all others of it are part of."""

    context: TraceContext
    parent_id: str
    """The client's span; empty: it has none."""
    operation: str
    """What was asked, in the words of OpenTelemetry's conventions."""


@dataclass(slots=True)
class Choice:
    """One generation of the request."""

    request_id: RequestId
    draft: Draft
    text: TextStream
    opened_s: float
    """When the request came. Times are the event loop's clock."""
    first_s: float | None = None
    last_s: float | None = None
    """When the first tokens came, and the last ones."""
    length_class: LengthClass | None = None
    """None: the scheduler has not said it yet."""
    generated: int = 0
    ended: bool = False


@dataclass(slots=True, eq=False)
class Ticket:
    """Made by `Router.open`; must be handed to `Router.close` in the end, whatever happened."""

    request_id: RequestId
    choices: list[Choice]
    prompt_tokens: int
    opened_s: float
    trace: RequestTrace | None = None
    """None: it is not traced."""
    _pieces: deque[Piece] = field(default_factory=deque)
    _error: ApiError | None = None
    _wake: asyncio.Event = field(default_factory=asyncio.Event)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Every piece, until all choices have ended. Raises: ApiError, the end of the whole request."""
        async for batch in self.batches():
            for piece in batch:
                yield piece

    async def batches(self) -> AsyncIterator[list[Piece]]:
        """All pieces that are there, each time there are any: one for each choice that gained something."""
        while True:
            if self._pieces:
                batch = list(self._pieces)
                self._pieces.clear()
                yield batch if len(batch) == 1 else _merged(batch)
                continue
            if self._error is not None:
                raise self._error
            if self.ended:
                return
            self._wake.clear()
            await self._wake.wait()

    @property
    def ended(self) -> bool:
        return self._error is not None or all(choice.ended for choice in self.choices)

    @property
    def whole(self) -> bool:
        """Ended well, and nothing is left to take."""
        return self._error is None and not self._pieces and all(choice.ended for choice in self.choices)

    @property
    def error(self) -> ApiError | None:
        """With which it ended."""
        return self._error

    @property
    def full(self) -> bool:
        return len(self._pieces) >= PIECES_MAX

    @property
    def usage(self) -> Usage:
        """Tokens of each prompt once, and every generated token, stop tokens too."""
        return Usage(self.prompt_tokens, sum(choice.generated for choice in self.choices))

    def put(self, piece: Piece) -> None:
        self._pieces.append(piece)
        self._wake.set()

    def fail(self, error: ApiError) -> None:
        """The first error is the one the client hears; after a last piece, none."""
        if not self.ended:
            self._error = error
            self._wake.set()


def _merged(pieces: Sequence[Piece]) -> list[Piece]:
    """One piece per choice, in the order in which they came first."""
    found: dict[int, list[Piece]] = {}
    for piece in pieces:
        found.setdefault(piece.choice, []).append(piece)
    return [
        Piece(
            choice,
            "".join(part.text for part in parts),
            tuple(token_id for part in parts for token_id in part.token_ids),
            tuple(logprob for part in parts for logprob in part.logprobs),
            parts[-1].finish_reason,
        )
        for choice, parts in found.items()
    ]


def make_ticket(
    request_id: RequestId,
    drafts: Sequence[Draft],
    decode: Decode,
    *,
    choices_per_prompt: int = 1,
    opened_s: float = 0.0,
    trace: RequestTrace | None = None,
) -> Ticket:
    """A choice per draft. One alone keeps the request's id; of several, choice i is `<id>-<i>`."""
    choices = [
        Choice(
            RequestId(request_id if len(drafts) == 1 else f"{request_id}-{i}"),
            draft,
            TextStream(decode, stops=draft.stop, stop_token_ids=draft.stop_token_ids),
            opened_s,
        )
        for i, draft in enumerate(drafts)
    ]
    prompt_tokens = sum(len(draft.prompt_ids) for draft in drafts[::choices_per_prompt])
    return Ticket(request_id, choices, prompt_tokens, opened_s, trace)
