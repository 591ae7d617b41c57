"""MXFP4: 32 numbers of 4 bits (E2M1) that share a power of two (OCP Microscaling Formats 1.0,
https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf), as gpt-oss' files hold it.

X_blocks is u8 [..., rows, groups, 16], two codes a byte, the lower one first; X_scales u8 [..., rows, groups] is the
exponent plus 127.
"""

from __future__ import annotations

import numpy as np

from swarmd.node.engine.gguf_codes import CODEBOOKS, half_powers
from swarmd.node.engine.quantized import Array, QuantizedWeight, Scales, Weight, WeightForm
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.gguf_types import GGUFType
from swarmd.node.models.hf_names import Source
from swarmd.node.models.hf_packing import PlainPacking, rows_of
from swarmd.node.models.tensor_files import TensorFiles

GROUP = 32
NOT_A_NUMBER = 255


def mxfp4_form() -> WeightForm:
    """The canonical form of such matrices."""
    return WeightForm(bits=4, group_size=GROUP, scale="bf16")


def mxfp4_weight(name: str, q: Array, exponents: Array) -> QuantizedWeight:
    """Codes as u32 [rows, columns/8] LSB-first and exponents u8 [rows, groups] -> canonical, exactly.

    Raises ModelFileError for an exponent that means "not a number".
    """
    if (exponents == NOT_A_NUMBER).any():
        raise ModelFileError(f"tensor {name!r} has a scale that is not a number; download it again")
    codebook, offset = CODEBOOKS[GGUFType.MXFP4]
    return QuantizedWeight(4, GROUP, q, Scales(half_powers(exponents)), None, codebook, offset)


class Mxfp4Packing(PlainPacking):
    """See `Packing`: gpt-oss' experts are so, all else is plain."""

    def parts(self, tensor: str, files: TensorFiles) -> tuple[str, ...]:
        """See `Packing`."""
        if f"{tensor}_blocks" not in files:
            return super().parts(tensor, files)
        return tuple(part for part in (f"{tensor}_blocks", f"{tensor}_scales") if part in files)

    def shape(self, source: Source, files: TensorFiles) -> tuple[int, ...]:
        """See `Packing`."""
        if f"{source.tensor}_blocks" not in files:
            return super().shape(source, files)
        blocks, scales = files.info(f"{source.tensor}_blocks"), files.info(f"{source.tensor}_scales")
        stacked = (source.experts,) if source.experts else ()
        shape = blocks.shape[len(stacked) :]
        if blocks.shape[: len(stacked)] != stacked or shape[2:] != (GROUP // 2,) or scales.shape != blocks.shape[:-1]:
            raise ModelFileError(
                f"tensor {blocks.name!r} has shape {blocks.shape} and its scales {scales.shape}; that is not MXFP4 of "
                f"{source.experts} experts"
            )
        return shape[0], shape[1] * GROUP

    def form(self, source: Source, files: TensorFiles) -> WeightForm:
        """See `Packing`."""
        return mxfp4_form() if f"{source.tensor}_blocks" in files else super().form(source, files)

    def read(self, source: Source, files: TensorFiles) -> Weight:
        """See `Packing`. Exact."""
        if f"{source.tensor}_blocks" not in files:
            return super().read(source, files)
        blocks = rows_of(source, f"{source.tensor}_blocks", files)
        q = np.ascontiguousarray(blocks).reshape(len(blocks), -1).view("<u4")
        return mxfp4_weight(source.tensor, q, rows_of(source, f"{source.tensor}_scales", files))
