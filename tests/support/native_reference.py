"""Rotary embedding, attention and gating in float64, as the native stage should compute them, with error bounds.

Inputs of +1 and -1, matrices of multiples of 1/64: with eps 0 the norm leaves such rows as they are and a product's sum
is exact in fp32, so that what a test sees is the error of the operation behind them alone.
"""

from __future__ import annotations

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


def rotated(heads: np.ndarray, positions: np.ndarray, frequencies: np.ndarray) -> Product:
    """Rotate-half of [rows, heads, head_dim]; an angle is position * frequency, rounded to fp32 as the product is.

    Four roundings for each element: cosine and sine (2 ulp of the C library), two products, a sum.
    """
    half = heads.shape[-1] // 2
    angles = (positions.astype(np.float32)[:, None] * frequencies.astype(np.float32)).astype(np.float64)[:, None, :]
    a, b = heads[..., :half].astype(np.float64), heads[..., half : 2 * half].astype(np.float64)
    cos, sin = np.cos(angles), np.sin(angles)
    value = np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    bound = 8 * U * np.concatenate([np.abs(a) + np.abs(b)] * 2, -1)
    return Product(value, bound)


def attended(q: Product, keys: np.ndarray, values: np.ndarray) -> Product:
    """softmax(q k / sqrt(head_dim)) v of one query head [head_dim] over keys and values [n, head_dim] as cached.

    A score of d terms is off by delta = (d + 4) u sum|q k| / sqrt(d), the query's own error, and the rounding of s -
    largest; a weight e^s is then off by the factor e^(2 delta) and by its own 8 u, and a sum over n keys by n u.
    """
    n, d = keys.shape
    k, v = keys.astype(np.float64), values.astype(np.float64)
    scores = k @ q.value / np.sqrt(d)
    sizes = np.abs(k) @ (np.abs(q.value) * (d + 4) * U + q.bound) / np.sqrt(d)
    delta = sizes.max() + 2 * U * np.abs(scores).max()
    weights = np.exp(scores - scores.max())
    weights /= weights.sum()
    # n*u for the sum of weights, and n*u for the sum of weighted values.
    return Product(weights @ v, (np.expm1(2 * delta) + (2 * n + 16) * U) * (weights @ np.abs(v)))


def gated(gate: np.ndarray, up: np.ndarray) -> Product:
    """silu(gate) * up; e^x is good to 4 u and a rounding of its argument, the rest are single roundings."""
    g, u = gate.astype(np.float64), up.astype(np.float64)
    value = g / (1 + np.exp(-g)) * u
    return Product(value, (16 + np.abs(g)) * U * np.abs(value))
