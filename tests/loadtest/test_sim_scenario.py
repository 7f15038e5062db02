"""Scenarios of the simulator: presets, TOML files, flags; and that what cannot be is refused with its place."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import msgspec
import pytest

from common import coefficients
from common.policy.cost_model import MODELS
from loadtest import __main__ as command_line
from loadtest import sim
from loadtest.simulator.scenario import (
    PRESETS,
    Scenario,
    ScenarioError,
    WorkloadSpec,
    check_scenario,
    check_workload,
    cost_model,
    load_scenario,
    make_scenario,
    scheduler_config,
)
from loadtest.simulator.workload import Arrival, Workload

TOML = """\
# two nodes, and shorts that share nothing
model = "yi-34b"
nodes = 2
policy = "pecsched"
colocation = false

[coefficients]
attention_flops = 1.0e14
inter_node = { bytes_s = 1e9 }

[scheduler]
pause_max_s = 1   # an integer where a float is wanted

[workload]
trace = ["conv.csv", "/data/code.csv"]
rate_scale = 2.0
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "cluster.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(tmp_path: Path, text: str, **changes: Any) -> str:
    with pytest.raises(ScenarioError) as caught:
        load_scenario(written(tmp_path, text), changes)
    said = str(caught.value)
    assert "\n" not in said
    return said.replace(f"{tmp_path}/", "")


def flags(*words: str) -> argparse.Namespace:
    return command_line.parse(["sim", *words])


# --- presets and files -------------------------------------------------------------------------------


def test_the_presets_are_the_papers_clusters() -> None:
    assert {name: (p.tp, p.decode_replicas, p.replicas) for name, p in PRESETS.items()} == {
        "mistral-7b": (1, 4, 32),
        "phi-3-14b": (2, 4, 16),
        "yi-34b": (4, 1, 8),
        "llama-3.1-70b": (4, 1, 8),
    }
    assert PRESETS.keys() == MODELS.keys()
    for preset in PRESETS.values():
        check_scenario(preset)
        assert (preset.nodes, preset.gpus_per_node, preset.gpu, preset.policy) == (4, 8, "a100", "pecsched")


def test_a_file_changes_the_preset_of_its_model(tmp_path: Path) -> None:
    scenario = load_scenario(written(tmp_path, TOML))
    assert (scenario.model, scenario.nodes, scenario.tp, scenario.decode_replicas) == ("yi-34b", 2, 4, 1)
    assert (scenario.colocation, scenario.preemption) == (False, True)
    assert scenario.workload == WorkloadSpec(trace=(str(tmp_path / "conv.csv"), "/data/code.csv"), rate_scale=2.0)
    assert scenario.prefill_replicas == 3


def test_coefficients_and_limits_reach_the_model_and_the_scheduler(tmp_path: Path) -> None:
    scenario = load_scenario(written(tmp_path, TOML))
    used, shipped = cost_model(scenario).coefficients, coefficients.load("a100")
    assert (used.attention_flops, used.inter_node.bytes_s) == (1.0e14, 1e9)
    assert used.inter_node.latency_s == shipped.inter_node.latency_s
    assert used.linear_flops == shipped.linear_flops
    config = scheduler_config(scenario, threshold_tokens=77)
    assert (config.pause_max_s, config.threshold_tokens, config.colocation, config.preemption) == (1.0, 77, False, True)


def test_without_disaggregation_all_replicas_prefill() -> None:
    assert make_scenario({"model": "yi-34b", "disaggregation": False}).prefill_replicas == 8


def test_a_coefficients_file_lies_beside_the_scenario(tmp_path: Path) -> None:
    own = msgspec.structs.replace(coefficients.load("a100"), name="own")
    (tmp_path / "own.json").write_bytes(msgspec.json.encode(own))
    scenario = load_scenario(written(tmp_path, 'model = "mistral-7b"\ngpu = "own.json"\n'))
    assert cost_model(scenario).coefficients.name == "own"


def test_the_scenarios_that_ship_can_be() -> None:
    files = sorted((Path(sim.__file__).parent / "scenarios").glob("*.toml"))
    assert [load_scenario(file).name for file in files] == ["slow network"]


# --- what is refused, and where ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nodes = 4\n", "cluster.toml: model: the key is missing; known models: llama-3.1-70b, mistral-7b, "),
        ('\nmodel = "gpt"\n', "cluster.toml:2: model: 'gpt' is unknown; known: llama-3.1-70b, mistral-7b, "),
        (f"{TOML}nodes = 3\n", "cluster.toml:17: workload.nodes: unknown key"),
        ('model = "yi-34b"\nnoods = 3\n', "cluster.toml:2: noods: unknown key; known: "),
        ('model = "yi-34b"\ntp = "4"\n', "cluster.toml:2: tp: expected `int`, got `str`"),
        ('model = "yi-34b"\ntp = 0\n', "cluster.toml:2: tp: expected `int` >= 1"),
        (
            'model = "yi-34b"\nscheduler.spill = "disk"\n',
            "cluster.toml:2: scheduler.spill: has no effect: simulated workers do not do that; leave it out",
        ),
        ('model = "yi-34b"\npolicy = "lifo"\n', "cluster.toml:2: policy: invalid enum value 'lifo'"),
        (
            'model = "yi-34b"\n[workload]\nlong_low = 10\nlong_high = 9\n',
            "cluster.toml:3: workload.long_low: more than workload.long_high",
        ),
        (
            'model = "yi-34b"\nworkload.rate_scale = -1.0\n',
            "cluster.toml:2: workload.rate_scale: expected `float` > 0",
        ),
        (
            'model = "yi-34b"\nworkload = { trace = ["a", 3] }\n',
            "cluster.toml:2: workload.trace[1]: expected `str`, got `int`",
        ),
        (
            'model = "yi-34b"\n[scheduler]\npause_max = 1\n',
            "cluster.toml:3: scheduler.pause_max: unknown key; known: ",
        ),
        (
            'model = "yi-34b"\n[scheduler]\npause_max_s = "1"\n',
            "cluster.toml:3: scheduler.pause_max_s: expected `float`, got `str`",
        ),
        (
            'model = "yi-34b"\n[scheduler]\npause_max_s = -1\n',
            "cluster.toml:3: scheduler.pause_max_s: -1 must be 0 or more",
        ),
        ('model = "yi-34b"\n[scheduler]\npolicy = "fifo"\n', "cluster.toml:3: scheduler.policy: not set here, but by "),
        (
            'model = "yi-34b"\n[coefficients.inter_node]\nbits_s = 1\n',
            "cluster.toml:3: coefficients.inter_node.bits_s: unknown key; known: bytes_s, latency_s",
        ),
        (
            'model = "yi-34b"\n[coefficients]\nattention_flops = 0\n',
            "cluster.toml:3: coefficients.attention_flops: 0 must be more than 0",
        ),
        (
            'model = "yi-34b"\n[coefficients]\nmemory_share = 1.5\n',
            "cluster.toml:3: coefficients.memory_share: 1.5 must not be more than 1",
        ),
        (
            'model = "yi-34b"\n[coefficients]\nattention_flops = "fast"\n',
            "cluster.toml:3: coefficients.attention_flops: expected `float`, got `str`",
        ),
        ('model = "yi-34b"\ngpu = "b200"\n', "cluster.toml:2: gpu: b200: no such processor"),
        ('model = "yi-34b"\ntp = 3\n', "cluster.toml:2: tp: 3 does not divide the 8 GPUs of a node"),
        (
            'model = "yi-34b"\nnodes = 1\ndecode_replicas = 2\n',
            "cluster.toml:3: decode_replicas: 2 of 2 replicas leave none to prefill",
        ),
        (
            'model = "yi-34b"\npolicy = "fifo"\ncolocation = false\n',
            "cluster.toml:3: colocation: a switch of the policy pecsched: fifo has nothing to switch off",
        ),
        ("model = \n", "cluster.toml: not TOML: Invalid value (at line 1, column 9)"),
    ],
)
def test_a_wrong_file_is_refused_with_line_and_key(tmp_path: Path, text: str, said: str) -> None:
    assert refusal(tmp_path, text).startswith(said)


def test_a_model_that_does_not_fit_its_gpus_is_refused(tmp_path: Path) -> None:
    said = refusal(tmp_path, 'model = "llama-3.1-70b"\ntp = 1\n')
    assert said.startswith("cluster.toml:2: tp: llama-3.1-70b at tp 1 on a100: ")


def test_a_tp_that_does_not_divide_the_heads_is_refused(tmp_path: Path) -> None:
    said = refusal(tmp_path, 'model = "phi-3-14b"\ntp = 4\n')  # 10 KV heads
    assert said.startswith("cluster.toml:2: tp: phi-3-14b at tp 4 on a100: ")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=r"none.toml: No such file or directory"):
        load_scenario(tmp_path / "none.toml")


def test_what_was_said_elsewhere_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    assert refusal(tmp_path, TOML, tp=3) == "tp: 3 does not divide the 8 GPUs of a node"


def workload(*prompts: int) -> Workload:
    return Workload("made up", tuple(Arrival(float(at), tokens, 10) for at, tokens in enumerate(prompts)), 5_000)


def test_requests_that_the_cluster_cannot_hold_are_refused() -> None:
    scenario = PRESETS["mistral-7b"]
    capacity = cost_model(scenario).kv_capacity_tokens
    check_workload(scenario, workload(4_000, 27 * capacity))  # over many replicas
    check_workload(scenario, workload(4_000, 28 * capacity - 10))
    with pytest.raises(
        ScenarioError, match=r"made up: request 2 \(at 1.000 s\) needs KV for .* 28 prefilling replicas"
    ):
        check_workload(scenario, workload(4_000, 28 * capacity - 9))
    shorts = msgspec.structs.replace(scenario, decode_replicas=0)
    huge = Workload("made up", workload(capacity).arrivals, threshold_tokens=capacity)
    with pytest.raises(ScenarioError, match=f"needs KV for {capacity + 10} tokens; a replica holds {capacity} of"):
        check_workload(shorts, huge)


# --- flags -------------------------------------------------------------------------------------------


def test_without_flags_the_default_preset() -> None:
    assert sim.scenario_of(flags()) == PRESETS["mistral-7b"]


def test_flags_change_what_a_file_says(tmp_path: Path) -> None:
    file = str(written(tmp_path, TOML))
    scenario = sim.scenario_of(
        flags("--scenario", file, "--nodes", "3", "--no-fast-sp", "--first", "60", "--long-high", "200000")
    )
    assert (scenario.nodes, scenario.tp, scenario.fast_sp, scenario.colocation) == (3, 4, False, False)
    assert (scenario.workload.first_s, scenario.workload.long_high, scenario.workload.rate_scale) == (60, 200_000, 2.0)


def test_any_key_can_be_set() -> None:
    scenario = sim.scenario_of(
        flags("--set", "scheduler.pause_max_s=0.5", "--set", "coefficients.inter_node.bytes_s=1e9", "--set", "name=x y")
    )
    assert scenario.scheduler == {"pause_max_s": 0.5}
    assert scenario.coefficients == {"inter_node": {"bytes_s": 1e9}}
    assert scenario.name == "x y"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--tp", "3"), "tp: 3 does not divide the 8 GPUs of a node"),
        (("--model", "gpt"), "model: 'gpt' is unknown; known: llama-3.1-70b, mistral-7b, phi-3-14b, yi-34b"),
        (("--set", "tp"), "--set tp: must be KEY=VALUE"),
        (("--set", "a.b=1"), "a: unknown key; known: "),
        (("--decode-replicas", "32"), "decode_replicas: 32 of 32 replicas leave none to prefill"),
        (("--rate-scale", "0"), "workload.rate_scale: expected `float` > 0"),
        (("--trace", "none.csv"), "none.csv: No such file or directory"),
        (("--csv", "no/such/folder.csv"), "--csv no/such/folder.csv: there is no folder "),
    ],
)
def test_wrong_flags_are_one_line(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str) -> None:
    assert command_line.main(["sim", *words]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("loadtest sim: ")]
    assert len(lines) == 1
    assert lines[0].startswith(f"loadtest sim: {said}")


def test_longs_are_made_before_the_workload_is_cut_and_scaled() -> None:
    whole = sim.workload_of(WorkloadSpec(), seed=2)
    cut = sim.workload_of(WorkloadSpec(first_s=300.0, rate_scale=2.0), seed=2)
    assert cut.arrivals == whole.first(300.0).scaled(2.0).arrivals
    assert cut.duration_s < 150.0
    assert cut.longs > 10
    assert sim.workload_of(WorkloadSpec(first_s=300.0, without_longs=True), seed=2).longs == 0
    as_they_are = sim.workload_of(WorkloadSpec(rewrite=False, synthetic_s=300.0), seed=2)
    assert max(arrival.prompt_tokens for arrival in as_they_are.arrivals) < 15_000


def test_scenarios_are_records_that_survive_json() -> None:
    scenario: Scenario = PRESETS["yi-34b"]
    assert msgspec.json.decode(msgspec.json.encode(scenario), type=Scenario) == scenario
