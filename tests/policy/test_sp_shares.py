"""Ownership of a long's tokens: even, contiguous, and the same whichever way the prompt is cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from common.policy.sp_shares import Shares, append_rank, chunk_bounds, owned_tokens, reserved_tokens

DEGREES = st.integers(1, 9)
CHUNKS = st.lists(st.integers(0, 40), max_size=12)


@given(DEGREES, CHUNKS)
def test_parts_are_contiguous_even_and_the_rest_goes_to_who_owns_the_fewest(degree: int, chunks: list[int]) -> None:
    shares = Shares(degree)
    for tokens in chunks:
        before = list(shares.owned)
        bounds = shares.take(tokens)
        parts = [end - begin for begin, end in zip(bounds, bounds[1:], strict=False)]
        assert (bounds[0], bounds[-1], len(bounds)) == (0, tokens, degree + 1)
        assert max(parts) - min(parts) <= 1
        larger = {rank for rank in range(degree) if parts[rank] > tokens // degree}
        poorest = sorted(range(degree), key=lambda rank: (before[rank], rank))
        assert larger == set(poorest[: tokens % degree])
        assert shares.owned == [have + part for have, part in zip(before, parts, strict=True)]


@given(DEGREES, CHUNKS, st.integers(0, 30))
def test_a_position_says_all(degree: int, chunks: list[int], decoded: int) -> None:
    shares, position = Shares(degree), 0
    for tokens in chunks:
        assert shares.take(tokens) == chunk_bounds(position, tokens, degree)
        position += tokens
    for _ in range(decoded):
        poorest = min(range(degree), key=lambda rank: (shares.owned[rank], rank))
        assert shares.append() == append_rank(position, degree) == poorest
        position += 1
    assert shares.owned == [owned_tokens(position, degree, rank) for rank in range(degree)]
    assert max(shares.owned) < reserved_tokens(position, degree)


def test_by_example() -> None:
    shares = Shares(3)
    assert shares.take(5) == (0, 2, 4, 5)
    assert shares.take(2) == (0, 1, 1, 2)  # rank 2 owns the fewest, then all the same: rank 0 again
    assert shares.owned == [3, 2, 2]
    assert [shares.append() for _ in range(4)] == [1, 2, 0, 1]
    assert repr(shares) == "Shares([4, 4, 3])"
