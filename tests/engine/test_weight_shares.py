"""Shares of a model's weights: together they compute what the whole modules do, and they are views of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from services.engine.model import load_model
from services.engine.weight_shares import PartialLinear, WeightShares
from tests.engine.models import FAMILIES, tiny_model


@pytest.mark.parametrize("per_node", [2, 3, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_shares_of_an_mlp_add_up_to_the_whole(family: str, per_node: int, tmp_path: Path) -> None:
    model = load_model(tiny_model(family, tmp_path / "m", intermediate_size=97), dtype="float32", device="cpu")
    shares, whole = WeightShares(model), model.decoder.layers[1].mlp
    hidden = torch.randn(1, 7, model.config.hidden_size)
    with torch.inference_mode():
        parts = [shares.of(per_node, place)[1].mlp(hidden) for place in range(per_node)]
        torch.testing.assert_close(sum(parts), whole(hidden))


def test_a_bias_of_the_projection_back_is_added_once(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path / "m", attention_bias=True, mlp_bias=True)
    model = load_model(folder, dtype="float32", device="cpu")
    shares, layer = WeightShares(model), model.decoder.layers[0]
    for name, back, width in (("attention", layer.self_attn.o_proj, 72), ("mlp", layer.mlp.down_proj, 96)):
        parts = [getattr(shares.of(2, place)[0], name) for place in range(2)]
        ends = [part.o_proj if name == "attention" else part.down_proj for part in parts]
        widths = [next(iter(pieces(end)))[0].shape[1] for end in ends]
        assert sum(widths) == width
        given = torch.randn(1, 4, width)
        sums = ends[0](given[..., : widths[0]]) + ends[1](given[..., widths[0] :])
        torch.testing.assert_close(sums, back(given))


@pytest.mark.parametrize("family", FAMILIES)
def test_shares_are_views_made_once(family: str, tmp_path: Path) -> None:
    model = load_model(tiny_model(family, tmp_path / "m"), dtype="float32", device="cpu")
    shares = WeightShares(model)
    owned = {weight.untyped_storage().data_ptr() for weight in model.module.parameters()}
    for place in range(2):
        for layer in shares.of(2, place):
            linears = [each for part in (layer.attention, layer.mlp) for each in part.modules()]
            found = [piece for each in linears if isinstance(each, PartialLinear) for piece in pieces(each)]
            assert len(found) == 7
            for weight, bias in found:
                assert weight.untyped_storage().data_ptr() in owned
                assert bias is None or bias.untyped_storage().data_ptr() in owned
        assert shares.of(2, place) is shares.of(2, place)


def pieces(linear: Any) -> Iterator[tuple[Tensor, Tensor | None]]:
    yield from linear._pieces
