"""Weights as MLX keeps them: quantized wherever `mx.quantized_matmul` computes with exactly the values of the canonical
form, and dense as in the file.

What each canonical form becomes (MLX's own affine form is `code*scale + bias` for groups of 32, 64 or 128 codes, LSB
first in u32 words: the canonical packing):

- Groups of 32, 64, 128: as they are, with scales and biases expanded to fp32 (bf16 where the working type is bf16 and
  loses nothing). With groups of 32 that is 2 bits a weight: 6 instead of 5 for Q4_1, instead of 4.6 for Q4_K.
- Groups of 16 (Q2_K, Q3_K, Q6_K): MLX has none. The codes are kept once, with two sets of scales for groups of 32: one
  for the even sixteens of inputs, one for the odd ones. A product is two products, each with the other sixteens of its
  input set to zero, so nothing is ever dequantized. 4 bits a weight for scales and biases: 10 instead of 6.6 for Q6_K.
- MXFP4 (levels of fp4 times powers of two): MLX's mode of that name, 4.25 bits a weight.
- Other codebooks (IQ4_NL, IQ4_XS): the levels themselves as codes of 8 bits, 10 bits a weight instead of 4.5.
- Dense weights stay in their type and are turned into fp32 tile by tile in a product, unless they are in the working
  type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import mlx.core as mx
import numpy as np

from swarmd.node.engine.backends.base import tile_rows
from swarmd.node.engine.gguf_codes import MXFP4_CODEBOOK
from swarmd.node.engine.quantized import DenseWeight, QuantizedWeight, Weight, pack

HALF_GROUP = 16
MXFP4_OFFSET = 12
E8M0_BIAS = 127


@dataclass(frozen=True)
class QuantizedPart:
    """Rows of a matrix, or of each of a stack of matrices (all arrays then have one more dimension in front).

    `q`: uint32 [rows, columns*bits/32]. `scales`: one array [rows, groups], or two for halves of groups as the module
    says; `biases` likewise, none for mode "mxfp4", whose scales are powers of two, uint8 e8m0.
    """

    q: mx.array
    scales: tuple[mx.array, ...]
    biases: tuple[mx.array, ...]
    bits: int
    group_size: int
    mode: str = "affine"

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """All that is held."""
        return (self.q, *self.scales, *self.biases)

    @property
    def form(self) -> tuple[object, ...]:
        """Equal for parts that can be joined or stacked."""
        dtypes = (self.scales[0].dtype, *(bias.dtype for bias in self.biases))
        return (self.bits, self.group_size, self.mode, len(self.scales), *map(str, dtypes))

    @property
    def rows(self) -> int:
        """Number of outputs."""
        return self.q.shape[-2]

    def product(self, x: mx.array) -> mx.array:
        """x [n, columns] -> [n, rows]."""
        products = [
            mx.quantized_matmul(piece, self.q, scale, bias, group_size=self.group_size, bits=self.bits, mode=self.mode)
            for piece, scale, bias in self._pieces(x)
        ]
        return sum(products[1:], products[0])

    def gathered(self, x: mx.array, index: mx.array, *, ordered: bool) -> mx.array:
        """Of a stack: x [n, 1, columns], each row by the matrix of its `index` [n] (`ordered`: it never falls)."""
        products = [
            mx.gather_qmm(
                *(piece, self.q, scale, bias),
                rhs_indices=index,
                group_size=self.group_size,
                bits=self.bits,
                mode=self.mode,
                sorted_indices=ordered,
            )
            for piece, scale, bias in self._pieces(x)
        ]
        return sum(products[1:], products[0])

    def rows_at(self, rows: mx.array) -> mx.array:
        """The values of the chosen rows: [n, columns], fp32."""
        values = [
            mx.dequantize(
                *(self.q[rows], scale[rows], None if bias is None else bias[rows]),
                group_size=self.group_size,
                bits=self.bits,
                mode=self.mode,
                dtype=mx.float32,
            )
            for scale, bias in self._scale_pairs()
        ]
        return values[0] if len(values) == 1 else mx.where(_even_half(values[0]), values[0], values[1])

    def _scale_pairs(self) -> list[tuple[mx.array, mx.array | None]]:
        return [(scale, self.biases[i] if self.biases else None) for i, scale in enumerate(self.scales)]

    def _pieces(self, x: mx.array) -> list[tuple[mx.array, mx.array, mx.array | None]]:
        """The inputs, and the scales and biases to multiply them with; the products are to be added up."""
        pairs = self._scale_pairs()
        if len(pairs) == 1:
            return [(x, *pairs[0])]
        even = _even_half(x)
        zero = mx.zeros((), x.dtype)
        return [(mx.where(even, x, zero), *pairs[0]), (mx.where(even, zero, x), *pairs[1])]


@dataclass(frozen=True)
class DensePart:
    """`values` [rows, columns], or of a stack of matrices [matrices, rows, columns]."""

    values: mx.array

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """All that is held."""
        return (self.values,)

    @property
    def form(self) -> tuple[object, ...]:
        """Equal for parts that can be joined or stacked."""
        return (str(self.values.dtype),)

    @property
    def rows(self) -> int:
        """Number of outputs."""
        return self.values.shape[-2]

    def product(self, x: mx.array) -> mx.array:
        """x [n, columns] -> [n, rows]. Tiles bound what an unevaluated graph needs at a time."""
        if self.values.dtype == x.dtype:
            return x @ self.values.T
        step = tile_rows(self.values.shape[1])
        wide = x.astype(mx.float32)
        tiles = [self.values[top : top + step].astype(mx.float32) for top in range(0, self.rows, step)]
        return mx.concatenate([wide @ tile.T for tile in tiles], axis=-1)

    def gathered(self, x: mx.array, index: mx.array, *, ordered: bool) -> mx.array:
        """See `QuantizedPart.gathered`; only for stacks in the type of x."""
        return mx.gather_mm(x, self.values.swapaxes(-1, -2), rhs_indices=index, sorted_indices=ordered)

    def rows_at(self, rows: mx.array) -> mx.array:
        """The values of the chosen rows: [n, columns], fp32."""
        return self.values[rows].astype(mx.float32)


Part = QuantizedPart | DensePart


@dataclass(frozen=True)
class MlxMatrix:
    """A matrix as its parts, in the order of the outputs."""

    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(array.nbytes for part in self.parts for array in part.arrays)

    @property
    def form(self) -> tuple[object, ...]:
        """Equal for matrices that can be stacked."""
        return tuple((part.form, part.q.shape if isinstance(part, QuantizedPart) else part.values.shape)
                     for part in self.parts)  # fmt: skip

    def product(self, x: mx.array) -> mx.array:
        """x [n, columns] -> [n, rows]."""
        return _side_by_side([part.product(x) for part in self.parts])

    def gathered(self, x: mx.array, index: mx.array, *, ordered: bool) -> mx.array:
        """See `QuantizedPart.gathered`."""
        return _side_by_side([part.gathered(x, index, ordered=ordered) for part in self.parts])

    def rows_at(self, rows: Sequence[int]) -> mx.array:
        """The values of the chosen rows: [len(rows), columns], fp32."""
        wanted = np.asarray(rows, np.int64)
        found, places, begin = [], [], 0
        for part in self.parts:
            here = np.flatnonzero((wanted >= begin) & (wanted < begin + part.rows))
            if len(here):
                found.append(part.rows_at(mx.array((wanted[here] - begin).astype(np.uint32))))
                places.append(here)
            begin += part.rows
        if len(found) == 1:
            return found[0]
        return mx.concatenate(found)[mx.array(np.argsort(np.concatenate(places)).astype(np.uint32))]


def matrix(parts: Sequence[Weight], working: mx.Dtype) -> MlxMatrix:
    """The matrix made of `parts` stacked along their rows; neighbours that become alike are joined."""
    kept = [_dense(part) if isinstance(part, DenseWeight) else _quantized(part, working) for part in parts]
    joined = [_combined(list(alike), mx.concatenate) for _, alike in groupby(kept, key=lambda part: part.form)]
    return _evaluated(MlxMatrix(tuple(joined)))


def stack(matrices: Sequence[MlxMatrix]) -> MlxMatrix:
    """Matrices of one form as one stack."""
    by_part = zip(*(one.parts for one in matrices), strict=True)
    return _evaluated(MlxMatrix(tuple(_combined(list(parts), mx.stack) for parts in by_part)))


def _even_half(x: mx.array) -> mx.array:
    """Which features of x are in the first half of their group of 32: bool [columns]."""
    return mx.arange(x.shape[-1]) % (2 * HALF_GROUP) < HALF_GROUP


def _side_by_side(products: list[mx.array]) -> mx.array:
    return products[0] if len(products) == 1 else mx.concatenate(products, axis=-1)


def _evaluated(made: MlxMatrix) -> MlxMatrix:
    mx.eval([part.arrays for part in made.parts])
    return made


def _combined(parts: list[Part], combine: Callable[[list[mx.array]], mx.array]) -> Part:
    """Parts of one form made one, by mx.concatenate (along the rows) or mx.stack."""
    if len(parts) == 1 and combine is mx.concatenate:
        return parts[0]

    def of(arrays: Sequence[mx.array]) -> mx.array:
        return combine(list(arrays))

    first = parts[0]
    if isinstance(first, DensePart):
        return DensePart(of([part.values for part in parts if isinstance(part, DensePart)]))
    alike = [part for part in parts if isinstance(part, QuantizedPart)]
    return replace(
        first,
        q=of([part.q for part in alike]),
        scales=tuple(of(same) for same in zip(*(part.scales for part in alike), strict=True)),
        biases=tuple(of(same) for same in zip(*(part.biases for part in alike), strict=True)),
    )


def _dense(weight: DenseWeight) -> DensePart:
    values = mx.array(weight.values)
    return DensePart(values.view(mx.bfloat16) if weight.type == "bf16" else values)


def _quantized(weight: QuantizedWeight, working: mx.Dtype) -> QuantizedPart:
    scale = weight.scale.expand()
    if weight.codebook is not None:
        exponents = _e8m0(scale) if _is_fp4(weight) else None
        if exponents is not None:
            return QuantizedPart(mx.array(weight.q), (mx.array(exponents),), (), 4, 32, "mxfp4")
        bits, q = 8, pack(weight.levels(), 8)
    else:
        bits, q = weight.bits, weight.q
    bias = weight.expanded_bias()
    if weight.group_size != HALF_GROUP:
        return QuantizedPart(
            mx.array(q), (_number(scale, working),), (_number(bias, working),), bits, weight.group_size
        )
    scales, biases = (tuple(_number(of[:, half::2], working) for half in (0, 1)) for of in (scale, bias))
    return QuantizedPart(mx.array(q), scales, biases, bits, 2 * HALF_GROUP)


def _number(values: np.ndarray, working: mx.Dtype) -> mx.array:
    """fp32, or the working type where that holds every value."""
    exact = mx.array(np.ascontiguousarray(values))
    narrow = exact.astype(working)
    return narrow if bool(mx.array_equal(narrow.astype(mx.float32), exact)) else exact


def _is_fp4(weight: QuantizedWeight) -> bool:
    return (
        weight.codebook is not None
        and (weight.bits, weight.group_size, weight.offset) == (4, 32, MXFP4_OFFSET)
        and weight.bias is None
        and np.array_equal(weight.codebook, MXFP4_CODEBOOK)
    )


def _e8m0(scale: np.ndarray) -> np.ndarray | None:
    """Twice the scales (the levels are doubled) as exponents 2**(e - 127), or None if one is no such number."""
    mantissa, exponent = np.frexp(scale.astype(np.float64))
    exponents = exponent + E8M0_BIAS
    if not (mantissa == 0.5).all() or exponents.min() < 0 or exponents.max() > 2 * E8M0_BIAS:
        return None
    return exponents.astype(np.uint8)
