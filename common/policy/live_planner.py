"""How a long is spread over live workers: over how many, by which scheme, and what each of them sets aside for it.

The cheapest scheme by `live_costs` whose KV every member has room for. A ring needs the least KV of each and needs no
heads to split, so it always can be. A ring whose rank 0 has room for all KV gathers it there when the prompt is done: a
token by one worker needs no other, and the rest of the group is free for shorts, and for the next long.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Final, NamedTuple

import msgspec

from common.messages.base import Record
from common.messages.cluster import WorkerProfile
from common.messages.groups import GATHERED_RING, GroupScheme
from common.policy.cluster import Cluster
from common.policy.costs import pass_s
from common.policy.live_costs import CHUNK_TOKENS, scheme_times
from common.policy.long_planner import Layout
from common.policy.paces import Paces
from common.policy.scheduler_config import SchedulerConfig
from common.policy.sequence_plan import EFFICIENCY_MIN, layout_of
from common.policy.sp_shares import kv_of_rank
from common.units import Seconds, Tokens

HEARD_FROM_S = 1.0
"""A prefill that was to take less says nothing of its degree: to begin and to end takes time as well."""


class Rank(NamedTuple):
    """A worker that is to take part."""

    profile: WorkerProfile
    kv_free: int


class GroupPlan(Record, frozen=True, kw_only=True):
    """How a group of live workers serves one long."""

    scheme: GroupScheme
    reserved: tuple[Tokens, ...]
    """What each rank sets aside for its KV."""
    prefill_s: Seconds
    """Undisturbed."""
    estimates: tuple[tuple[str, Seconds], ...] = ()
    """Prefill by each scheme that is possible."""
    refused: tuple[tuple[str, str], ...] = ()
    """Schemes that are not, and why."""
    why: str = ""
    """One sentence."""


def plan_group(tokens: int, kv_tokens: int, ranks: Sequence[Rank], config: SchedulerConfig) -> GroupPlan:
    """For these workers, two or more, in rank order, those of a node one after another."""
    size = len(ranks)
    sizes = tuple(len(list(same)) for _, same in groupby(rank.profile.node for rank in ranks))
    slowest = max((rank.profile for rank in ranks), key=lambda profile: pass_s(profile.step_cost, CHUNK_TOKENS))
    if any(rank.profile.layer != slowest.layer for rank in ranks):  # one of them is older, and does not say it
        slowest = msgspec.structs.replace(slowest, layer=None)
    times = scheme_times(slowest, tokens, sizes, internode_bytes_s=config.internode_bytes_s or math.inf)
    possible: list[tuple[GroupScheme, float]] = []
    refused = [(scheme.name(size), reason) for scheme, reason in times.refused]
    for scheme, seconds in times.possible:
        short = _lacking(scheme, kv_tokens, ranks)
        if short:
            refused.append((scheme.name(size), short))
        else:
            possible.append((scheme, seconds))
    scheme, seconds = min(possible or times.possible[:1], key=lambda each: each[1])
    if config.group_gathers and scheme.per_node == 1 and kv_tokens <= ranks[0].kv_free:
        scheme = GATHERED_RING
    estimates = tuple((each.name(size), took_s) for each, took_s in possible)
    return GroupPlan(
        scheme=scheme,
        reserved=_reserved(scheme, kv_tokens, slowest, size),
        prefill_s=seconds,
        estimates=estimates,
        refused=tuple(refused),
        why=_why(tokens, sizes, scheme.name(size), estimates, refused),
    )


class MeasuredPlanner:
    """Groups of live workers. Implements `LongPlanner`; all workers are taken to be as fast as one of them, and the
    prefills of a degree to take as many times their estimate as they did lately (`paces.py`)."""

    def __init__(self, cluster: Cluster, config: SchedulerConfig) -> None:
        self._cluster = cluster
        self.degree_max: Final = config.group_max
        self._internode_bytes_s = config.internode_bytes_s or math.inf
        self._paces = Paces()

    def degree(self, tokens: int, kv_tokens: int, free_by_node: Sequence[int], kv_free_tokens: int) -> int:
        """Enough replicas for the KV, then one more at a time, node by node, while that shortens the prefill and each
        of them does at least `EFFICIENCY_MIN` of what it would do alone for others. See `LongPlanner`."""
        free = min(sum(free_by_node), self.degree_max)
        if free > 1 and not all(replica.profile.group_address for replica in self._cluster.replicas.values()):
            free = 1
        profile = self._profile()
        best, best_s = 0, math.inf
        if profile is None or kv_free_tokens < 1:
            return 0
        alone_s = self.prefill_s(tokens, (1,))
        for degree in range(max(1, -(-kv_tokens // kv_free_tokens)), free + 1):
            took_s = self._least_s(profile, tokens, kv_tokens, layout_of(free_by_node, degree), kv_free_tokens)
            took_s *= self._paces.of(degree)
            if best and alone_s < EFFICIENCY_MIN * took_s * degree:
                break
            if took_s < best_s:
                best, best_s = degree, took_s
        return best

    def prefill_s(self, tokens: int, layout: Layout) -> float:
        """See `LongPlanner`. 0 while there is no worker."""
        profile = self._profile()
        if profile is None:
            return 0.0
        return self._least_s(profile, tokens, 0, layout, 0) * self._paces.of(sum(layout))

    def took(self, degree: int, expected_s: float, ran_s: float) -> None:
        """See `LongPlanner`."""
        if expected_s >= HEARD_FROM_S:
            self._paces.heard(degree, self._paces.of(degree) * ran_s / expected_s)

    def _profile(self) -> WorkerProfile | None:
        replica = next(iter(self._cluster.replicas.values()), None)
        return None if replica is None else replica.profile

    def _least_s(self, profile: WorkerProfile, tokens: int, kv_tokens: int, layout: Layout, kv_free: int) -> float:
        """By the cheapest scheme whose KV fits; of a ring it always does."""
        times, size = scheme_times(profile, tokens, layout, internode_bytes_s=self._internode_bytes_s), sum(layout)
        cheapest_first = sorted(times.possible, key=lambda each: each[1])
        return next(
            seconds
            for scheme, seconds in cheapest_first
            if scheme.per_node == 1 or max(_reserved(scheme, kv_tokens, profile, size)) <= kv_free
        )


def _reserved(scheme: GroupScheme, kv_tokens: int, profile: WorkerProfile, size: int) -> tuple[int, ...]:
    """By rank, in tokens."""
    return tuple(kv_of_rank(scheme, size, rank, kv_tokens, profile.layer) for rank in range(size))


def _lacking(scheme: GroupScheme, kv_tokens: int, ranks: Sequence[Rank]) -> str:
    """Which rank has no room for its share; empty: all have."""
    needs = _reserved(scheme, kv_tokens, ranks[0].profile, len(ranks))
    for rank, need in zip(ranks, needs, strict=True):
        if need > rank.kv_free:
            return f"{rank.profile.worker_id} has room for {rank.kv_free} tokens of KV, not for {need}"
    return ""


def _why(
    tokens: int,
    sizes: Sequence[int],
    chosen: str,
    estimates: Sequence[tuple[str, float]],
    refused: Sequence[tuple[str, str]],
) -> str:
    times = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in estimates)
    reasons = "".join(f"; {name} not: {reason}" for name, reason in refused)
    return f"{tokens} tokens on {'+'.join(map(str, sizes))} workers by {chosen} ({times}{reasons})"
