"""Small random Llama models as complete GGUF files, with tokenizer and chat template, written by `gguf`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from support.tiny_tokenizers import byte_level_metadata

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCAB_SIZE = len(byte_level_metadata()["tokenizer.ggml.tokens"])


@dataclass(frozen=True)
class TinyModel:
    """A random model's shape. `types` overrides `type` for tensors whose name, without ".weight", ends in the key."""

    n_layers: int = 4
    hidden_size: int = 64
    n_heads: int = 4
    n_kv_heads: int = 2
    ffn_size: int = 96
    vocab_size: int = VOCAB_SIZE
    context_length: int = 512
    type: Type = Type.F32
    types: Mapping[str, Type] | None = None
    tied: bool = True
    rope_factors: bool = False
    seed: int = 0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.n_heads

    def tensors(self) -> dict[str, np.ndarray]:
        """fp32 values by GGUF name, in HF's row order."""
        random = np.random.default_rng(self.seed)
        hidden, keys = self.hidden_size, self.n_kv_heads * self.head_dim

        def matrix(rows: int, columns: int) -> np.ndarray:
            return (random.standard_normal((rows, columns)) * 1.4 / np.sqrt(columns)).astype(np.float32)

        def norm() -> np.ndarray:
            return (1 + 0.2 * random.standard_normal(hidden)).astype(np.float32)

        tensors = {"token_embd": random.standard_normal((self.vocab_size, hidden)).astype(np.float32)}
        for layer in range(self.n_layers):
            tensors |= {
                f"blk.{layer}.attn_norm": norm(),
                f"blk.{layer}.attn_q": matrix(hidden, hidden),
                f"blk.{layer}.attn_k": matrix(keys, hidden),
                f"blk.{layer}.attn_v": matrix(keys, hidden),
                f"blk.{layer}.attn_output": matrix(hidden, hidden),
                f"blk.{layer}.ffn_norm": norm(),
                f"blk.{layer}.ffn_gate": matrix(self.ffn_size, hidden),
                f"blk.{layer}.ffn_up": matrix(self.ffn_size, hidden),
                f"blk.{layer}.ffn_down": matrix(hidden, self.ffn_size),
            }
        tensors["output_norm"] = norm()
        if not self.tied:
            tensors["output"] = matrix(self.vocab_size, hidden)
        if self.rope_factors:
            tensors["rope_freqs"] = np.linspace(1, 8, self.head_dim // 2).astype(np.float32)
        return tensors

    def type_of(self, name: str, values: np.ndarray) -> Type:
        if values.ndim == 1:
            return Type.F32
        chosen = [kind for end, kind in (self.types or {}).items() if name.endswith(end)]
        return chosen[0] if chosen else self.type


def write_tiny_gguf(path: Path, model: TinyModel | None = None, **metadata: Any) -> Path:
    """Write the model; `metadata` adds or overrides keys (dots as "__"). Returns `path`."""
    model = model or TinyModel()
    writer = gguf.GGUFWriter(path, "llama")
    _add_metadata(writer, model, {key.replace("__", "."): value for key, value in metadata.items()})
    for name, values in model.tensors().items():
        kind = model.type_of(name, values)
        heads = {"attn_q": model.n_heads, "attn_k": model.n_kv_heads}.get(name.rpartition(".")[2])
        rows = values if heads is None else _interleaved(values, heads)
        writer.add_tensor(f"{name}.weight", gguf.quantize(rows, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """HF's rows of Q or K -> llama.cpp's (`LlamaModel.permute` in convert_hf_to_gguf.py)."""
    rows, columns = values.shape
    return values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _add_metadata(writer: gguf.GGUFWriter, model: TinyModel, extra: Mapping[str, Any]) -> None:
    values: dict[str, Any] = {
        "general.name": "Tiny Random Llama",
        "llama.block_count": model.n_layers,
        "llama.context_length": model.context_length,
        "llama.embedding_length": model.hidden_size,
        "llama.feed_forward_length": model.ffn_size,
        "llama.attention.head_count": model.n_heads,
        "llama.attention.head_count_kv": model.n_kv_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": model.head_dim,
        "llama.vocab_size": model.vocab_size,
        "tokenizer.chat_template": CHAT_TEMPLATE,
        **byte_level_metadata(),
        **extra,
    }
    for key, value in values.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
