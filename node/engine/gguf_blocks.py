"""From GGUF's blocks to canonical weights, exactly. Block formats: ggml-common.h of llama.cpp."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from swarmd.node.engine.quantized import (
    Array,
    DenseWeight,
    FloatType,
    QuantizedWeight,
    Scales,
    Weight,
    WeightForm,
    pack,
)
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.gguf_types import GGUF_BLOCK, GGUFType

GROUP_SIZE = 32

DENSE_TYPES: dict[GGUFType, FloatType] = {GGUFType.F32: "f32", GGUFType.F16: "f16", GGUFType.BF16: "bf16"}

QUANTIZED_FORMS: dict[GGUFType, WeightForm] = {
    GGUFType.Q4_0: WeightForm(bits=4),
    GGUFType.Q4_1: WeightForm(bits=4, bias="f16"),
    GGUFType.Q5_0: WeightForm(bits=5),
    GGUFType.Q5_1: WeightForm(bits=5, bias="f16"),
    GGUFType.Q8_0: WeightForm(bits=8),
}
"""What each quantized type becomes."""


def form_of_type(name: str, kind: GGUFType, shape: tuple[int, ...]) -> WeightForm:
    """What `from_gguf` makes of a tensor `name` of this type. Raises ModelFileError for what is not supported.

    Quantized types need a matrix. Vectors are dense.
    """
    if kind in DENSE_TYPES:
        return WeightForm(DENSE_TYPES[kind])
    form = QUANTIZED_FORMS.get(kind)
    if form is None or len(shape) != 2:
        raise _unsupported(name, kind, shape)
    return form


def from_gguf(name: str, kind: GGUFType, data: Array, shape: tuple[int, ...]) -> Weight:
    """A tensor's bytes (uint8) of row-major `shape` as a weight; see `form_of_type`.

    The result is a copy: the file may be closed.
    """
    form = form_of_type(name, kind, shape)
    if form.float_type is not None:
        dtype = {"f32": "<f4", "f16": "<f2", "bf16": "<u2"}[form.float_type]
        return DenseWeight(data.view(dtype).reshape(shape).copy(), form.float_type)
    blocks = data.reshape(shape[0], shape[1] // GROUP_SIZE, GGUF_BLOCK[kind][1])
    codes, rest = _CODES[kind](blocks)
    floats = np.ascontiguousarray(rest).view("<f2")
    bias = Scales(np.ascontiguousarray(floats[..., 1])) if form.bias else None
    scale = Scales(np.ascontiguousarray(floats[..., 0]))
    return QuantizedWeight(form.bits, GROUP_SIZE, pack(codes.reshape(shape), form.bits), scale, bias)


def _unsupported(name: str, kind: GGUFType, shape: tuple[int, ...]) -> ModelFileError:
    known = ", ".join(t.name for t in (*QUANTIZED_FORMS, *DENSE_TYPES))
    what = "is" if len(shape) == 2 else f"with {len(shape)} dimension(s) is"
    return ModelFileError(f"tensor {name!r} {what} of type {kind.name}, not supported yet; supported types: {known}")


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
