"""Weights as the engine understands them: one canonical quantized form, and dense arrays. Pure numpy.

Canonical form: `w = level*scale + bias` per (row, group of `group_size` along the input). `level` is the code q itself,
an unsigned number of `bits` bits, packed LSB-first into little-endian u32 along the row; or, for types with a table,
`codebook[q]`. What a file holds is kept exactly: scales stay the file's own numbers, also where these come in two
levels (a small integer per group times an fp16 number per several groups, as in GGUF's K-quants), and a bias that is a
multiple of the scale, `-offset*scale`, is implied and not stored. `Weight.dequantize` defines the values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

FloatType = Literal["f32", "f16", "bf16"]
FLOAT_BYTES: dict[FloatType, int] = {"f32": 4, "f16": 2, "bf16": 2}

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (16, 32, 64, 128)


def bf16_to_f32(bits: Array) -> Array:
    """uint16 holding bf16 bits (numpy lacks the type) -> float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(values: Array) -> Array:
    """float32 -> uint16 holding bf16 bits, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


@dataclass(frozen=True)
class Scales:
    """One number per (row, group): `values[r, g]`, times `supers[r, g // (groups / supers per row)]` if there are any.

    `values` is float32, float16 or uint16 (bf16 bits), [rows, groups]; with `supers` (float16, [rows, groups / n] for a
    whole number n) it is int8 or uint8.
    """

    values: Array
    supers: Array | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of both levels."""
        return self.values.nbytes + (0 if self.supers is None else self.supers.nbytes)

    @property
    def kind(self) -> str:
        """The form: "f32", "f16", "bf16", "i8*f16" or "u8*f16"."""
        names = {"float32": "f32", "float16": "f16", "uint16": "bf16", "int8": "i8", "uint8": "u8"}
        return names[self.values.dtype.name] + ("" if self.supers is None else "*f16")

    def take(self, rows: slice | Array) -> Scales:
        """The chosen rows, in the chosen order."""
        return Scales(self.values[rows], None if self.supers is None else self.supers[rows])

    def expand(self) -> Array:
        """float32 [rows, groups]. Exact: an integer of 8 bits times an fp16 number has at most 19 significant bits."""
        if self.supers is None:
            return bf16_to_f32(self.values) if self.values.dtype == np.uint16 else self.values.astype(np.float32)
        per_super = self.values.shape[1] // self.supers.shape[1]
        return self.values.astype(np.float32) * np.repeat(self.supers.astype(np.float32), per_super, axis=1)


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix [rows, columns] in canonical form.

    `q`: uint32 [rows, columns*bits/32]; `bias` None: it is -offset*scale. `codebook`: uint8 [2**bits] or None. An
    offset of -1 stands for 2**(bits-1), the middle of the codes.
    """

    bits: int
    group_size: int
    q: Array
    scale: Scales
    bias: Scales | None
    codebook: Array | None = None
    offset: int = field(default=-1)

    def __post_init__(self) -> None:
        if self.offset < 0:
            object.__setattr__(self, "offset", 1 << (self.bits - 1))

    @property
    def rows(self) -> int:
        """Number of output features."""
        return self.q.shape[0]

    @property
    def columns(self) -> int:
        """Number of input features."""
        return self.scale.values.shape[1] * self.group_size

    @property
    def nbytes(self) -> int:
        """Bytes of q, scale and bias together."""
        return self.q.nbytes + self.scale.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def take(self, rows: slice | Array) -> QuantizedWeight:
        """The chosen rows, in the chosen order, bit for bit."""
        bias = None if self.bias is None else self.bias.take(rows)
        return QuantizedWeight(
            self.bits, self.group_size, self.q[rows], self.scale.take(rows), bias, self.codebook, self.offset
        )

    def codes(self) -> Array:
        """q unpacked: uint8 [rows, columns]."""
        return unpack(self.q, self.bits)

    def levels(self) -> Array:
        """The levels: uint8 [rows, columns], the codes themselves or what the codebook has for them."""
        codes = self.codes()
        return codes if self.codebook is None else self.codebook[codes]

    def expanded_bias(self) -> Array:
        """The bias, stored or implied: float32 [rows, groups]."""
        return self.scale.expand() * np.float32(-self.offset) if self.bias is None else self.bias.expand()

    def dequantize(self) -> Array:
        """The values: float32 [rows, columns], each rounded once after product and once after sum.

        Where the products are exact in fp32 (levels and scales of few bits) that is a single rounding.
        """
        levels = self.levels().reshape(self.rows, -1, self.group_size).astype(np.float32)
        if self.bias is None:  # level - offset is a small integer: exact, and so the product is rounded once
            values = (levels - np.float32(self.offset)) * self.scale.expand()[..., None]
        else:
            values = levels * self.scale.expand()[..., None] + self.bias.expand()[..., None]
        return values.reshape(self.rows, self.columns)


@dataclass(frozen=True)
class DenseWeight:
    """A matrix [rows, columns] or a vector [n] of floats.

    `values` is float32, float16, or uint16 holding bf16 bits, as `type` says.
    """

    values: Array
    type: FloatType

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
        return bf16_to_f32(self.values) if self.type == "bf16" else self.values.astype(np.float32)


Weight = QuantizedWeight | DenseWeight


@dataclass(frozen=True)
class WeightForm:
    """In what form a matrix is kept, known before it is read; `nbytes` says what that takes.

    Dense: `float_type`. Quantized: the other fields, as in `QuantizedWeight`; `scale` and `bias` are kinds of `Scales`,
    `bias` "" where it is implied. `per_super` groups share a super-scale.
    """

    float_type: FloatType | None = None
    bits: int = 0
    group_size: int = 32
    scale: str = "f16"
    bias: str = ""
    per_super: int = 8

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of a weight of this form."""
        if self.float_type is not None:
            return rows * columns * FLOAT_BYTES[self.float_type]
        groups = rows * (columns // self.group_size)
        return rows * columns * self.bits // 8 + sum(
            self._scale_bytes(kind, groups) for kind in (self.scale, self.bias)
        )

    def _scale_bytes(self, kind: str, groups: int) -> int:
        if not kind:
            return 0
        if kind.endswith("*f16"):
            return groups + groups // self.per_super * 2
        return groups * (4 if kind == "f32" else 2)


def form_of(weight: Weight) -> WeightForm:
    """The form of a weight that is there."""
    if isinstance(weight, DenseWeight):
        return WeightForm(weight.type)
    supers = weight.scale.supers
    per_super = 8 if supers is None else weight.scale.values.shape[1] // supers.shape[1]
    bias = "" if weight.bias is None else weight.bias.kind
    return WeightForm(None, weight.bits, weight.group_size, weight.scale.kind, bias, per_super)


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
