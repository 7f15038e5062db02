from __future__ import annotations

import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import coefficients
from common.coefficients import CoefficientsError
from common.messages.cluster import StepCost
from common.policy import costs
from common.policy.cost_model import MODELS, CostModel, ModelShape, StepCostModel
from common.policy.processors import Coefficients, Link

A100 = coefficients.load("a100")
H100 = coefficients.load("h100")
TP = {"mistral-7b": 1, "phi-3-14b": 2, "yi-34b": 4, "llama-3.1-70b": 4}
MODELS_ON_A100 = [CostModel(MODELS[name], A100, tp, 8) for name, tp in TP.items()]

ROUND = Coefficients(
    name="round",
    source="made up",
    sources={},
    memory_bytes=10**9,
    memory_share=0.5,
    peak_flops=2e12,
    linear_flops=1e12,
    memory_bytes_s=1e12,
    layer_s=2e-6,
    other_s=1e-6,
    other_tokens=0.0,
    norm_element_s=1e-10,
    activation_element_s=1e-11,
    attention_flops=1e12,
    all_reduce=Link(latency_s=1e-5, bytes_s=1e11),
    intra_node=Link(latency_s=1e-6, bytes_s=1e10),
    inter_node=Link(latency_s=1e-5, bytes_s=1e9),
)
SMALL = ModelShape(
    name="small",
    layers=2,
    hidden=100,
    heads=4,
    kv_heads=2,
    head_dim=25,
    ffn=300,
    vocab=1_000,
    gated=True,
    dtype_bytes=2,
)


def small(tp: int = 1, changed: Coefficients = ROUND) -> CostModel:
    return CostModel(SMALL, changed, tp, 4)


@pytest.fixture(params=MODELS_ON_A100, ids=lambda model: model.shape.name)
def model(request: pytest.FixtureRequest) -> CostModel:
    return request.param


# Shapes


@pytest.mark.parametrize(
    ("name", "billions", "kv_bytes"),
    [
        ("mistral-7b", 7.248, 131_072),
        ("phi-3-14b", 13.96, 204_800),
        ("yi-34b", 34.39, 245_760),
        ("llama-3.1-70b", 70.55, 327_680),
    ],
)
def test_shapes_have_as_many_weights_as_the_published_models(name: str, billions: float, kv_bytes: int):
    assert MODELS[name].weight_bytes / 2e9 == pytest.approx(billions, rel=1e-3)
    assert MODELS[name].kv_bytes_per_token == kv_bytes


def test_an_ungated_mlp_has_two_matrices():
    plain = ModelShape(
        name="plain", layers=1, hidden=8, heads=2, kv_heads=2, head_dim=4, ffn=32, vocab=10, gated=False, dtype_bytes=4
    )
    assert plain.mlp_weights == 2 * 8 * 32
    assert plain.linear_macs_per_token == 8 * 3 * 8 + 8 * 8 + 2 * 8 * 32
    assert plain.weight_bytes == 4 * (plain.linear_macs_per_token + 2 * 8 + 2 * 10 * 8 + 8)


# One pass, against the formulas by hand


def test_a_pass_is_the_sum_of_its_parts():
    weights = 100 * 200 + 100 * 100 + 3 * 100 * 300  # of one layer: q, k, v; output; MLP
    tokens, past = 10, 20
    matmuls = weights * math.hypot(2 / 1e12, 2 * tokens / 1e12)
    other = 3e-6 + tokens * (100 * 1e-10 + (6 * 25 + 600) * 1e-11)
    pairs = sum(past + at for at in range(1, tokens + 1))
    attention = 4 * pairs * 4 * 25 / 1e12
    head = 100 * 1_000 * math.hypot(2 / 1e12, 2 / 1e12)
    assert small().pass_s(tokens, past) == pytest.approx(2 * (matmuls + other + attention) + head)


def test_tensor_parallelism_splits_the_work_and_reduces_twice_per_layer():
    tokens = 10
    weights = (100 * 200 + 100 * 100 + 3 * 100 * 300) / 2
    matmuls = weights * math.hypot(2 / 1e12, 2 * tokens / 1e12)
    other = 3e-6 + tokens * (100 * 1e-10 + (6 * 25 + 600) / 2 * 1e-11)
    attention = 4 * 55 * 2 * 25 / 1e12
    reduces = 2 * (1e-5 + tokens * 100 * 2 / 1e11)  # over two ranks a ring moves the message once
    head = 100 * 1_000 / 2 * math.hypot(2 / 1e12, 2 / 1e12)
    assert small(tp=2).pass_s(tokens) == pytest.approx(2 * (matmuls + other + attention + reduces) + head)


def test_decode_attention_is_bound_by_reading_the_kv():
    without = small().decode_step_s(3, 0)
    kv_bytes = 2 * 2 * 25 * 2 * 2
    assert small().decode_step_s(3, 5_000) - without == pytest.approx(5_000 * kv_bytes / 1e12)
    # A single new token attends at that rate too, not at that of arithmetic.
    fast_arithmetic = small(changed=ROUND.assuming(attention_share=1e6))
    assert fast_arithmetic.pass_s(1, 4_999) == pytest.approx(fast_arithmetic.decode_step_s(1, 5_000))


def test_few_tokens_take_as_long_in_the_small_kernels_as_many():
    floor = Coefficients(**{**{f: getattr(ROUND, f) for f in ROUND.__struct_fields__}, "other_tokens": 64.0})
    per_token = 2 * (100 * 1e-10 + 750 * 1e-11)
    assert small(changed=floor).decode_step_s(1, 0) - small().decode_step_s(1, 0) == pytest.approx(63 * per_token)
    assert small(changed=floor).decode_step_s(64, 0) == pytest.approx(small().decode_step_s(64, 0))


def test_the_parts_that_a_planner_asks_for_add_up_to_a_pass():
    model = small(tp=2)
    tokens, layers = 50, 2
    layer = model.matmul_s(SMALL.linear_macs_per_token / 2, tokens) + model.other_s(tokens, 2)
    layer += model.attention_s(tokens * (tokens + 1) / 2, heads=2)
    reduce_s = layers * 2 * (1e-5 + tokens * 200 / 1e11)
    head = model.matmul_s(SMALL.head_weights / 2, 1)
    assert model.pass_s(tokens) == pytest.approx(layers * layer + reduce_s + head)


# Batches


def test_a_batch_of_one_is_a_pass(model: CostModel):
    for tokens in (1, 17, 1_000, 9_000):
        assert model.batch_s([tokens]) == pytest.approx(model.pass_s(tokens))


def test_a_batch_attends_within_each_prompt_only(model: CostModel):
    one, batch = model.pass_s(4_000), model.batch_s([1_000] * 4)
    apart = 4 * model.pass_s(1_000)
    assert batch < one
    assert batch < apart
    heads = model.shape.heads / model.tp
    pairs = 4_000 * 4_001 / 2 - 4 * 1_000 * 1_001 / 2
    saved = model.shape.layers * model.attention_s(pairs, heads)
    assert one - batch == pytest.approx(saved, rel=0.02)  # less the heads of three more rows


def test_nothing_takes_no_time(model: CostModel):
    assert model.batch_s([]) == 0.0


@given(
    st.sampled_from(MODELS_ON_A100),
    st.integers(1, 20_000),
    st.integers(1, 2_000),
    st.integers(0, 400_000),
    st.integers(1, 50_000),
)
def test_more_work_takes_longer(model: CostModel, tokens: int, more: int, past: int, further: int):
    assert model.pass_s(tokens, past) < model.pass_s(tokens + more, past)
    assert model.pass_s(tokens, past) < model.pass_s(tokens, past + further)
    assert model.batch_s([tokens]) < model.batch_s([tokens, more])
    assert model.decode_step_s(tokens, past) < model.decode_step_s(tokens + more, past + further)
    assert model.shared_step_s(tokens, 1, past) < model.shared_step_s(tokens + more, 1, past)
    assert model.kv_transfer_s(tokens, same_node=True) < model.kv_transfer_s(tokens, same_node=False)


def test_a_shared_step_with_no_short_is_a_decode_step_and_shares_the_weights(model: CostModel):
    alone = model.decode_step_s(1, 300_000)
    assert model.shared_step_s(0, 1, 300_000) == pytest.approx(alone)
    assert model.shared_step_s(256, 1, 300_000) < alone + model.pass_s(256)


# Chunks and steps


@given(st.sampled_from(MODELS_ON_A100), st.integers(1, 500_000), st.integers(0, 200_000))
def test_a_step_is_the_longest_of_all_chunks(model: CostModel, tokens: int, past: int):
    longest, at, left = 0.0, past, tokens
    while left:
        chunk = min(left, model.chunk_tokens(at))
        longest = max(longest, (model.pass_s(chunk, at) - model.pass_s(0, 0)) / model.shape.layers)
        at, left = at + chunk, left - chunk
    assert model.step_s(tokens, past) >= longest * 0.99
    assert model.step_s(tokens, past) <= 1.05 * model.step_s_max


def test_a_smaller_step_budget_shortens_steps():
    usual, short = (CostModel(MODELS["yi-34b"], A100, 4, 8, step_s_max=budget) for budget in (0.010, 0.004))
    assert short.step_s(300_000, 0) < usual.step_s(300_000, 0)
    assert short.chunk_tokens(200_000) < usual.chunk_tokens(200_000)


def test_the_step_cost_agrees_with_passes_of_a_shorts_size(model: CostModel):
    cost = model.step_cost()
    for tokens, past in itertools.product((256, 700, 2_000, 8_000), (0, 5_000, 100_000)):
        assert costs.pass_s(cost, tokens, past) == pytest.approx(model.pass_s(tokens, past), rel=0.04)


# What does not fit


def test_kv_has_what_the_weights_leave():
    model = CostModel(MODELS["llama-3.1-70b"], A100, 4, 8)
    left = 4 * 80e9 * 0.9 - MODELS["llama-3.1-70b"].weight_bytes
    assert model.kv_capacity_tokens == int(left // 327_680)


@pytest.mark.parametrize(
    ("name", "tp", "gpus_per_node", "words"),
    [
        ("llama-3.1-70b", 1, 8, r"weights take 141\.1 GB.* 72\.0 GB.*raise tp"),
        ("llama-3.1-70b", 3, 6, "tp 3 does not divide its 64 heads"),
        ("phi-3-14b", 4, 8, "phi-3-14b: tp 4 does not divide its 10 KV heads"),
        ("mistral-7b", 4, 6, "tp 4 does not divide the 6 GPUs of a node.*divides 6"),
        ("mistral-7b", 16, 8, "tp 16 does not divide the 8 GPUs"),
        ("mistral-7b", 0, 8, "1 or more"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(name: str, tp: int, gpus_per_node: int, words: str):
    with pytest.raises(ValueError, match=words) as refused:
        CostModel(MODELS[name], A100, tp, gpus_per_node)
    assert "\n" not in str(refused.value)


# What is known of these processors


def test_prefill_reaches_a_plausible_share_of_the_peak(model: CostModel):
    flops = 2 * model.shape.layers * model.shape.linear_macs_per_token * 4_096
    share = flops / (model.pass_s(4_096) * model.tp * A100.peak_flops)
    assert 0.4 < share < 0.75


def test_a_decode_step_takes_about_as_long_as_reading_the_weights(model: CostModel):
    read_s = model.shape.weight_bytes / model.tp / A100.memory_bytes_s
    assert read_s < model.decode_step_s(1, 1_000) < 2 * read_s


def test_an_h100_is_faster_at_everything(model: CostModel):
    faster = CostModel(model.shape, H100, model.tp, 8)
    for tokens in (1, 100, 1_000, 10_000):
        assert faster.pass_s(tokens) < model.pass_s(tokens)
    assert faster.decode_step_s(32, 50_000) < model.decode_step_s(32, 50_000)


# Coefficients


def test_every_value_that_ships_says_where_it_is_from():
    assert set(coefficients.names()) == {"a100", "h100"}
    for found in (A100, H100):
        assert set(found.sources) == set(found.__struct_fields__) - {"name", "source", "sources"}
        assumed = {field for field, source in found.sources.items() if "ASSUMPTION" in source}
        assert assumed == {"memory_share", "attention_flops", "inter_node"}
        assert found.attention_flops == pytest.approx(0.6 * found.peak_flops, rel=1e-3)
        assert found.inter_node.bytes_s == 50e9


def test_an_assumption_is_replaced_and_says_so():
    changed = A100.assuming(attention_share=0.3, inter_node_bytes_s=25e9, memory_share=0.8)
    assert changed.attention_flops == pytest.approx(0.3 * 312e12)
    assert changed.inter_node == Link(latency_s=A100.inter_node.latency_s, bytes_s=25e9)
    assert changed.memory_share == 0.8
    for field in ("attention_flops", "inter_node", "memory_share"):
        assert changed.sources[field] == "ASSUMPTION, set by the user"
    assert A100.assuming() == A100
    assert "set by the user" not in str(A100.sources)


def _file(**changes: object) -> bytes:
    """A file of coefficients in which these differ (None: absent)."""
    names = [name for name in A100.__struct_fields__ if name not in ("name", "source", "sources")]
    link = {"latency_s": 1e-6, "bytes_s": 1e9}
    fields: dict[str, object] = dict.fromkeys(names, 0.5)
    fields |= {"name": "mine", "source": "mine", "sources": dict.fromkeys(names, "mine"), "memory_bytes": 10**9}
    fields |= {"all_reduce": link, "intra_node": link, "inter_node": link, **changes}
    return json.dumps({name: value for name, value in fields.items() if value is not None}).encode()


def test_a_file_of_ones_own_is_read(tmp_path):
    path = tmp_path / "mine.json"
    path.write_bytes(_file(linear_flops=3e14))
    assert coefficients.load(str(path)).linear_flops == 3e14


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"linear_flops": 0}, "linear_flops is 0, must be more than 0"),
        ({"layer_s": -1e-6}, r"Expected `float` >= 0.0 - at `\$.layer_s`"),
        ({"other_tokens": -1}, "other_tokens is -1, must be 0 or more"),
        ({"memory_share": 1.5}, "memory_share is 1.5, must be at most 1"),
        ({"inter_node": {"latency_s": 0, "bytes_s": 0}}, "inter_node.bytes_s is 0"),
        ({"attention_flops": None}, "missing required field `attention_flops`"),
        ({"memory_bytes": "80 GB"}, r"Expected `int`, got `str` - at `\$.memory_bytes`"),
        ({"sources": {}}, "does not say where memory_bytes is from"),
    ],
)
def test_a_wrong_file_is_refused_with_its_place(tmp_path, changes: dict[str, object], words: str):
    path = tmp_path / "mine.json"
    path.write_bytes(_file(**changes))
    with pytest.raises(CoefficientsError, match=words) as refused:
        coefficients.load(str(path))
    assert str(refused.value).startswith(str(path))


def test_a_processor_nobody_knows_is_refused(tmp_path):
    with pytest.raises(CoefficientsError, match=r"tpu: no such processor: choose a100 or h100, or give a \.json file"):
        coefficients.load("tpu")
    with pytest.raises(CoefficientsError, match="No such file"):
        coefficients.load(str(tmp_path / "absent.json"))


# A measured worker


MEASURED = StepCostModel(
    StepCost(pass_s=0.050, token_s=4e-4, pair_s=2e-7),
    StepCost(pass_s=0.030, token_s=1e-3, pair_s=5e-7),
    layers=30,
    kv_capacity_tokens=32_768,
    kv_bytes_per_token=20_000,
    link=Link(latency_s=1e-3, bytes_s=2e9),
    step_s_max=0.026,
    chunk_tokens_max=512,
)


def test_a_measured_worker_answers_with_its_own_coefficients():
    assert MEASURED.pass_s(100, 50) == pytest.approx(0.050 + 0.04 + 2e-7 * 100 * 100)
    assert MEASURED.batch_s([100, 300]) == pytest.approx(0.050 + 0.16 + 2e-7 * (100**2 + 300**2) / 2)
    assert MEASURED.batch_s([]) == 0.0
    assert MEASURED.decode_step_s(8, 4_000) == pytest.approx(0.030 + 0.008 + 0.002)
    assert MEASURED.shared_step_s(100, 1, 4_000) == pytest.approx(0.050 + 0.0404 + 2e-7 * (5_000 + 4_000))
    assert MEASURED.kv_transfer_s(1_000, same_node=True) == pytest.approx(0.011)
    assert MEASURED.kv_capacity_tokens == 32_768
    assert MEASURED.step_cost() == StepCost(pass_s=0.050, token_s=4e-4, pair_s=2e-7)


def test_a_measured_workers_steps_stay_below_its_setting():
    assert MEASURED.step_s(7_000, 0) <= 0.026
    assert MEASURED.step_s(100, 0) == pytest.approx(MEASURED.pass_s(100) / 30)
    # A chunk of one grain after a very long past takes what it takes.
    assert MEASURED.step_s(1_000, 10_000_000) > 0.026
