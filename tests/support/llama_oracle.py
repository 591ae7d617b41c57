"""`transformers` as the oracle for Llama models, given the very weights that a GGUF file stands for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from support.tiny_gguf import TinyModel
from transformers import LlamaConfig, LlamaForCausalLM

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def tiny_oracle(model: TinyModel) -> LlamaForCausalLM:
    """The model that `write_tiny_gguf(model)` writes, with the rounding of its quantization."""
    tensors = {}
    for name, values in model.tensors().items():
        kind = model.type_of(name, values)
        tensors[name] = gguf.dequantize(gguf.quantize(values, kind), kind)
    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_size,
        num_hidden_layers=model.n_layers,
        num_attention_heads=model.n_heads,
        num_key_value_heads=model.n_kv_heads,
        max_position_embeddings=model.context_length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=model.tied,
    )
    oracle = _build(config, tensors)
    if (factors := tensors.get("rope_freqs")) is not None:
        oracle.model.rotary_emb.get_buffer("inv_freq").div_(torch.from_numpy(factors))
    return oracle


def file_oracle(path: Path) -> LlamaForCausalLM:
    """A llama GGUF file with tied embeddings, read by the `gguf` package."""
    reader = gguf.GGUFReader(path)

    def value(key: str) -> float:
        field = reader.fields[f"llama.{key}"]
        return field.contents()

    heads = {"attn_q": int(value("attention.head_count")), "attn_k": int(value("attention.head_count_kv"))}
    tensors = {}
    for tensor in reader.tensors:
        name = tensor.name.removesuffix(".weight")
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        n_heads = heads.get(name.rpartition(".")[2])
        if n_heads is not None:
            rows, columns = values.shape
            values = values.reshape(n_heads, rows // n_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
        tensors[name] = values
    config = LlamaConfig(
        vocab_size=len(tensors["token_embd"]),
        hidden_size=int(value("embedding_length")),
        intermediate_size=int(value("feed_forward_length")),
        num_hidden_layers=int(value("block_count")),
        num_attention_heads=heads["attn_q"],
        num_key_value_heads=heads["attn_k"],
        max_position_embeddings=int(value("context_length")),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("rope.freq_base")},
        tie_word_embeddings=True,
    )
    return _build(config, tensors)


def _build(config: LlamaConfig, tensors: Mapping[str, np.ndarray]) -> LlamaForCausalLM:
    oracle = LlamaForCausalLM(config).float().eval()
    state = {"model.embed_tokens.weight": tensors["token_embd"], "model.norm.weight": tensors["output_norm"]}
    state["lm_head.weight"] = tensors.get("output", tensors["token_embd"])
    for layer in range(config.num_hidden_layers):
        for name, hf_name in _LAYER_NAMES.items():
            state[f"model.layers.{layer}.{hf_name}.weight"] = tensors[f"blk.{layer}.{name}"]
    oracle.load_state_dict({name: torch.from_numpy(np.array(values)) for name, values in state.items()}, strict=True)
    return oracle
