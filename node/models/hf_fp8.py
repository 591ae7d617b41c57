"""Matrices of 8-bit floats with a scale for each block of 128 x 128 (DeepSeek-V3, arXiv:2412.19437, section 3.3).

X.weight is F8_E4M3 [rows, columns] (OCP 8-bit Floating Point 1.0, E4M3: no infinities, one NaN), X.weight_scale_inv F32
[row blocks, column blocks]; a value is the product of the two. It is kept as bf16, as `transformers` does when it
dequantizes: off by 2^-9 of itself at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from swarmd.node.engine.quantized import DenseWeight, Weight, WeightForm, f32_to_bf16
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.hf_names import Source
from swarmd.node.models.hf_packing import PlainPacking, rows_of
from swarmd.node.models.tensor_files import TensorFiles

MAX_BLOCK = 1 << 16
SLICE_ELEMENTS = 1 << 20
"""Values converted at a time, which bounds the temporaries."""


class Fp8Packing(PlainPacking):
    """See `Packing`. A matrix without scales is plain."""

    def __init__(self, described: Mapping[str, Any]) -> None:
        """Raises ModelFileError unless the scales are those of blocks."""
        blocks = described.get("weight_block_size")
        sizes = blocks if isinstance(blocks, list) else []
        if len(sizes) != 2 or not all(isinstance(n, int) and 0 < n <= MAX_BLOCK for n in sizes):
            raise ModelFileError(
                f"this model is quantized to fp8 with weight_block_size {blocks!r:.40}; two sizes are "
                "needed: one scale for a whole matrix is not supported"
            )
        self._block_rows, self._block_columns = sizes

    def parts(self, tensor: str, files: TensorFiles) -> tuple[str, ...]:
        """See `Packing`."""
        names = (tensor, _scale_name(tensor)) if _packed(tensor, files) else (tensor,)
        return tuple(name for name in names if name in files)

    def shape(self, source: Source, files: TensorFiles) -> tuple[int, ...]:
        """See `Packing`."""
        if _packed(source.tensor, files):
            shape = files.info(source.tensor).shape
            blocks = (-(-shape[-2] // self._block_rows), -(-shape[-1] // self._block_columns))
            scales = files.info(_scale_name(source.tensor)).shape
            if scales != (*shape[:-2], *blocks):
                raise ModelFileError(
                    f"tensor {_scale_name(source.tensor)!r} has shape {scales}; {(*shape[:-2], *blocks)} is needed"
                )
        return super().shape(source, files)

    def form(self, source: Source, files: TensorFiles) -> WeightForm:
        """See `Packing`."""
        return WeightForm("bf16") if _packed(source.tensor, files) else super().form(source, files)

    def read(self, source: Source, files: TensorFiles) -> Weight:
        """See `Packing`. Rounded to bf16."""
        if not _packed(source.tensor, files):
            return super().read(source, files)
        codes = rows_of(source, source.tensor, files)
        name = _scale_name(source.tensor)
        scales = files.read(name, source.expert, source.expert + 1)[0] if source.experts else files.read(name)
        numbers = source.first + np.arange(source.rows) * source.step
        out = np.empty(codes.shape, np.uint16)
        height = max(1, SLICE_ELEMENTS // max(1, codes.shape[1]))
        for top in range(0, len(codes), height):
            part = slice(top, top + height)
            wide = np.repeat(scales[numbers[part] // self._block_rows], self._block_columns, axis=1)
            out[part] = f32_to_bf16(_E4M3[codes[part]] * wide[:, : codes.shape[1]])
        return DenseWeight(out, "bf16")


def _scale_name(tensor: str) -> str:
    return f"{tensor}_scale_inv"


def _packed(tensor: str, files: TensorFiles) -> bool:
    return tensor in files and files.info(tensor).dtype == "F8_E4M3" and _scale_name(tensor) in files


def _e4m3_values() -> np.ndarray[Any, np.dtype[np.float32]]:
    """The value of each of the 256 codes: sign, 4 bits of exponent with bias 7, 3 bits of fraction."""
    codes = np.arange(256)
    exponent, fraction = (codes >> 3) & 15, codes & 7
    size = np.where(exponent == 0, fraction * 2.0**-9, (8 + fraction) * 2.0 ** (exponent - 10))
    size[(codes & 0x7F) == 0x7F] = np.nan
    return np.where(codes & 0x80, -size, size).astype(np.float32)


_E4M3 = _e4m3_values()
