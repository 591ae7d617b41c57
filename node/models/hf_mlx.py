"""Matrices as MLX quantizes them: affine groups of 32, 64 or 128 with 2 to 8 bits, or MXFP4.

X.weight holds the codes, packed LSB-first into u32 along the row, X.scales and X.biases one number per group: the
canonical form as it is (`mlx.core.quantize`, https://ml-explore.github.io/mlx/build/html/python/ops.html). What
config.json calls "quantization" names group_size and bits, and others for single tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from swarmd.node.engine.quantized import BITS, GROUP_SIZES, QuantizedWeight, Scales, Weight, WeightForm
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.hf_mxfp4 import GROUP as MXFP4_GROUP
from swarmd.node.models.hf_mxfp4 import mxfp4_form, mxfp4_weight
from swarmd.node.models.hf_names import Source
from swarmd.node.models.hf_packing import FLOATS, PlainPacking, rows_of
from swarmd.node.models.tensor_files import TensorFiles


class _Way(NamedTuple):
    """How one matrix is quantized."""

    bits: int
    group_size: int
    mode: str


class MlxPacking(PlainPacking):
    """See `Packing`. A matrix without scales is not quantized."""

    def __init__(self, described: Mapping[str, Any]) -> None:
        """Raises ModelFileError for group sizes, bits or modes that are not supported, naming them."""
        self._default = _way(described, described, "quantization")
        own = {name: value for name, value in described.items() if isinstance(value, dict)}
        self._own = {name: _way(value, described, f"quantization of {name}") for name, value in own.items()}

    def parts(self, tensor: str, files: TensorFiles) -> tuple[str, ...]:
        """See `Packing`."""
        if not _quantized(tensor, files):
            return super().parts(tensor, files)
        stem = _stem(tensor)
        return tuple(part for part in (tensor, f"{stem}.scales", f"{stem}.biases") if part in files)

    def shape(self, source: Source, files: TensorFiles) -> tuple[int, ...]:
        """See `Packing`."""
        if not _quantized(source.tensor, files):
            return super().shape(source, files)
        way, shape = self._of(source), files.info(source.tensor).shape
        if source.experts and (len(shape) != 3 or shape[0] != source.experts):
            raise ModelFileError(
                f"tensor {source.tensor!r} has shape {shape}; config.json implies {source.experts} experts"
            )
        rows, words = shape[-2:] if len(shape) >= 2 else (0, 0)
        columns = words * 32 // way.bits
        scales = files.info(f"{_stem(source.tensor)}.scales")
        if scales.shape != (*shape[:-1], columns // way.group_size) or files.info(source.tensor).dtype != "U32":
            raise ModelFileError(
                f"tensor {source.tensor!r} and its scales do not fit {way.bits} bits in groups of {way.group_size}, as "
                "config.json says; get another copy of the model"
            )
        return rows, columns

    def form(self, source: Source, files: TensorFiles) -> WeightForm:
        """See `Packing`."""
        if not _quantized(source.tensor, files):
            return super().form(source, files)
        way = self._of(source)
        if way.mode == "mxfp4":
            return mxfp4_form()
        kind = FLOATS.get(files.info(f"{_stem(source.tensor)}.scales").dtype)
        if kind is None or files.info(f"{_stem(source.tensor)}.biases").dtype not in FLOATS:
            raise ModelFileError(f"the scales of tensor {source.tensor!r} are no floats; get another copy of the model")
        return WeightForm(bits=way.bits, group_size=way.group_size, scale=kind, bias=kind)

    def read(self, source: Source, files: TensorFiles) -> Weight:
        """See `Packing`. Exact."""
        if not _quantized(source.tensor, files):
            return super().read(source, files)
        way, stem = self._of(source), _stem(source.tensor)
        q, scales = rows_of(source, source.tensor, files), rows_of(source, f"{stem}.scales", files)
        if way.mode == "mxfp4":
            return mxfp4_weight(source.tensor, q, scales)
        biases = rows_of(source, f"{stem}.biases", files)
        return QuantizedWeight(way.bits, way.group_size, q, Scales(scales), Scales(biases.astype(scales.dtype)))

    def _of(self, source: Source) -> _Way:
        return self._own.get(_stem(source.tensor), self._default)


def _way(described: Mapping[str, Any], fallback: Mapping[str, Any], where: str) -> _Way:
    mode = described.get("mode", fallback.get("mode", "affine"))
    bits = described.get("bits", fallback.get("bits", 4))
    group_size = described.get("group_size", fallback.get("group_size", 64))
    usable = mode == "affine" and bits in BITS and group_size in GROUP_SIZES
    if not usable and (mode, bits, group_size) != ("mxfp4", 4, MXFP4_GROUP):
        raise ModelFileError(
            f"{where} in config.json: mode {mode!r:.20} with {bits!r:.20} bits in groups of {group_size!r:.20} is not "
            f"supported; affine with {BITS} bits in groups of {GROUP_SIZES} and mxfp4 are"
        )
    return _Way(bits, group_size, mode)


def _stem(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def _quantized(tensor: str, files: TensorFiles) -> bool:
    return tensor.endswith(".weight") and f"{_stem(tensor)}.scales" in files and tensor in files
