"""Where a GGUF file has each tensor of a model (gguf-py's constants.py, `MODEL_TENSORS`, of llama.cpp)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import prod

from swarmd.node.engine import tensors
from swarmd.node.engine.spec import ArchSpec
from swarmd.node.models.gguf_families import FAMILIES
from swarmd.node.models.gguf_rope import FACTORS

EMBEDDING = "token_embd.weight"
HEAD = "output.weight"

_WHOLE_MODEL = {
    tensors.EMBEDDING: EMBEDDING,
    tensors.OUTPUT_NORM: "output_norm.weight",
    tensors.HEAD: HEAD,
    tensors.ROPE_FACTORS: FACTORS,
}
_OF_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.o_proj.bias": "attn_output.bias",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "self_attn.sinks": "attn_sinks.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.down_proj.bias": "ffn_down.bias",
    "mlp.router.weight": "ffn_gate_inp.weight",
    "mlp.router.bias": "ffn_gate_inp.bias",
    "mlp.router.selection_bias": "exp_probs_b.bias",
    "mlp.shared_expert.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_expert.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_expert.down_proj.weight": "ffn_down_shexp.weight",
    "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
}
"""What is a tensor of its own in every file; the others may be parts of one."""


@dataclass(frozen=True)
class Source:
    """Elements from `first` on of the file's tensor, whose whole row-major shape is `whole`.

    `heads`: the rows are in llama.cpp's interleaved order, of so many heads.
    """

    tensor: str
    whole: tuple[int, ...]
    first: int = 0
    heads: int = 0


def layer_prefix(layer: int) -> str:
    """What the names of a layer's tensors begin with in the file."""
    return f"blk.{layer}."


def tensor_sources(spec: ArchSpec, names: Collection[str]) -> dict[str, Source]:
    """Canonical name -> where the file has it, for all tensors of the model; `names` are those that it has."""
    finder = _Finder(spec, names)
    return {
        tensor: finder.find(tensor, shape) for tensor, shape in tensors.tensor_shapes(spec, 0, spec.n_layers).items()
    }


class _Finder:
    def __init__(self, spec: ArchSpec, names: Collection[str]) -> None:
        self._spec = spec
        self._names = names
        family = FAMILIES[spec.architecture]
        self._permuted = family.permuted
        self._of_layer = {**_OF_LAYER, "pre_feedforward_layernorm.weight": f"{family.pre_mlp_norm}.weight"}

    def find(self, tensor: str, shape: tuple[int, ...]) -> Source:
        if tensor in _WHOLE_MODEL:
            return Source(_WHOLE_MODEL[tensor], shape)
        _, _, layer, part = tensor.split(".", 3)
        prefix = layer_prefix(int(layer))
        if part in self._of_layer:
            return Source(prefix + self._of_layer[part], shape)
        stem, _, kind = part.rpartition(".")
        if stem.startswith("self_attn."):
            return self._qkv(prefix, stem.removeprefix("self_attn.")[0], kind, shape)
        if stem.startswith("mlp.experts."):
            _, _, expert, which = stem.split(".")
            return self._expert(prefix, int(expert), which.removesuffix("_proj"), kind, shape)
        return self._gate_up(prefix, stem.removeprefix("mlp.").removesuffix("_proj"), kind, shape)

    def _qkv(self, prefix: str, part: str, kind: str, shape: tuple[int, ...]) -> Source:
        """Q, K or V, by itself or one behind the other in one tensor."""
        spec = self._spec
        heads = {"q": spec.n_heads, "k": spec.n_kv_heads}.get(part, 0) if self._permuted else 0
        own, fused = f"{prefix}attn_{part}.{kind}", f"{prefix}attn_qkv.{kind}"
        if own in self._names or fused not in self._names:
            return Source(own, shape, heads=heads)
        queries, keys = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
        row = {"q": 0, "k": queries, "v": queries + keys}[part]
        return Source(fused, (queries + 2 * keys, *shape[1:]), row * prod(shape[1:]), heads)

    def _gate_up(self, prefix: str, part: str, kind: str, shape: tuple[int, ...]) -> Source:
        """Gate or up, by itself or (Phi 3) gate before up in the tensor that is called up."""
        own, up = f"{prefix}ffn_{part}.{kind}", f"{prefix}ffn_up.{kind}"
        if f"{prefix}ffn_gate.{kind}" in self._names or up not in self._names:
            return Source(own, shape)
        return Source(up, (2 * shape[0], *shape[1:]), prod(shape) if part == "up" else 0)

    def _expert(self, prefix: str, expert: int, part: str, kind: str, shape: tuple[int, ...]) -> Source:
        """An expert's matrix or bias: in a stack of all experts', with gate and up in one or not, or by itself."""
        assert self._spec.moe is not None
        n_experts, size = self._spec.moe.n_experts, prod(shape)
        stacked, fused = f"{prefix}ffn_{part}_exps.{kind}", f"{prefix}ffn_gate_up_exps.{kind}"
        alone = f"{prefix}ffn_{part}.{expert}.{kind}"
        if stacked not in self._names:
            if part != "down" and fused in self._names:
                first = 2 * expert + (part == "up")
                return Source(fused, (n_experts, 2 * shape[0], *shape[1:]), first * size)
            if alone in self._names:
                return Source(alone, shape)
        return Source(stacked, (n_experts, *shape), expert * size)
