"""References in float64 for the native kernels, and what each may differ from them by.

u = 2**-24 is half an fp32 ulp, relative. A sum of n terms in fp32, in any order, is off by at most about n * u times
the sum of the terms' absolute values (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from swarmd.node.engine.cpu import bindings as library
from swarmd.node.engine.quantized import DenseWeight, FloatType, QuantizedWeight, Scales, Weight, pack

U = 2.0**-24
GROUP = 32
"""Columns of activations that share a scale."""
BITS = (2, 3, 4, 5, 6, 8)
DENSE: tuple[FloatType, ...] = ("f32", "f16", "bf16")
ISAS = ("portable", "avx2", "avx512-vnni", "neon-dotprod")


def machine_isas() -> list[str]:
    """Every code path that this machine and build can take; none without the library."""
    try:
        best = library.isa()
        found = [name for name in ISAS if library.select(name)]
        library.select(best)
        return found
    except library.NativeMissing:
        return []


@dataclass(frozen=True)
class Form:
    """A quantized form: kinds as `Scales` has them, `bias` "" where implied; with `table` codes stand for levels."""

    bits: int
    group_size: int = 32
    scale: str = "f16"
    bias: str = ""
    per_super: int = 8
    offset: int = -1
    table: bool = False

    @property
    def unit(self) -> int:
        """Columns come in multiples of this."""
        two_levels = "*" in self.scale + self.bias
        return math.lcm(GROUP, self.group_size * (self.per_super if two_levels else 1))


FORMS = {
    "Q4_0": Form(4),
    "Q5_1": Form(5, bias="f16"),
    "Q2_K": Form(2, 16, "u8*f16", "u8*f16", 16),
    "Q3_K": Form(3, 16, "i8*f16", per_super=16),
    "Q4_K": Form(4, 32, "u8*f16", "u8*f16"),
    "Q5_K": Form(5, 32, "u8*f16", "u8*f16"),
    "Q6_K": Form(6, 16, "i8*f16", per_super=16),
    "IQ4_NL": Form(4, offset=128, table=True),
    "IQ4_XS": Form(4, 32, "i8*f16", offset=128, table=True),
    "MXFP4": Form(4, 32, "bf16", offset=12, table=True),
    "MLX 2 bits": Form(2, 64, "bf16", "bf16"),
    "MLX 3 bits": Form(3, 128, "f16", "f16"),
    "MLX 4 bits": Form(4, 64, "f16", "f16"),
    "MLX 5 bits": Form(5, 32, "bf16", "bf16"),
    "MLX 6 bits": Form(6, 64, "f32", "f32"),
    "MLX 8 bits": Form(8, 128, "bf16", "bf16"),
    "AWQ": Form(4, 128, "f16", "f32"),
    "GPTQ": Form(4, 128, "f32"),
    "8 bits, halves": Form(8, 16, "f32", "i8*f16", 3, 200),
    "4 bits, halves": Form(4, 16, "u8*f16", per_super=1, offset=0),
    "5 bits, halves": Form(5, 16, "bf16", "f16"),
    "levels, halves": Form(4, 16, "f32", "bf16", table=True),
    "2 bits, levels": Form(2, 64, "i8*f16", per_super=2, offset=77, table=True),
    "6 bits, levels": Form(6, 32, "f16", "f32", table=True),
}
"""Those of GGUF, MLX and others by name, and such as no format has today."""


def scales_of(rng: np.random.Generator, kind: str, rows: int, groups: int, per_super: int, size: float) -> Scales:
    """Random ones of a kind, of either sign, of about this size; small integers take all their values."""
    if "*" not in kind:
        values = (rng.uniform(0.2, 1, (rows, groups)) * rng.choice([-1, 1], (rows, groups)) * size).astype(np.float32)
        if kind == "bf16":
            return Scales((values.view(np.uint32) >> 16).astype(np.uint16))
        return Scales(values.astype(np.float16 if kind == "f16" else np.float32))
    small = np.iinfo(np.int8 if kind == "i8*f16" else np.uint8)
    values = rng.integers(small.min, small.max, (rows, groups), small.dtype, endpoint=True)
    return Scales(values, scales_of(rng, "f16", rows, groups // per_super, 1, size / 128).values)


def weight_of(rng: np.random.Generator, form: Form, rows: int, columns: int) -> QuantizedWeight:
    """Random codes, all values among them, with random scales and biases, of weights that are about 1."""
    groups, levels = columns // form.group_size, 1 << form.bits
    codes = rng.integers(0, levels, (rows, columns), dtype=np.uint8)
    table = rng.permutation(256)[:levels].astype(np.uint8) if form.table else None
    scale = scales_of(rng, form.scale, rows, groups, form.per_super, 1 / (256 if form.table else levels))
    bias = scales_of(rng, form.bias, rows, groups, form.per_super, 0.5) if form.bias else None
    return QuantizedWeight(form.bits, form.group_size, pack(codes, form.bits), scale, bias, table, form.offset)


def quantized_weight(rng: np.random.Generator, bits: int, rows: int, columns: int, *, biased: bool) -> QuantizedWeight:
    """In groups of 32 with fp16 scales, and fp16 biases or the implied ones."""
    return weight_of(rng, Form(bits, bias="f16" if biased else ""), rows, columns)


def dense_weight(rng: np.random.Generator, kind: FloatType, rows: int, columns: int) -> DenseWeight:
    """Random values as a file of this type stores them."""
    values = rng.normal(0, 1, (rows, columns)).astype(np.float32)
    if kind == "bf16":
        return DenseWeight((values.view(np.uint32) >> 16).astype(np.uint16), kind)
    return DenseWeight(values.astype(np.float16 if kind == "f16" else np.float32), kind)


def exact_parts(weight: QuantizedWeight) -> tuple[np.ndarray, np.ndarray]:
    """The two summands of each weight, level * scale and bias: float64 [rows, columns], no rounding."""
    levels = weight.levels().reshape(weight.rows, -1, weight.group_size).astype(np.float64)
    scale = weight.scale.expand().astype(np.float64)[..., None]
    bias = -float(weight.offset) * scale if weight.bias is None else weight.bias.expand().astype(np.float64)[..., None]
    shape = (weight.rows, weight.columns)
    return (levels * scale).reshape(shape), np.broadcast_to(bias, levels.shape).reshape(shape)


def exact_values(weight: Weight) -> np.ndarray:
    """The weights that the canonical form stands for: float64 [rows, columns], no rounding."""
    if isinstance(weight, DenseWeight):
        return weight.dequantize().astype(np.float64)
    return np.add(*exact_parts(weight))


STANDS_OUT = 5.0
"""A group whose largest value is so many times its row's root mean square has fine codes (native/rows.inl)."""


def _encoded(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(codes, scale) of fp32 groups [..., 32]: code = round(x * (127 / largest)), scale = largest / 127, in fp32."""
    largest = np.abs(groups).max(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        inverse = np.where(largest > 0, np.float32(127) / largest, np.float32(0)).astype(np.float32)
    return np.rint(groups * inverse), largest / np.float32(127)


def quantized_activations(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x [rows, columns] as the kernels see it, float64; and, per group [rows, groups], by how much they may see it
    otherwise, because rounding decides whether it stands out.
    """
    groups = x.astype(np.float32).reshape(len(x), -1, GROUP)
    codes, scale = _encoded(groups)
    seen = codes.astype(np.float64) * scale
    fine_codes, fine_scale = _encoded(groups - codes * scale)
    ratio = np.abs(groups).max(-1) / np.maximum(np.sqrt(np.square(x, dtype=np.float64).mean(-1)), 1e-300)[:, None]
    finer = np.where((ratio > STANDS_OUT)[..., None], fine_codes.astype(np.float64) * fine_scale, 0)
    unsure = np.where(np.abs(ratio - STANDS_OUT) < 1e-3, np.abs(groups).max(-1) / 254, 0)
    return (seen + finer).reshape(x.shape), unsure


@dataclass(frozen=True)
class Product:
    """x @ w.T in float64, and by how much a kernel's result may differ from it, element by element."""

    value: np.ndarray
    bound: np.ndarray


def product_of_codes(x: np.ndarray, weight: Weight) -> Product:
    """The product with the activations as the kernel quantizes them: only fp32 rounding is left.

    Each of the G groups of activations adds s * sum(scale * (levels . q)), of one or two scales and maybe twice, and
    one or two bias * sum(x): at most 4 summands. Their integers are exact. What comes of them is rounded up to 4 times:
    a product with each of scale and s and the sum of two; an implied bias, and in sum(x) a product and two sums. That
    is 4G + 4 in all. Dense: one term a column, no quantization.
    """
    values = exact_values(weight)
    if isinstance(weight, DenseWeight):
        sizes = np.abs(x.astype(np.float64)) @ np.abs(values).T
        return Product(x.astype(np.float64) @ values.T, (weight.columns + 2) * U * sizes)
    seen, unsure = quantized_activations(x)
    scaled, biases = exact_parts(weight)
    sizes = np.abs(seen) @ (np.abs(scaled) + np.abs(biases)).T
    otherwise = unsure @ np.abs(values).reshape(weight.rows, -1, GROUP).sum(-1).T
    return Product(seen @ values.T, (4 * (weight.columns // GROUP) + 4) * U * sizes + otherwise)


def product_of_values(x: np.ndarray, weight: Weight) -> Product:
    """The true product. A code is off by half a step, amax/254, at most (and a trifle, since 127/amax and its product
    with x are rounded), so |error| <= sum over groups of amax_g/254 * sum |w|, besides the rounding above."""
    values = exact_values(weight)
    true = x.astype(np.float64) @ values.T
    rounding = product_of_codes(x, weight).bound
    if isinstance(weight, DenseWeight):
        return Product(true, rounding)
    amax = np.abs(x.astype(np.float64)).reshape(len(x), -1, GROUP).max(-1)
    sizes = np.abs(values).reshape(weight.rows, -1, GROUP).sum(-1)
    return Product(true, (amax * (1 / 254 + 4 * U)) @ sizes.T + rounding)


def exceeds(found: np.ndarray, expected: Product) -> float:
    """The worst error as a share of what is allowed: at most 1 is right. Where nothing is allowed, none may be."""
    error = np.abs(found.astype(np.float64) - expected.value)
    assert np.isfinite(error).all()
    return float((error / np.maximum(expected.bound, np.finfo(np.float64).tiny)).max(initial=0.0))
