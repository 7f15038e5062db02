"""Tiny random models of every family, saved as folders like real ones; and transformers' own answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 211
CONTEXT = 512

FAMILIES = ("llama", "llama-mha", "mistral", "qwen2", "qwen3", "phi3", "phi3-longrope")


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    """Head counts that do not divide by two, or no grouping at all; real code paths, nothing else."""
    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 72,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    ungrouped = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    half = 8 // 2
    longrope = {
        "original_max_position_embeddings": 48,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "short_factor": [1.0] * half,
            "long_factor": [4.0, 3.0, 2.0, 2.0],
            "original_max_position_embeddings": 48,
        },
    }
    configs: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
        "llama": (LlamaConfig, {"tie_word_embeddings": True}),
        "llama-mha": (LlamaConfig, ungrouped),
        "mistral": (MistralConfig, {"sliding_window": None, "head_dim": 16}),
        "qwen2": (Qwen2Config, {}),
        "qwen3": (Qwen3Config, {"head_dim": 16}),
        "phi3": (Phi3Config, ungrouped),
        "phi3-longrope": (Phi3Config, longrope),
    }
    kind, own = configs[family]
    return kind(**{**common, **own, **changes})


def tiny_model(family: str, folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Save a random model of this family into `folder`; returns it."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(std=0.2)
    model.save_pretrained(folder)
    return folder


def reference_model(folder: Path) -> Any:
    """The same weights with transformers' own attention, float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


def reference_greedy(model: Any, prompt: Sequence[int], tokens: int) -> tuple[list[int], torch.Tensor]:
    """What transformers' `generate` answers, and the logits [tokens, vocab] each token was taken from."""
    ids = torch.tensor([list(prompt)])
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits)
