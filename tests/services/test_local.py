"""`pecsched serve` as a process, with real NATS and Redis and stand-ins for the roles: stages, table,
restarts, drain, and that nothing is left behind however it ends."""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

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
PATIENCE_S = 60.0
LAST_LINE = "  nats --server"
"""In the last line that is printed when all is ready."""


class Serve:
    """A running `pecsched serve`, read line by line."""

    def __init__(self, process):
        self.process = process
        self.lines = []

    def until(self, part):
        """Read its output up to a line that contains `part`."""
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            if part in line:
                return self.lines[-1]
        raise AssertionError(f"ended without {part!r}: {self.lines} {self.process.stderr.read()}")

    def pids(self):
        """Of the children, by role, from the table."""
        head = next(index for index, line in enumerate(self.lines) if line.startswith("ROLE"))
        rows = [line.split() for line in self.lines[head + 1 :]]
        return {row[0]: int(row[1]) for row in rows if len(row) >= 4 and row[1].isdigit()}

    def end(self):
        """Its exit status and what it wrote to the end."""
        out, err = self.process.communicate(timeout=PATIENCE_S)
        self.lines += out.splitlines()
        return self.process.returncode, err


def wait_gone(pids):
    for pid in pids:
        try:
            psutil.Process(pid).wait(PATIENCE_S)
        except psutil.NoSuchProcess:
            continue


@pytest.fixture
def serve(tmp_path):
    @contextmanager
    def run(*arguments, fate=None):
        env = {name: value for name, value in os.environ.items() if not name.startswith("PECSCHED_")}
        env |= {"XDG_RUNTIME_DIR": str(tmp_path), "PECSCHED_CACHE_DIR": str(tmp_path / "cache")}
        env |= {"FAKE_FATE": json.dumps(fate or {})}
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, *arguments],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            yield Serve(process)
        finally:
            children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.kill()
            process.communicate(timeout=PATIENCE_S)
            wait_gone(child.pid for child in children)

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
    with serve("--decode-workers", "2", "--start-s", "2") as running:
        status, err = running.end()
    assert status == 2
    assert "not complete after 2 s: decode-1 missing" in err
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
