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

from swarmd.node.engine.backends.base import AttentionShape, LayerCache, RowSpan
from swarmd.node.engine.backends.torch_tiles import Scratch, TiledMatrix, product, tiled
from swarmd.node.engine.quantized import Weight
from swarmd.node.engine.spec import Activation, CacheShape, MoeSpec
from swarmd.node.engine.stage_compute import Logits, WireDtype
from swarmd.node.engine.weights import AttentionWeights, LatentWeights, MlpWeights, MoeWeights


@dataclass
class TorchLayerCache:
    """Keys and values [heads, tokens, dim], fp32."""

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

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Written out: F.rms_norm is several times slower on CPUs."""
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).mul_(weight)

    def add(self, x: torch.Tensor, y: torch.Tensor, factor: float) -> torch.Tensor:
        """In place."""
        return x.add_(y, alpha=factor)

    def scale(self, x: torch.Tensor, factor: float) -> torch.Tensor:
        """In place."""
        return x if factor == 1.0 else x.mul_(factor)

    def softcap(self, x: torch.Tensor, cap: float | None) -> torch.Tensor:
        """In place."""
        return x if cap is None else x.div_(cap).tanh_().mul_(cap)

    def weigh(self, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """In place."""
        return x.mul_(logits.sigmoid())

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
            out[span.begin : span.end] = self._attend(rows[:, :heads], keys, values, span.start - first, shape, weights)
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
            _rotate(queries[..., latent.nope_dim :], *rotation)
            _rotate(keys[:, None], *rotation)
        out = torch.empty(len(queries), shape.heads, latent.value_dim)
        for span, cache in zip(spans, caches, strict=True):
            begin, end, stop = span.begin, span.end, span.start + span.end - span.begin
            cache.keys[0, span.start : stop] = keys[begin:end]
            cache.values[0, span.start : stop] = latents[begin:end]
            seen = cache.keys[0, :stop], cache.values[0, :stop]
            mixed = _attend_to_latents(queries[begin:end].transpose(0, 1), *seen, shape, weights)
            out[begin:end] = mixed.transpose(0, 1)
        return out.view(len(queries), -1)

    def norm_and_rotate(
        self,
        qkv: torch.Tensor,
        shape: AttentionShape,
        weights: AttentionWeights,
        rotation: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> None:
        """Queries and keys of qkv [rows, heads + 2*kv_heads, head_dim], in place."""
        heads, kv_heads = shape.heads, shape.kv_heads
        if shape.qk_norm != "none":
            self._norm_heads(qkv[:, :heads], weights.q_norm, shape)
            self._norm_heads(qkv[:, heads : heads + kv_heads], weights.k_norm, shape)
        if rotation is not None:
            _rotate(qkv[:, : heads + kv_heads], *rotation)

    def _norm_heads(self, x: torch.Tensor, weight: Any, shape: AttentionShape) -> None:
        """Norm [rows, heads, head_dim] in place, each head by itself or all together."""
        joined = x if shape.qk_norm == "head" else x.reshape(x.shape[0], -1)
        x.copy_(self.rms_norm(joined, weight, shape.eps).view(x.shape))

    def _attend(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        start: int,
        shape: AttentionShape,
        weights: AttentionWeights,
    ) -> torch.Tensor:
        """Of one sequence: queries [rows, heads, d] at positions from `start` on, counted from the first of the keys
        [kv_heads, n, d].
        """
        rows, heads, head_dim = queries.shape
        kv_heads, n = keys.shape[:2]
        folded = queries.transpose(0, 1).reshape(kv_heads, heads // kv_heads * rows, head_dim)
        scores = self.softcap(torch.bmm(folded, keys.transpose(1, 2)).mul_(shape.scale), shape.softcap)
        if rows > 1:
            position = torch.arange(start, start + rows)[:, None]
            blocked = torch.arange(n) > position
            if shape.window is not None:
                blocked |= torch.arange(n) <= position - shape.window
            scores.view(kv_heads, -1, rows, n).masked_fill_(blocked, float("-inf"))
        if weights.sinks is None:
            shares = scores.softmax(-1)
        else:
            sinks = weights.sinks.view(kv_heads, -1, 1).expand(-1, -1, rows).reshape(kv_heads, -1, 1)
            shares = torch.cat((scores, sinks), dim=-1).softmax(-1)[..., :-1]
        mixed = torch.bmm(shares, values)
        return mixed.view(heads, rows, head_dim).transpose(0, 1).reshape(rows, heads * head_dim)

    def gate(self, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        """Overwrites its input."""
        gate, up = gate_up.chunk(2, dim=1)
        if activation == "silu":
            return F.silu(gate).mul_(up)
        if activation == "gelu_tanh":
            return F.gelu(gate, approximate="tanh").mul_(up)
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return (gate * torch.sigmoid(gate * 1.702)).mul_(up + 1)

    def mixture(
        self, x: torch.Tensor, scores: torch.Tensor, moe: MoeSpec, weights: MoeWeights, activation: Activation
    ) -> torch.Tensor:
        """Expert by expert, each for the rows that chose it."""
        shares, chosen = route(scores, moe, weights.selection_bias)
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            mlp = weights.experts[expert]
            rows, places = (chosen == expert).nonzero(as_tuple=True)
            gated = self.gate(self.linear(x[rows], mlp.gate_up.matrix, mlp.gate_up.bias), activation)
            found = self.linear(gated, mlp.down.matrix, mlp.down.bias)
            out.index_add_(0, rows, found * shares[rows, places, None])
        return out

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


def route(scores: torch.Tensor, moe: MoeSpec, selection_bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The router's outputs [rows, experts] -> weights and numbers of the chosen experts, each [rows, top_k]."""
    shares = scores.sigmoid() if moe.score == "sigmoid" else scores.softmax(-1)
    candidates = shares if selection_bias is None else shares + selection_bias
    if moe.n_groups > 1:
        grouped = candidates.view(len(scores), moe.n_groups, -1)
        best = grouped.topk(moe.group_best, dim=-1).values.sum(-1).topk(moe.top_groups, dim=-1).indices
        allowed = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, True)
        candidates = grouped.masked_fill(~allowed[..., None], float("-inf")).view(len(scores), -1)
    chosen = candidates.topk(moe.top_k, dim=-1).indices
    weights = shares.gather(1, chosen)
    if moe.normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * moe.scale, chosen


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotary embedding in place on [rows, heads, head_dim], halves of the rotated dimensions paired."""
    first, second = x[..., : 2 * cos.shape[-1]].chunk(2, dim=-1)
    turned = second * cos + first * sin
    first.mul_(cos).sub_(second * sin)
    second.copy_(turned)


def _attend_to_latents(
    queries: torch.Tensor, keys: torch.Tensor, latents: torch.Tensor, shape: AttentionShape, weights: LatentWeights
) -> torch.Tensor:
    """Of one sequence: queries [heads, rows, d], the last of which belongs to the last of the keys [n, rope_dim] and
    latents [n, kv_rank]; -> [heads, rows, value_dim].
    """
    assert shape.latent is not None
    nope, (heads, rows, _), n = shape.latent.nope_dim, queries.shape, len(keys)
    absorbed = torch.bmm(queries[..., :nope], weights.kv_b[:, :nope])
    scores = absorbed.view(heads * rows, -1) @ latents.T
    scores += queries[..., nope:].reshape(heads * rows, -1) @ keys.T
    scores = scores.mul_(shape.scale).view(heads, rows, n)
    if rows > 1:
        scores.masked_fill_(torch.arange(n) > torch.arange(n - rows, n)[:, None], float("-inf"))
    mixed = (scores.softmax(-1).view(heads * rows, n) @ latents).view(heads, rows, -1)
    return torch.bmm(mixed, weights.kv_b[:, nope:].transpose(1, 2))
