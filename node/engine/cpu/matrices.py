"""Weights in the layout that the native products read, packed once at load."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from swarmd.node.engine.cpu.bindings import GROUP, TILE, Matrix, Segment, load
from swarmd.node.engine.quantized import Array, DenseWeight, FloatType, QuantizedWeight, Weight

QUANTIZED_KIND = 3
DENSE_KINDS: dict[FloatType, int] = {"f32": 0, "f16": 1, "bf16": 2}


class NativeMatrix:
    """A matrix [rows, columns] made of weights stacked along the rows; `struct` is what native calls take.

    The memory belongs to this object: keep it as long as the struct (or a copy of it) is in use.
    """

    def __init__(self, parts: Sequence[Weight]) -> None:
        """Packs copies. Raises ValueError for groups of another size than 32 and scales other than fp16."""
        self._memory: list[Array] = []
        segments = (Segment * len(parts))(*(self._segment(part) for part in parts))
        self.struct = Matrix(sum(part.rows for part in parts), parts[0].columns, len(parts), segments)
        self._segments = segments

    @property
    def rows(self) -> int:
        """Number of outputs."""
        return self.struct.rows

    @property
    def columns(self) -> int:
        """Number of inputs."""
        return self.struct.columns

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(array.nbytes for array in self._memory)

    def rows_at(self, ids: Sequence[int]) -> Array:
        """The chosen rows, fp32 [len(ids), columns], exactly as the canonical form defines them."""
        wanted = np.array(ids, np.int32)
        out = np.empty((len(wanted), self.columns), np.float32)
        load().swarmd_rows(ctypes.byref(self.struct), wanted.ctypes.data, len(wanted), out.ctypes.data)
        return out

    def _segment(self, part: Weight) -> Segment:
        return self._quantized(part) if isinstance(part, QuantizedWeight) else self._dense(part)

    def _quantized(self, part: QuantizedWeight) -> Segment:
        if part.group_size != GROUP or part.scale.kind != "f16" or part.codebook is not None:
            raise ValueError(f"groups of {part.group_size} with scales of {part.scale.kind} are not supported here")
        tiles, groups, biased = -(-part.rows // TILE), part.columns // GROUP, part.bias is not None
        codes = self._keep(np.empty(tiles * groups * part.bits * 64, np.uint8))
        scales = self._keep(np.empty(tiles * groups * TILE * (2 if biased else 1), np.float16))
        q, scale = np.ascontiguousarray(part.q, "<u4"), np.ascontiguousarray(part.scale.values)
        bias = None if part.bias is None else np.ascontiguousarray(part.bias.values, np.float16)
        load().swarmd_pack(
            *(part.bits, part.rows, part.columns, q.ctypes.data, scale.ctypes.data),
            *(None if bias is None else bias.ctypes.data, codes.ctypes.data, scales.ctypes.data),
        )
        sizes = (part.rows, part.columns)
        return Segment(QUANTIZED_KIND, part.bits, *sizes, codes.ctypes.data, scales.ctypes.data, biased)

    def _dense(self, part: DenseWeight) -> Segment:
        values = np.ascontiguousarray(part.values)
        codes = self._keep(np.empty(-(-part.rows // TILE) * TILE * part.columns, values.dtype))
        load().swarmd_pack_dense(values.itemsize, part.rows, part.columns, values.ctypes.data, codes.ctypes.data)
        return Segment(DENSE_KINDS[part.type], 0, part.rows, part.columns, codes.ctypes.data, None, 0)

    def _keep(self, array: Array) -> Array:
        self._memory.append(array)
        return array


def linear(matrix: NativeMatrix, x: Array, threads: int = 1) -> Array:
    """x @ matrix.T for fp32 x [rows, columns]: fp32 [rows, outputs]. One product, for tests and measurements."""
    library, x = load(), np.ascontiguousarray(x, np.float32)
    y = np.empty((len(x), matrix.rows), np.float32)
    struct = ctypes.byref(matrix.struct)
    workspace = aligned(library.swarmd_linear_workspace(struct, len(x)))
    pool = library.swarmd_pool_new(threads)
    try:
        library.swarmd_linear(pool, struct, x.ctypes.data, len(x), y.ctypes.data, workspace.ctypes.data)
    finally:
        library.swarmd_pool_free(pool)
    return y


def aligned(nbytes: int) -> Array:
    """Uninitialized bytes that begin at a multiple of 64, a cache line."""
    memory = np.empty(nbytes + 64, np.uint8)
    offset = -memory.ctypes.data % 64
    return memory[offset : offset + nbytes]
