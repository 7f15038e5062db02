"""Which rank of a group computes which tokens of a prompt, and who keeps the KV of which.

A chunk is split contiguously over the ranks, in rank order, into parts whose sizes differ by at most one; what does
not divide goes to the ranks that own the fewest tokens so far, the lowest first. By induction the ranks then own as
many tokens as if these had been dealt out one by one, rank 0 first: of the first n tokens rank r owns
ceil((n - r) / degree), however they were cut into chunks. So nothing need be agreed on: a position says all.
"""

from __future__ import annotations

from itertools import accumulate


def owned_tokens(tokens: int, degree: int, rank: int) -> int:
    """How many of the first `tokens` tokens of a sequence this rank owns."""
    return (tokens - rank + degree - 1) // degree


def chunk_bounds(start: int, tokens: int, degree: int) -> tuple[int, ...]:
    """Where the parts of the chunk [start, start + tokens) begin and end: rank r computes its tokens
    [bounds[r], bounds[r + 1]), counted from the chunk's first. `degree` + 1 offsets; a part may be empty."""
    parts = (owned_tokens(start + tokens, degree, rank) - owned_tokens(start, degree, rank) for rank in range(degree))
    return tuple(accumulate(parts, initial=0))


def append_rank(position: int, degree: int) -> int:
    """Who keeps the KV of the token decoded at this position: of those that own the fewest, the lowest."""
    return position % degree


def reserved_tokens(kv_tokens: int, degree: int) -> int:
    """What each rank reserves for a sequence that needs `kv_tokens` in all: its share at the most, and one to spare."""
    return -(-kv_tokens // degree) + 1


class Shares:
    """The ranks' shares of one sequence as it grows, for whoever follows it from its first token."""

    def __init__(self, degree: int) -> None:
        self.owned = [0] * degree
        """Tokens by rank."""

    def __repr__(self) -> str:
        return f"Shares({self.owned})"

    def take(self, tokens: int) -> tuple[int, ...]:
        """Split the next chunk; returns `chunk_bounds` of it."""
        bounds = chunk_bounds(sum(self.owned), tokens, len(self.owned))
        for rank in range(len(self.owned)):
            self.owned[rank] += bounds[rank + 1] - bounds[rank]
        return bounds

    def append(self) -> int:
        """Take in one decoded token; returns the rank that keeps its KV."""
        rank = append_rank(sum(self.owned), len(self.owned))
        self.owned[rank] += 1
        return rank
