"""`pecsched serve` as a user has it: five real services on a real NATS and Redis. The engine answers at a
cost model's speed, so that these tests are about the processes, not the arithmetic."""

import json
import signal
import subprocess
import sys

import httpx
import psutil
import pytest

from tests.serve_process import LAST_LINE, PATIENCE_S, clean_environment, serve_process, wait_gone

PECSCHED = (sys.executable, "-m", "services.cli")
CHAT = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 8}


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    return clean_environment() | {"XDG_RUNTIME_DIR": str(tmp_path_factory.mktemp("runtime"))}


@pytest.fixture
def serve(env, tmp_path):
    """A ready cluster."""
    command = (*PECSCHED, "serve", "--port", "0", "--engine", "timed", "--log-dir", str(tmp_path / "logs"))
    with serve_process(command, env) as running:
        running.until(LAST_LINE)
        yield running


def chat(running) -> httpx.Response:
    url = f"{running.address('router')}/v1/chat/completions"
    return httpx.post(url, json=CHAT, timeout=PATIENCE_S, trust_env=False)


def pecsched(env, *arguments) -> str:
    done = subprocess.run(
        [*PECSCHED, *arguments], env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_runs_is_printed_asked_seen_and_drained(serve, env):
    roles = {"nats", "redis", "scheduler", "sp-coordinator", "prefill-0", "prefill-1", "decode-0", "router"}
    assert set(serve.pids()) == roles
    answer = chat(serve).raise_for_status().json()
    assert answer["usage"]["completion_tokens"] == CHAT["max_tokens"]
    text = answer["choices"][0]["message"]["content"]

    question = ("--max-tokens", "8", CHAT["messages"][0]["content"])
    assert pecsched(env, "ask", *question).strip() == text.strip()
    assert pecsched(env, "ask", "--via", "nats", *question).strip() == text.strip()

    view = json.loads(pecsched(env, "status", "--json"))
    assert {worker["profile"]["worker_id"] for worker in view["workers"]} == {"prefill-0", "prefill-1", "decode-0"}
    for _ in range(20):  # each look takes a process's start; what a worker freed last is told within a heartbeat
        if sum(worker["kv_reserved_tokens"] for worker in view["workers"]) == 0:
            break
        view = json.loads(pecsched(env, "status", "--json"))
    else:
        raise AssertionError(f"KV stays reserved: {view}")
    assert "finished 3" in pecsched(env, "status")
    assert "RequestSubmitted" in pecsched(env, "story", answer["id"])

    serve.process.send_signal(signal.SIGTERM)
    status, err = serve.end()
    assert (status, err) == (0, "")
    assert not any(psutil.pid_exists(pid) for pid in serve.pids().values())
    assert not any("killed" in line for line in serve.lines), serve.lines


def test_running_requests_finish_while_it_drains(serve):
    url = f"{serve.address('router')}/v1/chat/completions"
    body = {**CHAT, "max_tokens": 60, "stream": True}
    pieces = []
    with httpx.stream("POST", url, json=body, timeout=PATIENCE_S, trust_env=False) as response:
        for line in response.iter_lines():
            if line.startswith("data: ") and not pieces:
                serve.process.send_signal(signal.SIGINT)
            if line.startswith("data: "):
                pieces.append(line)
    assert pieces[-1] == "data: [DONE]", pieces
    assert serve.end()[0] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_no_process_outlives_a_serve_that_is_killed_hard(serve):
    pids = serve.pids()
    serve.process.kill()
    wait_gone(list(pids.values()))
