"""`pecsched serve` as a process, with real NATS and Redis and stand-ins for the roles: stages, table,
restarts, drain, and that nothing is left behind however it ends."""

import json
import os
import signal
import socket
import sys
from pathlib import Path

import psutil
import pytest

from tests.serve_process import LAST_LINE, clean_environment, serve_process, wait_gone

FAKE_ROLE = Path(__file__).with_name("fake_role.py")
DRIVER = f"""
import dataclasses, sys
from services import local
real = local.role_spec

def fake(role, *rest):
    return dataclasses.replace(real(role, *rest), command=(sys.executable, {str(FAKE_ROLE)!r}, role.command))

async def no_model(settings, env):
    pass

local.role_spec = fake
local._prepare_model = no_model
from services.cli import main
sys.exit(main(["serve", "--port", "0", "--prefill-workers", "1", *sys.argv[1:]]))
"""


@pytest.fixture
def serve(tmp_path):
    def run(*arguments, fate=None):
        env = {"XDG_RUNTIME_DIR": str(tmp_path), "PECSCHED_CACHE_DIR": str(tmp_path / "cache")}
        env |= {"FAKE_FATE": json.dumps(fate or {})}
        return serve_process([sys.executable, "-c", DRIVER, *arguments], clean_environment() | env)

    return run


def test_it_starts_everything_says_so_and_drains_in_order(serve, tmp_path):
    with serve() as running:
        running.until(LAST_LINE)
        pids = running.pids()
        assert set(pids) == {"nats", "redis", "scheduler", "sp-coordinator", "prefill-0", "decode-0", "router"}
        text = "\n".join(running.lines)
        for part in ("NATS server", "Redis server", "cluster complete", "curl http://127.0.0.1:", "ask --via nats"):
            assert part in text
        assert "data-address-of-prefill-0" in text
        run = json.loads((tmp_path / "pecsched" / "serve.json").read_text())
        assert run["pid"] == running.process.pid
        assert run["pids"] == pids
        roles = ("scheduler", "sp-coordinator", "prefill-0", "decode-0", "router")
        assert run["metrics"] == {role: f"http://{running.metrics(role)}/metrics" for role in roles}
        assert len(set(run["metrics"].values())) == len(roles)
        assert running.metrics("nats") == "-"
        running.process.send_signal(signal.SIGINT)
        status, err = running.end()
    assert (status, err) == (0, "")
    assert running.lines[-1] == "stopped"
    assert not (tmp_path / "pecsched" / "serve.json").exists()
    assert not any(psutil.pid_exists(pid) for pid in pids.values())


@pytest.mark.parametrize("name", ["decode-0", "scheduler", "router", "nats", "redis"])
def test_a_killed_child_is_replaced_and_the_reason_is_printed(serve, name):
    with serve() as running:
        running.until(LAST_LINE)
        pids = running.pids()
        os.kill(pids[name], signal.SIGKILL)
        assert "killed by SIGKILL" in running.until(f"{name} (pid {pids[name]}) ended")
        again = running.until(f"{name} runs again")
        new_pid = int(again.rpartition("pid ")[2].rstrip(")"))
        assert psutil.pid_exists(new_pid)
        running.process.send_signal(signal.SIGTERM)
        status, _ = running.end()
    assert status == 0
    assert not psutil.pid_exists(new_pid)


def test_a_metrics_port_that_is_taken_is_said_before_anything_starts(serve):
    with socket.create_server(("127.0.0.1", 0)) as other:
        first = other.getsockname()[1] - 2
        with serve("--metrics-port", str(first)) as running:
            status, err = running.end()
    assert status == 2
    expected = f"pecsched serve: cannot listen on 127.0.0.1:{first + 2} for metrics: Address already in use; "
    assert err == expected + "choose others with --metrics-port\n"
    assert running.lines == []


def test_a_role_that_cannot_start_ends_it_with_the_roles_own_words(serve):
    with serve("--decode-workers", "2", fate={"decode-worker": "refuses"}) as running:
        status, err = running.end()
    assert status == 1
    assert err == "pecsched serve: pecsched decode-worker: has its reasons; everything was stopped\n"


def test_a_role_that_keeps_crashing_ends_it_with_its_last_lines(serve):
    with serve("--restarts-max", "1", fate={"prefill-worker": "crashes"}) as running:
        status, err = running.end()
    assert status == 1
    assert "prefill-0 crashed more than 1 times within a minute" in err
    assert any("RuntimeError: a bug" in line for line in running.lines)


def test_it_names_who_is_missing_when_time_is_up(serve):
    with serve("--decode-workers", "2", "--start-s", "8") as running:
        status, err = running.end()
    assert status == 2
    assert "not complete after 8 s: decode-1 missing" in err
    assert any("waiting for decode-1" in line for line in running.lines)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_nothing_is_left_when_it_is_killed_hard(serve):
    with serve() as running:
        running.until(LAST_LINE)
        pids = running.pids()
        running.process.kill()
        wait_gone(pids.values())
    assert not any(psutil.pid_exists(pid) for pid in pids.values())


def test_ctrl_c_during_the_start_stops_what_was_started(serve):
    with serve("--decode-workers", "2") as running:
        running.until("waiting for decode-1")
        children = psutil.Process(running.process.pid).children(recursive=True)
        running.process.send_signal(signal.SIGINT)
        status, _ = running.end()
    assert status == 0
    assert children
    assert not any(child.is_running() for child in children)
