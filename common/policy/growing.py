"""What a group that grows means for the scheduler's books.

A newcomer's seat and KV are taken when the order is given, so that nobody else gets them; whether it is a member, the
coordinator's word `GroupGrown` says. Until then, and if it never comes to that, the group is what it was: a newcomer
is told to drop what it holds, and its KV stays on the books until it says that it is free. Each try has a number, so
that a word about an earlier one means nothing. While a group tries, the order is repeated as any other that may be
lost.

A rank sets aside its share of the KV in a group of the size that it comes into; those who were there keep what they set
aside.
"""

from __future__ import annotations

from common.messages.sp import GroupGrown, GrowGroup
from common.policy.cluster import Request
from common.policy.decisions import GrowLong
from common.policy.elastic import remaining_s
from common.policy.ledger import Ledger
from common.policy.placement import in_rank_order, kv_share, layout_of


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
