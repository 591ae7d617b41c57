"""Loading: from a checkpoint to the prepared weights of one stage, and of no other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from swarmd.node.engine.backends.base import Array, Prepared, PreparedExperts, WeightKeeper
from swarmd.node.engine.rope import rope_table
from swarmd.node.engine.spec import ArchSpec, FactorsScaling, LatentAttention, RopeSpec
from swarmd.node.engine.tensors import (
    EMBEDDING,
    OUTPUT_NORM,
    ROPE_FACTORS,
    head_name,
    layer_prefix,
    layer_shapes,
    query_stem,
    tensor_shapes,
)
from swarmd.node.models.checkpoint import Checkpoint

ReportProgress = Callable[[int, int], None]
"""Called with (file bytes loaded, file bytes to load) after each tensor."""


@dataclass(frozen=True)
class Linear:
    """A matrix as a backend keeps it, with its bias, if it has one."""

    matrix: Prepared
    bias: Array | None = None


@dataclass(frozen=True)
class AttentionWeights:
    """Q, K and V are one matrix. Norms that the architecture lacks are None."""

    norm: Array | None
    qkv: Linear
    q_norm: Array | None
    k_norm: Array | None
    sinks: Array | None
    output: Linear
    post_norm: Array | None


@dataclass(frozen=True)
class LatentWeights:
    """Multi-head latent attention. Queries are `q` of the input, or of what `q_a` and `q_a_norm` make of it.

    `kv_b` is fp32 [heads, nope_dim + value_dim, kv_rank]: from a latent to a head's key, before rotation, and value.
    """

    norm: Array | None
    q_a: Linear | None
    q_a_norm: Array | None
    q: Linear
    kv_a: Linear
    kv_a_norm: Array
    k_rope: Linear
    kv_b: Array
    output: Linear
    post_norm: Array | None


@dataclass(frozen=True)
class MlpWeights:
    """A gated MLP; gate and up are one matrix, gate first."""

    gate_up: Linear
    down: Linear


@dataclass(frozen=True)
class MoeWeights:
    """A mixture of experts. `selection_bias` [experts]; `shared_gate` is a matrix [1, hidden]."""

    router: Linear
    selection_bias: Array | None
    experts: PreparedExperts
    shared: MlpWeights | None
    shared_gate: Prepared | None


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer, as a backend keeps it."""

    attention: AttentionWeights | LatentWeights
    mlp_norm: Array | None
    mlp: MlpWeights | MoeWeights
    mlp_post_norm: Array | None


@dataclass(frozen=True)
class Rotation:
    """One of the model's rotary embeddings: `frequencies` (fp32, [dim / 2]) and what cos and sin are multiplied by."""

    frequencies: Array
    magnitude: float


@dataclass(frozen=True)
class StageWeights:
    """What one stage holds. `nbytes` counts a tied embedding and head once; the rotations not at all."""

    layers: tuple[LayerWeights, ...]
    embedding: Prepared | None
    output_norm: Array | None
    head: Prepared | None
    rotations: tuple[Rotation, ...]
    nbytes: int


def load_stage_weights(
    checkpoint: Checkpoint,
    start: int,
    end: int,
    keeper: WeightKeeper,
    *,
    context: int | None = None,
    progress: ReportProgress | None = None,
) -> StageWeights:
    """Read, convert and prepare the tensors of layers [start, end), one matrix at a time.

    `context` is the longest sequence that will be served, by default the model's. Raises ModelFileError.
    """
    checkpoint.check(start, end)
    return _Loader(checkpoint, start, end, keeper, context, progress).load()


class _Loader:
    def __init__(
        self,
        checkpoint: Checkpoint,
        start: int,
        end: int,
        keeper: WeightKeeper,
        context: int | None,
        progress: ReportProgress | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._spec: ArchSpec = checkpoint.spec
        self._start = start
        self._end = end
        self._keeper = keeper
        self._context = context or self._spec.context_length
        self._progress = progress
        self._total = sum(map(checkpoint.stored_bytes, tensor_shapes(self._spec, start, end)))
        self._done = 0
        self._held = 0
        self._present: frozenset[str] = frozenset()

    def load(self) -> StageWeights:
        spec, first, last = self._spec, self._start == 0, self._end == self._spec.n_layers
        embedding = self._matrix(EMBEDDING) if first else None
        layers = tuple(self._layer(layer) for layer in range(self._start, self._end))
        output_norm = head = None
        if last:
            output_norm = self._vector(OUTPUT_NORM)
            tied_here = spec.tied_embeddings and embedding is not None
            head = embedding if tied_here else self._matrix(head_name(spec))
        rotations = tuple(self._rotation(rope) for rope in spec.ropes)
        return StageWeights(layers, embedding, output_norm, head, rotations, self._held)

    def _layer(self, layer: int) -> LayerWeights:
        prefix = layer_prefix(layer)
        self._present = frozenset(layer_shapes(self._spec, layer))
        moe = self._spec.layers[layer].moe and self._spec.moe is not None
        latent = self._spec.latent
        return LayerWeights(
            attention=self._attention(prefix) if latent is None else self._latent(prefix, latent),
            mlp_norm=self._optional(f"{prefix}pre_feedforward_layernorm.weight"),
            mlp=self._moe(f"{prefix}mlp.") if moe else self._mlp(f"{prefix}mlp."),
            mlp_post_norm=self._optional(f"{prefix}post_feedforward_layernorm.weight"),
        )

    def _attention(self, prefix: str) -> AttentionWeights:
        attention = f"{prefix}self_attn."
        return AttentionWeights(
            norm=self._optional(f"{prefix}input_layernorm.weight"),
            qkv=self._linear(*(f"{attention}{part}_proj" for part in "qkv")),
            q_norm=self._optional(f"{attention}q_norm.weight"),
            k_norm=self._optional(f"{attention}k_norm.weight"),
            sinks=self._optional(f"{attention}sinks"),
            output=self._linear(f"{attention}o_proj"),
            post_norm=self._optional(f"{prefix}post_attention_layernorm.weight"),
        )

    def _latent(self, prefix: str, latent: LatentAttention) -> LatentWeights:
        attention = f"{prefix}self_attn."
        return LatentWeights(
            norm=self._optional(f"{prefix}input_layernorm.weight"),
            q_a=None if latent.q_rank is None else self._linear(f"{attention}q_a_proj"),
            q_a_norm=self._optional(f"{attention}q_a_layernorm.weight"),
            q=self._linear(f"{attention}{query_stem(latent)}"),
            kv_a=self._linear(f"{attention}kv_a_proj"),
            kv_a_norm=self._vector(f"{attention}kv_a_layernorm.weight"),
            k_rope=self._linear(f"{attention}k_rope_proj"),
            kv_b=self._vector(f"{attention}kv_b_proj.weight", heads=self._spec.n_heads),
            output=self._linear(f"{attention}o_proj"),
            post_norm=self._optional(f"{prefix}post_attention_layernorm.weight"),
        )

    def _mlp(self, prefix: str) -> MlpWeights:
        return MlpWeights(self._linear(f"{prefix}gate_proj", f"{prefix}up_proj"), self._linear(f"{prefix}down_proj"))

    def _moe(self, prefix: str) -> MoeWeights:
        moe = self._spec.moe
        assert moe is not None
        shared = moe.shared_ffn_size > 0
        return MoeWeights(
            router=self._linear(f"{prefix}router"),
            selection_bias=self._optional(f"{prefix}router.selection_bias"),
            experts=self._experts(prefix, moe.n_experts),
            shared=self._mlp(f"{prefix}shared_expert.") if shared else None,
            shared_gate=self._matrix(f"{prefix}shared_expert_gate.weight") if moe.shared_gate else None,
        )

    def _experts(self, prefix: str, count: int) -> PreparedExperts:
        return self._keeper.prepare_experts([self._mlp(f"{prefix}experts.{expert}.") for expert in range(count)])

    def _linear(self, *stems: str) -> Linear:
        """Matrices stacked along the rows, and their biases likewise if the architecture has them."""
        matrix = self._matrix(*(f"{stem}.weight" for stem in stems))
        biases = [f"{stem}.bias" for stem in stems if f"{stem}.bias" in self._present]
        return Linear(matrix, self._vector(*biases) if biases else None)

    def _matrix(self, *names: str) -> Prepared:
        parts = []
        for name in names:
            parts.append(self._checkpoint.read(name))
            self._count(name)
        prepared = self._keeper.prepare(parts)
        self._held += prepared.nbytes
        return prepared

    def _optional(self, name: str) -> Array | None:
        return self._vector(name) if name in self._present else None

    def _vector(self, *names: str, heads: int = 0) -> Array:
        """`heads`: of a matrix that is kept dense, [heads, rows of each, columns]."""
        values = self._values(names)
        self._held += values.nbytes
        return self._keeper.prepare_vector(values.reshape(heads, -1, values.shape[1]) if heads else values)

    def _values(self, names: Sequence[str]) -> np.ndarray:
        values = np.concatenate([self._checkpoint.read(name).dequantize() for name in names])
        for name in names:
            self._count(name)
        return values

    def _count(self, name: str) -> None:
        self._done += self._checkpoint.stored_bytes(name)
        if self._progress is not None:
            self._progress(self._done, self._total)

    def _rotation(self, rope: RopeSpec) -> Rotation:
        factors = self._values([ROPE_FACTORS]) if isinstance(rope.scaling, FactorsScaling) else None
        frequencies, magnitude = rope_table(rope, self._context, factors)
        return Rotation(self._keeper.prepare_vector(frequencies), magnitude)
