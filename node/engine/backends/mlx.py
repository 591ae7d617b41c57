"""The MLX backend: the GPU of a Mac with Apple silicon, by Metal; and MLX's CPU device, which proves it elsewhere.

An operation only adds to a graph; the graph of a step is evaluated when its hidden states or logits are exported, once.
Only `settle`, a cache that grows, and experts that cannot be stacked evaluate besides. MLX's streams belong to threads:
since nothing is left unevaluated, load and steps may come from different threads, one at a time.

Numbers: with the working type fp32 everything is computed in fp32. With bf16, activations and the KV cache are bf16;
products with fp32 scales or fp32 weights, norms, rotations, softmax and routing are computed in fp32. A row's result
may differ in its last bits with the other rows of its step, because MLX chooses its kernels by the number of rows: a
prompt in chunks, a batch or a verified draft is equal within rounding only.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, Literal, cast

# GPUs with matrix units (M5) would else compute fp32 products with 10 bits of mantissa. MLX reads it once.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

import mlx.core as mx
import numpy as np

from swarmd.node.engine.backends import mlx_attention, mlx_experts, mlx_matrices
from swarmd.node.engine.backends.base import AttentionShape, LayerCache, RowSpan
from swarmd.node.engine.backends.mlx_attention import MlxLayerCache
from swarmd.node.engine.backends.mlx_experts import SeparateExperts, StackedExperts
from swarmd.node.engine.backends.mlx_matrices import MlxMatrix
from swarmd.node.engine.quantized import Weight
from swarmd.node.engine.spec import Activation, CacheShape, MoeSpec
from swarmd.node.engine.stage_compute import Logits, WireDtype
from swarmd.node.engine.weights import AttentionWeights, LatentWeights, MlpWeights, MoeWeights

CACHE_BYTES = 256 << 20
"""Of freed buffers, at most so much is kept for reuse: what is free belongs to the other programs of the machine."""

Working = Literal["f32", "bf16"]
WORKING_TYPES: dict[Working, mx.Dtype] = {"f32": mx.float32, "bf16": mx.bfloat16}


class MlxBackend:
    """See `Backend`. Arrays are mx.array in the working type. One device for the whole process: MLX's default.

    Raises ValueError where there is no Metal.
    """

    def __init__(self, device: Literal["metal", "mlx-cpu"], working: Working = "f32") -> None:
        if device == "metal" and not mx.metal.is_available():
            raise ValueError("MLX finds no Metal GPU; it needs a Mac with Apple silicon and macOS 13.5 or later")
        self.name = device
        self._type = WORKING_TYPES[working]
        mx.set_default_device(mx.gpu if device == "metal" else mx.cpu)
        mx.set_cache_limit(CACHE_BYTES)
        if device == "metal":  # above this, macOS takes memory back from the GPU while it computes
            mx.set_memory_limit(int(mx.device_info()["max_recommended_working_set_size"]))

    def prepare(self, parts: Sequence[Weight]) -> MlxMatrix:
        """See mlx_matrices for what is kept."""
        return mlx_matrices.matrix(parts, self._type)

    def prepare_vector(self, values: np.ndarray) -> mx.array:
        """fp32 whatever the working type."""
        return mx.array(values.astype(np.float32))

    def prepare_experts(self, experts: Sequence[MlpWeights]) -> StackedExperts | SeparateExperts:
        """Stacked where they can be."""
        return mlx_experts.prepared(experts, self._type)

    def receive(self, data: Any, dtype: WireDtype, rows: int, columns: int) -> mx.array:
        """Copies, so that the buffer stays the caller's."""
        values = mx.array(np.frombuffer(data, np.float32 if dtype == "f32" else np.uint16).reshape(rows, columns))
        return (values if dtype == "f32" else values.view(mx.bfloat16)).astype(self._type)

    def send(self, x: mx.array, dtype: WireDtype) -> memoryview:
        """Evaluates. bf16 is rounded to nearest even."""
        values = x.astype(mx.float32) if dtype == "f32" else x.astype(mx.bfloat16).view(mx.uint16)
        return memoryview(cast(Any, np.array(values).reshape(-1).view(np.uint8)))

    def embed(self, table: MlxMatrix, tokens: Sequence[int]) -> mx.array:
        """Only the wanted rows are dequantized."""
        return table.rows_at(tokens).astype(self._type)

    def linear(self, x: mx.array, weight: MlxMatrix, bias: mx.array | None = None) -> mx.array:
        """Rounded to the working type after the bias."""
        y = weight.product(x)
        return (y if bias is None else y + bias).astype(self._type)

    def rms_norm(self, x: mx.array, weight: mx.array, eps: float) -> mx.array:
        """In fp32 within."""
        return mx.fast.rms_norm(x, weight, eps).astype(self._type)

    def add(self, x: mx.array, y: mx.array, factor: float) -> mx.array:
        """A new array."""
        return x + (y if factor == 1.0 else y * factor)

    def scale(self, x: mx.array, factor: float) -> mx.array:
        """A new array."""
        return x if factor == 1.0 else x * factor

    def softcap(self, x: mx.array, cap: float | None) -> mx.array:
        """A new array."""
        return x if cap is None else mx.tanh(x / cap) * cap

    def weigh(self, x: mx.array, logits: mx.array) -> mx.array:
        """A new array."""
        return x * mx.sigmoid(logits)

    def rotation(self, positions: Sequence[int], frequencies: mx.array, magnitude: float) -> mlx_attention.Rotations:
        """Computed on the host, whose cosine is right to the last bit or so for large angles too."""
        angles = np.asarray(positions, np.float32)[:, None, None] * np.array(frequencies)
        turned = (np.cos(angles), np.sin(angles))
        return mx.array(turned[0] * np.float32(magnitude)), mx.array(turned[1] * np.float32(magnitude))

    def attention(
        self,
        qkv: mx.array,
        shape: AttentionShape,
        weights: AttentionWeights,
        rotation: mlx_attention.Rotations | None,
        spans: Sequence[RowSpan],
        caches: Sequence[LayerCache],
    ) -> mx.array:
        """One attention per sequence."""
        return mlx_attention.attention(qkv, shape, weights, rotation, spans, caches)

    def latent_attention(
        self,
        queries: mx.array,
        keys: mx.array,
        latents: mx.array,
        shape: AttentionShape,
        weights: LatentWeights,
        rotation: mlx_attention.Rotations | None,
        spans: Sequence[RowSpan],
        caches: Sequence[LayerCache],
    ) -> mx.array:
        """One attention per sequence."""
        return mlx_attention.latent_attention(queries, keys, latents, shape, weights, rotation, spans, caches)

    def gate(self, gate_up: mx.array, activation: Activation) -> mx.array:
        """A new array."""
        gate, up = mx.split(gate_up, 2, axis=-1)
        if activation == "silu":
            return gate * mx.sigmoid(gate) * up
        if activation == "gelu_tanh":
            inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate * gate * gate)
            return 0.5 * gate * (1 + mx.tanh(inner)) * up
        gate, up = mx.minimum(gate, 7.0), mx.clip(up, -7.0, 7.0)
        return gate * mx.sigmoid(gate * 1.702) * (up + 1)

    def mixture(
        self, x: mx.array, scores: mx.array, moe: MoeSpec, weights: MoeWeights, activation: Activation
    ) -> mx.array:
        """One gathered product where the experts are stacked."""
        chosen, shares = mlx_experts.route(scores, moe, weights.selection_bias)
        out = weights.experts.mixture(x, chosen, shares, lambda gate_up: self.gate(gate_up, activation))
        return out.astype(self._type)

    def select(self, x: mx.array, rows: Sequence[int]) -> mx.array:
        """The chosen rows."""
        return x[mx.array(list(rows), mx.uint32)]

    def logits(self, x: mx.array) -> Logits:
        """Evaluates; a copy."""
        return np.array(x.astype(mx.float32))

    def settle(self, caches: Sequence[LayerCache]) -> None:
        """Evaluates what has been written."""
        mx.eval([(cache.keys, cache.values) for cache in caches])

    def new_cache(self, shape: CacheShape, tokens: int, old: LayerCache | None, keep: int) -> MlxLayerCache:
        """Evaluates, so that the old memory is free when this layer is done."""
        dims = shape.key_dim, shape.value_dim
        keys, values = (mx.zeros((shape.heads, tokens, dim), self._type) for dim in dims)
        if old is not None:
            keys[:, :keep] = old.keys[:, :keep]
            values[:, :keep] = old.values[:, :keep]
        mx.eval(keys, values)
        return MlxLayerCache(keys, values)
