"""Orders to the members of a group that say more than whom they are about."""

from __future__ import annotations

from common.messages.sp import FormGroup, LoadSegment, SegmentPart


def load_order(order: FormGroup, rank: int, *, cause: str, epoch: int) -> LoadSegment:
    """To this rank of a group that is to be formed."""
    return LoadSegment(
        worker_id=order.members[rank],
        spec=order.spec,
        rank=rank,
        members=order.members,
        parts=(SegmentPart(start=0, tokens=order.spec.prompt.tokens),),
        addresses=order.addresses,
        scheme=order.scheme,
        cause=cause,
        epoch=epoch,
    )
