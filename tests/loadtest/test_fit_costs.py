"""The fit finds again what made-up tables were made from; wrong tables are refused with their place."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from common import coefficients
from common.policy.cost_model import MODELS, CostModel
from loadtest import __main__, fit_costs, gpu_profiles
from loadtest.fit_costs import FitOptions
from loadtest.gpu_profiles import ProfilesError

FLOPS, MEMORY, LAYER_S = 2e14, 1.5e12, 2e-5
OTHER_S, OTHER_TOKENS, NORM, ACTIVATION = 6e-6, 80.0, 1.2e-11, 3e-12
LINKS = {("all_reduce", False): (2e-5, 2e11), ("send_recv", False): (6e-6, 2.5e11), ("send_recv", True): (3e-5, 9e9)}
TOKENS = (1, 8, 64, 128, 256, 512, 1024, 4096)
BYTES = (2048, 500_000, 4_000_000, 12_000_000, 60_000_000)


def linear_table(gpu: str, hidden: int, ffn: int, tp: int) -> dict[str, Any]:
    shape = {"hidden": hidden, "heads": 32, "kv_heads": 8, "ffn": ffn, "gated": True}
    parts = {
        "qkv": hidden * (32 + 16) * hidden // 32,
        "out": hidden * hidden,
        "mlp_up": 2 * hidden * ffn,
        "mlp_down": hidden * ffn,
    }
    width = (40 * hidden // 32 + 2 * ffn) / tp
    rows = {}
    for tokens in TOKENS:
        took = {
            name: LAYER_S / 4 + weights / tp * math.hypot(2 / MEMORY, 2 * tokens / FLOPS)
            for name, weights in parts.items()
        }
        took["other"] = OTHER_S + max(tokens, OTHER_TOKENS) * (NORM * hidden + ACTIVATION * width)
        rows[str(tokens)] = {name: 1e3 * seconds for name, seconds in took.items()}
    return {"gpu": gpu, "shape_of": f"made-up-{hidden}", "shape": shape, "tp": tp, "by_tokens": rows}


def link_table(op: str, workers: int, crosses: bool) -> dict[str, Any]:
    latency, bandwidth = LINKS[op, crosses]
    load = 2 * (workers - 1) / workers if op == "all_reduce" else 1.0
    return {
        "machine": "a100_dgx",
        "op": op,
        "workers": workers,
        "devices_per_node": 1 if crosses else workers,
        "crosses_nodes": crosses,
        "by_bytes": {str(size): 1e3 * (latency + load * size / bandwidth) for size in BYTES},
    }


def made_up() -> dict[str, Any]:
    return {
        "source": "made up",
        "linear_ms_per_layer": [
            linear_table("a100", hidden, ffn, tp) for hidden, ffn in ((4096, 11008), (8192, 28672)) for tp in (1, 8)
        ],
        "collective_ms": [
            link_table("all_reduce", 2, False),
            link_table("all_reduce", 8, False),
            link_table("send_recv", 2, False),
            link_table("send_recv", 2, True),
        ],
    }


@pytest.fixture
def profiles(tmp_path: Path) -> Path:
    path = tmp_path / "profiles.json"
    path.write_text(json.dumps(made_up()))
    return path


def test_the_fit_finds_what_the_tables_were_made_from(profiles: Path, tmp_path: Path):
    out = tmp_path / "fitted.json"
    figures = fit_costs.run(FitOptions(profiles=str(profiles), out=str(out)))
    fitted = coefficients.load(str(out))
    assert fitted.linear_flops == pytest.approx(FLOPS, rel=0.01)
    assert fitted.memory_bytes_s == pytest.approx(MEMORY, rel=0.01)
    assert fitted.layer_s == pytest.approx(LAYER_S, rel=0.03)
    assert fitted.other_tokens == pytest.approx(OTHER_TOKENS, rel=0.1)
    assert fitted.norm_element_s == pytest.approx(NORM, rel=0.1)
    assert fitted.activation_element_s == pytest.approx(ACTIVATION, rel=0.1)
    for link, of in ((fitted.all_reduce, ("all_reduce", False)), (fitted.intra_node, ("send_recv", False))):
        assert (link.latency_s, link.bytes_s) == pytest.approx(LINKS[of], rel=0.01)
    assert fitted.inter_node.latency_s == pytest.approx(LINKS["send_recv", True][0], rel=0.01)
    assert "9 GB/s" in fitted.sources["inter_node"]
    errors = [part for row in figures["linear_errors"] for part in row["by_range"]]
    assert len(figures["linear_errors"]) == 4
    assert all(abs(part["worst"]) < 0.02 for part in errors)
    assert CostModel(MODELS["mistral-7b"], fitted, 1, 8).pass_s(1_000) > 0


def test_assumptions_are_flags(profiles: Path):
    options = FitOptions(profiles=str(profiles), attention_share=0.5, inter_node_gbps=200.0, memory_share=0.8)
    found = fit_costs.run(options)["coefficients"]
    assert found["attention_flops"] == pytest.approx(0.5 * 312e12)
    assert found["inter_node"]["bytes_s"] == 25e9
    assert found["memory_share"] == 0.8
    assert found["sources"]["attention_flops"].startswith("ASSUMPTION: 50%")
    assert "200 Gb/s" in found["sources"]["inter_node"]


def test_one_outlier_does_not_move_a_link(profiles: Path):
    data = made_up()
    data["collective_ms"][0]["by_bytes"]["2048"] *= 20
    profiles.write_text(json.dumps(data))
    found = fit_costs.run(FitOptions(profiles=str(profiles)))["coefficients"]["all_reduce"]
    assert (found["latency_s"], found["bytes_s"]) == pytest.approx(LINKS["all_reduce", False], rel=0.03)


def test_the_same_tables_give_the_same_file(profiles: Path, tmp_path: Path):
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    for out in (one, two):
        fit_costs.run(FitOptions(profiles=str(profiles), out=str(out)))
    assert one.read_bytes() == two.read_bytes()


def test_the_command_prints_an_error_per_table(profiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "fitted.json"
    figures = tmp_path / "figures.json"
    argv = ["fit-costs", "--profiles", str(profiles), "--gpu", "a100", "--out", str(out), "--json", str(figures)]
    assert __main__.main(argv) == 0
    printed = capsys.readouterr().out
    for words in (
        "made-up-4096, tp 8",
        "all-reduce in a node, 8 GPUs",
        "send-recv between nodes",
        "ASSUMPTION",
        str(out),
    ):
        assert words in printed
    assert out.exists()
    assert json.loads(figures.read_text())["coefficients"]["name"] == "a100"


def _set(data: dict[str, Any], place: str, value: object) -> None:
    *way, last = place.split("/")
    at: Any = data
    for step in way:
        at = at[int(step) if step.isdigit() and isinstance(at, list) else step]
    at[last] = value


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("linear_ms_per_layer/1/by_tokens/64/qkv", "fast", r"at `\$\.linear_ms_per_layer\[1\].*qkv`"),
        ("linear_ms_per_layer/0/by_tokens/64/other", -1.0, r"Expected `float` > 0.0.*other`"),
        ("linear_ms_per_layer/0/by_tokens/many", {}, r"Expected `int`.*\$\.linear_ms_per_layer\[0\]\.by_tokens"),
        ("linear_ms_per_layer/2/tp", 3, r"\[2\]\.tp: 3 does not divide"),
        ("linear_ms_per_layer/2/shape/hidden", 1000, r"\[2\]\.shape: hidden 1000 is not a multiple of its 32 heads"),
        ("linear_ms_per_layer", [], "has no table of a100"),
        ("collective_ms/0/op", "broadcast", r"Invalid enum value 'broadcast'"),
        ("collective_ms", [], "no table of all_reduce in a node for a100"),
    ],
)
def test_wrong_tables_are_refused_in_one_line_with_the_place(
    profiles: Path, capsys: pytest.CaptureFixture[str], place: str, value: object, words: str
):
    data = copy.deepcopy(made_up())
    _set(data, place, value)
    profiles.write_text(json.dumps(data))
    with pytest.raises(ProfilesError, match=words) as refused:
        fit_costs.run(FitOptions(profiles=str(profiles)))
    assert str(refused.value).startswith(str(profiles))
    assert __main__.main(["fit-costs", "--profiles", str(profiles)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "fit-costs" in error


def test_a_missing_file_and_an_unwritable_one_are_refused(profiles: Path, tmp_path: Path):
    with pytest.raises(ProfilesError, match="No such file"):
        gpu_profiles.read(str(tmp_path / "absent.json"))
    assert __main__.main(["fit-costs", "--profiles", str(profiles), "--out", str(tmp_path / "no" / "x.json")]) == 1


@pytest.mark.parametrize("flags", [["--attention-share", "1.5"], ["--inter-node-gbps", "0"], ["--gpu", "v100"]])
def test_a_flag_out_of_range_is_refused(flags: list[str]):
    with pytest.raises(SystemExit) as left:
        __main__.parse(["fit-costs", "--profiles", "x.json", *flags])
    assert left.value.code == 2
