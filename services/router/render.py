"""Answers in the API's shapes. Pure: pieces in, dictionaries out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from common.messages.requests import TokenLogprob
from services.router.tickets import Piece, Usage

TokenBytes = Callable[[int], bytes]

STREAM_END = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Answer:
    """What every part of one answer repeats."""

    request_id: str
    model: str
    created: int
    """Unix time in seconds."""
    token_bytes: TokenBytes
    logprobs: bool
    include_usage: bool = False

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.request_id, "object": kind, "created": self.created, "model": self.model}


class Shape(Protocol):
    """How one API writes an answer, whole or in parts."""

    def first(self, choice: int) -> dict[str, Any] | None:
        """A part that opens a choice."""
        ...

    def part(self, piece: Piece) -> dict[str, Any]: ...

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> dict[str, Any]: ...

    def usage(self, usage: Usage) -> dict[str, Any]:
        """The part with the usage, after the last choice ended."""
        ...


@dataclass(slots=True)
class ChatShape:
    """`chat.completion` and `chat.completion.chunk`."""

    answer: Answer

    def first(self, choice: int) -> dict[str, Any] | None:
        return self._chunk([self._delta(choice, {"role": "assistant", "content": ""}, None)])

    def part(self, piece: Piece) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text else {}
        choice = self._delta(piece.choice, delta, piece.finish_reason)
        if self.answer.logprobs:
            choice["logprobs"] = chat_logprobs(piece, self.answer.token_bytes)
        return self._chunk([choice])

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        choices = [
            {
                "index": piece.choice,
                "message": {"role": "assistant", "content": piece.text, "refusal": None},
                "logprobs": chat_logprobs(piece, self.answer.token_bytes) if self.answer.logprobs else None,
                "finish_reason": piece.finish_reason,
            }
            for piece in pieces
        ]
        return {**self.answer.head("chat.completion"), "choices": choices, "usage": usage.as_dict}

    def usage(self, usage: Usage) -> dict[str, Any]:
        return {**self._chunk([]), "usage": usage.as_dict}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = {**self.answer.head("chat.completion.chunk"), "choices": choices}
        return {**chunk, "usage": None} if self.answer.include_usage else chunk

    @staticmethod
    def _delta(choice: int, delta: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        return {"index": choice, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


@dataclass(slots=True)
class CompletionShape:
    """`text_completion`, whole or in parts."""

    answer: Answer
    _offsets: dict[int, int] = field(default_factory=dict)
    """Characters of each choice that its logprobs cover so far."""

    def first(self, choice: int) -> dict[str, Any] | None:
        return None

    def part(self, piece: Piece) -> dict[str, Any]:
        chunk = {**self.answer.head("text_completion"), "choices": [self._choice(piece)]}
        return {**chunk, "usage": None} if self.answer.include_usage else chunk

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        choices = [self._choice(piece) for piece in pieces]
        return {**self.answer.head("text_completion"), "choices": choices, "usage": usage.as_dict}

    def usage(self, usage: Usage) -> dict[str, Any]:
        return {**self.answer.head("text_completion"), "choices": [], "usage": usage.as_dict}

    def _choice(self, piece: Piece) -> dict[str, Any]:
        logprobs = None
        if self.answer.logprobs:
            offset = self._offsets.get(piece.choice, 0)
            logprobs = completion_logprobs(piece, self.answer.token_bytes, offset)
            self._offsets[piece.choice] = offset + sum(len(token) for token in logprobs["tokens"])
        return {"index": piece.choice, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish_reason}


def merged(pieces: Sequence[Piece], choices: int) -> list[Piece]:
    """One piece per choice out of many."""
    texts: list[list[str]] = [[] for _ in range(choices)]
    ids: list[list[int]] = [[] for _ in range(choices)]
    logprobs: list[list[TokenLogprob]] = [[] for _ in range(choices)]
    ends: list[Any] = [None] * choices
    for piece in pieces:
        texts[piece.choice].append(piece.text)
        ids[piece.choice].extend(piece.token_ids)
        logprobs[piece.choice].extend(piece.logprobs)
        ends[piece.choice] = piece.finish_reason
    return [Piece(i, "".join(texts[i]), tuple(ids[i]), tuple(logprobs[i]), ends[i]) for i in range(choices)]


def chat_logprobs(piece: Piece, token_bytes: TokenBytes) -> dict[str, Any]:
    """`{"content": [{"token", "logprob", "bytes", "top_logprobs"}]}`."""
    content = []
    for token_id, found in zip(piece.token_ids, piece.logprobs, strict=False):
        top = [_token(i, logprob, token_bytes) for i, logprob in found.top]
        content.append({**_token(token_id, found.logprob, token_bytes), "top_logprobs": top})
    return {"content": content, "refusal": None}


def completion_logprobs(piece: Piece, token_bytes: TokenBytes, offset: int) -> dict[str, Any]:
    """`{"tokens", "token_logprobs", "top_logprobs", "text_offset"}`; offsets in characters of the answer."""
    pairs = list(zip(piece.token_ids, piece.logprobs, strict=False))
    tokens = [_readable(token_bytes(i)) for i, _ in pairs]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [found.logprob for _, found in pairs],
        "top_logprobs": [{_readable(token_bytes(i)): logprob for i, logprob in found.top} for _, found in pairs],
        "text_offset": offsets,
    }


def _token(token_id: int, logprob: float, token_bytes: TokenBytes) -> dict[str, Any]:
    data = token_bytes(token_id)
    return {"token": _readable(data), "logprob": logprob, "bytes": list(data)}


def _readable(data: bytes) -> str:
    return data.decode(errors="replace")


def models(name: str, context_tokens: int, created: int) -> dict[str, Any]:
    """GET /v1/models."""
    card = {"id": name, "object": "model", "created": created, "owned_by": "pecsched", "max_model_len": context_tokens}
    return {"object": "list", "data": [card]}
