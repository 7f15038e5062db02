"""What a group that grows, or gives replicas back, means for the scheduler's books.

A newcomer's seat and KV are taken when the order is given, so that nobody else gets them; whether it is a member, the
coordinator's word `GroupGrown` says. Until then, and if it never comes to that, the group is what it was: a newcomer
is told to drop what it holds, and its KV stays on the books until it says that it is free. Each try has a number, so
that a word about an earlier one means nothing. While a group tries, the order is repeated as any other that may be
lost.

A rank sets aside its share of the KV in a group of the size that it comes into; those who were there keep what they set
aside.

A group gives replicas back by leaving all KV to its first, which had set aside room for it: at the end of its prefill,
or sooner as ordered (`parting.py`). Then the others' seats are free at once, their KV when they say so.
"""

from __future__ import annotations

from common.messages.sp import GroupGrown, GroupParted, GrowGroup, PartGroup
from common.policy.cluster import Request
from common.policy.decisions import GrowLong
from common.policy.elastic import remaining_s
from common.policy.ledger import Ledger
from common.policy.placement import in_rank_order, kv_share, layout_of
from common.units import WorkerId


def grow(ledger: Ledger, decision: GrowLong) -> None:
    """Order it."""
    request, cluster = decision.request, ledger.cluster
    request.joining = decision.newcomers
    request.growth += 1
    request.growth_since_s = ledger.now_s
    share = kv_share(request.spec.kv_tokens, len(request.workers))
    newcomers = [cluster.replicas[worker_id] for worker_id in decision.newcomers]
    cluster.reserve_long(newcomers, request.key, (share,) * len(newcomers), ledger.now_s)
    cluster.seat_long(newcomers, request.request_id)
    ledger.save(request)
    order(ledger, request)


def order(ledger: Ledger, request: Request) -> None:
    """For the first time, or again."""
    members, addresses = in_rank_order(ledger.cluster, request.workers)
    ledger.emit(
        GrowGroup(
            request_id=request.request_id,
            attempt=request.spec.attempt,
            growth=request.growth,
            members=members,
            addresses=addresses,
        )
    )


def grown(ledger: Ledger, request: Request, word: GroupGrown) -> None:
    """How it ended."""
    if not request.joining or word.growth != request.growth:
        return
    if set(word.members) != set(request.workers):
        give_back(ledger, request, word.reason)
        return
    pauses, cluster = request.pauses, ledger.cluster
    assert pauses is not None
    before, after = layout_of(cluster, request.members), layout_of(cluster, word.members)
    left_s = remaining_s(ledger.planner.prefill_s, request.tokens, word.prefilled_tokens, before, after)
    pauses.regrouped(ledger.now_s, left_s, ledger.done_share(request, word.prefilled_tokens))
    sizes = dict(zip(request.members, request.sizes, strict=True))
    request.sizes = tuple(sizes.get(member, len(word.members)) for member in word.members)
    request.members, request.joining = word.members, ()
    cluster.group_resized(request.request_id)
    ledger.counters["grown"] += 1
    ledger.note(request.request_id, f"grown to {len(word.members)} at token {word.prefilled_tokens}")
    ledger.save(request)
    ledger.policy.long_changed(request)


def give_back(ledger: Ledger, request: Request, reason: str) -> None:
    """The newcomers are free again, once they have dropped what they hold. Nothing, if there are none."""
    newcomers, request.joining = request.joining, ()
    if not newcomers:
        return
    ledger.counters["growth_failed"] += 1
    ledger.note(request.request_id, f"not grown: {reason}")
    ledger.cluster.unseat(request, newcomers, decodes=False)
    for worker_id in newcomers:
        ledger.drop_on(worker_id, request.key)
    ledger.save(request)


def part(ledger: Ledger, request: Request) -> None:
    """Order it, for the first time or again."""
    request.parting_since_s = ledger.now_s
    ledger.emit(PartGroup(request_id=request.request_id, attempt=request.spec.attempt))


def parted(ledger: Ledger, request: Request, word: GroupParted) -> None:
    """It has; or it cannot, and goes on as it was."""
    leaving = tuple(member for member in request.members if member not in word.members)
    request.parting_since_s = None
    if not leaving:
        return
    pauses, planner = request.pauses, ledger.planner
    assert pauses is not None
    done_share = ledger.done_share(request, word.prefilled_tokens)
    tell_planner(ledger, request, done_share)
    let_go(ledger, request, leaving)
    ledger.cluster.group_resized(request.request_id)
    pauses.regrouped(ledger.now_s, planner.prefill_s(request.tokens, (1,)) * (1.0 - done_share), done_share)
    ledger.counters["parted"] += 1
    ledger.policy.long_changed(request)


def tell_planner(ledger: Ledger, request: Request, done_share: float = 1.0) -> None:
    """How long so much of its prefill took. Of one that has grown, or parted, since then."""
    pauses = request.pauses
    assert pauses is not None
    done = (done_share - pauses.base_share) / (1.0 - pauses.base_share) if done_share > pauses.base_share else 0.0
    expected_s = (pauses.estimate_s - pauses.base_s) * done
    ledger.planner.took(len(request.members), expected_s, pauses.ran_s(ledger.now_s) - pauses.base_s)


def let_go(ledger: Ledger, request: Request, leaving: tuple[WorkerId, ...]) -> None:
    """Of members whose KV rank 0 has: they are free, once they have dropped it."""
    ledger.cluster.unseat(request, leaving, decodes=False)
    sizes = zip(request.members, request.sizes, strict=True)
    request.sizes = tuple(size for member, size in sizes if member not in leaving)
    request.members = tuple(member for member in request.members if member not in leaving)
    request.parted += leaving
    request.parting_since_s = None
    ledger.note(request.request_id, f"{', '.join(request.members)} goes on alone")
    for worker_id in leaving:
        ledger.drop_on(worker_id, request.key)
    ledger.save(request)
