"""GGUF's block formats taken apart: codes, scales and biases of each quantized type, vectorised.

Formats: ggml-common.h and the dequantize_row functions of ggml-quants.c in llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from swarmd.node.engine.quantized import Array
from swarmd.node.models.gguf_types import GGUFType


class Parts(NamedTuple):
    """What rows of blocks hold: `codes` uint8 [rows, columns], and scales and biases as in `Scales`.

    The fp16 numbers have shape [rows, blocks]; the small integers of two-level scales [rows, groups]. None: the type
    has no such part.
    """

    codes: Array
    scale: Array
    scale_supers: Array | None = None
    bias: Array | None = None
    bias_supers: Array | None = None


IQ4_CODEBOOK = np.array(
    [value + 128 for value in (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)], np.uint8
)
"""`kvalues_iq4nl` of ggml-common.h, 128 added."""

MXFP4_CODEBOOK = np.array([value + 12 for value in (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)], np.uint8)
"""The values of fp4 (e2m1) doubled (`kvalues_mxfp4`), 12 added."""

CODEBOOKS: dict[GGUFType, tuple[Array, int]] = {
    GGUFType.IQ4_NL: (IQ4_CODEBOOK, 128),
    GGUFType.IQ4_XS: (IQ4_CODEBOOK, 128),
    GGUFType.MXFP4: (MXFP4_CODEBOOK, 12),
}
"""Per type with a table: the table, and the offset of its levels."""


def _bits(packed: Array, width: int, run: int) -> Array:
    """Fields of `width` bits: each run of `run` bytes holds the lowest fields of `run` elements, then the next ones.

    uint8 [rows, blocks, bytes] -> uint8 [rows, blocks, bytes * 8 / width].
    """
    word = np.dtype(np.uint64 if run % 8 == 0 else np.uint32 if run % 4 == 0 else np.uint8)
    words = np.ascontiguousarray(packed).view(word)
    mask = word.type(int.from_bytes(bytes([(1 << width) - 1]) * word.itemsize, "little"))
    rows, blocks = packed.shape[:2]
    runs = words.reshape(rows, blocks, -1, run // word.itemsize)
    out = np.empty((*runs.shape[:3], 8 // width, runs.shape[3]), word)
    for field in range(8 // width):  # whole words at once: what crosses from byte to byte is masked away
        np.bitwise_and(runs >> word.type(field * width), mask, out=out[:, :, :, field])
    return out.view(np.uint8).reshape(rows, blocks, -1)


def _f16(two_bytes: Array) -> Array:
    """One fp16 number a block: [rows, blocks]."""
    return np.ascontiguousarray(two_bytes).view("<f2")[..., 0]


def _flat(per_block: Array) -> Array:
    """[rows, blocks, n] -> [rows, blocks * n]."""
    return per_block.reshape(per_block.shape[0], -1)


def _fifth_bits(packed: Array) -> Array:
    """4 bytes a block: bit i belongs to element i; as 0 or 16."""
    return np.unpackbits(packed, axis=-1, bitorder="little") << 4


def _q4_0(b: Array) -> Parts:
    return Parts(_flat(_bits(b[..., 2:], 4, 16)), _f16(b[..., :2]))


def _q4_1(b: Array) -> Parts:
    return Parts(_flat(_bits(b[..., 4:], 4, 16)), _f16(b[..., :2]), bias=_f16(b[..., 2:4]))


def _q5_0(b: Array) -> Parts:
    return Parts(_flat(_bits(b[..., 6:], 4, 16) | _fifth_bits(b[..., 2:6])), _f16(b[..., :2]))


def _q5_1(b: Array) -> Parts:
    codes = _bits(b[..., 8:], 4, 16) | _fifth_bits(b[..., 4:8])
    return Parts(_flat(codes), _f16(b[..., :2]), bias=_f16(b[..., 2:4]))


def _q8_0(b: Array) -> Parts:
    return Parts(_flat(b[..., 2:] ^ 0x80), _f16(b[..., :2]))


def _q2_k(b: Array) -> Parts:
    """16 groups of 16; a group's byte is its scale (low nibble) and what is subtracted (high nibble)."""
    scale, minimum = _flat(b[..., :16] & 15), _flat(b[..., :16] >> 4)
    return Parts(_flat(_bits(b[..., 16:80], 2, 32)), scale, _f16(b[..., 80:82]), minimum, -_f16(b[..., 82:84]))


def _q3_k(b: Array) -> Parts:
    """16 groups of 16; scales of 6 bits, 32 too large: eight bytes of low nibbles, then four of high bits."""
    codes = _bits(b[..., 32:96], 2, 32) | (_bits(b[..., :32], 1, 32) << 2)
    scale = _bits(b[..., 96:104], 4, 8) | (_bits(b[..., 104:108], 2, 4) << 4)
    return Parts(_flat(codes), _flat(scale).view(np.int8) - np.int8(32), _f16(b[..., 108:110]))


def _six_bit_pairs(packed: Array) -> tuple[Array, Array]:
    """Q4_K's and Q5_K's 12 bytes: 8 scales and 8 minimums of 6 bits (`get_scale_min_k4` of ggml-quants.c)."""
    first, second, rest = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scale = np.concatenate([first & 63, (rest & 15) | ((first >> 2) & 0x30)], axis=-1)
    minimum = np.concatenate([second & 63, (rest >> 4) | ((second >> 2) & 0x30)], axis=-1)
    return _flat(scale), _flat(minimum)


def _q4_k(b: Array) -> Parts:
    """8 groups of 32."""
    scale, minimum = _six_bit_pairs(b[..., 4:16])
    return Parts(_flat(_bits(b[..., 16:], 4, 32)), scale, _f16(b[..., :2]), minimum, -_f16(b[..., 2:4]))


def _q5_k(b: Array) -> Parts:
    """8 groups of 32."""
    scale, minimum = _six_bit_pairs(b[..., 4:16])
    codes = _bits(b[..., 48:], 4, 32) | (_bits(b[..., 16:48], 1, 32) << 4)
    return Parts(_flat(codes), scale, _f16(b[..., :2]), minimum, -_f16(b[..., 2:4]))


def _q6_k(b: Array) -> Parts:
    """16 groups of 16; scales are signed bytes."""
    codes = _bits(b[..., :128], 4, 64) | (_bits(b[..., 128:192], 2, 32) << 4)
    return Parts(_flat(codes), _flat(b[..., 192:208]).view(np.int8), _f16(b[..., 208:210]))


def _iq4_nl(b: Array) -> Parts:
    return _q4_0(b)


def _iq4_xs(b: Array) -> Parts:
    """8 groups of 32; scales of 6 bits, 32 too large: the high bits (2 bytes), then the low nibbles (4 bytes)."""
    scale = _bits(b[..., 4:8], 4, 1) | (_bits(b[..., 2:4], 2, 1) << 4)
    return Parts(_flat(_bits(b[..., 8:], 4, 16)), _flat(scale).view(np.int8) - np.int8(32), _f16(b[..., :2]))


def _mxfp4(b: Array) -> Parts:
    return Parts(_flat(_bits(b[..., 1:], 4, 16)), half_powers(b[..., 0]))


def half_powers(exponents: Array) -> Array:
    """Half of the powers of two 2**(e - 127), as bf16 bits: MXFP4's levels are doubled (`ggml_e8m0_to_fp32_half`)."""
    exponent = exponents.astype(np.uint16)
    half = np.where(exponent < 2, np.uint16(0x20) << exponent, (exponent - np.uint16(1)) << np.uint16(7))
    return half.astype(np.uint16)


TAKE_APART: dict[GGUFType, Callable[[Array], Parts]] = {
    GGUFType.Q4_0: _q4_0,
    GGUFType.Q4_1: _q4_1,
    GGUFType.Q5_0: _q5_0,
    GGUFType.Q5_1: _q5_1,
    GGUFType.Q8_0: _q8_0,
    GGUFType.Q2_K: _q2_k,
    GGUFType.Q3_K: _q3_k,
    GGUFType.Q4_K: _q4_k,
    GGUFType.Q5_K: _q5_k,
    GGUFType.Q6_K: _q6_k,
    GGUFType.IQ4_NL: _iq4_nl,
    GGUFType.IQ4_XS: _iq4_xs,
    GGUFType.MXFP4: _mxfp4,
}
"""Per type: blocks uint8 [rows, blocks, block bytes] -> their parts."""
