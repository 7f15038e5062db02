"""A real cluster that an operator watches: an OpenTelemetry collector, a Prometheus where there is one, the board."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from services.embedded import free_port
from tests.e2e.served import Question, Served, clients, serving
from tests.exposition import Scrape
from tests.otlp_collector import Collector, collecting
from tests.serve_process import ServeProcess

COMPOSE = Path(__file__).parents[2] / "compose"
BOARD = COMPOSE / "grafana" / "dashboards" / "pecsched.json"
RATE_WINDOW = "40s"
"""In place of Grafana's `$__rate_interval`: all of the load."""
SCRAPE_S = 0.5
PATIENCE_S = 30.0
POLL_S = 0.1
LONG, SHORT = 4_500, 150
ROLES = {"router": 1, "scheduler": 1, "sp-coordinator": 1, "prefill": 2, "decode": 1}
JOBS = {"prefill": "pecsched-prefill-worker", "decode": "pecsched-decode-worker"}


def job_of(role: str) -> str:
    """Of the role's process `prefill-0`, `router` …, as `compose/prometheus/prometheus.yml` names it."""
    kind = role.removesuffix("-0").removesuffix("-1")
    return JOBS.get(kind, f"pecsched-{kind}")


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(BOARD.read_text())["panels"] if panel["type"] != "row"]


def queries() -> list[str]:
    """Every query of the board, as Prometheus takes it."""
    found = [target["expr"] for panel in panels() for target in panel["targets"]]
    return [query.replace("$__rate_interval", RATE_WINDOW) for query in found]


def names_in(query: str) -> set[str]:
    """Names of metrics: what is neither a function, a label, nor a string."""
    bare = re.sub(r'\{[^}]*\}|"[^"]*"|by \([^)]*\)|\[[^\]]*\]', " ", query)
    return {name for name in re.findall(r"\b[a-z_][a-z0-9_]+\b(?!\s*\()", bare) if "_" in name or name == "up"}


class NotReady(httpx.HTTPStatusError):
    """It listens already, and has not yet read its storage."""


class Prometheus:
    """Debian's, scraping a cluster of `pecsched serve`."""

    def __init__(self, folder: Path, running: ServeProcess) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        config = yaml.safe_load((COMPOSE / "prometheus" / "prometheus.yml").read_text())
        shutil.copy(COMPOSE / "prometheus" / "rules.yml", folder)
        config["global"] = {"scrape_interval": f"{SCRAPE_S * 1e3:.0f}ms", "evaluation_interval": "500ms"}
        config["global"]["scrape_timeout"] = "400ms"
        self.targets = {role: running.metrics(role) for role in running.pids() if role not in ("nats", "redis")}
        for job in config["scrape_configs"]:
            del job["dns_sd_configs"]
            own = [address for role, address in self.targets.items() if job_of(role) == job["job_name"]]
            job["static_configs"] = [{"targets": own}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self._process = subprocess.Popen(
            [
                *("prometheus", "--config.file", str(folder / "prometheus.yml")),
                *(
                    "--storage.tsdb.path",
                    str(folder / "tsdb"),
                    "--web.listen-address",
                    self.url.removeprefix("http://"),
                ),
            ],
            stdout=subprocess.DEVNULL,
            stderr=(folder / "prometheus.log").open("wb"),
        )

    def ask(self, path: str, **params: str) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=params, trust_env=False, timeout=PATIENCE_S)
        if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE:
            raise NotReady(answer.text, request=answer.request, response=answer)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def query(self, query: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ask("query", query=query)["result"]
        return found

    def until(self, query: str, value: float) -> None:
        """Until every series of the query has this value, and there is one."""
        end_s = time.monotonic() + PATIENCE_S
        found: list[float] = []
        while not found or any(each != value for each in found):
            assert time.monotonic() < end_s, f"{query} is {found}, not {value}"
            time.sleep(POLL_S)
            try:
                found = [float(each["value"][1]) for each in self.query(query)]
            except httpx.HTTPError:
                continue  # it is starting

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE_S)


@dataclass(eq=False)
class Observed:
    """A cluster after a mixed run, and what was seen of it."""

    running: ServeProcess
    collector: Collector
    prometheus: Prometheus | None
    """None: there is none on this machine."""
    paused_long: Question | None = None
    long_jct_s: float = 0.0
    scrapes: dict[str, Scrape] = field(default_factory=dict)
    """Of each role, after the run."""


@contextmanager
def observed(folder: Path) -> Iterator[Observed]:
    with collecting() as collector, serving(folder, "--otlp-endpoint", collector.url) as running:
        prometheus = Prometheus(folder, running) if shutil.which("prometheus") else None
        try:
            found = Observed(running, collector, prometheus)
            if prometheus is not None:
                prometheus.until('up{job=~"pecsched-.+"}', 1.0)
            asyncio.run(_mixed_run(found))
            yield found
        finally:
            if prometheus is not None:
                prometheus.close()


async def _mixed_run(found: Observed) -> None:
    async with clients(found.running) as served:
        loop = asyncio.get_running_loop()
        asked_s = loop.time()
        longs = [served.ask(LONG, 12) for _ in range(2)]
        shorts: list[Question] = []
        while not all(long.began.is_set() for long in longs):
            shorts.append(served.ask(SHORT, 8))
            await asyncio.sleep(POLL_S)
        refused = served.ask(LONG, 100_000)
        await served.ended([*longs, *shorts, refused], PATIENCE_S)
        assert refused.error.startswith("400")
        assert [q.error for q in (*longs, *shorts)] == [""] * (len(longs) + len(shorts))
        view = await served.until(lambda view: not view.requests)
        assert view.counters["pauses"] > 0
        found.paused_long = longs[0]
        assert longs[0].ended_s is not None
        found.long_jct_s = longs[0].ended_s - asked_s
        found.scrapes = await _scrape_all(found.running, served)


async def _scrape_all(running: ServeProcess, served: Served) -> dict[str, Scrape]:
    async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE_S) as http:
        roles = [role for role in running.pids() if role not in ("nats", "redis")]
        return {role: Scrape((await http.get(f"http://{running.metrics(role)}/metrics")).text) for role in roles}
