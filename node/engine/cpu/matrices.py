"""Weights in the layout that the native products read, packed once at load."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from swarmd.node.engine.cpu.bindings import GROUP, TILE, Matrix, NativeScales, Segment, load
from swarmd.node.engine.quantized import (
    BITS,
    GROUP_SIZES,
    Array,
    DenseWeight,
    FloatType,
    QuantizedWeight,
    Scales,
    Weight,
    pack,
)

DENSE_KINDS: dict[FloatType, int] = {"f32": 0, "f16": 1, "bf16": 2}
QUANTIZED_KIND = 3
SCALE_KINDS: dict[str, int] = {**DENSE_KINDS, "i8*f16": 4, "u8*f16": 5}
TABLE_BITS = 4
"""Codes whose levels the kernels look up."""


class NativeMatrix:
    """A matrix [rows, columns] made of weights stacked along the rows; `struct` is what native calls take.

    The memory belongs to this object: keep it as long as the struct (or a copy of it) is in use.
    """

    def __init__(self, parts: Sequence[Weight]) -> None:
        """Packs copies. Raises ValueError for quantized weights that the kernels cannot take, above all those whose
        columns are no multiple of 32."""
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
        part = _with_supported_table(part)
        _check(part)
        rows, columns, table = part.rows, part.columns, part.codebook
        codes = self._take(-(-rows // TILE) * (columns // GROUP) * part.bits * 64)
        q = np.ascontiguousarray(part.q, "<u4")
        load().swarmd_pack(part.bits, rows, columns, q.ctypes.data, codes.ctypes.data)
        levels = (ctypes.c_uint8 * 16)(*([] if table is None else table.tolist()))
        return Segment(
            *(QUANTIZED_KIND, part.bits, rows, columns, part.group_size, part.offset, table is not None, levels),
            *(codes.ctypes.data, self._scales(part.scale), self._scales(part.bias) if part.bias else NativeScales()),
        )

    def _scales(self, scales: Scales) -> NativeScales:
        values, supers = scales.values, scales.supers
        if supers is None:
            return NativeScales(SCALE_KINDS[scales.kind], 0, self._packed(values), None)
        per_super = values.shape[1] // supers.shape[1]
        return NativeScales(SCALE_KINDS[scales.kind], per_super, self._packed(values), self._packed(supers))

    def _dense(self, part: DenseWeight) -> Segment:
        return Segment(DENSE_KINDS[part.type], 0, part.rows, part.columns, codes=self._packed(part.values))

    def _packed(self, numbers: Array) -> int:
        """The address of [rows, columns] as the kernels have them: [tile, column, 16]."""
        numbers = np.ascontiguousarray(numbers)
        rows, columns = numbers.shape
        out = self._take(-(-rows // TILE) * TILE * columns * numbers.itemsize)
        load().swarmd_pack_numbers(numbers.itemsize, rows, columns, numbers.ctypes.data, out.ctypes.data)
        return out.ctypes.data

    def _take(self, nbytes: int) -> Array:
        """Memory that this object keeps; a vector of it never lies on two cache lines."""
        self._memory.append(aligned(nbytes))
        return self._memory[-1]


def _with_supported_table(part: QuantizedWeight) -> QuantizedWeight:
    """The same weight in a form that the kernels have. They look up codes of 4 bits only (no format has others): where
    other codes stand for levels, the levels themselves become 8-bit codes.
    """
    if part.codebook is None or part.bits == TABLE_BITS:
        return part
    return QuantizedWeight(8, part.group_size, pack(part.levels(), 8), part.scale, part.bias, None, part.offset)


def _check(part: QuantizedWeight) -> None:
    """Raises ValueError unless native code may read all that a weight of this form has."""
    rows, columns = part.rows, part.columns
    if columns % GROUP:
        raise ValueError(f"the kernels take quantized matrices whose columns are a multiple of {GROUP}, not {columns}")
    if part.bits not in BITS or part.group_size not in GROUP_SIZES:
        raise ValueError(f"the kernels take no {part.bits}-bit codes in groups of {part.group_size}")
    if part.q.shape != (rows, columns * part.bits // 32):
        raise ValueError(f"codes {part.q.shape} do not fit {rows} rows of {columns} columns of {part.bits} bits")
    if part.codebook is not None and part.codebook.shape != (1 << part.bits,):
        raise ValueError(f"a table of {part.codebook.shape} levels does not fit codes of {part.bits} bits")
    for scales in (part.scale, part.bias):
        if scales is not None:
            _check_scales(scales, rows, columns // part.group_size)


def _check_scales(scales: Scales, rows: int, groups: int) -> None:
    if scales.kind not in SCALE_KINDS:
        raise ValueError(f"the kernels take scales of {', '.join(SCALE_KINDS)}, not {scales.kind}")
    if scales.values.shape != (rows, groups):
        raise ValueError(f"scales {scales.values.shape} do not fit {rows} rows of {groups} groups")
    supers = scales.supers
    if supers is None:
        return
    if supers.dtype != np.float16 or len(supers) != rows or groups % supers.shape[1]:
        raise ValueError(f"super-scales {supers.dtype} {supers.shape} do not fit {rows} rows of {groups} groups")


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
