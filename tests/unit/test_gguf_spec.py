"""What a GGUF header says becomes an ArchSpec, or is refused with the name of the key."""

from __future__ import annotations

from typing import Any

import pytest

from swarmd.node.engine.spec import ArchSpec, LinearScaling, LongRopeScaling, YarnScaling
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.gguf_families import FAMILIES
from swarmd.node.models.gguf_spec import spec_from_gguf

SIZES: dict[str, Any] = {
    "block_count": 4,
    "context_length": 128,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
}
MOE = {"expert_count": 6, "expert_used_count": 2}
LONG = ("rope_factors_long.weight", "rope_factors_short.weight")


def spec_of(architecture: str, names: tuple[str, ...] = (), /, **changes: Any) -> ArchSpec:
    """Keys without the architecture's name, dots as "__"; None removes one."""
    values = {**SIZES, **{key.replace("__", "."): value for key, value in changes.items()}}
    metadata = {f"{architecture}.{key}": value for key, value in values.items() if value is not None}
    metadata |= {"general.architecture": architecture, "tokenizer.ggml.tokens": ["a"] * 50}
    return spec_from_gguf(metadata, names, lambda name, length: (2.0 if "long" in name else 1.0,) * length)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_least_that_a_header_says_is_enough(architecture: str) -> None:
    spec = spec_of(architecture)
    assert spec.architecture == architecture
    assert (spec.n_layers, spec.head_dim, spec.vocab_size) == (4, 16, 50)


def test_one_value_for_all_layers_may_be_a_list() -> None:
    assert spec_of("llama", attention__head_count_kv=[2] * 4).n_kv_heads == 2


def test_yarn() -> None:
    scaling = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}
    spec = spec_of("qwen2", **scaling, rope__scaling__original_context_length=32)
    assert spec.ropes[0].scaling == YarnScaling(4.0, 32)
    assert spec_of("gpt-oss", **scaling).ropes[0].scaling == YarnScaling(4.0, 128, truncate=False)


def test_a_factor_without_a_type_is_linear() -> None:
    assert spec_of("llama", rope__scaling__factor=2.0).ropes[0].scaling == LinearScaling(2.0)
    assert spec_of("llama", rope__scale_linear=2.0).ropes[0].scaling == LinearScaling(2.0)
    assert spec_of("llama", rope__scaling__factor=2.0, rope__scaling__type="none").ropes[0].scaling is None


def test_long_rope_reads_its_factors_from_tensors() -> None:
    spec = spec_of("phi3", LONG, rope__scaling__original_context_length=32, rope__scaling__attn_factor=1.19)
    assert spec.ropes[0].scaling == LongRopeScaling((1.0,) * 8, (2.0,) * 8, 32, 4.0, 1.19)


@pytest.mark.parametrize(("architecture", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_gemma_of_27b_scales_attention_by_its_width(architecture: str, layers: int) -> None:
    large = spec_of(architecture, block_count=layers, attention__key_length=32, attention__value_length=32)
    assert large.attention_scale == 16**-0.5
    small = spec_of(architecture, attention__key_length=32, attention__value_length=32)
    assert small.attention_scale == 32**-0.5


def test_windows_follow_a_pattern_from_the_file() -> None:
    spec = spec_of("olmo2", attention__sliding_window=9, attention__sliding_window_pattern=[True, False, False, True])
    assert [layer.window for layer in spec.layers] == [9, None, None, 9]
    spec = spec_of("gpt-oss", **MOE, attention__sliding_window=9, attention__sliding_window_pattern=4)
    assert [layer.window for layer in spec.layers] == [9, 9, 9, None]


def test_granite_without_positions() -> None:
    assert {layer.rope for layer in spec_of("granite", rope__scaling__finetuned=False).layers} == {None}


def test_layers_with_a_router_are_mixtures() -> None:
    spec = spec_of("qwen3moe", ("blk.2.ffn_gate_inp.weight",), **MOE, expert_feed_forward_length=32)
    assert [layer.moe for layer in spec.layers] == [False, False, True, False]
    assert spec.moe is not None
    assert (spec.moe.ffn_size, spec.moe.score, spec.moe.normalize) == (32, "softmax", True)


def test_experts_as_the_keys_say() -> None:
    moe = spec_of("llama", **MOE, expert_gating_func=2, expert_weights_norm=False, expert_weights_scale=2.5).moe
    assert moe is not None
    assert (moe.score, moe.normalize, moe.scale, moe.ffn_size) == ("sigmoid", False, 2.5, 96)
    qwen = spec_of("qwen2moe", ("blk.0.ffn_up_shexp.weight",), **MOE).moe
    assert qwen is not None
    assert (qwen.ffn_size, qwen.shared_ffn_size, qwen.shared_gate) == (48, 96, True)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"block_count": None}, "block_count is missing"),
    ("llama", {"block_count": 1 << 40}, "block_count"),
    ("llama", {"block_count": True}, "block_count is True"),
    ("llama", {"attention__head_count": [4, 2, 4, 2]}, "head_count is"),
    ("llama", {"attention__head_count_kv": 3}, "cannot share"),
    ("llama", {"attention__key_length": 32}, "differ in size"),
    ("llama", {"attention__key_length_swa": 32}, "another size"),
    ("llama", {"attention__causal": False}, "not causal"),
    ("llama", {"attention__causal": 1}, "true or false"),
    ("llama", {"attention__clamp_kqv": 8.0}, r"attention\.clamp_kqv \(8\.0\)"),
    ("llama", {"attention__layer_norm_rms_epsilon": float("nan")}, "epsilon"),
    ("llama", {"rope__dimension_count": 8}, "8 of 16 dimensions"),
    ("phi3", {"rope__dimension_count": 7}, "7 of 16 dimensions"),
    ("phi3", {"rope__dimension_count": 18}, "18 of 16 dimensions"),
    ("llama", {"rope__scaling__type": "su"}, "'su' is not supported"),
    ("llama", {"rope__scaling__type": 3}, "3 is not supported"),
    ("llama", {"rope__scaling__type": "longrope"}, "'longrope' is not supported"),
    ("llama", {"rope__scaling__type": "yarn"}, r"'yarn' comes without rope\.scaling\.factor"),
    ("llama", {"rope__scaling__attn_factor": 1.2}, "attn_factor"),
    ("qwen2", {"rope__scaling__yarn_attn_factor": 1.0}, "yarn_attn_factor of 1.0"),
    ("mistral3", {"rope__scaling__yarn_log_multiplier": 1.0}, "yarn_log_multiplier"),
    ("mistral3", {"attention__temperature_scale": 0.1}, "temperature_scale"),
    ("qwen2", {"rope__dimension_sections": [16, 24, 24, 0]}, "dimension_sections"),
    ("qwen2", {"attention__sliding_window": 4096}, r"qwen2\.attention\.sliding_window"),
    ("gemma3", {"attention__sliding_window_pattern": [True]}, "one truth value for each layer"),
    ("gemma3", {"attention__sliding_window_pattern": 0}, "pattern is 0"),
    ("llama", {"logit_scale": 0.5}, r"llama\.logit_scale"),
    ("granite", {"logit_scale": -1.0}, "positive"),
    ("llama", {"expert_count": 6}, "0 of 6 experts"),
    ("llama", {"expert_count": 6, "expert_used_count": 7}, "7 of 6 experts"),
    ("llama", {"expert_count": 4096, "expert_used_count": 2, "block_count": 17}, "not possible"),
    ("llama", {"expert_count": 1 << 20, "expert_used_count": 2}, "expert_count"),
    ("llama", {**MOE, "expert_gating_func": 4}, "gating_func 4"),
    ("llama", {**MOE, "expert_group_count": 4}, "expert_group_count"),
    ("llama", {"leave": "x"}, r"llama\.leave \('x'\) asks for what is not supported"),
]


@pytest.mark.parametrize(("architecture", "changes", "says"), REFUSED)
def test_what_is_not_understood_is_refused_by_name(architecture: str, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelFileError, match=says):
        spec_of(architecture, **changes)


def test_contradicting_rope_factors_are_refused() -> None:
    with pytest.raises(ModelFileError, match="both rope factors and rope scaling"):
        spec_of("llama", ("rope_freqs.weight",), rope__scaling__type="linear", rope__scaling__factor=2.0)
    with pytest.raises(ModelFileError, match="long and short rope factors beside"):
        spec_of("phi3", LONG, rope__scaling__type="yarn")


def test_unknown_architectures_are_named_with_the_known_ones() -> None:
    with pytest.raises(ModelFileError, match=r"'mamba'.*supported architectures: llama, .*gpt-oss"):
        spec_from_gguf({"general.architecture": "mamba"}, [])
    with pytest.raises(ModelFileError, match=r"'deepseek2': multi-head latent attention.*folders of safetensors"):
        spec_from_gguf({"general.architecture": "deepseek2"}, [])
    with pytest.raises(ModelFileError, match="architecture is None"):
        spec_from_gguf({}, [])


def test_keys_that_are_off_or_harmless_do_not_matter() -> None:
    spec_of("llama", attention__clamp_kqv=0.0, tensor_data_layout="Meta AI original pth", nextn_predict_layers=0)
