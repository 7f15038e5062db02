"""Ownership of a long's tokens: even, contiguous, and the same whichever way the prompt is cut."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from common.messages.groups import RING, GroupScheme
from common.policy.model_shapes import split_heads
from common.policy.sp_shares import (
    Mesh,
    Shares,
    append_rank,
    chunk_bounds,
    head_shares,
    misfit,
    owned_tokens,
    reserved_tokens,
)

DEGREES = st.integers(1, 9)
CHUNKS = st.lists(st.integers(0, 40), max_size=12)


@given(DEGREES, CHUNKS)
def test_parts_are_contiguous_even_and_the_rest_goes_to_who_owns_the_fewest(degree: int, chunks: list[int]) -> None:
    shares = Shares(degree)
    for tokens in chunks:
        before = list(shares.owned)
        bounds = shares.take(tokens)
        parts = [end - begin for begin, end in pairwise(bounds)]
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
    assert max(shares.owned) <= reserved_tokens(position, degree)


@given(st.integers(1, 4), st.integers(1, 4), CHUNKS)
def test_a_mesh_deals_out_over_nodes_and_in_each_over_places(nodes: int, per_node: int, chunks: list[int]) -> None:
    mesh, computed, position = Mesh(nodes, per_node), [0] * nodes * per_node, 0
    for tokens in chunks:
        bounds = mesh.bounds(position, tokens)
        parts = [end - begin for begin, end in pairwise(bounds)]
        assert (bounds[0], bounds[-1], len(parts)) == (0, tokens, mesh.size)
        assert bounds[::per_node] == chunk_bounds(position, tokens, nodes)
        assert max(parts) - min(parts) <= 1
        computed = [before + part for before, part in zip(computed, parts, strict=True)]
        position += tokens
    assert max(computed) - min(computed) <= 1
    for node in range(nodes):
        ranks = [mesh.rank(node, place) for place in range(per_node)]
        assert [(mesh.node(rank), mesh.place(rank)) for rank in ranks] == [(node, at) for at in range(per_node)]
        assert sum(computed[rank] for rank in ranks) == mesh.owned_tokens(position, node)
        assert mesh.owned_tokens(position, node) <= mesh.reserved_tokens(position)
        assert mesh.owned_tokens(position + 1, node) - mesh.owned_tokens(position, node) == (
            mesh.append_node(position) == node
        )


def test_meshes_by_example() -> None:
    assert Mesh.of(RING, 3).bounds(5, 5) == chunk_bounds(5, 5, 3)
    assert Mesh.of(GroupScheme(per_node=3), 3).bounds(5, 5) == chunk_bounds(5, 5, 3)
    assert Mesh(2, 2).bounds(0, 6) == (0, 2, 3, 5, 6)
    assert Mesh(2, 2).bounds(6, 3) == (0, 1, 2, 2, 3)  # node 0 is next; in both, place 1 has computed the fewest
    assert (Mesh(2, 2).reserved_tokens(11), Mesh(1, 4).reserved_tokens(11)) == (6, 11)


def test_schemes_have_names_and_must_fit_the_group() -> None:
    mixed = GroupScheme(per_node=2, attention="megatron")
    named = [(RING, 2), (GroupScheme(per_node=3), 3), (mixed, 4), (mixed, 2), (GroupScheme(per_node=2), 6), (RING, 1)]
    assert [scheme.name(size) for scheme, size in named] == [
        "ring 2",
        "ulysses 3",
        "ring 2 x megatron/ulysses 2",
        "megatron/ulysses 2",
        "ring 3 x ulysses 2",
        "ring 1",
    ]
    assert not misfit(mixed, 4)
    assert misfit(mixed, 3) == "3 ranks are no whole number of nodes of 2: per_node must divide the group's size"


def test_by_example() -> None:
    shares = Shares(3)
    assert shares.take(5) == (0, 2, 4, 5)
    assert shares.take(2) == (0, 1, 1, 2)  # rank 2 owns the fewest, then all the same: rank 0 again
    assert shares.owned == [3, 2, 2]
    assert [shares.append() for _ in range(4)] == [1, 2, 0, 1]
    assert repr(shares) == "Shares([4, 4, 3])"


@given(st.integers(1, 8), st.integers(1, 6), DEGREES)
def test_every_query_head_has_one_rank_which_holds_its_kv_head(kv_heads: int, group: int, degree: int) -> None:
    shares = head_shares(kv_heads * group, kv_heads, degree)
    assert len(shares) == degree
    served = [head for share in shares for head in range(*share.query)]
    assert served == list(range(kv_heads * group))
    assert shares[0].query_heads == -(-kv_heads * group // degree)
    assert shares[0].query_heads - shares[-1].query_heads <= 1
    for share in shares:
        assert {head // group for head in range(*share.query)} == set(range(*share.kv))
        assert len(share.runs) <= 3
        attended = [
            (share.query[0] + run.query[0] + at, share.kv[0] + run.kv[0] + at // each)
            for run in share.runs
            for each in [(run.query[1] - run.query[0]) // (run.kv[1] - run.kv[0])]
            for at in range(run.query[1] - run.query[0])
        ]
        assert attended == [(head, head // group) for head in range(*share.query)]
    if degree <= kv_heads * group:  # the costs of plans follow the same rule
        split = split_heads(kv_heads * group, kv_heads, degree)
        assert split.heads_max == max(share.query_heads for share in shares)
        assert split.kv_heads_max == max(share.kv_heads for share in shares)
        assert split.kv_copies == sum(share.kv_heads for share in shares)


def test_heads_by_example() -> None:
    first, second = head_shares(9, 3, 2)
    assert (first.query, first.kv, second.query, second.kv) == ((0, 5), (0, 2), (5, 9), (1, 3))
    assert first.runs == (((0, 3), (0, 1)), ((3, 5), (1, 2)))
    assert second.runs == (((0, 1), (0, 1)), ((1, 4), (1, 2)))
    assert [share.runs for share in head_shares(8, 4, 2)] == [(((0, 4), (0, 2)),)] * 2  # even: as the kernel likes it
    replicated = head_shares(9, 3, 4)
    assert [(s.kv, s.query) for s in replicated] == [
        ((0, 1), (0, 3)),
        ((1, 2), (3, 5)),
        ((1, 3), (5, 7)),
        ((2, 3), (7, 9)),
    ]
    assert [s.reserved_tokens(100, 3) for s in replicated] == [34, 34, 67, 34]
    idle = head_shares(4, 4, 5)[4]
    assert (idle.kv_heads, idle.query_heads, idle.reserved_tokens(100, 4)) == (0, 0, 0)
