"""Definitions, the series they are kept in, and what a scrape says of them."""

from __future__ import annotations

import re

import pytest

from common import metrics as m
from common.metrics import Metrics
from tests.exposition import Scrape

VLLM = (
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "time_to_first_token_seconds"),
    *("inter_token_latency_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"),
    *("request_prefill_time_seconds", "request_decode_time_seconds", "request_num_preemptions"),
    *("request_success_total", "prompt_tokens_total", "generation_tokens_total"),
)
"""Names that dashboards of vLLM know."""


def test_what_vllm_has_is_named_as_there_behind_our_prefix() -> None:
    assert {f"pecsched_{name}" for name in VLLM} <= set(m.definitions())


@pytest.mark.parametrize("of", m.definitions().values(), ids=lambda of: of.name)
def test_a_definition_keeps_prometheus_rules(of: m.Definition) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_]*", of.name)
    assert (of.kind == "counter") == of.name.endswith("_total")
    assert (of.kind == "histogram") == bool(of.buckets)
    assert list(of.buckets) == sorted(set(of.buckets))
    assert of.help
    assert not of.help.endswith(".")


def test_series_are_there_at_0_before_anything_happened() -> None:
    metrics = Metrics("router", "r0")
    metrics.counter(m.SUCCESS, "short", "stop")
    metrics.histogram(m.TTFT, "short")
    scrape = Scrape(metrics.exposition())
    assert scrape.samples_of("pecsched_request_success_total") == [
        ({"finished_reason": "stop", "length_class": "short"}, 0.0)
    ]
    assert scrape.count(m.TTFT, length_class="short") == 0.0
    assert scrape.value(m.ROLE_INFO, role="router", name="r0") == 1.0
    assert scrape.sum_of("process_resident_memory_bytes") > 1e6
    assert scrape.types["pecsched_time_to_first_token_seconds"] == "histogram"


def test_a_series_is_the_same_wherever_it_is_bound() -> None:
    metrics = Metrics("router")
    metrics.counter(m.SUCCESS, "short", "stop").inc()
    metrics.counter(m.SUCCESS, "short", "stop").inc(2.0)
    metrics.counter(m.SUCCESS, "short", "length").inc()
    scrape = Scrape(metrics.exposition())
    assert scrape.value(m.SUCCESS, finished_reason="stop") == 3.0
    assert scrape.value(m.SUCCESS) == 4.0


@pytest.mark.parametrize(
    ("value", "bucket"), [(0.0, "0.001"), (0.001, "0.001"), (0.0011, "0.0025"), (2_500.0, "2500.0"), (9_999.0, "+Inf")]
)
def test_a_value_counts_in_the_first_bucket_that_is_not_below_it(value: float, bucket: str) -> None:
    metrics = Metrics("router")
    metrics.histogram(m.TTFT, "long").observe(value)
    scrape = Scrape(metrics.exposition())
    counts = {
        sample.labels["le"]: sample.value
        for sample in scrape.samples
        if sample.name == "pecsched_time_to_first_token_seconds_bucket"
    }
    bounds = [*map(str, m.SECONDS), "+Inf"]
    assert list(counts) == bounds
    assert [bound for bound in bounds if counts[bound]] == bounds[bounds.index(bucket) :]
    assert scrape.total(m.TTFT) == value


def test_what_is_read_is_asked_for_at_every_scrape() -> None:
    metrics = Metrics("scheduler")
    waiting = {("short",): 1.0}
    metrics.read(m.WAITING, lambda: waiting)
    assert Scrape(metrics.exposition()).value(m.WAITING, length_class="short") == 1.0
    waiting[("short",)] = 7.0
    waiting[("long",)] = 2.0
    scrape = Scrape(metrics.exposition())
    assert (scrape.value(m.WAITING, length_class="short"), scrape.value(m.WAITING)) == (7.0, 9.0)


def test_labels_that_the_definition_does_not_have_are_a_mistake() -> None:
    with pytest.raises(AssertionError, match="finished_reason"):
        Metrics("router").counter(m.SUCCESS)


def test_two_processes_share_nothing() -> None:
    one, other = Metrics("router"), Metrics("router")
    one.counter(m.SUCCESS, "short", "stop").inc()
    assert Scrape(other.exposition()).value(m.SUCCESS) == 0.0
