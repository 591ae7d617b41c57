"""The product of few rows with a quantized matrix, in one Triton kernel that reads the packed codes.

At decode a product reads every weight once and does little with it, so what counts is how many bytes that is: the
kernel unpacks codes and applies scales in registers. It knows every canonical form (see `QuantizedWeight`). One program
makes BLOCK_N outputs for up to ROWS rows. https://triton-lang.org; with TRITON_INTERPRET=1 it runs without a GPU.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false
# A kernel's constants are plain numbers to whoever calls it, and compile-time ones to the compiler.
from __future__ import annotations

import torch
import triton
import triton.language as tl

from swarmd.node.engine.backends.torch_packed import DeviceScales, PackedPart

ROWS = 16
"""The smallest size of a matrix product on tensor cores: up to so many rows cost the same."""
BLOCK_N = 32
BLOCK_K = 64


@triton.jit
def _number(values, supers, n, k, inside, groups, GROUP: tl.constexpr, PER_SUPER: tl.constexpr, TWO: tl.constexpr):  # noqa: N803
    """Scale or bias of outputs n and inputs k, fp32."""
    group = k // GROUP
    found = tl.load(values + n[:, None] * groups + group[None, :], mask=inside, other=0).to(tl.float32)
    if TWO:
        at = n[:, None] * (groups // PER_SUPER) + (group // PER_SUPER)[None, :]
        found = found * tl.load(supers + at, mask=inside, other=0).to(tl.float32)
    return found


@triton.jit
def _codes(q, n, k, inside, words, BITS: tl.constexpr):  # noqa: N803
    """The codes of outputs n and inputs k; one may begin in one word and end in the next."""
    begin = k * BITS
    word, shift = begin // 32, begin % 32
    at = q + n[:, None] * words + word[None, :]
    codes = tl.load(at, mask=inside, other=0).to(tl.uint32, bitcast=True) >> shift[None, :].to(tl.uint32)
    if 32 % BITS != 0:
        crosses = inside & (shift + BITS > 32)[None, :]
        rest = tl.load(at + 1, mask=crosses, other=0).to(tl.uint32, bitcast=True)
        left = tl.where(shift == 0, 0, 32 - shift).to(tl.uint32)
        codes = codes | tl.where(crosses, rest << left[None, :], 0)
    return codes & ((1 << BITS) - 1)


@triton.jit
def _product(
    x, q, scales, scale_supers, biases, bias_supers, codebook, y, rows, outputs, columns, words, groups, offset,
    BITS: tl.constexpr, GROUP: tl.constexpr, SCALE_PER: tl.constexpr, SCALE_TWO: tl.constexpr, BIASED: tl.constexpr,  # noqa: N803
    BIAS_PER: tl.constexpr, BIAS_TWO: tl.constexpr, CODEBOOK: tl.constexpr, EXACT: tl.constexpr, ROWS: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """y [rows, outputs] = x [rows, columns] times the matrix; EXACT in fp32, else bf16 with fp32 sums."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, ROWS)
    total = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for first in range(0, columns, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        inside = (n < outputs)[:, None] & (k < columns)[None, :]
        codes = _codes(q, n, k, inside, words, BITS)
        levels = tl.load(codebook + codes) if CODEBOOK else codes.to(tl.float32)
        scale = _number(scales, scale_supers, n, k, inside, groups, GROUP, SCALE_PER, SCALE_TWO)
        if BIASED:
            w = levels * scale + _number(biases, bias_supers, n, k, inside, groups, GROUP, BIAS_PER, BIAS_TWO)
        else:
            w = (levels - offset) * scale
        seen = (m < rows)[:, None] & (k < columns)[None, :]
        part = tl.load(x + m[:, None] * columns + k[None, :], mask=seen, other=0)
        if EXACT:
            total += tl.dot(w, tl.trans(part), input_precision="ieee")
        else:
            total += tl.dot(w.to(tl.bfloat16), tl.trans(part))
    at = m[None, :] * outputs + n[:, None]
    tl.store(y + at, total, mask=(n < outputs)[:, None] & (m < rows)[None, :])


def product(x: torch.Tensor, part: PackedPart) -> torch.Tensor:
    """x [n, columns], n <= ROWS, fp32 or bf16, times a part: fp32 [n, rows]."""
    y = torch.empty(len(x), part.rows, dtype=torch.float32, device=x.device)
    scale, bias = part.scale, part.bias if part.bias is not None else part.scale
    codebook = part.codebook if part.codebook is not None else y
    _product[(triton.cdiv(part.rows, BLOCK_N),)](
        *(x.contiguous(), part.q, scale.values, _supers(scale), bias.values, _supers(bias), codebook, y),
        *(len(x), part.rows, part.columns, part.q.shape[1], scale.values.shape[1], part.offset),
        BITS=part.bits,
        GROUP=part.group_size,
        SCALE_PER=scale.per_super,
        SCALE_TWO=scale.supers is not None,
        BIASED=part.bias is not None,
        BIAS_PER=bias.per_super,
        BIAS_TWO=bias.supers is not None,
        CODEBOOK=part.codebook is not None,
        EXACT=x.dtype is torch.float32,
        ROWS=ROWS,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
    )
    return y


def _supers(scales: DeviceScales) -> torch.Tensor:
    """A pointer for the kernel, also where it is not read."""
    return scales.values if scales.supers is None else scales.supers
