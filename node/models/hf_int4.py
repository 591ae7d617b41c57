"""Matrices as GPTQ and AWQ quantize them: integer codes with an integer zero point and a scale per group of inputs.

GPTQ (Frantar et al. 2022, arXiv:2210.17323; AutoGPTQ's and GPTQModel's files): X.qweight i32 [in * bits / 32, out],
codes of consecutive inputs LSB-first; X.qzeros i32 [groups, out * bits / 32], zero points less one in the format
"gptq", as they are in "gptq_v2"; X.scales [groups, out]; X.g_idx [in], the group of each input. w = scale * (q - zero).

AWQ (Lin et al. 2023, arXiv:2306.00978; AutoAWQ's "gemm" version): X.qweight i32 [in, out / 8], X.qzeros i32
[groups, out / 8], the eight outputs of a word in the order 0 2 4 6 1 3 5 7; X.scales [groups, out]; no "less one".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from swarmd.node.engine.quantized import (
    GROUP_SIZES,
    Array,
    QuantizedWeight,
    Scales,
    Weight,
    WeightForm,
    bf16_to_f32,
    pack,
)
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.hf_names import Source
from swarmd.node.models.hf_packing import FLOATS, PlainPacking
from swarmd.node.models.tensor_files import TensorFiles

GPTQ_BITS = (2, 4, 8)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class _GroupedIntegers(PlainPacking, ABC):
    """See `Packing`: what GPTQ and AWQ share. Zero points become biases, in fp32, where the product is exact."""

    def __init__(self, method: str, described: Mapping[str, Any], bits: int) -> None:
        self._bits = bits
        self._group_size = described.get("group_size", 128)
        if self._group_size not in GROUP_SIZES:
            raise ModelFileError(
                f"this model is quantized by {method} in groups of {self._group_size!r:.20}, which is not "
                f"supported; groups of {GROUP_SIZES} are"
            )

    def parts(self, tensor: str, files: TensorFiles) -> tuple[str, ...]:
        """See `Packing`."""
        stem = tensor.removesuffix(".weight")
        if f"{stem}.qweight" not in files:
            return super().parts(tensor, files)
        names = (f"{stem}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx"))
        return tuple(name for name in names if name in files)

    def shape(self, source: Source, files: TensorFiles) -> tuple[int, ...]:
        """See `Packing`."""
        stem = self._stem(source, files)
        if not stem:
            return super().shape(source, files)
        inputs, outputs = self._sizes(files.info(f"{stem}.qweight").shape)
        groups = -(-inputs // self._group_size)
        per_word = 32 // self._bits
        expected = {"qzeros": (groups, -(-outputs // per_word)), "scales": (groups, outputs)}
        for part, shape in expected.items():
            if (found := files.info(f"{stem}.{part}").shape) != shape:
                raise ModelFileError(f"tensor {stem}.{part} has shape {found}; {shape} is needed; get another copy")
        return outputs, inputs

    def form(self, source: Source, files: TensorFiles) -> WeightForm:
        """See `Packing`."""
        stem = self._stem(source, files)
        if not stem:
            return super().form(source, files)
        kind = FLOATS.get(files.info(f"{stem}.scales").dtype)
        if kind is None:
            raise ModelFileError(f"tensor {stem}.scales is not of floats; get another copy of the model")
        return WeightForm(bits=self._bits, group_size=self._group_size, scale=kind, bias="f32")

    def read(self, source: Source, files: TensorFiles) -> Weight:
        """See `Packing`. Exact."""
        stem = self._stem(source, files)
        if not stem:
            return super().read(source, files)
        rows = slice(source.first, source.first + source.rows)
        codes = self._codes(stem, files)[:, rows]
        scales = np.ascontiguousarray(files.read(f"{stem}.scales")[:, rows].T)
        zeros = np.ascontiguousarray(self._zeros(stem, files)[:, rows].T).astype(np.float32)
        wide = bf16_to_f32(scales) if scales.dtype == np.uint16 else scales.astype(np.float32)
        q = pack(np.ascontiguousarray(codes.T), self._bits)
        return QuantizedWeight(self._bits, self._group_size, q, Scales(scales), Scales(-zeros * wide))

    def _stem(self, source: Source, files: TensorFiles) -> str:
        """What the names of the matrix' tensors begin with, "" if it is not quantized."""
        stem = source.tensor.removesuffix(".weight")
        return stem if f"{stem}.qweight" in files else ""

    @abstractmethod
    def _sizes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Inputs and outputs of a qweight of this shape."""
        ...

    @abstractmethod
    def _codes(self, stem: str, files: TensorFiles) -> Array:
        """uint8 [inputs, outputs]."""
        ...

    @abstractmethod
    def _zeros(self, stem: str, files: TensorFiles) -> Array:
        """What is taken off the codes: uint16 [groups, outputs]."""
        ...


class GptqPacking(_GroupedIntegers):
    """See `Packing`."""

    def __init__(self, described: Mapping[str, Any]) -> None:
        """Raises ModelFileError for bits and group sizes that are not supported."""
        bits = described.get("bits")
        if bits not in GPTQ_BITS:
            raise ModelFileError(f"this model is quantized by GPTQ with {bits!r:.20} bits; {GPTQ_BITS} are supported")
        layout = described.get("checkpoint_format", "gptq")
        if layout not in ("gptq", "gptq_v2"):
            raise ModelFileError(
                f"this model's GPTQ checkpoint_format {layout!r:.20} is not supported; gptq and gptq_v2 are"
            )
        self._added = 1 if layout == "gptq" else 0
        super().__init__("GPTQ", described, bits)

    def _sizes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        rows, outputs = shape if len(shape) == 2 else (0, 0)
        return rows * (32 // self._bits), outputs

    def _codes(self, stem: str, files: TensorFiles) -> Array:
        words = files.read(f"{stem}.qweight")
        self._check_groups(stem, files, len(words) * (32 // self._bits))
        return _fields(words, self._bits).transpose(0, 2, 1).reshape(-1, words.shape[1])

    def _zeros(self, stem: str, files: TensorFiles) -> Array:
        words = files.read(f"{stem}.qzeros")
        zeros = _fields(words, self._bits).reshape(len(words), -1).astype(np.uint16) + np.uint16(self._added)
        # A stored zero point wraps around within its bits.
        return zeros & np.uint16((1 << self._bits) - 1) if self._added and self._bits == 8 else zeros

    def _check_groups(self, stem: str, files: TensorFiles, inputs: int) -> None:
        if f"{stem}.g_idx" not in files:
            return
        groups = files.read(f"{stem}.g_idx")
        if len(groups) != inputs or (groups != np.arange(inputs) // self._group_size).any():
            raise ModelFileError(
                f"tensor {stem}.g_idx: the inputs of a group are not neighbours here (GPTQ with desc_act), which "
                "is not supported; get a variant without desc_act, or another format"
            )


class AwqPacking(_GroupedIntegers):
    """See `Packing`."""

    def __init__(self, described: Mapping[str, Any]) -> None:
        """Raises ModelFileError for bits, versions and group sizes that are not supported."""
        bits, version = described.get("bits", 4), str(described.get("version", "gemm")).lower()
        if bits != 4 or version != "gemm":
            raise ModelFileError(
                f"this model is quantized by AWQ with {bits!r:.20} bits, version {version:.20}; 4 bits of version gemm "
                "are supported"
            )
        super().__init__("AWQ", described, bits)

    def _sizes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        inputs, words = shape if len(shape) == 2 else (0, 0)
        return inputs, words * 8

    def _codes(self, stem: str, files: TensorFiles) -> Array:
        return _reordered(files.read(f"{stem}.qweight"))

    def _zeros(self, stem: str, files: TensorFiles) -> Array:
        return _reordered(files.read(f"{stem}.qzeros")).astype(np.uint16)


def _fields(words: Array, bits: int) -> Array:
    """i32 [a, b] -> uint8 [a, b, 32 / bits], the lowest bits first."""
    stream = np.ascontiguousarray(words).view(np.uint32)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return ((stream[..., None] >> shifts) & np.uint32((1 << bits) - 1)).astype(np.uint8)


def _reordered(words: Array) -> Array:
    """i32 [a, b] of AWQ -> uint8 [a, 8 b] in the order of the outputs."""
    fields = _fields(words, 4)
    ordered = np.empty_like(fields)
    ordered[..., list(AWQ_ORDER)] = fields
    return ordered.reshape(len(words), -1)
