"""Products with quantized matrices by Triton kernels that read the packed codes; see `QuantizedWeight` for the forms.

At decode a product reads every weight once and does little with it, so what counts is how many bytes that is: `product`
and `chosen_product` unpack codes and apply scales in registers. For many rows `values` writes what cuBLAS then
multiplies. https://triton-lang.org; with TRITON_INTERPRET=1 all of it runs without a GPU.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false
# A kernel's constants are plain numbers to whoever calls it, and compile-time ones to the compiler.
# ruff: noqa: N803
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from swarmd.node.engine.backends.torch_packed import DeviceScales, PackedPart, Part

ROWS = 16
"""The smallest size of a matrix product on tensor cores: up to so many rows cost the same."""
BLOCK_N = 32
BLOCK_K = 64


@triton.jit
def _number(values, supers, n, k, inside, groups, GROUP: tl.constexpr, PER_SUPER: tl.constexpr, TWO: tl.constexpr):
    """Scale or bias of rows n and columns k, fp32."""
    group = k // GROUP
    found = tl.load(values + n[:, None] * groups + group[None, :], mask=inside, other=0).to(tl.float32)
    if TWO:
        at = n[:, None] * (groups // PER_SUPER) + (group // PER_SUPER)[None, :]
        found = found * tl.load(supers + at, mask=inside, other=0).to(tl.float32)
    return found


@triton.jit
def _codes(q, n, k, inside, words, BITS: tl.constexpr):
    """The codes of rows n and columns k; one may begin in one word and end in the next."""
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
def _weights(
    q, scales, scale_supers, biases, bias_supers, codebook, n, k, inside, words, groups, offset,
    BITS: tl.constexpr, GROUP: tl.constexpr, SCALE_PER: tl.constexpr, SCALE_TWO: tl.constexpr, BIASED: tl.constexpr,
    BIAS_PER: tl.constexpr, BIAS_TWO: tl.constexpr, CODEBOOK: tl.constexpr,
):  # fmt: skip
    """Rows n (int64) and columns k of the matrix, fp32; 0 bits: floats as they are."""
    if BITS == 0:
        w = tl.load(q + n[:, None] * words + k[None, :], mask=inside, other=0).to(tl.float32)
    else:
        codes = _codes(q, n, k, inside, words, BITS)
        levels = tl.load(codebook + codes) if CODEBOOK else codes.to(tl.float32)
        scale = _number(scales, scale_supers, n, k, inside, groups, GROUP, SCALE_PER, SCALE_TWO)
        if BIASED:
            w = levels * scale + _number(biases, bias_supers, n, k, inside, groups, GROUP, BIAS_PER, BIAS_TWO)
        else:
            w = (levels - offset) * scale
    return w


@triton.jit
def multiply(
    x, chosen, y, rows, outputs, columns, per_row,
    q, scales, scale_supers, biases, bias_supers, codebook, words, groups, offset,
    BITS: tl.constexpr, GROUP: tl.constexpr, SCALE_PER: tl.constexpr, SCALE_TWO: tl.constexpr, BIASED: tl.constexpr,
    BIAS_PER: tl.constexpr, BIAS_TWO: tl.constexpr, CODEBOOK: tl.constexpr, EXACT: tl.constexpr,
    GATHERED: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y [rows, outputs] = x [rows, columns] times the matrix; EXACT in fp32, else bf16 with fp32 sums.

    GATHERED: the matrix is that of many experts below each other, and program (_, i) makes row i of y, of row
    i // per_row of x and of expert chosen[i].
    """
    local = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = local.to(tl.int64)
    if GATHERED:
        pair = tl.program_id(1)
        n += tl.load(chosen + pair).to(tl.int64) * outputs
        x += (pair // per_row).to(tl.int64) * columns
        y += pair.to(tl.int64) * outputs
    m = tl.arange(0, ROWS)
    total = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for first in range(0, columns, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        inside = (local < outputs)[:, None] & (k < columns)[None, :]
        w = _weights(
            q, scales, scale_supers, biases, bias_supers, codebook, n, k, inside, words, groups, offset,
            BITS, GROUP, SCALE_PER, SCALE_TWO, BIASED, BIAS_PER, BIAS_TWO, CODEBOOK,
        )  # fmt: skip
        seen = (m < rows)[:, None] & (k < columns)[None, :]
        part = tl.load(x + m[:, None] * columns + k[None, :], mask=seen, other=0)
        if EXACT:
            total += tl.dot(w, tl.trans(part), input_precision="ieee")
        else:
            total += tl.dot(w.to(tl.bfloat16), tl.trans(part))
    at = m[None, :] * outputs + local[:, None]
    tl.store(y + at, total, mask=(local < outputs)[:, None] & (m < rows)[None, :])


@triton.jit
def dequantize(
    y, first, rows, columns,
    q, scales, scale_supers, biases, bias_supers, codebook, words, groups, offset,
    BITS: tl.constexpr, GROUP: tl.constexpr, SCALE_PER: tl.constexpr, SCALE_TWO: tl.constexpr, BIASED: tl.constexpr,
    BIAS_PER: tl.constexpr, BIAS_TWO: tl.constexpr, CODEBOOK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y [rows, columns] = rows of the matrix from `first` on, in the type of y."""
    local = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (local < rows)[:, None] & (k < columns)[None, :]
    w = _weights(
        q, scales, scale_supers, biases, bias_supers, codebook, first + local, k, inside, words, groups, offset,
        BITS, GROUP, SCALE_PER, SCALE_TWO, BIASED, BIAS_PER, BIAS_TWO, CODEBOOK,
    )  # fmt: skip
    tl.store(y + local[:, None] * columns + k[None, :], w.to(y.dtype.element_ty), mask=inside)


def product(x: torch.Tensor, part: Part) -> torch.Tensor:
    """x [n, columns], n <= ROWS, fp32 or bf16, times a part: fp32 [n, rows]."""
    y = torch.empty(len(x), part.rows, dtype=torch.float32, device=x.device)
    arguments, form = _matrix(part)
    multiply[(triton.cdiv(part.rows, BLOCK_N),)](
        *(x.contiguous(), x, y, len(x), part.rows, part.columns, 1, *arguments),
        **(form | {"EXACT": x.dtype is torch.float32, "GATHERED": False} | BLOCKS),
        ROWS=ROWS,
    )
    return y


def chosen_product(x: torch.Tensor, part: Part, chosen: torch.Tensor, experts: int) -> torch.Tensor:
    """Each row of x [n, columns] times the matrices of the experts that it chose: fp32 [len(chosen), rows / experts].

    `part` holds the matrices of all experts below each other; `chosen` [n * experts per row] are their numbers.
    """
    outputs = part.rows // experts
    y = torch.empty(len(chosen), outputs, dtype=torch.float32, device=x.device)
    arguments, form = _matrix(part)
    multiply[(triton.cdiv(outputs, BLOCK_N), len(chosen))](
        *(x.contiguous(), chosen, y, 1, outputs, part.columns, len(chosen) // len(x), *arguments),
        **(form | {"EXACT": x.dtype is torch.float32, "GATHERED": True} | BLOCKS),
        ROWS=ROWS,
    )
    return y


def values(part: PackedPart, begin: int, end: int, kind: torch.dtype) -> torch.Tensor:
    """Rows [begin, end) of a part, rounded once more to `kind`."""
    y = torch.empty(end - begin, part.columns, dtype=kind, device=part.q.device)
    arguments, form = _matrix(part)
    grid = (triton.cdiv(end - begin, BLOCK_N), triton.cdiv(part.columns, BLOCK_K))
    dequantize[grid](y, begin, end - begin, part.columns, *arguments, **form, **BLOCKS)
    return y


BLOCKS = {"BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K}


def _matrix(part: Part) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the kernels need to know of a matrix: arguments and constants. Pointers that are not read are any tensor."""
    if not isinstance(part, PackedPart):
        w = part.weights
        form = {"BITS": 0, "GROUP": 32, "SCALE_PER": 1, "SCALE_TWO": False, "BIASED": False, "BIAS_PER": 1}
        return (w, w, w, w, w, w, part.columns, 1, 0), form | {"BIAS_TWO": False, "CODEBOOK": False}
    scale, bias = part.scale, part.bias if part.bias is not None else part.scale
    codebook = part.codebook if part.codebook is not None else part.q
    numbers = (part.q.shape[1], scale.values.shape[1], part.offset)
    return (part.q, scale.values, _supers(scale), bias.values, _supers(bias), codebook, *numbers), {
        "BITS": part.bits,
        "GROUP": part.group_size,
        "SCALE_PER": scale.per_super,
        "SCALE_TWO": scale.supers is not None,
        "BIASED": part.bias is not None,
        "BIAS_PER": bias.per_super,
        "BIAS_TWO": bias.supers is not None,
        "CODEBOOK": part.codebook is not None,
    }


def _supers(scales: DeviceScales) -> torch.Tensor:
    return scales.values if scales.supers is None else scales.supers
