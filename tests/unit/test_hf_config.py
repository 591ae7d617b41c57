"""What configurations say about a model: both spellings, defaults that files leave out, and what is refused by name."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import transformers as hf
from support.architectures import FOLDERS

from swarmd.node.engine.spec import (
    CacheShape,
    LatentAttention,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    MoeSpec,
    RopeSpec,
    YarnScaling,
)
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.hf_config import spec_from_config
from swarmd.node.models.hf_families import FAMILIES

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "bos_token_id": 128000,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
"""Llama 3.2 1B's, as published."""

GEMMA3: dict[str, Any] = {
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152},
}
"""Gemma 3 4B's: the text's numbers are mostly left out."""


DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
"""As published."""


def test_llama_as_published() -> None:
    spec = spec_from_config(LLAMA)
    assert (spec.n_layers, spec.head_dim, spec.n_kv_heads, spec.context_length) == (16, 64, 8, 131072)
    assert spec.tied_embeddings
    assert spec.ropes == (RopeSpec(500000.0, 64, Llama3Scaling(32.0, 1.0, 4.0, 8192)),)


def test_gemma_3_as_published_and_its_defaults() -> None:
    spec = spec_from_config(GEMMA3)
    assert (spec.n_heads, spec.n_kv_heads, spec.head_dim, spec.vocab_size) == (8, 4, 256, 262208)
    assert spec.ropes == (RopeSpec(1e6, 256, LinearScaling(8.0)), RopeSpec(1e4, 256))
    assert [layer.window for layer in spec.layers[:7]] == [1024] * 5 + [None, 1024]
    assert [layer.rope for layer in spec.layers[:7]] == [1] * 5 + [0, 1]
    assert spec.tied_embeddings
    assert spec.attention_scale == 256**-0.5


@pytest.mark.parametrize("name", FOLDERS)
def test_both_spellings_of_rotary_embeddings_mean_the_same(name: str) -> None:
    new = FOLDERS[name]().config.to_dict()
    assert spec_from_config(_old_spelling(new)) == spec_from_config(new)


def _old_spelling(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4 wrote it."""
    old = dict(config)
    parameters = old.pop("rope_parameters")
    if "full_attention" in parameters:
        old["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        parameters = parameters["full_attention"]
    scaling = dict(parameters)
    old["rope_theta"] = scaling.pop("rope_theta")
    if "partial_rotary_factor" in scaling:
        old["partial_rotary_factor"] = scaling.pop("partial_rotary_factor")
    scaling["type"] = scaling.pop("rope_type")
    old["rope_scaling"] = None if scaling["type"] == "default" else scaling
    if old["model_type"] == "olmo3":
        del old["rope_local_base_freq"]
    return old


@pytest.mark.parametrize("name", FAMILIES)
def test_defaults_are_those_of_transformers(name: str) -> None:
    config = hf.AutoConfig.for_model(name)
    for key, value in FAMILIES[name].defaults.items():
        if key == "rope_theta":
            full = config.rope_parameters.get("full_attention", config.rope_parameters)
            assert full["rope_theta"] == value
        else:
            assert getattr(config, key) == value, key


@pytest.mark.parametrize(
    ("scaling", "meant"),
    [
        ({"type": "linear", "factor": 2}, LinearScaling(2.0)),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, YarnScaling(4.0, 4096)),
        (
            {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "attention_factor": 1.5},
            YarnScaling(8.0, 64, magnitude=1.5),
        ),
        (
            {"rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32, "factor": 4.0},
            LongRopeScaling((1.0,) * 32, (2.0,) * 32, 131072, 4.0),
        ),
        ({"rope_type": "default"}, None),
        (None, None),
    ],
)
def test_scalings(scaling: dict[str, Any] | None, meant: Any) -> None:
    assert spec_from_config({**LLAMA, "rope_scaling": scaling}).ropes[0].scaling == meant


def test_yarn_extends_the_context() -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = {**LLAMA, "model_type": "qwen2", "max_position_embeddings": 32768, "rope_scaling": scaling}
    assert spec_from_config(config).context_length == 131072


def test_null_means_missing() -> None:
    without = {key: value for key, value in LLAMA.items() if key != "head_dim"}
    nulls = {"head_dim": None, "sliding_window": None, "quantization_config": None, "layer_types": None}
    assert spec_from_config({**LLAMA, **nulls}) == spec_from_config(without)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "kimi_k2"}, "'kimi_k2'; its tokenizer"),
        ({"model_type": "mamba"}, "'mamba'.*supported are llama"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"hidden_act": "relu"}, "hidden_act.*'relu'.*silu"),
        ({"hidden_act": "gelu"}, "hidden_act.*'gelu'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type.*'dynamic'"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "rope_scaling.rope_type.*'mrope'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 1.0}}, "rope_scaling.mscale.*1.0"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor.*missing"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "rope_scaling.factor.*-1"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1]}}, "short_factor.*32"),
        ({"rope_scaling": "linear"}, "rope_scaling.*'linear'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor.*0.5"),
        ({"use_qk_norm": True}, "use_qk_norm.*True"),
        ({"logits_scaling": 8.0}, "logits_scaling.*8.0"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping.*30.0"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias.*True"),
        ({"num_local_experts": 8}, "num_local_experts.*8"),
        ({"layer_types": ["full_attention"] * 15}, "layer_types.*16 layers"),
        ({"layer_types": ["linear_attention"] * 16}, "layer_types.*'linear_attention'"),
        ({"sliding_window": 64, "layer_types": ["sliding_attention"] * 16}, "layer_types.*only full_attention"),
        ({"num_key_value_heads": 5}, "num_key_value_heads.*5.*divide"),
        ({"hidden_size": 0}, "hidden_size.*0"),
        ({"hidden_size": 1 << 40}, "hidden_size"),
        ({"num_hidden_layers": 1 << 20}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers.*True"),
        ({"vocab_size": "many"}, "vocab_size.*'many'"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings.*'yes'"),
        ({"model_type": "qwen3_moe", "num_experts": 4}, "num_experts_per_tok.*missing"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, "no_rope_layers.*16 layers"),
        (
            {"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2, "swiglu_limit": 5.0},
            "swiglu_limit.*5.0",
        ),
    ],
)
def test_what_the_decoder_does_not_do_is_refused_by_key_and_value(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelFileError, match=says):
        spec_from_config({**LLAMA, **changes})


def test_deepseek_v3_as_published() -> None:
    spec = spec_from_config(DEEPSEEK_V3)
    assert spec.latent == LatentAttention(q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128)
    assert (spec.head_dim, spec.cache) == (192, CacheShape(1, 64, 512))
    assert spec.ropes == (RopeSpec(1e4, 64, YarnScaling(40.0, 4096, 32.0, 1.0, 1.0)),)
    assert math.isclose(spec.attention_scale, 192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert [layer.moe for layer in spec.layers] == [False] * 3 + [True] * 58
    assert spec.moe == MoeSpec(
        256, 8, 2048, "sigmoid", scale=2.5, shared_ffn_size=2048, n_groups=8, top_groups=4, selection_bias=True
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"scoring_func": "softmax"}, "scoring_func.*'softmax'.*'sigmoid'"),
        ({"topk_method": "greedy"}, "topk_method.*'greedy'.*'noaux_tc'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq.*2"),
        ({"n_group": 7}, "n_group.*7.*divide"),
        ({"n_group": 256}, "n_group.*256.*groups of 2"),
        ({"n_group": 128, "topk_group": 3}, "topk_group.*3.*fewer than the 8"),
        ({"n_shared_experts": 1 << 30}, "n_shared_experts"),
        ({"num_key_value_heads": 64}, "num_key_value_heads.*64.*128"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim.*63.*even"),
        ({"kv_lora_rank": None}, "kv_lora_rank.*missing"),
        ({"kv_lora_rank": 1 << 40}, "kv_lora_rank"),
        ({"attention_bias": True}, "attention_bias.*True"),
        ({"model_type": "deepseek_v2", "scoring_func": "softmax"}, "topk_method.*'noaux_tc'.*greedy"),
        ({"model_type": "deepseek_v2", "scoring_func": "softmax", "norm_topk_prob": True}, "norm_topk_prob.*True"),
    ],
)
def test_what_the_decoder_does_not_do_of_deepseek(changes: dict[str, Any], says: str) -> None:
    neutral = {} if "model_type" not in changes else {"norm_topk_prob": False}
    with pytest.raises(ModelFileError, match=says):
        spec_from_config({**DEEPSEEK_V3, **neutral, **changes})


def test_keys_of_other_models_may_stand_at_values_that_change_nothing() -> None:
    neutral = {"use_qk_norm": False, "logits_scaling": 1.0, "partial_rotary_factor": 1.0, "sliding_window": 4096}
    assert spec_from_config({**LLAMA, **neutral}) == replace(spec_from_config(LLAMA))


@pytest.mark.parametrize("name", FOLDERS)
def test_the_epsilon_of_norms_is_the_files(name: str) -> None:
    """Small models' logits hardly show it."""
    config = FOLDERS[name]().config.to_dict() | {"rms_norm_eps": 3e-4}
    assert spec_from_config(config).rms_eps == 3e-4
