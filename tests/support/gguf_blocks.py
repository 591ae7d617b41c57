"""Random blocks of GGUF's quantized types: every code occurs, scales are what the test wants."""

from __future__ import annotations

import gguf
import numpy as np

from swarmd.node.engine.gguf_blocks import MXFP4_NAN
from swarmd.node.models.gguf_types import GGUF_BLOCK, GGUFType

FLOATS_AT = {
    **dict.fromkeys((GGUFType.Q4_1, GGUFType.Q5_1, GGUFType.Q4_K, GGUFType.Q5_K), (0, 2)),
    GGUFType.Q2_K: (80, 82),
    GGUFType.Q3_K: (108,),
    GGUFType.Q6_K: (208,),
    GGUFType.MXFP4: (),
}
"""Where a block has its fp16 numbers; at its start if not said otherwise (ggml-common.h)."""
MIDDLE = {GGUFType.Q4_1: -7.5, GGUFType.Q5_1: -15.5, GGUFType.Q4_K: 7.5, GGUFType.Q5_K: 15.5, GGUFType.Q2_K: 1.5}
"""The second number of a block, in units of the first, by which its values have a mean of about 0."""


def random_blocks(kind: GGUFType, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Random bytes, with finite fp16 scales of all magnitudes and both signs: uint8, flat."""
    random = np.random.default_rng(seed)
    blocks = _bytes(random, kind, rows, columns)
    for start in FLOATS_AT.get(kind, (0,)):
        numbers = random.integers(0, 0x7C00, (*blocks.shape[:2], 1), dtype=np.uint16)
        numbers |= random.integers(0, 2, numbers.shape, dtype=np.uint16) << 15
        blocks[..., start : start + 2] = numbers.view(np.uint8)
    if kind is GGUFType.MXFP4:
        blocks[..., 0] = random.integers(0, MXFP4_NAN, blocks.shape[:2])
    return blocks.reshape(-1)


def weight_blocks(kind: GGUFType, rows: int, columns: int, deviation: float, seed: int = 0) -> np.ndarray:
    """Random blocks whose values are like a weight's, of about the given standard deviation: uint8, flat."""
    random = np.random.default_rng(seed)
    blocks = _bytes(random, kind, rows, columns)
    if kind is GGUFType.MXFP4:
        blocks[..., 0] = random.integers(125, 128, blocks.shape[:2]) + round(np.log2(deviation / 3))
        return blocks.reshape(-1)
    signs = random.choice([-1.0, 1.0], (*blocks.shape[:2], 1))
    scale = 2.0**-10
    for _ in range(2):  # with any scale, and with the right one
        for start, unit in zip(FLOATS_AT.get(kind, (0,)), (1.0, MIDDLE.get(kind, 0.0)), strict=False):
            blocks[..., start : start + 2] = (signs * scale * unit).astype("<f2").view(np.uint8)
        values = gguf.dequantize(blocks.reshape(rows, -1), gguf.GGMLQuantizationType(int(kind)))
        scale *= deviation / float(values.std())
    return blocks.reshape(-1)


def _bytes(random: np.random.Generator, kind: GGUFType, rows: int, columns: int) -> np.ndarray:
    elements, nbytes = GGUF_BLOCK[kind]
    return random.integers(0, 256, (rows, columns // elements, nbytes), dtype=np.uint8)
