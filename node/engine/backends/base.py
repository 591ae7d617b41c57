"""The seam between the decoder and a machine's arithmetic: the operations that a backend implements.

The decoder is written once over these. A backend owns its array type (`Array` below: torch.Tensor, mx.array,
...); the decoder passes arrays from one operation to the next and never looks inside. `prepare` turns a
canonical weight into what the backend keeps, once at load; the canonical copy is dropped afterwards. This
module needs no array library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from swarmd.node.engine.quantized import Weight
from swarmd.node.engine.spec import Activation, CacheShape, LatentAttention, MoeSpec, QkNorm
from swarmd.node.engine.stage_compute import Logits, WireDtype

if TYPE_CHECKING:
    from swarmd.node.engine.weights import AttentionWeights, LatentWeights, MlpWeights, MoeWeights

Array = Any
"""A backend's own array."""

Prepared = Any
"""A matrix as a backend keeps it; its `nbytes` are the bytes of memory held."""

PreparedExperts = Any
"""The experts of one layer as a backend keeps them."""

TILE_ELEMENTS = 1 << 20
"""At most so many weights are dequantized at a time (unless one row of outputs has more): 4 MiB of fp32."""

TILE_MULTIPLE = 64
"""Tiles are cut at multiples of so many output features, a cache line of bytes."""


def tile_rows(columns: int) -> int:
    """How many output features of a matrix with `columns` inputs make one tile."""
    return max(TILE_MULTIPLE, TILE_ELEMENTS // columns // TILE_MULTIPLE * TILE_MULTIPLE)


@dataclass(frozen=True)
class RowSpan:
    """Rows [begin, end) of a step's activations belong to one sequence and stand at positions `start`,
    `start`+1, ...
    """

    begin: int
    end: int
    start: int


@dataclass(frozen=True)
class AttentionShape:
    """What one layer's attention does, as `ArchSpec` and `LayerSpec` say; `eps` is that of the Q and K norms."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    softcap: float | None
    window: int | None
    rope: int | None
    qk_norm: QkNorm
    eps: float
    latent: LatentAttention | None = None


class LayerCache(Protocol):
    """Keys and values of one layer of one sequence, with room for the rows of the step at hand."""

    keys: Array
    values: Array


class WeightKeeper(Protocol):
    """Turns canonical weights into what a backend keeps, once at load."""

    def prepare(self, parts: Sequence[Weight]) -> Prepared:
        """A matrix made of `parts` stacked along the rows (all of the same columns)."""
        ...

    def prepare_vector(self, values: np.ndarray) -> Array:
        """A float32 vector (norm weights, biases, sinks, rotation frequencies), or the `kv_b` of `LatentWeights`."""
        ...

    def prepare_experts(self, experts: Sequence[MlpWeights]) -> PreparedExperts:
        """The experts of a layer, prepared one by one, as one thing (stacked, say)."""
        ...


class Backend(WeightKeeper, Protocol):
    """The operations of the decoder on activations [rows, features] in the backend's working type."""

    name: str

    def receive(self, data: Any, dtype: WireDtype, rows: int, columns: int) -> Array:
        """Activations from a buffer of row-major values."""
        ...

    def send(self, x: Array, dtype: WireDtype) -> memoryview:
        """Activations as row-major bytes."""
        ...

    def embed(self, table: Prepared, tokens: Sequence[int]) -> Array:
        """Rows `tokens` of the embedding: [len(tokens), hidden]."""
        ...

    def linear(self, x: Array, weight: Prepared, bias: Array | None = None) -> Array:
        """x @ weight.T + bias: [rows, outputs]."""
        ...

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """x / sqrt(mean(x^2) + eps) * weight along the features (Zhang and Sennrich 2019, arXiv:1910.07467)."""
        ...

    def add(self, x: Array, y: Array, factor: float) -> Array:
        """x + factor * y; x may be overwritten."""
        ...

    def scale(self, x: Array, factor: float) -> Array:
        """x * factor; x may be overwritten."""
        ...

    def softcap(self, x: Array, cap: float | None) -> Array:
        """cap * tanh(x / cap); x itself for None. x may be overwritten."""
        ...

    def weigh(self, x: Array, logits: Array) -> Array:
        """x * sigmoid(logits), logits [rows, 1]."""
        ...

    def rotation(self, positions: Sequence[int], frequencies: Array, magnitude: float) -> Array:
        """What `attention` needs to rotate rows at these positions by these frequencies."""
        ...

    def attention(
        self,
        qkv: Array,
        shape: AttentionShape,
        weights: AttentionWeights,
        rotation: Array | None,
        spans: Sequence[RowSpan],
        caches: Sequence[LayerCache],
    ) -> Array:
        """Causal grouped-query attention, each span on its own cache.

        `qkv` is [rows, (heads + 2*kv_heads) * head_dim]. Queries and keys are normed as `shape.qk_norm` says, then
        rotated (rotate-half, the first dimensions of each head); keys and values are stored in the caches at the spans'
        positions. Scores are softcap(q.k * scale); a query at position p sees keys from p - window + 1 on; a head's
        `sinks` logit takes part in its softmax and gives nothing (Xiao et al. 2023, arXiv:2309.17453). Returns [rows,
        heads*head_dim].
        """
        ...

    def latent_attention(
        self,
        queries: Array,
        keys: Array,
        latents: Array,
        shape: AttentionShape,
        weights: LatentWeights,
        rotation: Array | None,
        spans: Sequence[RowSpan],
        caches: Sequence[LayerCache],
    ) -> Array:
        """Causal multi-head latent attention, each span on its own cache (arXiv:2405.04434, section 2.1).

        Queries are [rows, heads * (nope_dim + rope_dim)], the shared keys [rows, rope_dim], latents, normed, [rows,
        kv_rank]. Keys and the last dimensions of each query are rotated; keys and latents are stored in the caches,
        latents as values. A score is (q.(K latent) + rotated q.rotated key) * scale, and a head's output is V times the
        weighted sum of latents, K and V being its rows of `weights.kv_b`. It is q K that is computed, and V last, so
        that nothing is made of latents that are cached. Returns [rows, heads * value_dim].
        """
        ...

    def gate(self, gate_up: Array, activation: Activation) -> Array:
        """The activation of stacked gate and up [rows, 2*ffn] -> [rows, ffn] (Shazeer 2020, arXiv:2002.05202)."""
        ...

    def mixture(self, x: Array, scores: Array, moe: MoeSpec, weights: MoeWeights, activation: Activation) -> Array:
        """The chosen experts' weighted outputs for x [rows, hidden]; `scores` [rows, experts] are the router's."""
        ...

    def select(self, x: Array, rows: Sequence[int]) -> Array:
        """The chosen rows."""
        ...

    def logits(self, x: Array) -> Logits:
        """The head's outputs, float32 on the host."""
        ...


class CachingBackend(Backend, Protocol):
    """A backend whose caches are contiguous per sequence, for `KvCache`."""

    def settle(self, caches: Sequence[LayerCache]) -> None:
        """Have all that was written to these caches computed, for backends whose operations only promise results."""
        ...

    def new_cache(self, shape: CacheShape, tokens: int, old: LayerCache | None, keep: int) -> LayerCache:
        """Room for `tokens` tokens of one layer; the first `keep` are copied from `old`."""
        ...
