"""References in float64 for the native kernels, and what each may differ from them by.

u = 2**-24 is half an fp32 ulp, relative. A sum of n terms in fp32, in any order, is off by at most about n * u times
the sum of the terms' absolute values (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from swarmd.node.engine.cpu import bindings as library
from swarmd.node.engine.quantized import DenseWeight, FloatType, QuantizedWeight, Scales, Weight, pack

U = 2.0**-24
GROUP = 32
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


def quantized_weight(rng: np.random.Generator, bits: int, rows: int, columns: int, *, biased: bool) -> QuantizedWeight:
    """Random codes, all values among them, with fp16 scales of either sign and fp16 biases."""
    codes = rng.integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
    shape = (rows, columns // GROUP)
    scale = (rng.uniform(0.2, 1, shape) * rng.choice([-1, 1], shape) / (1 << bits)).astype(np.float16)
    bias = Scales(rng.normal(0, 0.5, shape).astype(np.float16)) if biased else None
    return QuantizedWeight(bits, GROUP, pack(codes, bits), Scales(scale), bias)


def dense_weight(rng: np.random.Generator, kind: FloatType, rows: int, columns: int) -> DenseWeight:
    """Random values as a file of this type stores them."""
    values = rng.normal(0, 1, (rows, columns)).astype(np.float32)
    if kind == "bf16":
        return DenseWeight((values.view(np.uint32) >> 16).astype(np.uint16), kind)
    return DenseWeight(values.astype(np.float16 if kind == "f16" else np.float32), kind)


def exact_parts(weight: QuantizedWeight) -> tuple[np.ndarray, np.ndarray]:
    """The two summands of each weight, code * scale and bias: float64 [rows, columns], no rounding."""
    codes = weight.codes().reshape(weight.rows, -1, GROUP).astype(np.float64)
    scale = weight.scale.expand().astype(np.float64)[..., None]
    bias = (
        -(2.0 ** (weight.bits - 1)) * scale
        if weight.bias is None
        else weight.bias.expand().astype(np.float64)[..., None]
    )
    shape = (weight.rows, weight.columns)
    return (codes * scale).reshape(shape), np.broadcast_to(bias, codes.shape).reshape(shape)


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

    Each of a row's G groups adds scale*s*(codes . q), maybe twice, and bias*s*sum(q), whose integers are exact and
    whose factors are rounded up to 4 times: 3G + 4 in all. Dense: one term a column, no quantization.
    """
    values = exact_values(weight)
    if isinstance(weight, DenseWeight):
        sizes = np.abs(x.astype(np.float64)) @ np.abs(values).T
        return Product(x.astype(np.float64) @ values.T, (weight.columns + 2) * U * sizes)
    seen, unsure = quantized_activations(x)
    scaled, biases = exact_parts(weight)
    sizes = np.abs(seen) @ (np.abs(scaled) + np.abs(biases)).T
    otherwise = unsure @ np.abs(values).reshape(weight.rows, -1, GROUP).sum(-1).T
    return Product(seen @ values.T, (3 * weight.scale.values.shape[1] + 4) * U * sizes + otherwise)


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
