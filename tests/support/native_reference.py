"""Rotary embedding, attention and gating in float64, as the native stage should compute them, with error bounds.

Inputs of +1 and -1, matrices of multiples of 1/64: with eps 0 the norm leaves such rows as they are and a product's sum
is exact in fp32, so that what a test sees is the error of the operation behind them alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from support.native_kernels import Product, U

HALF = 2.0**-11
"""Half an fp16 ulp, relative."""


def signs(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Rows of +1 and -1."""
    return rng.choice([-1.0, 1.0], (rows, columns)).astype(np.float32)


def sixty_fourths(rng: np.random.Generator, rows: int, columns: int, largest: float = 1.0) -> np.ndarray:
    """Multiples of 1/64 in [-largest, largest]; float32."""
    most = int(64 * largest)
    return (rng.integers(-most, most + 1, (rows, columns)) / 64).astype(np.float32)


def normed(x: np.ndarray, bound: np.ndarray, weight: np.ndarray, eps: float) -> Product:
    """RMS norm along the last axis of numbers off by `bound`; n/2 roundings for the sum of n squares, then six.

    An error of the input is scaled by the factor, and once more through the root mean square, which it moves by at most
    its own.
    """
    n, exact = x.shape[-1], x.astype(np.float64)
    factor = 1 / np.sqrt((exact**2).mean(-1, keepdims=True) + np.float64(np.float32(eps)))
    value = exact * factor * weight
    moved = np.sqrt((bound**2).mean(-1, keepdims=True)) * factor
    return Product(value, (n / 2 + 6) * U * np.abs(value) + bound * factor * np.abs(weight) + moved * np.abs(value))


def rotated(
    heads: np.ndarray,
    positions: np.ndarray,
    frequencies: np.ndarray,
    magnitude: float = 1.0,
    bound: np.ndarray | float = 0.0,
) -> Product:
    """Rotate-half of [rows, heads, head_dim], of which the first 2 * frequencies dimensions turn; an angle is position
    * frequency, rounded to fp32 as the product is.

    Five roundings for each element: cosine and sine (2 ulp of the C library) and their magnitude, two products, a sum;
    what the input is off by (`bound`) turns along.
    """
    half = len(frequencies)
    angles = (positions.astype(np.float32)[:, None] * frequencies.astype(np.float32)).astype(np.float64)[:, None, :]
    a, b = heads[..., :half].astype(np.float64), heads[..., half : 2 * half].astype(np.float64)
    rest = heads[..., 2 * half :].astype(np.float64)
    off = np.broadcast_to(bound, heads.shape)
    turned = magnitude * (off[..., :half] + off[..., half : 2 * half])
    cos, sin = np.cos(angles) * np.float64(np.float32(magnitude)), np.sin(angles) * np.float64(np.float32(magnitude))
    value = np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)
    rounding = 10 * U * magnitude * (np.abs(a) + np.abs(b)) + turned
    return Product(value, np.concatenate([rounding, rounding, off[..., 2 * half :]], -1))


@dataclass(frozen=True)
class Scoring:
    """How queries and keys make scores; see `AttentionShape`. `scale` None is 1 / sqrt(head_dim)."""

    scale: float | None = None
    softcap: float | None = None
    sink: float | None = None


def attended(q: Product, keys: np.ndarray, values: np.ndarray, how: Scoring = Scoring()) -> Product:
    """softmax(softcap(q k * scale)) v of one query head [head_dim] over keys and values [n, head_dim] as cached.

    A score of d terms is off by delta = (d + 4) u sum|q k| scale, the query's own error, and the rounding of s -
    largest; a weight e^s is then off by the factor e^(2 delta) and by its own 8 u, and a sum over n keys by n u. A soft
    cap adds 16 u of the cap (its tanh is 1 - 2 / (e^2x + 1)) and the error of its exponent; it makes no error larger.
    """
    n, d = keys.shape
    k, v = keys.astype(np.float64), values.astype(np.float64)
    scale = d**-0.5 if how.scale is None else float(np.float32(how.scale))
    scores = k @ q.value * scale
    delta = (np.abs(k) @ (np.abs(q.value) * (d + 4) * U + q.bound) * scale).max()
    if how.softcap is not None:
        delta += 16 * U * how.softcap + 2 * U * np.abs(scores).max()
        scores = how.softcap * np.tanh(scores / how.softcap)
    logits = scores if how.sink is None else np.append(scores, how.sink)
    delta += 2 * U * np.abs(logits).max()
    weights = np.exp(logits - logits.max())
    weights = (weights / weights.sum())[:n]
    # n*u for the sum of weights, and n*u for the sum of weighted values.
    return Product(weights @ v, (np.expm1(2 * delta) + (2 * n + 16) * U) * (weights @ np.abs(v)))


def gated_by_gelu(gate: np.ndarray, up: np.ndarray) -> Product:
    """gelu_tanh(gate) * up as g / (1 + e^-2y), y = sqrt(2/pi) (g + 0.044715 g^3): five roundings of y."""
    g, u = gate.astype(np.float64), up.astype(np.float64)
    y = 2 * np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)
    # Above 88 the exponent is cut; what is left is below the smallest normal fp32.
    value = g / (1 + np.exp(np.minimum(-y, 700))) * u
    return Product(value, (16 + 6 * np.abs(y)) * U * np.abs(value) + 1e-36)


def gated_by_clamped_swiglu(gate: np.ndarray, up: np.ndarray) -> Product:
    """gpt-oss' g sigmoid(1.702 g) (u + 1); as with silu, 1.702 g is rounded once more."""
    g, u = np.minimum(gate, 7.0).astype(np.float64), np.clip(up, -7.0, 7.0).astype(np.float64)
    value = g / (1 + np.exp(np.minimum(-1.702 * g, 700))) * (u + 1)
    return Product(value, (20 + 4 * np.abs(g)) * U * np.abs(value) + 1e-36)


def gated(gate: np.ndarray, up: np.ndarray) -> Product:
    """silu(gate) * up; e^x is good to 4 u and a rounding of its argument, the rest are single roundings."""
    g, u = gate.astype(np.float64), up.astype(np.float64)
    value = g / (1 + np.exp(-g)) * u
    return Product(value, (16 + np.abs(g)) * U * np.abs(value))
