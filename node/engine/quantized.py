"""Weights as the engine understands them: one canonical quantized form, and dense arrays.

Canonical form: `w = q*scale + bias` per (row, group of `group_size` along the input), q an unsigned number of
`bits` bits, packed LSB-first into little-endian u32 along the row. Conversions from GGUF blocks are exact:
scale and bias stay the file's own fp16 numbers, and the symmetric types' bias, -2**(bits-1) * scale, is
implied and not stored. Block formats: ggml-common.h of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.gguf_types import GGUF_BLOCK, GGUFType

GROUP_SIZE = 32

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class QuantizedFormat:
    """What a GGUF type becomes: bits of q, and whether the bias is implied by the scale."""

    bits: int
    symmetric: bool


QUANTIZED_FORMATS: dict[GGUFType, QuantizedFormat] = {
    GGUFType.Q4_0: QuantizedFormat(4, symmetric=True),
    GGUFType.Q4_1: QuantizedFormat(4, symmetric=False),
    GGUFType.Q5_0: QuantizedFormat(5, symmetric=True),
    GGUFType.Q5_1: QuantizedFormat(5, symmetric=False),
    GGUFType.Q8_0: QuantizedFormat(8, symmetric=True),
}

DENSE_ITEM_BYTES: dict[GGUFType, int] = {GGUFType.F32: 4, GGUFType.F16: 2, GGUFType.BF16: 2}


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix [rows, columns] in canonical form.

    `q`: uint32 [rows, columns*bits/32]; `scale`: float [rows, columns/group_size]; `bias`: as scale, or None
    where it is -2**(bits-1) * scale exactly (computed in fp32, where that product is always exact).
    """

    bits: int
    group_size: int
    q: Array
    scale: Array
    bias: Array | None

    @property
    def rows(self) -> int:
        """Number of output features."""
        return self.q.shape[0]

    @property
    def columns(self) -> int:
        """Number of input features."""
        return self.scale.shape[1] * self.group_size

    @property
    def nbytes(self) -> int:
        """Bytes of q, scale and bias together."""
        return self.q.nbytes + self.scale.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def take(self, rows: slice | Array) -> QuantizedWeight:
        """The chosen rows, in the chosen order, bit for bit."""
        bias = None if self.bias is None else self.bias[rows]
        return QuantizedWeight(self.bits, self.group_size, self.q[rows], self.scale[rows], bias)

    def codes(self) -> Array:
        """q unpacked: uint8 [rows, columns]."""
        return unpack(self.q, self.bits)

    def dequantize(self) -> Array:
        """The values: float32 [rows, columns], each rounded once."""
        codes = self.codes().reshape(self.rows, -1, self.group_size).astype(np.float32)
        scale = self.scale.astype(np.float32)
        bias = scale * np.float32(-(1 << (self.bits - 1))) if self.bias is None else self.bias.astype(np.float32)
        return (codes * scale[..., None] + bias[..., None]).reshape(self.rows, self.columns)


@dataclass(frozen=True)
class DenseWeight:
    """A matrix [rows, columns] or a vector [n] as the file stores it.

    `values` is float32, float16, or (for BF16, which numpy lacks) uint16 holding the bf16 bits.
    """

    values: Array
    type: GGUFType

    @property
    def rows(self) -> int:
        """Number of output features."""
        return self.values.shape[0]

    @property
    def columns(self) -> int:
        """Number of input features."""
        return self.values.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.values.nbytes

    def take(self, rows: slice | Array) -> DenseWeight:
        """The chosen rows, in the chosen order, bit for bit."""
        return DenseWeight(self.values[rows], self.type)

    def dequantize(self) -> Array:
        """The values as float32, exactly."""
        if self.type is GGUFType.BF16:
            return (self.values.astype(np.uint32) << 16).view(np.float32)
        return self.values.astype(np.float32)


Weight = QuantizedWeight | DenseWeight


def from_gguf(name: str, kind: GGUFType, data: Array, shape: tuple[int, ...]) -> Weight:
    """A tensor's bytes (uint8) of row-major `shape` as a weight; quantized types need a matrix.

    The result is a copy: the file may be closed. Raises ModelFileError for types that are not supported yet.
    """
    if kind in DENSE_ITEM_BYTES:
        dtype = {GGUFType.F32: "<f4", GGUFType.F16: "<f2", GGUFType.BF16: "<u2"}[kind]
        return DenseWeight(data.view(dtype).reshape(shape).copy(), kind)
    form = QUANTIZED_FORMATS.get(kind)
    if form is None or len(shape) != 2:
        raise unsupported(name, kind, shape)
    blocks = data.reshape(shape[0], shape[1] // GROUP_SIZE, GGUF_BLOCK[kind][1])
    codes, rest = _CODES[kind](blocks)
    floats = np.ascontiguousarray(rest).view("<f2")
    bias = None if form.symmetric else np.ascontiguousarray(floats[..., 1])
    q = pack(codes.reshape(shape), form.bits)
    return QuantizedWeight(form.bits, GROUP_SIZE, q, np.ascontiguousarray(floats[..., 0]), bias)


def unsupported(name: str, kind: GGUFType, shape: tuple[int, ...]) -> ModelFileError:
    """The error for a tensor whose type cannot be used for its shape."""
    known = ", ".join(t.name for t in (*QUANTIZED_FORMATS, *DENSE_ITEM_BYTES))
    what = "is" if len(shape) == 2 else f"with {len(shape)} dimension(s) is"
    return ModelFileError(f"tensor {name!r} {what} of type {kind.name}, not supported yet; supported types: {known}")


def held_bytes(name: str, kind: GGUFType, shape: tuple[int, ...]) -> int:
    """Bytes that `from_gguf`'s result takes; vectors (norms) are kept in fp32. Raises ModelFileError as it
    does.
    """
    elements = int(np.prod(shape, dtype=object))
    if kind in DENSE_ITEM_BYTES:
        return elements * (DENSE_ITEM_BYTES[kind] if len(shape) == 2 else 4)
    form = QUANTIZED_FORMATS.get(kind)
    if form is None or len(shape) != 2:
        raise unsupported(name, kind, shape)
    return elements * form.bits // 8 + elements // GROUP_SIZE * (2 if form.symmetric else 4)


def pack(codes: Array, bits: int) -> Array:
    """uint8 codes [rows, columns] -> uint32 [rows, columns*bits/32], LSB-first. Columns are a multiple of 32."""
    rows = codes.shape[0]
    if bits == 8:
        packed = np.ascontiguousarray(codes)
    elif bits == 4:
        packed = codes[:, 0::2] | (codes[:, 1::2] << 4)
    else:
        # Eight codes are exactly `bits` bytes, so one u64 holds them whatever the width.
        eights = codes.reshape(rows, -1, 8)
        words = np.zeros(eights.shape[:2], np.uint64)
        for i in range(8):
            words |= eights[..., i].astype(np.uint64) << np.uint64(bits * i)
        packed = np.ascontiguousarray(words.astype("<u8").view(np.uint8).reshape(rows, -1, 8)[..., :bits])
    return packed.reshape(rows, -1).view("<u4")


def unpack(q: Array, bits: int) -> Array:
    """The inverse of `pack`: uint8 [rows, q.shape[1]*32/bits]."""
    rows = q.shape[0]
    stream = np.ascontiguousarray(q, "<u4").view(np.uint8)
    if bits == 8:
        return stream
    if bits == 4:
        return np.stack([stream & 15, stream >> 4], axis=-1).reshape(rows, -1)
    words = np.zeros((rows, stream.shape[1] // bits, 8), np.uint8)
    words[..., :bits] = stream.reshape(rows, -1, bits)
    shifted = words.view("<u8") >> (np.arange(8, dtype=np.uint64) * np.uint64(bits))
    return (shifted & np.uint64((1 << bits) - 1)).astype(np.uint8).reshape(rows, -1)


def llama_row_order(n_heads: int, head_dim: int) -> Array:
    """For Q or K of a llama GGUF: the file's row for each row of HF's order, to be given to `take`.

    llama.cpp's converter interleaves each head's two halves (`permute` in convert_hf_to_gguf.py); this undoes
    it.
    """
    rows = np.arange(n_heads * head_dim).reshape(n_heads, head_dim // 2, 2)
    return rows.swapaxes(1, 2).reshape(-1)


def _nibbles(packed: Array) -> Array:
    """16 bytes a block: elements 0-15 in the low nibbles, 16-31 in the high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _fifth_bits(packed: Array) -> Array:
    """4 bytes a block: bit i belongs to element i; as 0 or 16."""
    return np.unpackbits(packed, axis=-1, bitorder="little") << 4


_CODES: dict[GGUFType, Callable[[Array], tuple[Array, Array]]] = {
    GGUFType.Q4_0: lambda b: (_nibbles(b[..., 2:]), b[..., :2]),
    GGUFType.Q4_1: lambda b: (_nibbles(b[..., 4:]), b[..., :4]),
    GGUFType.Q5_0: lambda b: (_nibbles(b[..., 6:]) | _fifth_bits(b[..., 2:6]), b[..., :2]),
    GGUFType.Q5_1: lambda b: (_nibbles(b[..., 8:]) | _fifth_bits(b[..., 4:8]), b[..., :4]),
    GGUFType.Q8_0: lambda b: (b[..., 2:] ^ 0x80, b[..., :2]),
}
"""Per type: blocks uint8 [rows, groups, block bytes] -> (codes uint8 [rows, groups, 32], the fp16 numbers'
bytes).
"""
