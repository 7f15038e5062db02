"""The `pecsched` command as a person meets it: help, and one clear line with an exit status for each mistake."""

import os
import socket
import subprocess
import sys

import pytest
from rich.console import Console

from common.messages.cluster import StepCost, WorkerProfile
from common.messages.views import ClusterView, RequestView, WorkerView
from common.settings_loader import SettingsError
from services import cli
from services.local_plan import make_plan, measured_roles, role_environment, threads_per_worker
from services.local_report import missing_parts, table
from services.run_file import RunFile, find_running, read_run_file, remove_run_file, started_s, write_run_file
from services.status import render

PATIENCE_S = 60.0


@pytest.fixture
def home(tmp_path):
    """An environment without anybody's settings, run file or cached model."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PECSCHED_")}
    return env | {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": "", "XDG_CACHE_HOME": "", "HF_HUB_OFFLINE": "1"}


def pecsched(env, *arguments, status):
    """Run it as a process; its only line on stderr."""
    command = [sys.executable, "-m", "services.cli", *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == status, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr.strip()


def test_help_names_every_command(capsys):
    assert cli.main(["--help"], {}) == 0
    text = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert name in text
    assert cli.main([], {}) == 0


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([name, "--help"], {})
    assert left.value.code == 0
    assert f"pecsched {name}" in capsys.readouterr().out


def test_version(capsys):
    assert cli.main(["version"], {}) == 0
    assert capsys.readouterr().out.startswith("pecsched ")


@pytest.mark.parametrize(
    ("arguments", "env", "line"),
    [
        (["statsu"], {}, "no such command; did you mean status?"),
        (["serve", "--prot", "1"], {}, "--prot: no such flag; did you mean --port?"),
        (["router", "--port", "-1"], {}, "--port: must be a whole number of 0 to 65535, not '-1'"),
        (["scheduler"], {"PECSCHED_POLICY": "lifo"}, "PECSCHED_POLICY: must be one of"),
        (["decode-worker"], {"PECSCHED_ROW_MAX": "1"}, "did you mean PECSCHED_ROWS_MAX?"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, env, line, capsys):
    assert cli.main(arguments, env) == 2
    stderr = capsys.readouterr().err
    assert line in stderr
    assert stderr.startswith(f"pecsched {arguments[0]}: ")
    assert stderr.count("\n") == 1


def test_neither_help_nor_the_small_roles_load_torch():
    code = (
        "import sys, services.cli, services.local, services.status, services.ask\n"
        "services.cli.main(['--help'], {})\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_serve_refuses_a_taken_port_before_it_starts_anything(home, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        line = pecsched(home, "serve", "--port", port, status=2)
    assert f"cannot listen on 127.0.0.1 port {port}" in line
    assert not (tmp_path / ".cache").exists()


@pytest.mark.parametrize(
    ("flag", "url"), [("--nats-url", "nats://127.0.0.1:1"), ("--redis-url", "redis://127.0.0.1:1/0")]
)
def test_serve_refuses_a_server_that_does_not_answer(home, flag, url):
    line = pecsched(home, "serve", "--port", "0", flag, url, status=2)
    assert url.removesuffix("/0") in line
    assert flag in line


def test_serve_refuses_what_a_role_would_refuse(home):
    line = pecsched(home | {"PECSCHED_CHUNK_TOKENS": "many"}, "serve", "--port", "0", status=2)
    assert "PECSCHED_CHUNK_TOKENS: must be a whole number" in line


def test_serve_refuses_a_folder_that_is_no_model(home, tmp_path):
    (tmp_path / "empty").mkdir()
    line = pecsched(home, "serve", "--port", "0", "--model", str(tmp_path / "empty"), status=2)
    assert "empty" in line
    assert "model" in line


@pytest.mark.parametrize(
    "arguments", [("status",), ("story", "r1"), ("ask", "hello"), ("ask", "--via", "nats", "hello")]
)
def test_questions_without_a_running_serve_say_how_to_find_one(home, arguments):
    line = pecsched(home, *arguments, status=1)
    assert "no `pecsched serve` runs here" in line
    assert "url" in line


@pytest.mark.parametrize("arguments", [("status",), ("ask", "--via", "nats", "hello")])
def test_questions_to_a_server_that_is_not_there(home, arguments):
    line = pecsched(home | {"PECSCHED_TIMEOUT_S": "0.5"}, *arguments, "--nats-url", "nats://127.0.0.1:1", status=1)
    assert "cannot reach NATS at nats://127.0.0.1:1" in line


def test_ask_names_the_address_that_does_not_answer(home):
    line = pecsched(home, "ask", "hello", "--url", "http://127.0.0.1:1", status=1)
    assert "http://127.0.0.1:1" in line


# --- what serve leaves for the others -------------------------------------------------------------


def run_file(pid, started):
    return RunFile(
        pid=pid,
        started_s=started,
        url="http://h:1",
        nats_url="nats://h:2",
        log_dir="/logs",
        pids={"router": 1},
        metrics={},
    )


def test_run_file_counts_only_while_its_process_lives(tmp_path):
    path = tmp_path / "pecsched" / "serve.json"
    assert read_run_file(path) is None
    own = run_file(os.getpid(), started_s(os.getpid()))
    write_run_file(own, path)
    assert read_run_file(path) == own
    assert path.stat().st_mode & 0o077 == 0
    write_run_file(run_file(os.getpid(), started_s(os.getpid()) - 3600.0), path)
    assert read_run_file(path) is None, "another process with the same id"
    path.write_text("{")
    assert read_run_file(path) is None


def test_run_file_of_another_serve_is_not_removed(tmp_path):
    path = tmp_path / "serve.json"
    write_run_file(run_file(os.getpid(), started_s(os.getpid())), path)
    remove_run_file(path, os.getpid() + 1)
    assert path.exists()
    remove_run_file(path, os.getpid())
    assert not path.exists()


def test_run_file_lies_in_the_runtime_folder(tmp_path):
    env = {"XDG_RUNTIME_DIR": str(tmp_path)}
    write_run_file(run_file(os.getpid(), started_s(os.getpid())), tmp_path / "pecsched" / "serve.json")
    assert find_running(env, "--url").url == "http://h:1"


# --- the plan of one machine, and its reports -----------------------------------------------------


def worker_view(worker_id, role):
    profile = WorkerProfile(
        worker_id=worker_id,
        role=role,
        incarnation="1",
        node="node-0",
        replica=worker_id,
        model_id="m",
        model_fingerprint="f",
        layers=2,
        kv_bytes_per_token=64,
        kv_capacity_tokens=1000,
        context_tokens=512,
        data_address="127.0.0.1:7",
        step_cost=StepCost(pass_s=0.1, token_s=0.1, pair_s=0.0),
    )
    return WorkerView(profile=profile, requests=("r1",), queued_tokens=5, kv_reserved_tokens=250, silent_s=0.5)


def cluster_view(workers, **fields):
    defaults = {"policy": "pecsched", "routers": ("router-1",), "coordinator_present": True, "requests": ()}
    numbers = {"queued_shorts": 3, "queued_longs": 1, "queued_tokens": 99, "counters": {"pauses": 7}}
    return ClusterView(workers=tuple(workers), **(defaults | numbers | fields))


def test_plan_drains_the_door_first_and_the_scheduler_last():
    plan = make_plan(cli.ServeSettings(prefill_workers=2, decode_workers=1), 8000)
    assert [role.name for role in plan.roles] == [
        "scheduler",
        "sp-coordinator",
        "prefill-0",
        "prefill-1",
        "decode-0",
        "router",
    ]
    assert plan.drain_order == (
        ("router",),
        ("prefill-0", "prefill-1", "decode-0"),
        ("sp-coordinator",),
        ("scheduler",),
    )
    secrets = {role.instead["data_secret"] for role in plan.workers}
    assert len(secrets) == 1
    assert all(secrets)


def test_each_role_but_the_router_has_a_metrics_port_of_its_own():
    serve = cli.ServeSettings(prefill_workers=1, metrics_host="0.0.0.0")
    assert measured_roles(serve) == 4
    plan = make_plan(serve, 8000, (9101, 9102, 9103, 9104))
    assert plan.metrics_ports == {"scheduler": 9101, "sp-coordinator": 9102, "prefill-0": 9103, "decode-0": 9104}
    for role in plan.roles:
        env = role_environment(role, serve, {}, "nats://n", "redis://r")
        assert env.get("PECSCHED_METRICS_PORT") == (str(plan.metrics_ports.get(role.name, "")) or None)
        assert env.get("PECSCHED_METRICS_HOST") == (None if role.name == "router" else "0.0.0.0")
    assert make_plan(serve, 8000).metrics_ports == {}


@pytest.mark.parametrize(
    ("settings", "nodes"),
    [
        ({}, {"node-0": "p0 p1 d0"}),
        ({"node": "rack-7", "prefill_workers": 3}, {"rack-7": "p0 p1 p2 d0"}),
        ({"workers_per_node": 3}, {"node-0": "p0 p1 p2 d0"}),
        ({"nodes": 2, "workers_per_node": 2, "decode_workers": 3}, {"node-0": "p0 p1 d0 d2", "node-1": "p2 p3 d1"}),
        ({"nodes": 3, "prefill_workers": 6}, {"node-0": "p0 p1 d0", "node-1": "p2 p3", "node-2": "p4 p5"}),
    ],
)
def test_workers_are_dealt_out_to_nodes(settings, nodes):
    serve = cli.ServeSettings(**settings)
    plan = make_plan(serve, 8000)
    stand: dict[str, list[str]] = {}
    for role in plan.workers:
        env = role_environment(role, serve, {}, "nats://n", "redis://r")
        kind, number = role.name.split("-")
        stand.setdefault(env["PECSCHED_NODE"], []).append(f"{kind[0]}{number}")
        assert env["PECSCHED_WORKER_ID"] == role.name
    assert {node: " ".join(names) for node, names in stand.items()} == nodes


def test_every_role_has_files_of_its_own():
    serve = cli.ServeSettings(journal="/j", alive_file="/a")
    plan = make_plan(serve, 8000)
    found = {r.name: role_environment(r, serve, {}, "nats://n", "redis://r") for r in plan.roles}
    assert {env["PECSCHED_JOURNAL"] for env in found.values()} == {f"/j.{name}" for name in found}
    assert found["decode-0"]["PECSCHED_ALIVE_FILE"] == "/a.decode-0"


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"tp": 2}, ("--tp 2", "holds the whole model", "only --tp 1 works")),
        ({"nodes": 2, "prefill_workers": 3}, ("--nodes 2", "3 prefill workers", "--workers-per-node")),
        ({"nodes": 3}, ("--nodes 3", "2 prefill workers cannot be shared out evenly")),
        ({"nodes": 2, "node": "rack-7"}, ("--node rack-7", "--nodes asks for 2")),
    ],
)
def test_a_topology_that_cannot_be_is_refused_in_one_line(settings, parts):
    with pytest.raises(SettingsError) as refused:
        make_plan(cli.ServeSettings(**settings), 8000)
    assert "\n" not in str(refused.value)
    for part in parts:
        assert part in str(refused.value)


@pytest.mark.parametrize(("workers", "cores", "threads"), [(3, 2, 1), (3, 8, 2), (3, 64, 21), (1, 1, 1)])
def test_threads_share_the_cores(workers, cores, threads):
    assert threads_per_worker(workers, cores) == threads


def test_missing_parts_are_named():
    plan = make_plan(cli.ServeSettings(prefill_workers=1, decode_workers=1), 8000)
    assert missing_parts(plan, None, router_healthy=False) == ("scheduler",)
    view = cluster_view([worker_view("prefill-0", "prefill")], coordinator_present=False)
    assert missing_parts(plan, view, router_healthy=False) == ("decode-0", "sp-coordinator", "router")
    complete = cluster_view([worker_view("prefill-0", "prefill"), worker_view("decode-0", "decode")])
    assert missing_parts(plan, complete, router_healthy=True) == ()


def test_table_cuts_nothing_off():
    lines = table(("ROLE", "LOG"), [("router", "x" * 200), ("sp-coordinator", "y")])
    assert "x" * 200 in lines[1]
    assert lines[1].index("x") == lines[2].index("y")


def test_status_shows_workers_requests_queues_and_counters():
    request = RequestView(
        request_id="r1",
        attempt=0,
        length_class="long",
        state="prefilling",
        prompt_tokens=6000,
        age_s=2.0,
        workers=("prefill-0",),
    )
    console = Console(width=200)
    with console.capture() as capture:
        console.print(render(cluster_view([worker_view("prefill-0", "prefill")], requests=(request,))))
    text = capture.get()
    assert [line.split()[:4] for line in text.splitlines() if line.startswith("prefill-0 ")] == [
        ["prefill-0", "prefill", "node-0", "prefill-0"]
    ], "with its node and its replica"
    for part in ("prefill-0", "250/1000 (25%)", "r1", "prefilling", "6000 tokens", "3 short, 1 long", "pauses 7"):
        assert part in text
