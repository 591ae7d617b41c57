"""The plain torch backend for CPUs: fp32 arithmetic, weights kept quantized and dequantized tile by tile for
each product.

Results of a row do not depend on the other rows of the step: oneDNN's product takes each row through the same
arithmetic from two rows on, so a single row is given a twin (measured on AVX2 and AVX-512; tests compare bit
for bit).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from swarmd.node.engine.backends.base import AttentionShape, LayerCache, RowSpan
from swarmd.node.engine.backends.torch_ops import TorchOps, attend_to_latents, rotate
from swarmd.node.engine.backends.torch_tiles import Scratch, TiledMatrix, product, tiled
from swarmd.node.engine.quantized import Weight
from swarmd.node.engine.spec import CacheShape
from swarmd.node.engine.stage_compute import Logits, WireDtype
from swarmd.node.engine.weights import AttentionWeights, LatentWeights, MlpWeights


@dataclass
class TorchLayerCache:
    """Keys and values [heads, tokens, dim], fp32."""

    keys: torch.Tensor
    values: torch.Tensor


class TorchCpuBackend(TorchOps):
    """See `Backend`. Arrays are fp32 CPU tensors. Not for use by two threads at once (they would share the
    scratch).
    """

    name = "torch-cpu"

    def __init__(self) -> None:
        self._scratch = Scratch()

    def prepare(self, parts: Sequence[Weight]) -> TiledMatrix:
        """Cut the stacked parts into tiles; see torch_tiles for what is kept."""
        matrix = tiled(parts)
        self._scratch.fit(matrix)
        return matrix

    def prepare_vector(self, values: np.ndarray) -> torch.Tensor:
        """A copy as a tensor."""
        return torch.from_numpy(values.astype(np.float32))

    def prepare_experts(self, experts: Sequence[MlpWeights]) -> tuple[MlpWeights, ...]:
        """As they are: each runs by itself."""
        return tuple(experts)

    def receive(self, data: Any, dtype: WireDtype, rows: int, columns: int) -> torch.Tensor:
        """fp32 copies of the values, so that the buffer stays the caller's."""
        kind = torch.float32 if dtype == "f32" else torch.bfloat16
        # A bytearray copy: torch warns about read-only buffers, and the operations below write in place.
        values = torch.frombuffer(bytearray(data), dtype=kind) if rows else torch.empty(0)
        return values.view(rows, columns).float()

    def send(self, x: torch.Tensor, dtype: WireDtype) -> memoryview:
        """bf16 is rounded to nearest even."""
        values = x.contiguous() if dtype == "f32" else x.bfloat16()
        return memoryview(cast(Any, values.view(torch.uint8).reshape(-1).numpy()))

    def embed(self, table: TiledMatrix, tokens: Sequence[int]) -> torch.Tensor:
        """Only the wanted rows are dequantized."""
        return table.rows_at(torch.tensor(tokens, dtype=torch.int64))

    def linear(self, x: torch.Tensor, weight: TiledMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
        """One product per tile."""
        y = self._linear(torch.cat((x, x)), weight)[:1] if x.shape[0] == 1 else self._linear(x, weight)
        return y if bias is None else y.add_(bias)

    def _linear(self, x: torch.Tensor, weight: TiledMatrix) -> torch.Tensor:
        outputs = [product(x, tile.dequantize(self._scratch)) for tile in weight.tiles]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def rotation(
        self, positions: Sequence[int], frequencies: torch.Tensor, magnitude: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, each [rows, 1, rotated dimensions / 2]."""
        angles = torch.tensor(positions, dtype=torch.float32)[:, None, None] * frequencies
        return angles.cos().mul_(magnitude), angles.sin().mul_(magnitude)

    def attention(
        self,
        qkv: torch.Tensor,
        shape: AttentionShape,
        weights: AttentionWeights,
        rotation: tuple[torch.Tensor, torch.Tensor] | None,
        spans: Sequence[RowSpan],
        caches: Sequence[LayerCache],
    ) -> torch.Tensor:
        """One scaled dot product per sequence, the query heads of a group folded into rows."""
        heads, kv_heads, head_dim = shape.heads, shape.kv_heads, shape.head_dim
        qkv = qkv.view(qkv.shape[0], heads + 2 * kv_heads, head_dim)
        self.norm_and_rotate(qkv, shape, weights, rotation)
        out = torch.empty(qkv.shape[0], heads * head_dim)
        for span, cache in zip(spans, caches, strict=True):
            rows = qkv[span.begin : span.end]
            stop = span.start + span.end - span.begin
            cache.keys[:, span.start : stop] = rows[:, heads : heads + kv_heads].transpose(0, 1)
            cache.values[:, span.start : stop] = rows[:, heads + kv_heads :].transpose(0, 1)
            first = 0 if shape.window is None else max(0, span.start - shape.window + 1)
            keys, values = cache.keys[:, first:stop], cache.values[:, first:stop]
            out[span.begin : span.end] = self.attend(rows[:, :heads], keys, values, span.start - first, shape, weights)
        return out

    def latent_attention(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        latents: torch.Tensor,
        shape: AttentionShape,
        weights: LatentWeights,
        rotation: tuple[torch.Tensor, torch.Tensor] | None,
        spans: Sequence[RowSpan],
        caches: Sequence[LayerCache],
    ) -> torch.Tensor:
        """Sequence by sequence; each head's products with its matrices are one batch."""
        latent = shape.latent
        assert latent is not None
        queries = queries.view(len(queries), shape.heads, shape.head_dim)
        if rotation is not None:
            rotate(queries[..., latent.nope_dim :], *rotation)
            rotate(keys[:, None], *rotation)
        out = torch.empty(len(queries), shape.heads, latent.value_dim)
        for span, cache in zip(spans, caches, strict=True):
            begin, end, stop = span.begin, span.end, span.start + span.end - span.begin
            cache.keys[0, span.start : stop] = keys[begin:end]
            cache.values[0, span.start : stop] = latents[begin:end]
            seen = cache.keys[0, :stop], cache.values[0, :stop]
            mixed = attend_to_latents(queries[begin:end].transpose(0, 1), *seen, shape, weights)
            out[begin:end] = mixed.transpose(0, 1)
        return out.view(len(queries), -1)

    def select(self, x: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """A copy."""
        return x[torch.tensor(rows, dtype=torch.int64)]

    def logits(self, x: torch.Tensor) -> Logits:
        """They share the tensor's memory."""
        return x.numpy()

    def settle(self, caches: Sequence[LayerCache]) -> None:
        """Nothing is pending here."""

    def new_cache(self, shape: CacheShape, tokens: int, old: LayerCache | None, keep: int) -> TorchLayerCache:
        """Fresh memory; only the kept part is touched."""
        keys = torch.empty(shape.heads, tokens, shape.key_dim)
        values = torch.empty(shape.heads, tokens, shape.value_dim)
        if old is not None:
            keys[:, :keep] = old.keys[:, :keep]
            values[:, :keep] = old.values[:, :keep]
        return TorchLayerCache(keys, values)
