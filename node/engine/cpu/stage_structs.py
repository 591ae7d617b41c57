"""A stage's weights as the structs that the native step reads (native/swarmd_native.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from swarmd.node.engine.cpu.bindings import (
    Layer,
    Matrix,
    NativeLinear,
    NativeMixture,
    NativeMlp,
    NativeRope,
    Routing,
    Stage,
)
from swarmd.node.engine.quantized import Array
from swarmd.node.engine.spec import Activation, ArchSpec, LayerSpec, QkNorm
from swarmd.node.engine.weights import AttentionWeights, Linear, MlpWeights, MoeWeights, Rotation, StageWeights

QK_NORMS: dict[QkNorm, int] = {"none": 0, "head": 1, "full": 2}
ACTIVATIONS: dict[Activation, int] = {"silu": 0, "gelu_tanh": 1, "clamped_swiglu": 2}


class StageStructs:
    """`stage` is what native calls take. It points into the weights and the pools, which this object keeps alive."""

    def __init__(
        self,
        spec: ArchSpec,
        layers: Sequence[LayerSpec],
        weights: StageWeights,
        keys: Sequence[Array],
        values: Sequence[Array],
    ) -> None:
        """`layers` describe the stage's own; `keys` and `values` are their KV pools, [kv_heads, n_blocks, ...]."""
        self._kept: list[Any] = [weights, keys, values]
        self._layers = (Layer * len(layers))(*map(self._layer, layers, weights.layers, keys, values))
        self._ropes = (NativeRope * len(weights.rotations))(*map(_rope, weights.rotations))
        self.stage = self._stage(spec, weights, keys[0].shape[1] if keys else 0)

    def _layer(self, described: LayerSpec, layer: Any, keys: Array, values: Array) -> Layer:
        attention: AttentionWeights = layer.attention
        mixed = isinstance(layer.mlp, MoeWeights)
        return Layer(
            _data(attention.norm),
            _data(attention.q_norm),
            _data(attention.k_norm),
            _data(attention.sinks),
            _data(attention.post_norm),
            _linear(attention.qkv),
            _linear(attention.output),
            _data(layer.mlp_norm),
            _data(layer.mlp_post_norm),
            NativeMlp() if mixed else _mlp(layer.mlp),
            ctypes.pointer(self._mixture(layer.mlp)) if mixed else None,
            keys.ctypes.data,
            values.ctypes.data,
            described.window or 0,
            -1 if described.rope is None else described.rope,
        )

    def _mixture(self, moe: MoeWeights) -> NativeMixture:
        experts = (NativeMlp * len(moe.experts))(*map(_mlp, moe.experts))
        shared = None if moe.shared is None else ctypes.pointer(_mlp(moe.shared))
        shared_gate = None if moe.shared_gate is None else ctypes.pointer(moe.shared_gate.struct)
        mixture = NativeMixture(_linear(moe.router), _data(moe.selection_bias), experts, shared, shared_gate)
        self._kept += [experts, shared, shared_gate, mixture]
        return mixture

    def _stage(self, spec: ArchSpec, weights: StageWeights, n_blocks: int) -> Stage:
        return Stage(
            *(len(self._layers), spec.hidden_size, spec.n_heads, spec.n_kv_heads, spec.head_dim),
            *(_widest_mlp(weights), n_blocks, QK_NORMS[spec.qk_norm], ACTIVATIONS[spec.activation]),
            *(len(self._ropes), spec.rms_eps, spec.attention_scale),
            *(spec.attention_softcap or 0.0, spec.logit_softcap or 0.0),
            *(spec.embedding_multiplier, spec.residual_multiplier, spec.logit_multiplier),
            _routing(spec, weights),
            self._ropes,
            self._layers,
            _pointer(weights.embedding),
            _data(weights.output_norm),
            _pointer(weights.head),
        )


def _routing(spec: ArchSpec, weights: StageWeights) -> Routing:
    moe = spec.moe
    if moe is None or not any(isinstance(layer.mlp, MoeWeights) for layer in weights.layers):
        return Routing(groups=1, top_groups=1)
    return Routing(
        *(moe.n_experts, moe.top_k, moe.ffn_size, moe.score == "sigmoid"),
        *(moe.normalize, moe.n_groups, moe.top_groups, moe.scale),
    )


def _widest_mlp(weights: StageWeights) -> int:
    """Beside the experts that are chosen."""
    mlps = [layer.mlp.shared if isinstance(layer.mlp, MoeWeights) else layer.mlp for layer in weights.layers]
    return max((mlp.down.matrix.columns for mlp in mlps if mlp is not None), default=0)


def _rope(rotation: Rotation) -> NativeRope:
    return NativeRope(rotation.frequencies.ctypes.data, len(rotation.frequencies), rotation.magnitude)


def _mlp(mlp: MlpWeights) -> NativeMlp:
    return NativeMlp(_linear(mlp.gate_up), _linear(mlp.down))


def _linear(linear: Linear) -> NativeLinear:
    return NativeLinear(linear.matrix.struct, _data(linear.bias))


def _pointer(matrix: Any) -> Any:
    """To a `NativeMatrix`'s struct, or nothing."""
    struct: Matrix | None = None if matrix is None else matrix.struct
    return None if struct is None else ctypes.pointer(struct)


def _data(vector: Array | None) -> int | None:
    return None if vector is None else vector.ctypes.data
