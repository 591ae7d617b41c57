"""Rotary frequencies, from a `RopeSpec`. Pure numpy, in float32 as `transformers` computes them, so that equal formulas
give equal angles (modeling_rope_utils.py).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from swarmd.node.engine.spec import (
    FactorsScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeSpec,
    YarnScaling,
)

Frequencies = np.ndarray[Any, np.dtype[np.float32]]


def rope_table(rope: RopeSpec, context: int, factors: Frequencies | None = None) -> tuple[Frequencies, float]:
    """Radians per position of each rotated pair, float32 [dim / 2], and what cos and sin are multiplied by.

    `context` is the longest sequence to be served: LongRoPE chooses by it. `factors` is the tensor of `FactorsScaling`.
    """
    exponents = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    base = (np.float32(1) / np.float32(rope.theta) ** exponents).astype(np.float32)
    match rope.scaling:
        case None:
            return base, 1.0
        case LinearScaling(factor=factor):
            return base / np.float32(factor), 1.0
        case Llama3Scaling():
            return _llama3(base, rope.scaling), 1.0
        case YarnScaling():
            return _yarn(base, rope, rope.scaling)
        case LongRopeScaling():
            return _long_rope(base, rope.scaling, context)
        case FactorsScaling():
            assert factors is not None, "the file's factors come with the tensors"
            return (base / factors).astype(np.float32), 1.0


def _llama3(base: Frequencies, scaling: Llama3Scaling) -> Frequencies:
    wavelengths = 2 * np.pi / base
    smooth = (scaling.original_context / wavelengths - scaling.low_factor) / (scaling.high_factor - scaling.low_factor)
    blended = (1 - smooth) * base / scaling.factor + smooth * base
    low = wavelengths > scaling.original_context / scaling.low_factor
    high = wavelengths < scaling.original_context / scaling.high_factor
    return np.where(low, base / scaling.factor, np.where(high, base, blended)).astype(np.float32)


def _yarn(base: Frequencies, rope: RopeSpec, scaling: YarnScaling) -> tuple[Frequencies, float]:
    """Frequencies that turn often within the original context are kept, slow ones divided, a ramp between."""

    def dimension_of(turns: float) -> float:
        full_turns = scaling.original_context / (turns * 2 * math.pi)
        return rope.dim * math.log(full_turns) / (2 * math.log(rope.theta))

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(rope.dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    frequencies = base / np.float32(scaling.factor) * ramp + base * (1 - ramp)
    magnitude = scaling.magnitude if scaling.magnitude is not None else 0.1 * math.log(max(scaling.factor, 1.0)) + 1.0
    return frequencies.astype(np.float32), magnitude


def _long_rope(base: Frequencies, scaling: LongRopeScaling, context: int) -> tuple[Frequencies, float]:
    factors = scaling.long if context > scaling.original_context else scaling.short
    magnitude = scaling.magnitude
    if magnitude is None:
        grown = scaling.extension > 1
        magnitude = math.sqrt(1 + math.log(scaling.extension) / math.log(scaling.original_context)) if grown else 1.0
    return (base / np.array(factors, np.float32)).astype(np.float32), magnitude
