"""Matrices on a GPU: the canonical form as it is, and its values where a product wants them, by operations of torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from swarmd.node.engine.quantized import DenseWeight, QuantizedWeight, Scales, Weight, form_of

TILE_ELEMENTS = 1 << 22
"""At most so many weights are dequantized at a time: 8 MiB of bf16, a dozen times that by operations of torch."""
WORD_BITS = 32
"""32 codes of b bits are b whole words."""


@dataclass(frozen=True)
class DeviceScales:
    """`Scales` on a device: `values` [rows, groups], `supers` [rows, groups / n] or None."""

    values: torch.Tensor
    supers: torch.Tensor | None

    @classmethod
    def of(cls, scales: Scales, device: torch.device) -> DeviceScales:
        """A copy on the device; bf16 bits become torch's bf16."""
        values = torch.from_numpy(np.ascontiguousarray(scales.values))
        values = values.view(torch.bfloat16) if scales.kind == "bf16" else values
        supers = None if scales.supers is None else torch.from_numpy(np.ascontiguousarray(scales.supers)).to(device)
        return cls(values.to(device), supers)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that is held."""
        return (self.values,) if self.supers is None else (self.values, self.supers)

    @property
    def per_super(self) -> int:
        """Groups that share a super-scale; 1 without any."""
        return 1 if self.supers is None else self.values.shape[1] // self.supers.shape[1]

    def take(self, rows: slice) -> DeviceScales:
        """The chosen rows, of the same memory."""
        return DeviceScales(self.values[rows], None if self.supers is None else self.supers[rows])

    @classmethod
    def below(cls, parts: Sequence[DeviceScales]) -> DeviceScales:
        """The rows of all parts, which have one form."""
        supers = [part.supers for part in parts if part.supers is not None]
        return cls(torch.cat([part.values for part in parts]), torch.cat(supers) if supers else None)

    def expand(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """fp32 [chosen rows, groups]."""
        values = self.values[rows].float()
        if self.supers is None:
            return values
        return values * self.supers[rows].float().repeat_interleave(self.per_super, dim=1)


@dataclass(frozen=True)
class PackedPart:
    """Rows of a matrix; see `QuantizedWeight`. `q` is int32 [rows, words], `codebook` fp32 [levels] or None."""

    bits: int
    group_size: int
    offset: int
    q: torch.Tensor
    scale: DeviceScales
    bias: DeviceScales | None
    codebook: torch.Tensor | None

    @property
    def rows(self) -> int:
        """Number of outputs."""
        return self.q.shape[0]

    @property
    def columns(self) -> int:
        """Number of inputs."""
        return self.q.shape[1] * WORD_BITS // self.bits

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that is held, but for the codebook."""
        return (self.q, *self.scale.tensors, *(self.bias.tensors if self.bias is not None else ()))

    def take(self, rows: slice) -> PackedPart:
        """The chosen rows, of the same memory."""
        bias = None if self.bias is None else self.bias.take(rows)
        form = (self.bits, self.group_size, self.offset)
        return PackedPart(*form, self.q[rows], self.scale.take(rows), bias, self.codebook)

    def values(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """The chosen rows: fp32 [chosen, columns], as `QuantizedWeight.dequantize` defines them."""
        codes = self._codes(self.q[rows])
        levels = codes.float() if self.codebook is None else self.codebook[codes]
        grouped = levels.view(len(levels), -1, self.group_size)
        scale = self.scale.expand(rows)[..., None]
        if self.bias is None:
            grouped = (grouped - self.offset) * scale
        else:
            grouped = grouped * scale + self.bias.expand(rows)[..., None]
        return grouped.view(len(levels), -1)

    def _codes(self, q: torch.Tensor) -> torch.Tensor:
        """int64 [rows, columns]. A code may begin in one word and end in the next."""
        begin = torch.arange(0, WORD_BITS * self.bits, self.bits, device=q.device)
        word, shift = begin // WORD_BITS, begin % WORD_BITS
        following = (word + 1).clamp(max=self.bits - 1)
        words = (q.view(len(q), -1, self.bits).to(torch.int64)) & 0xFFFFFFFF
        both = (words[..., word] >> shift) | (words[..., following] << (WORD_BITS - shift))
        return (both & ((1 << self.bits) - 1)).view(len(q), -1)


@dataclass(frozen=True)
class DensePart:
    """Rows of a matrix of floats: `weights` [rows, columns] in the file's type."""

    weights: torch.Tensor

    @property
    def rows(self) -> int:
        """Number of outputs."""
        return self.weights.shape[0]

    @property
    def columns(self) -> int:
        """Number of inputs."""
        return self.weights.shape[1]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that is held."""
        return (self.weights,)

    def take(self, rows: slice) -> DensePart:
        """The chosen rows, of the same memory."""
        return DensePart(self.weights[rows])

    def values(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """The chosen rows, in the file's type."""
        return self.weights[rows]


Part = PackedPart | DensePart


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix as its parts, in the order of the outputs."""

    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for part in self.parts for tensor in part.tensors)

    def rows_at(self, rows: torch.Tensor) -> torch.Tensor:
        """fp32 [len(rows), columns], without looking at the row numbers on the host: a captured step may do it."""
        found, begin = torch.zeros(len(rows), self.parts[0].columns, device=rows.device), 0
        for part in self.parts:
            here = (rows >= begin) & (rows < begin + part.rows)
            values = part.values((rows - begin).clamp(0, part.rows - 1)).float()
            found = torch.where(here[:, None], values, found)
            begin += part.rows
        return found


def packed(parts: Sequence[Weight], device: torch.device) -> PackedMatrix:
    """The matrix made of `parts` stacked along their rows, on the device; neighbours of one form become one part."""
    alike = groupby(parts, key=_form)
    return PackedMatrix(tuple(below([_part(part, device) for part in group]) for _, group in alike))


def below(parts: Sequence[Part]) -> Part:
    """The rows of all parts, which have one form, below each other."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, DensePart):
        return DensePart(torch.cat([part.weights for part in parts if isinstance(part, DensePart)]))
    quantized = [part for part in parts if isinstance(part, PackedPart)]
    biases = [part.bias for part in quantized if part.bias is not None]
    return PackedPart(
        *(first.bits, first.group_size, first.offset),
        torch.cat([part.q for part in quantized]),
        DeviceScales.below([part.scale for part in quantized]),
        DeviceScales.below(biases) if biases else None,
        first.codebook,
    )


def product(x: torch.Tensor, part: Part, read: Callable[[Part, int, int], torch.Tensor] | None = None) -> torch.Tensor:
    """x [n, columns] times a part, in the type of x, tile by tile: [n, rows].

    `read` gives rows [begin, end) of a part in that type, by default by operations of torch.
    """
    height = max(1, TILE_ELEMENTS // part.columns) if isinstance(part, PackedPart) else part.rows
    read = read or (lambda part, begin, end: part.values(slice(begin, end)).to(x.dtype))
    tiles = [(top, min(top + height, part.rows)) for top in range(0, part.rows, height)]
    outputs = [x @ read(part, *tile).t() for tile in tiles]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _form(weight: Weight) -> tuple[object, ...]:
    """Equal for weights that can be one part."""
    if isinstance(weight, DenseWeight):
        return (weight.type,)
    return (form_of(weight), weight.offset, None if weight.codebook is None else weight.codebook.tobytes())


def _part(weight: Weight, device: torch.device) -> Part:
    if isinstance(weight, DenseWeight):
        values = torch.from_numpy(np.ascontiguousarray(weight.values))
        return DensePart((values.view(torch.bfloat16) if weight.type == "bf16" else values).to(device))
    return _packed_part(weight, device)


def _packed_part(weight: QuantizedWeight, device: torch.device) -> PackedPart:
    codebook = None if weight.codebook is None else torch.from_numpy(weight.codebook.astype(np.float32)).to(device)
    return PackedPart(
        weight.bits,
        weight.group_size,
        weight.offset,
        torch.from_numpy(np.ascontiguousarray(weight.q).view(np.int32)).to(device),
        DeviceScales.of(weight.scale, device),
        None if weight.bias is None else DeviceScales.of(weight.bias, device),
        codebook,
    )
