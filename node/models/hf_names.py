"""Where a folder in Hugging Face's form has each tensor of a model.

Models name and lay out the same things differently: Q, K and V in one tensor or three, an expert's matrices by
themselves or those of all experts stacked. For each canonical name there are a few places; which it is is seen by what
the files have.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from swarmd.node.engine import tensors
from swarmd.node.engine.spec import ArchSpec
from swarmd.node.models.hf_families import Family

PREFIXES = ("model.", "language_model.model.", "model.language_model.", "")
"""What stands before `embed_tokens` and `layers`: of a model, of the text part of a larger one, of a model saved
without its head."""
HARMLESS = ("self_attn.rotary_emb.inv_freq", "self_attn.rotary_emb.cos_cached", "self_attn.rotary_emb.sin_cached")
"""Tensors of a layer that follow from the configuration."""

_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj\.(weight|bias)")
_MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}
_RENAMED = {
    "mlp.router": ("mlp.gate", "block_sparse_moe.gate", "block_sparse_moe.router.layer"),
    "mlp.shared_expert.gate_proj": ("mlp.shared_experts.gate_proj",),
    "mlp.shared_expert.up_proj": ("mlp.shared_experts.up_proj",),
    "mlp.shared_expert.down_proj": ("shared_mlp.output_linear", "mlp.shared_experts.down_proj"),
}


@dataclass(frozen=True)
class Source:
    """Where a matrix or vector lies: `tensor` as it is called where it is not quantized.

    `experts` > 0: it is stacked, and the `expert`-th of so many. Of what then is there, it is `rows` rows, `first`,
    `first` + `step`, ..., of `total` ones. `transposed`: a matrix is stored [columns, rows], unless it is quantized.
    """

    tensor: str
    rows: int = 0
    experts: int = 0
    expert: int = 0
    first: int = 0
    step: int = 1
    total: int = 0
    transposed: bool = False


@dataclass(frozen=True)
class Places:
    """Of one model: which tensors it may be in. `has` says whether a tensor is there, quantized or not."""

    spec: ArchSpec
    family: Family
    has: Callable[[str], bool]

    def prefix(self) -> str:
        """What stands before `embed_tokens` and `layers` in this model's names."""
        found = (prefix for prefix in PREFIXES if self.has(f"{prefix}embed_tokens.weight"))
        return next(found, PREFIXES[0])

    def find(self, name: str, shape: tuple[int, ...], prefix: str) -> Source:
        """The place of a canonical tensor of this shape; where nothing is there, the most usual one."""
        rows = shape[0]
        candidates = [replace(p, rows=rows, total=p.total or rows) for p in self._candidates(name, prefix)]
        return next((place for place in candidates if self.has(place.tensor)), candidates[0])

    def _candidates(self, name: str, prefix: str) -> Iterator[Source]:
        if name == tensors.HEAD:
            yield Source(name)
            yield Source(f"language_model.{name}")
            return
        if not name.startswith("model.layers."):
            yield Source(prefix + name.removeprefix("model."))
            return
        _, _, number, part = name.split(".", 3)
        for place in self._of_layer(part):
            yield replace(place, tensor=f"{prefix}layers.{number}.{place.tensor}")

    def _of_layer(self, part: str) -> Iterator[Source]:
        if part.startswith("pre_feedforward_layernorm.") and self.spec.norms == "before":
            yield Source(part.replace("pre_feedforward", "post_attention"))
            return
        stem, _, kind = part.rpartition(".")
        if found := _EXPERT.fullmatch(part):
            yield from self._of_expert(int(found[1]), found[2], found[3])
            return
        if part == "mlp.router.selection_bias":
            yield Source("mlp.gate.e_score_correction_bias")
            return
        if (latent := self.spec.latent) and stem in ("self_attn.kv_a_proj", "self_attn.k_rope_proj"):
            first = 0 if stem.endswith("kv_a_proj") else latent.kv_rank
            yield Source(f"self_attn.kv_a_proj_with_mqa.{kind}", first=first, total=latent.kv_rank + latent.rope_dim)
            return
        yield Source(part)
        yield from (Source(f"{other}.{kind}") for other in _RENAMED.get(stem, ()))
        yield from self._joined(stem, kind)

    def _joined(self, stem: str, kind: str) -> Iterator[Source]:
        """Matrices that Phi-3 and Granite have one below the other."""
        spec, moe = self.spec, self.spec.moe
        queries, keys = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
        shared = moe.shared_ffn_size if moe else 0
        tables = {
            "self_attn.q_proj": ("self_attn.qkv_proj", 0, queries + 2 * keys),
            "self_attn.k_proj": ("self_attn.qkv_proj", queries, queries + 2 * keys),
            "self_attn.v_proj": ("self_attn.qkv_proj", queries + keys, queries + 2 * keys),
            "mlp.gate_proj": ("mlp.gate_up_proj", 0, 2 * spec.ffn_size),
            "mlp.up_proj": ("mlp.gate_up_proj", spec.ffn_size, 2 * spec.ffn_size),
            "mlp.shared_expert.gate_proj": ("shared_mlp.input_linear", 0, 2 * shared),
            "mlp.shared_expert.up_proj": ("shared_mlp.input_linear", shared, 2 * shared),
        }
        if stem in tables:
            joined, first, total = tables[stem]
            yield Source(f"{joined}.{kind}", first=first, total=total)

    def _of_expert(self, expert: int, part: str, kind: str) -> Iterator[Source]:
        moe = self.spec.moe
        assert moe is not None
        yield Source(f"mlp.experts.{expert}.{part}_proj.{kind}")
        yield Source(f"block_sparse_moe.experts.{expert}.{_MIXTRAL[part]}.{kind}")
        one = Source("", experts=moe.n_experts, expert=expert)
        for stem in ("mlp.switch_mlp", "block_sparse_moe.switch_mlp", "mlp.experts"):  # MLX's
            yield replace(one, tensor=f"{stem}.{part}_proj.{kind}")
        # Those of `transformers`' own modules have no ".weight", and biases no dot.
        ending, turned = ("" if kind == "weight" else "_bias"), self.family.interleaved_experts and kind == "weight"
        if part == "down":
            yield replace(one, tensor=f"block_sparse_moe.output_linear.{kind}")
            yield replace(one, tensor=f"mlp.experts.down_proj{ending}", transposed=turned)
            return
        second = part == "up"
        halves = replace(one, first=moe.ffn_size if second else 0, total=2 * moe.ffn_size)
        yield replace(halves, tensor=f"block_sparse_moe.input_linear.{kind}")
        if self.family.interleaved_experts:
            halves = replace(halves, first=int(second), step=2)
        yield replace(halves, tensor=f"mlp.experts.gate_up_proj{ending}", transposed=turned)
