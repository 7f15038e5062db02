"""What an operator sees of a real cluster after a mixed run: metrics, the board's queries, traces, logs."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
import yaml

from common.metrics import PREFIX, definitions
from tests.e2e.observed import COMPOSE, Observed, names_in, observed, panels, queries
from tests.traces import is_whole, sum_s

NEVER_HERE = {"spans_dropped_total"}
HISTOGRAM_PARTS = ("_bucket", "_sum", "_count")

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="no prometheus here (apt-get install prometheus)"
)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory):
    with observed(tmp_path_factory.mktemp("observed")) as found:
        yield found


def exported(seen: Observed) -> set[str]:
    return set().union(*(scrape.names for scrape in seen.scrapes.values()))


def test_every_role_exports_and_every_metric_is_exported_by_some_role(seen: Observed):
    assert set(seen.scrapes) == {"router", "scheduler", "sp-coordinator", "prefill-0", "prefill-1", "decode-0"}
    for role, scrape in seen.scrapes.items():
        assert scrape.sum_of("pecsched_nats_connected") == 1, role
        assert scrape.sum_of("process_cpu_seconds_total") > 0, role
    names = exported(seen)
    missing = {of.full_name for of in definitions().values() if not names & {of.full_name, f"{of.full_name}_count"}}
    assert missing == set()


def test_every_histogram_has_seen_something(seen: Observed):
    for of in definitions().values():
        if of.kind == "histogram":
            counted = sum(scrape.count(of) for scrape in seen.scrapes.values())
            assert counted > 0, of.full_name


def test_the_board_asks_for_what_is_exported(seen: Observed):
    names = exported(seen) | {"up"}
    for query in queries():
        asked = names_in(query)
        assert asked, query
        assert asked <= names, f"{query}: nobody exports {asked - names}"


def test_all_that_is_measured_of_requests_is_on_the_board():
    asked = set().union(*map(names_in, queries()))
    bare = {name.removesuffix(part) for name in asked for part in ("", *HISTOGRAM_PARTS)}
    left_out = {name for name in definitions() if name not in bare}
    assert left_out == {f"{PREFIX}{name}" for name in ("role_info", "spans_dropped_total", "worker_requests")}


def test_panels_say_what_they_show():
    for panel in panels():
        assert panel["description"], panel["title"]
        assert all(target["legendFormat"] for target in panel["targets"])


def test_a_trace_of_a_paused_long_is_whole_and_adds_up(seen: Observed):
    def of_longs() -> list[str]:
        own = {span.attributes["pecsched.request_id"] for span in seen.collector.spans if span.serves}
        return [
            span.attributes["pecsched.request_id"]
            for span in seen.collector.spans
            if span.name == "pause" and span.attributes["pecsched.request_id"] in own
        ]

    seen.collector.until(of_longs)
    own, parts = seen.collector.of(of_longs()[0])
    is_whole(own, parts)
    jct_s = own.end_s - own.start_s
    assert sum_s(parts) == pytest.approx(jct_s, rel=0.02)
    names = [part.name for part in parts]
    assert names.count("prefill") == names.count("pause") + 1
    assert names[-1] == "decode"
    assert seen.collector.services == {"pecsched-router", "pecsched-scheduler"}
    assert own.attributes["gen_ai.operation.name"] == "text_completion"
    assert jct_s <= seen.long_jct_s * 1.05


def test_the_logs_do_not_show_what_was_asked(seen: Observed):
    assert seen.paused_long is not None
    prompt = ", ".join(map(str, seen.paused_long.prompt_ids[:5]))
    logs = [Path(line.split()[-1]) for line in seen.running.lines if line.endswith(".log")]
    assert len(logs) == len(seen.running.pids())
    for log in logs:
        assert prompt not in log.read_text(errors="replace"), log


@needs_prometheus
def test_every_query_of_the_board_has_data_in_prometheus(seen: Observed):
    assert seen.prometheus is not None
    empty = []
    for query in queries():
        values = [float(series["value"][1]) for series in seen.prometheus.query(query)]
        if not values or all(value != value for value in values):
            empty.append(query)
    assert empty == []


@needs_prometheus
def test_the_rules_are_right_and_none_fires_in_a_healthy_cluster(seen: Observed):
    assert seen.prometheus is not None
    done = subprocess.run(
        ["promtool", "check", "config", str(COMPOSE / "prometheus" / "prometheus.yml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    groups = seen.prometheus.ask("rules")["groups"]
    wanted = yaml.safe_load((COMPOSE / "prometheus" / "rules.yml").read_text())["groups"][0]["rules"]
    assert [rule["name"] for group in groups for rule in group["rules"]] == [rule["alert"] for rule in wanted]
    assert seen.prometheus.ask("alerts")["alerts"] == []
    for rule in wanted:
        assert names_in(rule["expr"]) <= exported(seen) | {"up"}, rule["expr"]


@needs_prometheus
def test_a_role_that_hangs_is_down_on_the_board_and_an_alert_is_raised(seen: Observed):
    prometheus = seen.prometheus
    assert prometheus is not None
    process = psutil.Process(seen.running.pids()["sp-coordinator"])
    process.send_signal(signal.SIGSTOP)
    try:
        prometheus.until('up{job="pecsched-sp-coordinator"}', 0.0)
        prometheus.until('count(ALERTS{alertname="PecSchedRoleDown"})', 1.0)
        (alert,) = [a for a in prometheus.ask("alerts")["alerts"] if a["labels"]["alertname"] == "PecSchedRoleDown"]
        assert prometheus.targets["sp-coordinator"] in alert["annotations"]["summary"]
    finally:
        process.send_signal(signal.SIGCONT)
    prometheus.until('up{job="pecsched-sp-coordinator"}', 1.0)


def test_provisioning_finds_the_board_and_its_data_source():
    provisioning = COMPOSE / "grafana" / "provisioning"
    source = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"][0]
    board = json.loads((COMPOSE / "grafana" / "dashboards" / "pecsched.json").read_text())
    variable = board["templating"]["list"][0]
    assert (variable["query"], variable["current"]["value"]) == (source["type"], source["uid"])
    assert {target["datasource"]["uid"] for panel in panels() for target in panel["targets"]} == {"${datasource}"}
    provider = yaml.safe_load((provisioning / "dashboards" / "pecsched.yaml").read_text())["providers"][0]
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"
