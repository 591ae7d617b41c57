"""Hidden states as bytes: the types in which they travel between stages. Pure numpy.

f32 is exact. bf16 is rounded to nearest even. f16 has three bits more than bf16 and ends at 65504: rows beyond that
travel as bf16 instead, so a sender says with every step what it used. q8 is int8 codes in blocks of 32 values of a row,
each with an fp32 scale, largest/127 (as GGUF's Q8_0): 9 bits a value, off by 1/254 of the block's largest at most.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import numpy as np

from swarmd.node.engine.quantized import bf16_to_f32, f32_to_bf16

WireDtype = Literal["f32", "bf16", "f16", "q8"]
WIRE_DTYPES: tuple[WireDtype, ...] = ("f32", "bf16", "f16", "q8")

F16_LARGEST = 65504.0
BLOCK = 32

Hidden = np.ndarray[Any, np.dtype[np.float32]]


def wire_bytes(dtype: WireDtype, rows: int, columns: int) -> int:
    """Bytes that hidden states [rows, columns] take."""
    if dtype == "q8":
        return rows * (4 * _blocks(columns) + columns)
    return rows * columns * (4 if dtype == "f32" else 2)


def encode(x: Hidden, dtype: WireDtype) -> tuple[WireDtype, memoryview]:
    """Float32 [rows, columns] -> the type used and the bytes, row-major.

    The type is `dtype`, or bf16 where f16 would overflow.
    """
    if dtype == "f16" and not bool((np.abs(x) <= F16_LARGEST).all()):
        dtype = "bf16"
    if dtype == "f32":
        out: np.ndarray[Any, Any] = np.ascontiguousarray(x)
    elif dtype == "bf16":
        out = f32_to_bf16(x)
    elif dtype == "f16":
        out = x.astype("<f2")
    else:
        out = _to_blocks(x)
    return dtype, memoryview(cast(Any, out.reshape(-1).view(np.uint8)))


def decode(data: Any, dtype: WireDtype, rows: int, columns: int) -> Hidden:
    """The inverse of `encode`, for `wire_bytes` bytes in any buffer. The result may share its memory."""
    if dtype == "q8":
        return _from_blocks(np.frombuffer(data, np.uint8), rows, columns)
    if dtype == "f32":
        return np.frombuffer(data, "<f4").reshape(rows, columns)
    if dtype == "f16":
        return np.frombuffer(data, "<f2").reshape(rows, columns).astype(np.float32)
    return bf16_to_f32(np.frombuffer(data, "<u2")).reshape(rows, columns)


def _blocks(columns: int) -> int:
    return -(-columns // BLOCK)


def _to_blocks(x: Hidden) -> np.ndarray[Any, Any]:
    """Scales [rows, blocks] float32 first, then codes [rows, columns] int8.

    A block with a value that is not finite gets a scale that is not a number: the receiver's results are not either,
    and that is noticed.
    """
    rows, columns = x.shape
    padded = np.zeros((rows, _blocks(columns), BLOCK), np.float32)
    padded.reshape(rows, _blocks(columns) * BLOCK)[:, :columns] = x
    largest = np.abs(padded).max(-1)
    scales = np.where(np.isfinite(largest), largest / np.float32(127), np.float32(np.nan)).astype("<f4")
    usable = np.isfinite(scales) & (scales > 0)
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=usable)
    with np.errstate(invalid="ignore"):
        codes = np.rint(np.where(usable[..., None], padded * inverse[..., None], 0)).clip(-127, 127).astype(np.int8)
    body = codes.reshape(rows, _blocks(columns) * BLOCK)[:, :columns]
    return np.concatenate([scales.reshape(-1).view(np.uint8), np.ascontiguousarray(body).reshape(-1).view(np.uint8)])


def _from_blocks(data: np.ndarray[Any, Any], rows: int, columns: int) -> Hidden:
    head = 4 * rows * _blocks(columns)
    scales = data[:head].view("<f4").reshape(rows, _blocks(columns))
    codes = data[head:].view(np.int8).reshape(rows, columns)
    return np.repeat(scales, BLOCK, axis=1)[:, :columns] * codes.astype(np.float32)
