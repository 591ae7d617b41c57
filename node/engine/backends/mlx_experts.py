"""A mixture of experts for MLX: the chosen experts of all rows in one gathered product, without leaving the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from swarmd.node.engine.backends.mlx_matrices import DensePart, MlxMatrix, stack
from swarmd.node.engine.spec import MoeSpec
from swarmd.node.engine.weights import Linear, MlpWeights

SORT_FROM = 64
"""From so many products on, rows are sorted by expert: Metal's gathered products then read each expert once."""

Gate = Callable[[mx.array], mx.array]
"""Stacked gate and up [..., 2*ffn] -> [..., ffn]."""


@dataclass(frozen=True)
class StackedLinear:
    """The same matrix of all experts, one upon the other, and their biases [experts, outputs]."""

    matrix: MlxMatrix
    bias: mx.array | None

    def __call__(self, x: mx.array, index: mx.array, *, ordered: bool) -> mx.array:
        """x [n, columns], each row by its expert `index` [n] -> [n, outputs]."""
        y = self.matrix.gathered(x[:, None], index, ordered=ordered)[:, 0]
        return y if self.bias is None else y + self.bias[index]


@dataclass(frozen=True)
class StackedExperts:
    """Experts of one form."""

    gate_up: StackedLinear
    down: StackedLinear

    def mixture(self, x: mx.array, chosen: mx.array, shares: mx.array, gate: Gate) -> mx.array:
        """The sum of the chosen experts' outputs by their shares, both [rows, k]; x [rows, hidden]."""
        rows, top_k = chosen.shape
        index = chosen.reshape(-1)
        of_row = mx.arange(index.size) // top_k
        ordered = index.size >= SORT_FROM
        order = mx.argsort(index) if ordered else None
        if order is not None:
            index, of_row = index[order], of_row[order]
        gated = gate(self.gate_up(x[of_row], index, ordered=ordered).astype(x.dtype))
        out = self.down(gated, index, ordered=ordered)
        if order is not None:
            out = out[mx.argsort(order)]
        return (out.reshape(rows, top_k, -1) * shares[..., None]).sum(axis=1)


@dataclass(frozen=True)
class SeparateExperts:
    """Experts that cannot be stacked (of different forms), or not to advantage: dense ones in another type than the
    working type would all be converted for every step. Which were chosen must be known, so each such layer evaluates.
    """

    experts: tuple[MlpWeights, ...]

    def mixture(self, x: mx.array, chosen: mx.array, shares: mx.array, gate: Gate) -> mx.array:
        """See `StackedExperts.mixture`."""
        mx.eval(chosen, shares)
        numbers, weights = np.array(chosen), np.array(shares)
        out = mx.zeros(x.shape, mx.float32)
        for expert in np.unique(numbers):
            rows, place = (numbers == expert).nonzero()
            at = mx.array(rows.astype(np.uint32))
            mlp = self.experts[expert]
            gated = gate(_linear(x[at], mlp.gate_up).astype(x.dtype))
            out = out.at[at].add(_linear(gated, mlp.down) * mx.array(weights[rows, place])[:, None])
        return out


def prepared(experts: Sequence[MlpWeights], working: mx.Dtype) -> StackedExperts | SeparateExperts:
    """The experts of a layer. Stacking copies: a layer's experts are there twice for a moment."""
    for of in (lambda mlp: mlp.gate_up, lambda mlp: mlp.down):
        matrices: list[MlxMatrix] = [of(mlp).matrix for mlp in experts]
        dense = [part for part in matrices[0].parts if isinstance(part, DensePart)]
        if any(one.form != matrices[0].form for one in matrices) or any(p.values.dtype != working for p in dense):
            return SeparateExperts(tuple(experts))
    return StackedExperts(_stacked([mlp.gate_up for mlp in experts]), _stacked([mlp.down for mlp in experts]))


def route(scores: mx.array, moe: MoeSpec, selection_bias: mx.array | None) -> tuple[mx.array, mx.array]:
    """The router's outputs [rows, experts] -> numbers and weights (fp32) of the chosen experts, each [rows, top_k]."""
    scores = scores.astype(mx.float32)
    shares = mx.sigmoid(scores) if moe.score == "sigmoid" else mx.softmax(scores, axis=-1)
    candidates = shares if selection_bias is None else shares + selection_bias
    if moe.n_groups > 1:
        grouped = candidates.reshape(len(scores), moe.n_groups, -1)
        best = _largest(mx.topk(grouped, moe.group_best, axis=-1).sum(axis=-1), moe.top_groups)
        allowed = (best[..., None] == mx.arange(moe.n_groups)).any(axis=1)
        candidates = mx.where(allowed[..., None], grouped, -mx.inf).reshape(candidates.shape)
    chosen = _largest(candidates, moe.top_k)
    weights = mx.take_along_axis(shares, chosen, axis=-1)
    if moe.normalize:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return chosen, weights * moe.scale


def _largest(x: mx.array, count: int) -> mx.array:
    """Where the `count` largest of each row are, in any order."""
    return mx.argpartition(-x, count - 1, axis=-1)[..., :count]


def _stacked(linears: Sequence[Linear]) -> StackedLinear:
    biases = [linear.bias for linear in linears if linear.bias is not None]
    bias = mx.stack(biases) if biases else None
    if bias is not None:
        mx.eval(bias)
    return StackedLinear(stack([linear.matrix for linear in linears]), bias)


def _linear(x: mx.array, linear: Linear) -> mx.array:
    y = linear.matrix.product(x)
    return y if linear.bias is None else y + linear.bias
