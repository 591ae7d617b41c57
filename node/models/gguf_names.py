"""Where a GGUF file has each tensor of a model (gguf-py's constants.py, `MODEL_TENSORS`, of llama.cpp)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from swarmd.node.engine import tensors
from swarmd.node.engine.spec import ArchSpec

EMBEDDING = "token_embd.weight"
HEAD = "output.weight"
ROPE_FACTORS = "rope_freqs.weight"

_WHOLE_MODEL = {
    tensors.EMBEDDING: EMBEDDING,
    tensors.OUTPUT_NORM: "output_norm.weight",
    tensors.HEAD: HEAD,
    tensors.ROPE_FACTORS: ROPE_FACTORS,
}
_OF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "pre_feedforward_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class Source:
    """The file's tensor. `heads`: its rows are in llama.cpp's interleaved order, of so many heads."""

    tensor: str
    heads: int = 0


def layer_prefix(layer: int) -> str:
    """What the names of a layer's tensors begin with in the file."""
    return f"blk.{layer}."


def tensor_sources(spec: ArchSpec, names: Collection[str]) -> dict[str, Source]:
    """Canonical name -> where the file has it, for all tensors of the model; `names` are those that it has."""
    sources: dict[str, Source] = {}
    for tensor in tensors.tensor_shapes(spec, 0, spec.n_layers):
        sources[tensor] = Source(_WHOLE_MODEL[tensor]) if tensor in _WHOLE_MODEL else _of_layer(spec, tensor)
    return sources


def _of_layer(spec: ArchSpec, tensor: str) -> Source:
    _, _, number, part = tensor.split(".", 3)
    stem, _, kind = part.rpartition(".")
    heads = {"self_attn.q_proj": spec.n_heads, "self_attn.k_proj": spec.n_kv_heads}.get(stem, 0)
    return Source(f"{layer_prefix(int(number))}{_OF_LAYER[stem]}.{kind}", heads)
