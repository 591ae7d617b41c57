"""The seam between the decoder and a machine's arithmetic: the fused operations that a backend implements.

The decoder is written once over these. A backend owns its array type (`Array` below: torch.Tensor, mx.array,
...); the decoder passes arrays from one operation to the next and never looks inside. `prepare` turns a
canonical weight into what the backend keeps, once at load; the canonical copy is dropped afterwards. This
module needs no array library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from swarmd.node.engine.quantized import Weight
from swarmd.node.engine.stage_compute import WireDtype

Array = Any
"""A backend's own array."""

Prepared = Any
"""A matrix as a backend keeps it; its `nbytes` are the bytes of memory held."""

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
        """A float32 vector (norm weights, rotation frequencies)."""
        ...


class Backend(WeightKeeper, Protocol):
    """About a dozen operations on activations [rows, features] in the backend's working type."""

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

    def linear(self, x: Array, weight: Prepared) -> Array:
        """x @ weight.T: [rows, outputs]."""
        ...

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """x / sqrt(mean(x^2) + eps) * weight along the features (Zhang and Sennrich 2019, arXiv:1910.07467)."""
        ...

    def add(self, x: Array, y: Array) -> Array:
        """x + y; x may be overwritten."""
        ...

    def rotation(self, positions: Sequence[int], frequencies: Array) -> Array:
        """What `attention` needs to rotate rows at these positions by these frequencies."""
        ...

    def attention(
        self,
        qkv: Array,
        shape: tuple[int, int, int],
        rotation: Array,
        spans: Sequence[RowSpan],
        caches: Sequence[LayerCache],
    ) -> Array:
        """Causal grouped-query attention with rotary embedding (rotate-half), each span on its own cache.

        `qkv` is [rows, (heads + 2*kv_heads) * head_dim], `shape` (heads, kv_heads, head_dim). Keys are
        rotated, and keys and values stored in the caches at the spans' positions. Returns [rows,
        heads*head_dim].
        """
        ...

    def gated_mlp(self, x: Array, gate_up: Prepared, down: Prepared) -> Array:
        """down(silu(gate(x)) * up(x)) with gate and up stacked (Shazeer 2020, arXiv:2002.05202)."""
        ...

    def select(self, x: Array, rows: Sequence[int]) -> Array:
        """The chosen rows."""
        ...

    def logits(self, x: Array) -> Any:
        """The head's outputs as a float32 CPU torch.Tensor."""
        ...

    def new_cache(self, kv_heads: int, head_dim: int, tokens: int, old: LayerCache | None, keep: int) -> LayerCache:
        """Room for `tokens` tokens of one layer; the first `keep` are copied from `old`."""
        ...
