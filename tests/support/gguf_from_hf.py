"""Models of `transformers` written as GGUF files, by the rules of llama.cpp's convert_hf_to_gguf.py.

Tensor names come from the `gguf` package's own map, so that ours are compared with llama.cpp's and not with themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from support.tiny_tokenizers import byte_level_metadata
from transformers import PreTrainedModel

Arrays = Iterator[tuple[str, np.ndarray]]

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "olmoe": "olmoe",
    "seed_oss": "seed_oss",
    "granite": "granite",
    "granitemoe": "granitemoe",
    "granitemoeshared": "granitemoe",
    "smollm3": "smollm3",
    "gpt_oss": "gpt-oss",
}
"""config.model_type -> general.architecture."""
PERMUTED = ("llama", "mistral3", "granite", "granitemoe", "smollm3")
"""Those whose converter inherits `LlamaModel`."""
_BY_NAME = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}


def write_gguf_of(
    model: PreTrainedModel,
    path: Path,
    *,
    architecture: str = "",
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    raw_of: Callable[[np.ndarray], tuple[gguf.GGMLQuantizationType, np.ndarray]] | None = None,
    metadata: Mapping[str, Any] | None = None,
    **writer_options: Any,
) -> Path:
    """Write `model` with a tokenizer of bytes. Returns `path`.

    Matrices are quantized to `kind`, or `raw_of` gives their type and bytes. `metadata` adds or overrides keys, None
    removes one; `writer_options` go to `GGUFWriter`.
    """
    name = architecture or ARCHITECTURES[model.config.model_type]
    keys = {"general.name": "Tiny", **_keys(model.config, name), **byte_level_metadata(), **(metadata or {})}
    writer = gguf.GGUFWriter(path, name, **writer_options)
    for key, value in keys.items():
        _add(writer, key, value)
    for tensor, values in gguf_tensors(model, name):
        if values.ndim == 1 or tensor.endswith(".bias"):
            writer.add_tensor(tensor, np.ascontiguousarray(values, np.float32))
        elif raw_of is not None:
            raw_kind, data = raw_of(values)
            writer.add_tensor(tensor, data.reshape(*values.shape[:-1], -1), raw_dtype=raw_kind)
        else:
            writer.add_tensor(tensor, gguf.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(model: PreTrainedModel, architecture: str) -> Arrays:
    """The file's tensors in fp32, under the file's names, in the file's row order."""
    config = model.config
    names = gguf.get_tensor_name_map(_BY_NAME[architecture], config.num_hidden_layers)
    yield from _factors(config, architecture)
    state = {name: tensor.detach().float().numpy() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings or architecture.startswith("gemma"):
        state.pop("lm_head.weight", None)
    for hf_name, values in _converted(state, config, architecture):
        tensor = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        assert tensor is not None, hf_name
        yield tensor, values


def _converted(state: Mapping[str, np.ndarray], config: Any, architecture: str) -> Arrays:
    for name, values in state.items():
        if architecture in PERMUTED and name.rpartition(".")[0].endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            rows = len(values)
            yield name, values.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)
        elif architecture.startswith("gemma") and name.endswith("norm.weight"):
            yield name, values + 1
        elif "experts." in name:
            yield from _experts(name, values, config)
        elif name.endswith("shared_mlp.input_linear.weight"):
            layer = name.split(".")[2]
            for part, rows in zip(("gate", "up"), np.split(values, 2), strict=True):
                yield f"model.layers.{layer}.mlp.shared_expert.{part}_proj.weight", rows
        elif name.endswith("sinks"):
            yield f"{name}.weight", values
        else:
            yield name.replace("block_sparse_moe.router.weight", "block_sparse_moe.router.layer.weight"), values


def _experts(name: str, values: np.ndarray, config: Any) -> Arrays:
    """All experts' matrices in one; gpt-oss has them transposed, and gate and up in turns."""
    prefix, _, part = name.partition(".experts.")
    prefix = f"model.layers.{prefix.split('.')[2]}.mlp.experts"
    kind = "bias" if part.endswith("_bias") else "weight"
    if config.model_type == "gpt_oss" and kind == "weight":
        values = values.swapaxes(1, 2)
    if part.startswith("down"):
        yield f"{prefix}.down_proj.{kind}", values
        return
    half = values.shape[1] // 2
    turns = config.model_type == "gpt_oss"
    yield f"{prefix}.gate_proj.{kind}", values[:, ::2] if turns else values[:, :half]
    yield f"{prefix}.up_proj.{kind}", values[:, 1::2] if turns else values[:, half:]


def _factors(config: Any, architecture: str) -> Arrays:
    rope = _rope(config)
    if architecture == "phi3" and "long_factor" in rope:
        yield "rope_factors_long.weight", np.array(rope["long_factor"], np.float32)
        yield "rope_factors_short.weight", np.array(rope["short_factor"], np.float32)
    elif rope["rope_type"] == "llama3":
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        yield "rope_freqs.weight", np.array(list(_llama3_factors(rope, dim)), np.float32)


def _llama3_factors(rope: Mapping[str, Any], dim: int) -> Iterator[float]:
    """`LlamaModel.generate_extra_tensors`."""
    context, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
    for i in range(0, dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / dim)
        if wavelength < context / high:
            yield 1.0
        elif wavelength > context / low:
            yield rope["factor"]
        else:
            smooth = (context / wavelength - low) / (high - low)
            yield 1 / ((1 - smooth) / rope["factor"] + smooth)


def _rope(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    return rope.get("full_attention", rope)


def _keys(config: Any, architecture: str) -> dict[str, Any]:
    """`set_gguf_parameters` of `TextModel` and of the architecture's class."""
    rope = _rope(config)
    keys: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "expert_count": getattr(config, "num_local_experts", getattr(config, "num_experts", None)),
        "expert_used_count": getattr(config, "num_experts_per_tok", None),
        "expert_feed_forward_length": getattr(config, "moe_intermediate_size", None),
        "expert_shared_feed_forward_length": getattr(
            config, "shared_expert_intermediate_size", getattr(config, "shared_intermediate_size", None)
        ),
    }
    if architecture not in ("gemma", "gemma2"):
        keys["rope.freq_base"] = float(rope["rope_theta"])
    if architecture not in ("granite", "granitemoe", "phi3") and getattr(config, "head_dim", None):
        keys |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    if rope["rope_type"] in ("linear", "yarn"):
        keys |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        keys["rope.scaling.yarn_beta_fast"] = rope.get("beta_fast")
        keys["rope.scaling.yarn_beta_slow"] = rope.get("beta_slow")
    keys |= _own_keys(config, architecture, rope)
    return {f"{architecture}.{key}": value for key, value in keys.items() if value is not None}


def _own_keys(config: Any, architecture: str, rope: Mapping[str, Any]) -> dict[str, Any]:
    if architecture in PERMUTED:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        keys = {"rope.dimension_count": head_dim}
        if architecture.startswith("granite"):
            keys |= {
                "attention.scale": config.attention_multiplier,
                "embedding_scale": float(config.embedding_multiplier),
                "residual_scale": config.residual_multiplier,
                "logit_scale": float(config.logits_scaling),
            }
        return keys
    if architecture == "phi3":
        return _phi3_keys(config, rope)
    if architecture == "gpt-oss":
        return {
            "attention.sliding_window": config.sliding_window,
            "expert_feed_forward_length": config.intermediate_size,
        }
    if architecture == "olmo2" and config.model_type == "olmo3":
        pattern = [kind == "sliding_attention" for kind in config.layer_types]
        return {"attention.sliding_window": config.sliding_window, "attention.sliding_window_pattern": pattern}
    if architecture in ("gemma2", "gemma3"):
        local = config.rope_parameters.get("sliding_attention", {}) if architecture == "gemma3" else {}
        return {
            "attention.sliding_window": config.sliding_window,
            "attn_logit_softcapping": config.attn_logit_softcapping,
            "final_logit_softcapping": config.final_logit_softcapping,
            "rope.freq_base_swa": local.get("rope_theta"),
        }
    return {}


def _phi3_keys(config: Any, rope: Mapping[str, Any]) -> dict[str, Any]:
    part = rope.get("partial_rotary_factor", 1.0)
    keys: dict[str, Any] = {
        "rope.dimension_count": int(part * config.hidden_size) // config.num_attention_heads,
        "attention.sliding_window": config.sliding_window or 0,
    }
    original = rope["original_max_position_embeddings"]
    keys["rope.scaling.original_context_length"] = original
    if "long_factor" in rope:
        scale = config.max_position_embeddings / original
        keys["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    return keys


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif value is not None:
        writer.add_uint32(key, value)
