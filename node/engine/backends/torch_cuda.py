"""The CUDA backend: plain torch's operations on a GPU, matrices that stay quantized there, a paged KV cache.

Activations between products are fp32, products multiply in bf16 and sum in fp32 (in fp32 throughout when asked for, as
the tests do), keys and values are kept in bf16. A step whose sequences all append one token touches nothing of the host
(no sizes, no values), so that it can be captured in a CUDA graph.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from swarmd.node.engine.backends.base import AttentionShape, LayerCache, RowSpan
from swarmd.node.engine.backends.torch_cpu import TorchCpuBackend
from swarmd.node.engine.backends.torch_packed import PackedMatrix, PackedPart, packed, product
from swarmd.node.engine.quantized import Weight
from swarmd.node.engine.stage_compute import WireDtype
from swarmd.node.engine.weights import AttentionWeights

log = logging.getLogger("swarmd.engine")

BLOCK = 16
"""Tokens in one block of the KV cache."""
FEW_ROWS = 16
"""Up to so many rows a product reads the packed codes; for more, tiles are dequantized and multiplied by cuBLAS."""


@dataclass(frozen=True)
class PagedBatch:
    """Where a step's rows stand: `positions` [rows]; `slots` [rows], where in the pools each row's key goes; `tables`
    [sequences, blocks], the blocks of each sequence, in order, filled up with any.

    `decode`: every sequence has just one row.
    """

    positions: torch.Tensor
    slots: torch.Tensor
    tables: torch.Tensor
    decode: bool


@dataclass(frozen=True)
class PagedPool:
    """Keys and values of one layer: [blocks, BLOCK, kv_heads, head_dim]."""

    keys: torch.Tensor
    values: torch.Tensor


class TorchCudaBackend(TorchCpuBackend):
    """See `Backend`. `batch` and `pools` are set by the compute before each step; `caches` are then layer numbers."""

    def __init__(self, device: torch.device, product_type: torch.dtype = torch.bfloat16, *, fused: bool = True) -> None:
        """`fused`: products of few rows by the Triton kernel, where Triton is."""
        super().__init__()
        self.name = f"torch-{device}"
        self.device = device
        self.product_type = product_type
        self.pools: list[PagedPool] = []
        self.batch: PagedBatch | None = None
        self._fused = fused and importlib.util.find_spec("triton") is not None
        if fused and not self._fused:
            log.warning("Triton is not installed: weights are dequantized for every product, which is slower")

    def prepare(self, parts: Sequence[Weight]) -> Any:
        """On the device, as they are."""
        return packed(parts, self.device)

    def prepare_vector(self, values: np.ndarray) -> torch.Tensor:
        """A copy on the device."""
        return super().prepare_vector(values).to(self.device)

    def receive(self, data: Any, dtype: WireDtype, rows: int, columns: int) -> torch.Tensor:
        """fp32 on the device; bf16 crosses the bus as such."""
        kind = torch.float32 if dtype == "f32" else torch.bfloat16
        with torch.device("cpu"):
            values = torch.frombuffer(bytearray(data), dtype=kind).view(rows, columns)
        return values.to(self.device).float()

    def send(self, x: torch.Tensor, dtype: WireDtype) -> memoryview:
        """bf16 is rounded to nearest even, on the device."""
        values = (x.contiguous() if dtype == "f32" else x.bfloat16()).cpu()
        return memoryview(cast(Any, values.view(torch.uint8).reshape(-1).numpy()))

    def embed(self, table: Any, tokens: Any) -> torch.Tensor:
        """`tokens` may be a tensor on the device."""
        return table.rows_at(torch.as_tensor(tokens, dtype=torch.int64, device=self.device))

    def linear(self, x: torch.Tensor, weight: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Rows of either kind in fp32."""
        y = self._products(x.to(self.product_type), weight)
        return y if bias is None else y + bias

    def _products(self, x: torch.Tensor, weight: PackedMatrix) -> torch.Tensor:
        outputs = []
        for part in weight.parts:
            if self._fused and isinstance(part, PackedPart) and len(x) <= FEW_ROWS:
                from swarmd.node.engine.backends import triton_product

                outputs.append(triton_product.product(x, part))
            else:
                outputs.append(product(x, part).float())
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def rotation(
        self, positions: Sequence[int], frequencies: torch.Tensor, magnitude: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The positions are those of the batch."""
        assert self.batch is not None
        angles = self.batch.positions.float()[:, None, None] * frequencies
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
        """`caches[0]` is the layer's number."""
        batch, pool = self.batch, self.pools[cast(int, caches[0])]
        assert batch is not None
        heads, kv_heads = shape.heads, shape.kv_heads
        qkv = qkv.view(len(qkv), heads + 2 * kv_heads, shape.head_dim)
        self.norm_and_rotate(qkv, shape, weights, rotation)
        for into, rows in ((pool.keys, qkv[:, heads:-kv_heads]), (pool.values, qkv[:, -kv_heads:])):
            into.view(-1, kv_heads, shape.head_dim).index_copy_(0, batch.slots, rows.to(into.dtype))
        if batch.decode:
            return _attend_paged(qkv[:, :heads], pool, batch, shape, weights)
        out = torch.empty(len(qkv), heads * shape.head_dim)
        for span, table in zip(spans, batch.tables, strict=True):
            stop = span.start + span.end - span.begin
            first = 0 if shape.window is None else max(0, span.start - shape.window + 1)
            keys, values = (_read(part, table, first, stop) for part in (pool.keys, pool.values))
            queries = qkv[span.begin : span.end, :heads]
            out[span.begin : span.end] = self._attend(queries, keys, values, span.start - first, shape, weights)
        return out

    def logits(self, x: torch.Tensor) -> Any:
        """They stay on the device: the compute takes those that are wanted."""
        return x


def _read(pool: torch.Tensor, table: torch.Tensor, first: int, stop: int) -> torch.Tensor:
    """Positions [first, stop) of one sequence: fp32 [kv_heads, stop - first, head_dim]."""
    blocks = table[first // BLOCK : -(-stop // BLOCK)]
    rows = pool[blocks].flatten(0, 1)[first % BLOCK : first % BLOCK + stop - first]
    return rows.transpose(0, 1).float()


def _attend_paged(
    queries: torch.Tensor, pool: PagedPool, batch: PagedBatch, shape: AttentionShape, weights: AttentionWeights
) -> torch.Tensor:
    """One query [rows, heads, d] of each sequence over all blocks of its table: [rows, heads*d].

    The same work whatever the lengths, which only mask: so it can be captured once per size of the tables.
    """
    rows, heads, head_dim = queries.shape
    keys, values = (part[batch.tables].flatten(1, 2).float() for part in (pool.keys, pool.values))
    grouped = queries.reshape(rows, shape.kv_heads, -1, head_dim)
    scores = torch.einsum("rkgd,rnkd->rkgn", grouped, keys).mul_(shape.scale)
    if shape.softcap is not None:
        scores = scores.div_(shape.softcap).tanh_().mul_(shape.softcap)
    key, position = torch.arange(keys.shape[1], device=keys.device), batch.positions[:, None]
    blocked = key > position
    if shape.window is not None:
        blocked |= key <= position - shape.window
    scores.masked_fill_(blocked[:, None, None], float("-inf"))
    if weights.sinks is None:
        shares = scores.softmax(-1)
    else:
        sinks = weights.sinks.view(shape.kv_heads, -1, 1).expand(rows, -1, -1, -1)
        shares = torch.cat((scores, sinks), dim=-1).softmax(-1)[..., :-1]
    return torch.einsum("rkgn,rnkd->rkgd", shares, values).reshape(rows, heads * head_dim)
