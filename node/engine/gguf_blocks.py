"""From GGUF's blocks to canonical weights, exactly; gguf_codes.py has the block formats."""

from __future__ import annotations

import numpy as np

from swarmd.node.engine.gguf_codes import CODEBOOKS, TAKE_APART, Parts
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

SLICE_ELEMENTS = 1 << 20
"""Elements converted at a time, which bounds temporaries to some 10 MB beside the result (or to those of one row)."""

DENSE_TYPES: dict[GGUFType, FloatType] = {GGUFType.F32: "f32", GGUFType.F16: "f16", GGUFType.BF16: "bf16"}

QUANTIZED_FORMS: dict[GGUFType, WeightForm] = {
    GGUFType.Q4_0: WeightForm(bits=4),
    GGUFType.Q4_1: WeightForm(bits=4, bias="f16"),
    GGUFType.Q5_0: WeightForm(bits=5),
    GGUFType.Q5_1: WeightForm(bits=5, bias="f16"),
    GGUFType.Q8_0: WeightForm(bits=8),
    GGUFType.Q2_K: WeightForm(bits=2, group_size=16, scale="u8*f16", bias="u8*f16", per_super=16),
    GGUFType.Q3_K: WeightForm(bits=3, group_size=16, scale="i8*f16", per_super=16),
    GGUFType.Q4_K: WeightForm(bits=4, scale="u8*f16", bias="u8*f16"),
    GGUFType.Q5_K: WeightForm(bits=5, scale="u8*f16", bias="u8*f16"),
    GGUFType.Q6_K: WeightForm(bits=6, group_size=16, scale="i8*f16", per_super=16),
    GGUFType.IQ4_NL: WeightForm(bits=4),
    GGUFType.IQ4_XS: WeightForm(bits=4, scale="i8*f16"),
    GGUFType.MXFP4: WeightForm(bits=4, scale="bf16"),
}
"""What each quantized type becomes."""

MXFP4_NAN = 255
"""The exponent that means "not a number" (OCP Microscaling Formats 1.0, E8M0)."""


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

    The result is a copy: the file may be closed. Also raises ModelFileError for scales that are no numbers.
    """
    form = form_of_type(name, kind, shape)
    if form.float_type is not None:
        dtype = {"f32": "<f4", "f16": "<f2", "bf16": "<u2"}[form.float_type]
        return DenseWeight(data.view(dtype).reshape(shape).copy(), form.float_type)
    elements, nbytes = GGUF_BLOCK[kind]
    blocks = data.reshape(shape[0], shape[1] // elements, nbytes)
    if kind is GGUFType.MXFP4 and (blocks[..., 0] == MXFP4_NAN).any():
        raise ModelFileError(f"tensor {name!r} of type {kind.name} has a scale that is not a number; download it again")
    q, scale, scale_supers, bias, bias_supers = _converted(kind, blocks, form.bits)
    codebook, offset = CODEBOOKS.get(kind, (None, -1))
    return QuantizedWeight(
        bits=form.bits,
        group_size=form.group_size,
        q=q,
        scale=Scales(scale, scale_supers),
        bias=None if bias is None else Scales(bias, bias_supers),
        codebook=codebook,
        offset=offset,
    )


def _converted(kind: GGUFType, blocks: Array, bits: int) -> Parts:
    """All rows' parts, with the codes packed; a slice of rows at a time."""
    rows, per_row = blocks.shape[0], blocks.shape[1] * GGUF_BLOCK[kind][0]
    step = max(1, SLICE_ELEMENTS // per_row)
    whole: list[Array | None] = []
    for start in range(0, rows, step):
        parts = TAKE_APART[kind](blocks[start : start + step])
        parts = parts._replace(codes=pack(parts.codes, bits))
        if not whole:
            whole = [None if part is None else np.empty((rows, *part.shape[1:]), part.dtype) for part in parts]
        for target, part in zip(whole, parts, strict=True):
            if target is not None:
                target[start : start + step] = part
    return Parts(*whole)  # pyright: ignore[reportArgumentType]  codes and scale are never None


def _unsupported(name: str, kind: GGUFType, shape: tuple[int, ...]) -> ModelFileError:
    known = ", ".join(t.name for t in (*QUANTIZED_FORMS, *DENSE_TYPES))
    what = "is" if len(shape) == 2 else f"with {len(shape)} dimension(s) is"
    return ModelFileError(f"tensor {name!r} {what} of type {kind.name}, not supported yet; supported types: {known}")
