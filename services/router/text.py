"""Token ids to text as they come, and the search for stop strings. Pure: `decode` is handed in.

A token may be a part of a character, so text is given out only up to the last whole one. Tokens are
decoded together with those of the piece before them, because a decoder may treat the first token of
a text differently (SentencePiece drops its leading space); what was already given out is cut off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, special tokens left out."""

REPLACEMENT = "\ufffd"
CHARACTER_TOKENS_MAX = 4
"""A character has at most four bytes, so at most four tokens."""
HELD_TOKENS_MAX = 16
"""Tokens held back for a character that is not whole yet; with more, these bytes are no text at all."""


class Detokenizer:
    """The concatenation of all that `push` and `finish` return is `decode(all ids)`."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._window: list[int] = []
        """Tokens of the piece last given out, then those still held back."""
        self._settled = 0
        """How many of the window's tokens were given out."""
        self._sent = ""
        """Text of the window given out so far."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete."""
        if len(token_ids) > 1 and (text := self._all_at_once(token_ids)) is not None:
            return text
        pieces: list[str] = []
        for token_id in token_ids:
            self._window.append(token_id)
            pieces.append(self._advance())
        return "".join(pieces)

    def finish(self) -> str:
        """What is held back, whole character or not."""
        text = self._decode(self._window) if self._window else ""
        delta = text[len(self._sent) :]
        self._window, self._settled, self._sent = [], 0, ""
        return delta

    def _all_at_once(self, token_ids: Sequence[int]) -> str | None:
        """Several tokens for the price of one, if the text is whole at their end; None: they have to go one by one."""
        text = self._decode([*self._window, *token_ids])
        if text.endswith(REPLACEMENT) or text == self._sent or len(self._window) > self._settled:
            return None
        delta = text[len(self._sent) :]
        self._window, self._settled = list(token_ids), len(token_ids)
        self._sent = self._decode(self._window)
        return delta

    def _advance(self) -> str:
        text = self._decode(self._window)
        if text == self._sent:
            # It adds nothing (a special token). Kept, since a decoder may look at it; a run of them is cut short.
            if len(self._window) - self._settled > HELD_TOKENS_MAX:
                self._window.pop()
            return ""
        if text.endswith(REPLACEMENT):
            return self._force(text) if len(self._window) - self._settled > HELD_TOKENS_MAX else ""
        delta = text[len(self._sent) :]
        self._window = self._window[self._settled :]
        self._settled = len(self._window)
        self._sent = self._decode(self._window)
        return delta

    def _force(self, text: str) -> str:
        """Bytes that are no text: give out all before the last few, cut where no character is split."""
        for kept in range(1, CHARACTER_TOKENS_MAX + 1):
            head, tail = self._window[:-kept], self._window[-kept:]
            head_text = self._decode(head)
            if head_text + self._decode(tail) == text:
                delta = head_text[len(self._sent) :]
                self._window, self._settled, self._sent = tail, 0, ""
                return delta
        return self.finish()


class StopFinder:
    """Gives text out only as far as it cannot belong to a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text to give out, whether a stop string was found: then the text ends before it)."""
        if not self._stops:
            return text, False
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            text, self._held = self._held[: min(found)], ""
            return text, True
        kept = self._possible_start()
        cut = len(self._held) - kept
        text, self._held = self._held[:cut], self._held[cut:]
        return text, False

    def finish(self) -> str:
        text, self._held = self._held, ""
        return text

    def _possible_start(self) -> int:
        """Length of the longest end of the held text that some stop string begins with."""
        longest = min(len(self._held), max(len(stop) for stop in self._stops) - 1)
        for length in range(longest, 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0


class TextStream:
    """The text of one generation. Stop tokens and special tokens are left out."""

    def __init__(self, decode: Decode, *, stops: Sequence[str] = (), stop_token_ids: Sequence[int] = ()) -> None:
        self._detokenizer = Detokenizer(decode)
        self._finder = StopFinder(stops)
        self._stop_token_ids = frozenset(stop_token_ids)

    def push(self, token_ids: Sequence[int], *, last: bool) -> tuple[str, bool]:
        """(new text, whether a stop string ends the generation here). `last`: no more tokens follow."""
        if last and token_ids and token_ids[-1] in self._stop_token_ids:
            token_ids = token_ids[:-1]
        text, stopped = self._finder.push(self._detokenizer.push(token_ids))
        if stopped or not last:
            return text, stopped
        rest, stopped = self._finder.push(self._detokenizer.finish())
        text += rest
        return (text, True) if stopped else (text + self._finder.finish(), False)
