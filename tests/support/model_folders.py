"""Models of several files, with the right outside and any bytes inside, for tests of layouts, stores and exchanges."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import save_file
from support import trained_tokenizers
from support.tiny_gguf import CHAT_TEMPLATE, TinyModel

MIB = 1 << 20
LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
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
"""Hugging Face's names of Llama's tensors by GGUF's, both without what is in front and behind."""


def safetensors_bytes(nbytes: int, *, tensor: str = "weight", seed: int = 0) -> bytes:
    """A safetensors file of one tensor of so many random bytes."""
    header = json.dumps({tensor: {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}}).encode()
    return len(header).to_bytes(8, "little") + header + random.Random(seed).randbytes(nbytes)


def write_folder(folder: Path, weights: Mapping[str, int], *, indexed: bool = True) -> Path:
    """A folder as Hugging Face's tools write it, its weights in files of these names with so many bytes of data."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {}}))
    for number, (name, nbytes) in enumerate(weights.items()):
        (folder / name).write_bytes(safetensors_bytes(nbytes, tensor=f"weight.{number}", seed=number))
    if indexed:
        where = {f"weight.{number}": name for number, name in enumerate(weights)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def write_split_gguf(folder: Path, count: int, *, megabytes: int = 1, stem: str = "Tiny Model") -> list[Path]:
    """Valid shards of a split GGUF model, named and numbered as llama.cpp's gguf-split does."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    for number, path in enumerate(paths):
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        values = np.random.default_rng(number).standard_normal((megabytes, 1 << 18), dtype=np.float32)
        writer.add_tensor(f"blk.{number}.weight", values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def write_llama_folder(folder: Path, model: TinyModel, *, shards: int) -> Path:
    """A tiny Llama as transformers would save it, in so many files with an index, with a tokenizer of its own."""
    folder.mkdir(parents=True)
    backend = trained_tokenizers.byte_level(trained_tokenizers.splits(r"\s+"), size=model.vocab_size - 3)
    trained_tokenizers.write_folder(
        folder, backend, chat_template=CHAT_TEMPLATE, bos_token="<|bos|>", eos_token="<|im_end|>"
    )
    (folder / "config.json").write_text(json.dumps(_llama_config(model)))
    tensors = {_llama_name(name): values for name, values in model.tensors().items()}
    names = list(tensors)
    where: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def _llama_name(name: str) -> str:
    layer, _, rest = name.removeprefix("blk.").partition(".")
    return f"model.layers.{layer}.{LLAMA_NAMES[rest]}.weight" if rest else f"{LLAMA_NAMES[name]}.weight"


def _llama_config(model: TinyModel) -> dict[str, object]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": model.n_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.context_length,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": model.tied,
        "hidden_act": "silu",
        "torch_dtype": "float32",
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
