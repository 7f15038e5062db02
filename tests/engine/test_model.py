"""Loading: every family gives its figures; every bad folder gives one line that says what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from common.settings import PrefillWorkerSettings
from services.engine import calibrate
from services.engine.calibrate import fit
from services.engine.model import ModelError, load_model, pick_device
from services.engine.torch_prefill import make_prefill_engine
from tests.engine.models import CONTEXT, FAMILIES, VOCAB, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_figures(family: str, tmp_path: Path) -> None:
    model = load_model(tiny_model(family, tmp_path), dtype="bfloat16", device="cpu")
    heads, kv_heads = (4, 4) if family in ("llama-mha", "phi3") else (9, 3)
    head_dim = 8 if family in ("llama", "qwen2", "phi3-longrope") else 16
    assert (model.query_heads, model.kv_heads, model.head_dim) == (heads, kv_heads, head_dim)
    assert (model.layers, model.vocab, model.context_tokens, model.eos_ids) == (3, VOCAB, CONTEXT, (2,))
    assert model.kv_bytes_per_token == 3 * 2 * kv_heads * head_dim * 2
    assert next(model.module.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("family", "changes", "context"),
    [
        ("mistral", {"sliding_window": 100}, 100),
        ("mistral", {"sliding_window": 10_000}, CONTEXT),
        ("qwen2", {"sliding_window": 100, "use_sliding_window": False}, CONTEXT),
        ("qwen2", {"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 1}, 100),
        ("phi3", {"sliding_window": 64}, 64),
    ],
)
def test_an_active_sliding_window_bounds_the_context(
    family: str, changes: dict[str, int], context: int, tmp_path: Path
) -> None:
    assert load_model(tiny_model(family, tmp_path, **changes), dtype="float32").context_tokens == context


def test_fingerprint_tells_models_and_dtypes_apart_and_copies_not(tmp_path: Path) -> None:
    def fingerprint(name: str, dtype: str = "float32", **changes: int) -> str:
        folder = tiny_model("llama", tmp_path / name, **changes)
        return load_model(folder, dtype=dtype).fingerprint  # type: ignore[arg-type]

    assert fingerprint("a") == fingerprint("copy")
    different = {fingerprint("a"), fingerprint("b", "bfloat16"), fingerprint("c", rms_norm_eps=1e-3)}
    assert len(different | {fingerprint("d", intermediate_size=100)}) == 4


def test_several_eos_ids(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    assert load_model(folder, dtype="float32").eos_ids == (2, 5)


def refused(folder: Path, complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint) as caught:
        load_model(folder, dtype="float32")
    assert "\n" not in str(caught.value)


def test_missing_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "does not exist: give an existing folder")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "model.gguf", "is a file: give the folder")


def test_folder_without_config(tmp_path: Path) -> None:
    refused(tmp_path, "no config.json: give a folder")


@pytest.mark.parametrize("text", ["{not json", "{}", '{"model_type": "no-such-family"}'])
def test_unreadable_config(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    refused(tmp_path, "cannot read the configuration")


def test_not_a_causal_model(tmp_path: Path) -> None:
    BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ).save_pretrained(tmp_path)
    refused(tmp_path, r"not a causal language model \(BertModel\): give one that generates text")


def test_unsupported_family(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=20)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["GPT2ForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, "family 'gpt2', which is not supported: use one of llama")


def test_config_without_weights(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path)
    (folder / "model.safetensors").unlink()
    refused(folder, "cannot read the weights")


def test_truncated_weights(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(folder, "cannot read the weights")


def test_weights_of_fewer_layers_than_the_config_says(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, r"lacks \d+ weights \(model\.layers\.3")


@pytest.mark.parametrize("name", ["warp", "cuda:77"])
def test_unknown_device(name: str) -> None:
    with pytest.raises(ModelError, match=r"use (--device )?auto"):
        pick_device(name)


async def test_factory_measures_what_a_pass_costs(tmp_path: Path) -> None:
    folder = tiny_model("qwen3", tmp_path / "tiny-qwen")
    settings = PrefillWorkerSettings(model=str(folder), dtype="float32", device="cpu", kv_capacity_tokens=300)
    engine = make_prefill_engine(settings)
    profile = engine.profile
    assert (profile.model_id, profile.layers, profile.kv_capacity_tokens) == ("tiny-qwen", 3, 300)
    assert profile.context_tokens == CONTEXT
    assert profile.step_cost.pass_s > 0
    assert profile.step_cost.token_s > 0
    assert profile.step_cost.pair_s > 0
    assert engine.kv_used_tokens == 0
    await engine.shutdown()


def test_cost_is_fitted_exactly_where_it_can_be() -> None:
    def seconds(tokens: int, past: int) -> float:
        return 0.05 + 4e-4 * tokens + 2e-7 * tokens * (past + tokens / 2)

    sizes = [(1, 0), (64, 0), (64, 7_000), (256, 0), (256, 2_048), (512, 130_000)]
    cost = fit(sizes, [seconds(*size) for size in sizes])
    assert cost.pass_s == pytest.approx(0.05)
    assert cost.token_s == pytest.approx(4e-4)
    assert cost.pair_s == pytest.approx(2e-7)


def test_no_coefficient_is_negative() -> None:
    cost = fit([(1, 0), (64, 0), (64, 500)], [0.05, 0.02, 0.01])
    assert min(cost.pass_s, cost.token_s, cost.pair_s) > 0


@pytest.mark.parametrize("room", [4, 100, 513, 200_000])
def test_measured_sizes_fit_into_the_context(room: int) -> None:
    sizes = calibrate._sizes(room)
    assert sizes[0] == (1, 0)
    assert all(tokens >= 1 and past >= 0 and tokens + past <= room for tokens, past in sizes)
    assert len({tokens for tokens, _ in sizes}) >= 2  # else the slopes could not be told from the rest
    assert len({past for _, past in sizes}) >= 2
