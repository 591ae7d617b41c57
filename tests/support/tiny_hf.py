"""Small random models of `transformers`, one for every architecture and variant that GGUF files come in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from support.tiny_gguf import VOCAB_SIZE

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL_EXPERTS = {"num_local_experts": 6, "num_experts_per_tok": 2}
GRANITE = {
    "attention_multiplier": 0.3,
    "embedding_multiplier": 6.0,
    "residual_multiplier": 0.4,
    "logits_scaling": 3.0,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
PHI3_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 128,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 1.5, 2.5, 4.0, 8.0, 16.0],
}
PHI3_PLAIN = {"rope_type": "default", "rope_theta": 10000.0, "original_max_position_embeddings": 512}


def _case(config: Any, model: Any, /, **changes: Any) -> Callable[[], hf.PreTrainedModel]:
    def build() -> hf.PreTrainedModel:
        torch.manual_seed(0)
        built = model(config(**{**SIZES, "attn_implementation": "eager", **changes})).float().eval()
        _randomize(built)
        return built

    return build


def _randomize(model: hf.PreTrainedModel) -> None:
    """Values by which every parameter matters: initialization leaves norms at 1 or 0, and biases at 0."""
    for name, values in model.named_parameters():
        with torch.no_grad():
            if "norm" in name:
                values += 0.2 * torch.randn_like(values)
            elif values.ndim > 1:
                values.copy_(torch.randn_like(values) * 1.2 / values.shape[-1] ** 0.5)
            else:
                values.copy_(0.3 * torch.randn_like(values))
    for name, values in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            values.copy_(0.3 * torch.randn_like(values))


CASES: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "llama": _case(hf.LlamaConfig, hf.LlamaForCausalLM),
    "llama tied": _case(hf.LlamaConfig, hf.LlamaForCausalLM, tie_word_embeddings=True),
    "llama 3": _case(hf.LlamaConfig, hf.LlamaForCausalLM, rope_parameters=LLAMA3),
    "llama linear": _case(
        hf.LlamaConfig,
        hf.LlamaForCausalLM,
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    ),
    "llama yarn": _case(hf.LlamaConfig, hf.LlamaForCausalLM, rope_parameters=YARN),
    "llama biases": _case(hf.LlamaConfig, hf.LlamaForCausalLM, attention_bias=True, mlp_bias=True),
    "mistral": _case(hf.MistralConfig, hf.MistralForCausalLM, head_dim=32, sliding_window=None),
    "mixtral": _case(hf.MixtralConfig, hf.MixtralForCausalLM, **LOCAL_EXPERTS),
    "qwen2": _case(hf.Qwen2Config, hf.Qwen2ForCausalLM),
    "qwen2 yarn": _case(hf.Qwen2Config, hf.Qwen2ForCausalLM, rope_parameters=YARN),
    "qwen2moe": _case(hf.Qwen2MoeConfig, hf.Qwen2MoeForCausalLM, **EXPERTS, shared_expert_intermediate_size=128),
    "qwen3": _case(hf.Qwen3Config, hf.Qwen3ForCausalLM, head_dim=32),
    "qwen3moe": _case(hf.Qwen3MoeConfig, hf.Qwen3MoeForCausalLM, **EXPERTS, head_dim=32, norm_topk_prob=True),
    "olmoe": _case(hf.OlmoeConfig, hf.OlmoeForCausalLM, num_experts=6, num_experts_per_tok=2),
    "seed_oss": _case(hf.SeedOssConfig, hf.SeedOssForCausalLM, head_dim=32),
    "gemma": _case(hf.GemmaConfig, hf.GemmaForCausalLM, head_dim=32),
    "gemma2": _case(hf.Gemma2Config, hf.Gemma2ForCausalLM, head_dim=32, query_pre_attn_scalar=32, sliding_window=16),
    "gemma3": _case(
        hf.Gemma3TextConfig,
        hf.Gemma3ForCausalLM,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=16,
        num_hidden_layers=7,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "phi3": _case(hf.Phi3Config, hf.Phi3ForCausalLM, rope_parameters=PHI3_PLAIN, sliding_window=None),
    "phi3 window": _case(hf.Phi3Config, hf.Phi3ForCausalLM, rope_parameters=PHI3_PLAIN, sliding_window=15),
    "phi3 long": _case(
        hf.Phi3Config,
        hf.Phi3ForCausalLM,
        rope_parameters=PHI3_LONG,
        original_max_position_embeddings=128,
        sliding_window=None,
        tie_word_embeddings=True,
    ),
    "olmo2": _case(hf.Olmo2Config, hf.Olmo2ForCausalLM),
    "olmo3": _case(
        hf.Olmo3Config,
        hf.Olmo3ForCausalLM,
        sliding_window=16,
        rope_parameters={
            "full_attention": YARN,
            "sliding_attention": {"rope_type": "default", "rope_theta": YARN["rope_theta"]},
        },
    ),
    "granite": _case(hf.GraniteConfig, hf.GraniteForCausalLM, **GRANITE),
    "granitemoe": _case(hf.GraniteMoeConfig, hf.GraniteMoeForCausalLM, **GRANITE, **LOCAL_EXPERTS),
    "granitemoe shared": _case(
        hf.GraniteMoeSharedConfig,
        hf.GraniteMoeSharedForCausalLM,
        **GRANITE,
        **LOCAL_EXPERTS,
        shared_intermediate_size=128,
    ),
    "smollm3": _case(hf.SmolLM3Config, hf.SmolLM3ForCausalLM),
    "gpt-oss": _case(
        hf.GptOssConfig,
        hf.GptOssForCausalLM,
        **LOCAL_EXPERTS,
        head_dim=32,
        sliding_window=16,
        rope_parameters={**YARN, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
    ),
}
"""By what is special about it."""
