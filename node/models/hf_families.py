"""What a model_type in a config.json implies and no key says: one row per family.

Sources: the configuration and modeling files of each in `transformers`, whose defaults these are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from swarmd.node.engine.spec import NormPlacement, QkNorm

AttentionBias = Literal["no", "qkv", "qkv_bias", "attention_bias", "attention_out_bias"]
"""Biases of attention: none; Q, K and V always have one; the key `qkv_bias` decides on these; the key `attention_bias`
decides on these and the output's; or on these, and `attention_out_bias` on that."""

Windows = Literal["never", "all", "later", "period", "no rope"]
"""Which layers have the window where `layer_types` is not given: none; all; those from max_window_layers on; all but
the last of each period; those without positions."""

Scale = Literal["head_dim", "head_dim and yarn", "query_pre_attn_scalar", "attention_multiplier"]
"""What q.k is multiplied by: head_dim to the power of -1/2; that, times what YaRN's mscale_all_dim says; the key to
that power; or the last key itself."""

MoeKind = Literal["mixtral", "qwen", "gpt_oss", "deepseek_v2", "deepseek_v3"]
"""Mixtral's, of all layers; Qwen's, with keys for everything; gpt-oss', with biases; DeepSeek's, in groups, behind some
layers without: V2's by softmax, V3's by sigmoid and a bias for choosing."""


@dataclass(frozen=True)
class Family:
    """One model_type."""

    norms: NormPlacement = "before"
    qk_norm: QkNorm = "none"
    norm_plus_one: bool = False
    """The file has norm weights less 1."""
    bias: AttentionBias = "no"
    mlp_bias: bool = False
    """The key `mlp_bias` decides on biases of the MLP."""
    activation_keys: tuple[str, ...] = ("hidden_act",)
    windows: Windows = "never"
    window_switch: bool = False
    """There is a window only if `use_sliding_window` is true."""
    period: int = 0
    scale: Scale = "head_dim"
    softcaps: bool = False
    scaled_embedding: bool = False
    """Embeddings are multiplied by sqrt(hidden_size)."""
    multipliers: bool = False
    """Granite's: embedding_multiplier, residual_multiplier, logits_scaling."""
    partial_rope: bool = False
    local_rope: bool = False
    """Layers with the window have a rotary embedding of their own."""
    local_theta: float | None = None
    """Theta of these where no key says; None: that of the others."""
    no_rope: bool = False
    """`no_rope_layers` and `no_rope_layer_interval` say which layers have no positions."""
    sinks: bool = False
    latent: bool = False
    """Multi-head latent attention."""
    moe: MoeKind | None = None
    shared_size: str = ""
    """The key of a shared expert's size."""
    interleaved_experts: bool = False
    """Experts are stored [inputs, outputs], rows of gate and up in turn."""
    defaults: Mapping[str, object] = field(default_factory=dict)


_GEMMA = {"tie_word_embeddings": True, "head_dim": 256, "rms_norm_eps": 1e-6}
_GEMMA2 = {**_GEMMA, "query_pre_attn_scalar": 256, "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096}

FAMILIES: dict[str, Family] = {
    "llama": Family(bias="attention_bias", mlp_bias=True, defaults={"rms_norm_eps": 1e-6}),
    "mistral": Family(windows="all", defaults={"rms_norm_eps": 1e-6}),
    "mixtral": Family(
        windows="all",
        moe="mixtral",
        defaults={"rms_norm_eps": 1e-5, "rope_theta": 1e6},
    ),
    "qwen2": Family(bias="qkv", windows="later", window_switch=True, defaults={"max_window_layers": 28}),
    "qwen2_moe": Family(
        bias="qkv_bias",
        windows="never",
        window_switch=True,
        moe="qwen",
        shared_size="shared_expert_intermediate_size",
        defaults={"qkv_bias": True},
    ),
    "qwen3": Family(
        qk_norm="head",
        bias="attention_bias",
        windows="later",
        window_switch=True,
        defaults={"head_dim": 128, "max_window_layers": 28},
    ),
    "qwen3_moe": Family(
        qk_norm="head",
        bias="attention_bias",
        windows="all",
        window_switch=True,
        moe="qwen",
    ),
    "gemma": Family(norm_plus_one=True, bias="attention_bias", scaled_embedding=True, defaults=_GEMMA),
    "gemma2": Family(
        norms="both",
        norm_plus_one=True,
        bias="attention_bias",
        activation_keys=("hidden_activation",),
        windows="period",
        period=2,
        scale="query_pre_attn_scalar",
        softcaps=True,
        scaled_embedding=True,
        defaults={**_GEMMA2, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    ),
    "gemma3_text": Family(
        norms="both",
        qk_norm="head",
        norm_plus_one=True,
        bias="attention_bias",
        activation_keys=("hidden_activation",),
        windows="period",
        period=6,
        scale="query_pre_attn_scalar",
        softcaps=True,
        scaled_embedding=True,
        local_rope=True,
        local_theta=1e4,
        defaults={
            **_GEMMA2,
            "vocab_size": 262208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
        },
    ),
    "phi3": Family(
        windows="all",
        partial_rope=True,
        defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    ),
    "smollm3": Family(
        bias="attention_bias",
        mlp_bias=True,
        windows="no rope",
        window_switch=True,
        no_rope=True,
        defaults={"tie_word_embeddings": True, "rope_theta": 2e6, "no_rope_layer_interval": 4},
    ),
    "olmo2": Family(norms="after", qk_norm="full", bias="attention_bias", defaults={"rms_norm_eps": 1e-5}),
    "olmo3": Family(
        norms="after",
        qk_norm="full",
        bias="attention_bias",
        windows="period",
        period=4,
        local_rope=True,
        defaults={"rms_norm_eps": 1e-5, "rope_theta": 5e5, "sliding_window": 4096},
    ),
    "olmoe": Family(
        qk_norm="full",
        bias="attention_bias",
        moe="qwen",
        defaults={"rms_norm_eps": 1e-5},
    ),
    "granite": Family(bias="attention_bias", mlp_bias=True, scale="attention_multiplier", multipliers=True),
    "granitemoe": Family(
        bias="attention_bias",
        scale="attention_multiplier",
        multipliers=True,
        moe="mixtral",
    ),
    "granitemoeshared": Family(
        bias="attention_bias",
        scale="attention_multiplier",
        multipliers=True,
        moe="mixtral",
        shared_size="shared_intermediate_size",
        defaults={"shared_intermediate_size": 0},
    ),
    "seed_oss": Family(bias="attention_out_bias", mlp_bias=True, defaults={"attention_bias": True, "head_dim": 128}),
    "gpt_oss": Family(
        bias="attention_bias",
        windows="period",
        period=2,
        sinks=True,
        moe="gpt_oss",
        interleaved_experts=True,
        defaults={"rms_norm_eps": 1e-5, "attention_bias": True, "head_dim": 64, "rope_theta": 15e4},
    ),
    "deepseek_v2": Family(
        scale="head_dim and yarn",
        latent=True,
        moe="deepseek_v2",
        defaults={
            "topk_method": "greedy",
            "routed_scaling_factor": 1.0,
            "n_shared_experts": 2,
            "first_k_dense_replace": 0,
        },
    ),
    "deepseek_v3": Family(
        scale="head_dim and yarn",
        latent=True,
        moe="deepseek_v3",
        defaults={
            "n_group": 8,
            "topk_group": 4,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "n_shared_experts": 1,
            "first_k_dense_replace": 3,
        },
    ),
}
"""By model_type."""

WRAPPERS = ("gemma3", "mistral3")
"""Models of text and images whose `text_config` is one of the families; images can't be given."""

WHY_NOT = {
    "deepseek_v32": "its sparse attention is not supported yet",
    "kimi_k2": "its tokenizer is not supported yet",
    "qwen3_next": "its linear attention is not supported yet",
    "llama4": "its chunked attention is not supported yet",
    "gemma3n": "its per-layer embeddings are not supported yet",
}
"""What is known of other values."""

NEUTRAL: dict[str, tuple[object, ...]] = {
    "alibi": (False,),
    "attention_bias": (False,),
    "attention_chunk_size": (),
    "attention_out_bias": (False,),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "embedding_multiplier": (1, 1.0),
    "final_logit_softcapping": (),
    "hidden_activation": (),
    "is_causal": (True,),
    "kv_lora_rank": (),
    "layer_types": (),
    "logit_scale": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "mlp_bias": (False,),
    "moe_intermediate_size": (),
    "n_routed_experts": (),
    "no_rope_layers": (),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "o_bias": (False,),
    "parallel_attn": (False,),
    "partial_rotary_factor": (1, 1.0),
    "per_layer_config": (),
    "position_embedding_type": ("rope",),
    "qk_layernorm": (False,),
    "qkv_bias": (False,),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1, 1.0),
    "rope_local_base_freq": (),
    "shared_expert_intermediate_size": (0,),
    "shared_intermediate_size": (0,),
    "sliding_window_pattern": (),
    "use_bidirectional_attention": (False,),
    "use_cla": (False,),
    "use_qk_norm": (False,),
    "use_qkv_bias": (False,),
}
"""Keys that change results in some model, with the values that change nothing, beside null. Where a family doesn't
read such a key, another value is refused."""
