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
import torch.nn.functional as F  # noqa: N812

from swarmd.node.engine.backends.base import LayerCache, RowSpan
from swarmd.node.engine.backends.torch_tiles import Scratch, TiledMatrix, product, tiled
from swarmd.node.engine.quantized import Weight
from swarmd.node.engine.stage_compute import WireDtype


@dataclass
class TorchLayerCache:
    """Keys and values [kv_heads, tokens, head_dim], fp32."""

    keys: torch.Tensor
    values: torch.Tensor


class TorchCpuBackend:
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

    def linear(self, x: torch.Tensor, weight: TiledMatrix) -> torch.Tensor:
        """One product per tile."""
        if x.shape[0] == 1:
            return self._linear(torch.cat((x, x)), weight)[:1]
        return self._linear(x, weight)

    def _linear(self, x: torch.Tensor, weight: TiledMatrix) -> torch.Tensor:
        outputs = [product(x, tile.dequantize(self._scratch)) for tile in weight.tiles]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Written out: F.rms_norm is several times slower on CPUs."""
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).mul_(weight)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """In place."""
        return x.add_(y)

    def rotation(self, positions: Sequence[int], frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, each [rows, 1, head_dim / 2]."""
        angles = torch.tensor(positions, dtype=torch.float32)[:, None, None] * frequencies
        return angles.cos(), angles.sin()

    def attention(
        self,
        qkv: torch.Tensor,
        shape: tuple[int, int, int],
        rotation: tuple[torch.Tensor, torch.Tensor],
        spans: Sequence[RowSpan],
        caches: Sequence[LayerCache],
    ) -> torch.Tensor:
        """One scaled dot product per sequence, the query heads of a group folded into rows."""
        heads, kv_heads, head_dim = shape
        qkv = qkv.view(qkv.shape[0], heads + 2 * kv_heads, head_dim)
        _rotate(qkv[:, : heads + kv_heads], *rotation)
        out = torch.empty(qkv.shape[0], heads * head_dim)
        for span, cache in zip(spans, caches, strict=True):
            rows = qkv[span.begin : span.end]
            stop = span.start + span.end - span.begin
            cache.keys[:, span.start : stop] = rows[:, heads : heads + kv_heads].transpose(0, 1)
            cache.values[:, span.start : stop] = rows[:, heads + kv_heads :].transpose(0, 1)
            mixed = _attend(rows[:, :heads], cache.keys[:, :stop], cache.values[:, :stop], span.start)
            out[span.begin : span.end] = mixed
        return out

    def gated_mlp(self, x: torch.Tensor, gate_up: TiledMatrix, down: TiledMatrix) -> torch.Tensor:
        """gate and up in one product."""
        both = self.linear(x, gate_up)
        half = both.shape[1] // 2
        return self.linear(F.silu(both[:, :half]).mul_(both[:, half:]), down)

    def select(self, x: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """A copy."""
        return x[torch.tensor(rows, dtype=torch.int64)]

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """They are one already."""
        return x

    def new_cache(
        self, kv_heads: int, head_dim: int, tokens: int, old: LayerCache | None, keep: int
    ) -> TorchLayerCache:
        """Fresh memory; only the kept part is touched."""
        keys = torch.empty(kv_heads, tokens, head_dim)
        values = torch.empty(kv_heads, tokens, head_dim)
        if old is not None:
            keys[:, :keep] = old.keys[:, :keep]
            values[:, :keep] = old.values[:, :keep]
        return TorchLayerCache(keys, values)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotary embedding in place on [rows, heads, head_dim], halves paired (Su et al. 2021, arXiv:2104.09864)."""
    first, second = x.chunk(2, dim=-1)
    turned = second * cos + first * sin
    first.mul_(cos).sub_(second * sin)
    second.copy_(turned)


def _attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int) -> torch.Tensor:
    """softmax(q k / sqrt(d)) v of one sequence: queries [rows, heads, d] at positions from `start`, keys
    [kv_heads, n, d].
    """
    rows, heads, head_dim = queries.shape
    kv_heads = keys.shape[0]
    folded = queries.transpose(0, 1).reshape(kv_heads, heads // kv_heads * rows, head_dim)
    scores = torch.bmm(folded, keys.transpose(1, 2)).mul_(head_dim**-0.5)
    if rows > 1:
        blocked = torch.ones(rows, rows, dtype=torch.bool).triu_(1)
        scores.view(kv_heads, -1, rows, keys.shape[1])[..., start:].masked_fill_(blocked, float("-inf"))
    mixed = torch.bmm(scores.softmax(-1), values)
    return mixed.view(heads, rows, head_dim).transpose(0, 1).reshape(rows, heads * head_dim)
