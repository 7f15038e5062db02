"""What is too long for the workers that are there, however long it waits."""

from __future__ import annotations

from common.messages.requests import RequestSpec
from common.policy.cluster import Cluster
from common.policy.costs import decode_slot_tokens
from common.policy.scheduler_config import SchedulerConfig


def beyond_capacity(cluster: Cluster, config: SchedulerConfig, spec: RequestSpec, *, is_long: bool) -> str | None:
    """Why none of them can ever hold its KV; None: they can, or nobody is there to say."""
    prefill_max = cluster.kv_max("prefill")
    if is_long:
        group_max = prefill_max * min(config.group_max, len(cluster.replicas))
        return _too_long(spec, group_max) if 0 < group_max < spec.kv_tokens else None
    decode_max = cluster.kv_max("decode") if config.disaggregation else prefill_max
    if 0 < prefill_max < spec.prompt.tokens or 0 < decode_max < decode_slot_tokens(spec.kv_tokens):
        return _too_long(spec, min(prefill_max, decode_max))
    return None


def _too_long(spec: RequestSpec, kv_max: int) -> str:
    return (
        f"prompt of {spec.prompt.tokens} tokens and max_tokens {spec.max_tokens} need KV for {spec.kv_tokens} tokens; "
        f"the largest worker holds {kv_max}: shorten the prompt or lower max_tokens"
    )
