"""Random weights of every canonical form that a model file can bring."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from swarmd.node.engine.gguf_codes import IQ4_CODEBOOK, MXFP4_CODEBOOK
from swarmd.node.engine.quantized import BITS, Array, DenseWeight, QuantizedWeight, Scales, Weight, pack

MakeWeight = Callable[[int, int, np.random.Generator], Weight]
"""(rows, columns, random) -> a weight."""


def _bf16(values: Array) -> Array:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def _scale(rows: int, groups: int, kind: str, random: np.random.Generator, size: float, most: int = 128) -> Scales:
    values = random.standard_normal((rows, groups)).astype(np.float32) * np.float32(size)
    if kind.endswith("*f16"):
        integers = random.integers(0, 64, (rows, groups)).astype(np.uint8)
        if kind.startswith("i8"):
            integers = random.integers(-most, most, (rows, groups)).astype(np.int8)
        supers = random.standard_normal((rows, groups // 2)) * size / 32
        return Scales(integers, supers.astype(np.float16))
    return Scales({"f32": values, "f16": values.astype(np.float16), "bf16": _bf16(values)}[kind])


def _quantized(bits: int, group: int, scale: str, bias: str = "") -> MakeWeight:
    def make(rows: int, columns: int, random: np.random.Generator) -> Weight:
        groups, size = columns // group, columns**-0.5
        codes = random.integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
        scales = _scale(rows, groups, scale, random, size / (1 << (bits - 1)))
        biases = _scale(rows, groups, bias, random, size) if bias else None
        return QuantizedWeight(bits, group, pack(codes, bits), scales, biases)

    return make


def _table(codebook: Array, offset: int, scale: str) -> MakeWeight:
    def make(rows: int, columns: int, random: np.random.Generator) -> Weight:
        codes = random.integers(0, 16, (rows, columns), dtype=np.uint8)
        if scale == "powers of two":
            exponents = random.integers(110, 125, (rows, columns // 32)).astype(np.uint16)
            scales = Scales((exponents << 7).astype(np.uint16))
        else:
            scales = _scale(rows, columns // 32, scale, random, columns**-0.5 / 64, most=32)  # IQ4_XS: 6 bits
        return QuantizedWeight(4, 32, pack(codes, 4), scales, None, codebook, offset)

    return make


def _dense(kind: str) -> MakeWeight:
    def make(rows: int, columns: int, random: np.random.Generator) -> Weight:
        values = (random.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)
        if kind == "f32":
            return DenseWeight(values, "f32")
        return DenseWeight(values.astype(np.float16), "f16") if kind == "f16" else DenseWeight(_bf16(values), "bf16")

    return make


FORMS: dict[str, MakeWeight] = {
    "F32": _dense("f32"),
    "F16": _dense("f16"),
    "BF16": _dense("bf16"),
    "Q4_0": _quantized(4, 32, "f16"),
    "Q4_1": _quantized(4, 32, "f16", "f16"),
    "Q5_0": _quantized(5, 32, "f16"),
    "Q5_1": _quantized(5, 32, "f16", "f16"),
    "Q8_0": _quantized(8, 32, "f16"),
    "Q2_K": _quantized(2, 16, "u8*f16", "u8*f16"),
    "Q3_K": _quantized(3, 16, "i8*f16"),
    "Q4_K": _quantized(4, 32, "u8*f16", "u8*f16"),
    "Q5_K": _quantized(5, 32, "u8*f16", "u8*f16"),
    "Q6_K": _quantized(6, 16, "i8*f16"),
    "IQ4_NL": _table(IQ4_CODEBOOK, 128, "f16"),
    "IQ4_XS": _table(IQ4_CODEBOOK, 128, "i8*f16"),
    "MXFP4": _table(MXFP4_CODEBOOK, 12, "powers of two"),
    "fp4 with other scales": _table(MXFP4_CODEBOOK, 12, "f16"),
    **{f"MLX {bits} bits, groups of 64": _quantized(bits, 64, "bf16", "bf16") for bits in BITS},
    **{f"MLX {bits} bits, groups of 128": _quantized(bits, 128, "f16", "f16") for bits in BITS},
    "fp32 scales": _quantized(4, 64, "f32", "f32"),
}
"""By name: GGUF's types, and what MLX's and other tools write. Columns must be a multiple of 128."""
