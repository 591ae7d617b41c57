"""Quantized matrices for plain torch: how they are kept, and how one tile becomes fp32 in few vectorized
operations.

A matrix [N, K] is cut along its outputs into tiles and each tile is kept K-major, [K, outputs], because then
a group's scale runs along contiguous memory and one `addcmul` with broadcasting turns codes into weights. The
codes are paired so that unpacking needs no interleaving: with 4 bits, byte row r holds input r in its low
nibble and input r + K/2 in its high one. With 5 bits the low four are kept like that, and the fifth ones
eight to a byte: bit j of row r is input r + j*K/8. On the machine this was written on, a 4-bit product 576 ->
1536 with one row took 0.19 ms on two threads, against 0.43 ms for a look-up of byte values and 1.3 ms for
unpacking in the stored order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from swarmd.node.engine.backends.base import tile_rows
from swarmd.node.engine.quantized import Array, DenseWeight, Weight
from swarmd.node.models.gguf_types import GGUFType


class Scratch:
    """Buffers that every dequantization of a backend reuses: fp32 and uint8, as large as the largest tile."""

    def __init__(self) -> None:
        self._floats = torch.empty(0)
        self._codes = torch.empty(0, dtype=torch.uint8)

    def fit(self, matrix: TiledMatrix) -> None:
        """Have room for any tile of the matrix."""
        need = max(tile.columns * tile.outputs for tile in matrix.tiles)
        if need > self._floats.numel():
            self._floats = torch.empty(need)
            self._codes = torch.empty(need, dtype=torch.uint8)

    def floats(self, columns: int, outputs: int) -> torch.Tensor:
        """fp32 [columns, outputs], contents undefined."""
        return self._floats[: columns * outputs].view(columns, outputs)

    def codes(self, columns: int, outputs: int) -> torch.Tensor:
        """uint8 [columns, outputs], contents undefined."""
        return self._codes[: columns * outputs].view(columns, outputs)


@dataclass(frozen=True)
class DenseTile:
    """`values` [columns, outputs] in the file's own float type."""

    values: torch.Tensor

    @property
    def columns(self) -> int:
        """Number of inputs."""
        return self.values.shape[0]

    @property
    def outputs(self) -> int:
        """Number of outputs."""
        return self.values.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.values.nbytes

    def dequantize(self, scratch: Scratch) -> torch.Tensor:
        """fp32 [columns, outputs]; valid until the scratch is used again."""
        if self.values.dtype is torch.float32:
            return self.values
        return scratch.floats(self.columns, self.outputs).copy_(self.values)

    def rows_at(self, outputs: torch.Tensor) -> torch.Tensor:
        """fp32 [len(outputs), columns]."""
        return self.values[:, outputs].t().float()


@dataclass(frozen=True)
class QuantizedTile:
    """Codes paired as the module says, scale (and bias unless implied) [groups, 1, outputs].

    `low` is uint8 [columns, outputs] for 8 bits, else [columns/2, outputs]; `fifth` is uint8 [columns/8,
    outputs], 5 bits only.
    """

    bits: int
    low: torch.Tensor
    fifth: torch.Tensor | None
    scale: torch.Tensor
    bias: torch.Tensor | None

    @property
    def columns(self) -> int:
        """Number of inputs."""
        return self.low.shape[0] * (1 if self.bits == 8 else 2)

    @property
    def outputs(self) -> int:
        """Number of outputs."""
        return self.low.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(part.nbytes for part in (self.low, self.fifth, self.scale, self.bias) if part is not None)

    def dequantize(self, scratch: Scratch) -> torch.Tensor:
        """fp32 [columns, outputs]; valid until the scratch is used again."""
        codes = self.low
        if self.bits != 8:
            codes = scratch.codes(self.columns, self.outputs)
            _unpair(self.low, self.fifth, codes)
        floats = scratch.floats(self.columns, self.outputs).copy_(codes)
        _scale(floats, self.bits, self.scale, self.bias)
        return floats

    def rows_at(self, outputs: torch.Tensor) -> torch.Tensor:
        """fp32 [len(outputs), columns]."""
        codes = self.low[:, outputs]
        if self.bits != 8:
            paired, codes = codes, torch.empty(self.columns, len(outputs), dtype=torch.uint8)
            _unpair(paired, None if self.fifth is None else self.fifth[:, outputs], codes)
        floats = codes.float()
        _scale(
            floats,
            self.bits,
            self.scale[..., outputs],
            None if self.bias is None else self.bias[..., outputs],
        )
        return floats.t()


Tile = DenseTile | QuantizedTile
"""Some consecutive outputs of a matrix."""


@dataclass(frozen=True)
class TiledMatrix:
    """A matrix as its tiles, in the order of the outputs."""

    tiles: tuple[Tile, ...]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tile.nbytes for tile in self.tiles)

    def rows_at(self, outputs: torch.Tensor) -> torch.Tensor:
        """fp32 [len(outputs), columns]: the chosen rows of the matrix [N, K]."""
        found = torch.empty(len(outputs), self.tiles[0].columns)
        begin = 0
        for tile in self.tiles:
            here = ((outputs >= begin) & (outputs < begin + tile.outputs)).nonzero().view(-1)
            if len(here):
                found[here] = tile.rows_at(outputs[here] - begin)
            begin += tile.outputs
        return found


def tiled(parts: Sequence[Weight]) -> TiledMatrix:
    """The matrix made of `parts` stacked along their rows; neighbours of one form share tiles."""
    tiles: list[Tile] = []
    for _, alike in groupby(parts, key=_form):
        group = list(alike)
        height = tile_rows(group[0].columns)
        if sum(part.rows for part in group) <= height:
            tiles.append(_joined([_tile(part) for part in group]))
            continue
        for part in group:
            tiles += [_tile(part.take(slice(top, top + height))) for top in range(0, part.rows, height)]
    return TiledMatrix(tuple(tiles))


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [rows, K] @ weight [K, N], rows >= 2, by oneDNN; where torch has none, by the default library in
    fours of rows.

    oneDNN is faster for few rows and gives each row the same bits whatever the others; MKL does so in
    multiples of four.
    """
    if torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight.t(), None, "none", [], "")
    padding = -x.shape[0] % 4
    return (torch.nn.functional.pad(x, (0, 0, 0, padding)) @ weight)[: x.shape[0]]


def _form(weight: Weight) -> tuple[object, ...]:
    """Equal for weights that can be joined in one tile."""
    if isinstance(weight, DenseWeight):
        return (weight.type,)
    return weight.bits, weight.group_size, weight.scale.dtype, weight.bias is None


def _tile(weight: Weight) -> Tile:
    if isinstance(weight, DenseWeight):
        values = torch.from_numpy(np.array(weight.values.T, order="C"))
        return DenseTile(values.view(torch.bfloat16) if weight.type is GGUFType.BF16 else values)
    codes = torch.from_numpy(weight.codes()).t().contiguous()
    low, fifth = codes, None
    if weight.bits != 8:
        low, fifth = _pair(codes, weight.bits)
    return QuantizedTile(
        weight.bits,
        low,
        fifth,
        _grouped(weight.scale),
        None if weight.bias is None else _grouped(weight.bias),
    )


def _grouped(values: Array) -> torch.Tensor:
    """[outputs, groups] -> [groups, 1, outputs]."""
    return torch.from_numpy(np.array(values.T, order="C"))[:, None]


def _joined(tiles: Sequence[Tile]) -> Tile:
    """Tiles of one form side by side."""
    if len(tiles) == 1:
        return tiles[0]
    dense = [tile for tile in tiles if isinstance(tile, DenseTile)]
    if dense:
        return DenseTile(torch.cat([tile.values for tile in dense], dim=1))
    parts = [tile for tile in tiles if isinstance(tile, QuantizedTile)]

    def side_by_side(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(present, dim=-1) if present else None

    return QuantizedTile(
        parts[0].bits,
        torch.cat([tile.low for tile in parts], dim=1),
        side_by_side([tile.fifth for tile in parts]),
        torch.cat([tile.scale for tile in parts], dim=-1),
        side_by_side([tile.bias for tile in parts]),
    )


def _pair(codes: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """uint8 codes [columns, outputs] of 4 or 5 bits -> (`low`, `fifth`) of a tile."""
    half = codes.shape[0] // 2
    low = (codes[:half] & 15) | (codes[half:] << 4)
    if bits == 4:
        return low, None
    if bits != 5:
        raise ValueError(f"the plain torch backend keeps weights of 4, 5 and 8 bits, not {bits}")
    fifth = torch.zeros_like(codes[: codes.shape[0] // 8])
    for bit, part in enumerate(codes.chunk(8)):
        fifth |= (part >> 4) << bit
    return low, fifth


def _unpair(low: torch.Tensor, fifth: torch.Tensor | None, codes: torch.Tensor) -> None:
    """The inverse of `_pair`, written to `codes`."""
    half = low.shape[0]
    torch.bitwise_and(low, 15, out=codes[:half])
    torch.bitwise_right_shift(low, 4, out=codes[half:])
    if fifth is not None:
        for bit, part in enumerate(codes.chunk(8)):
            part |= ((fifth >> bit) & 1) << 4


def _scale(floats: torch.Tensor, bits: int, scale: torch.Tensor, bias: torch.Tensor | None) -> None:
    """codes -> codes*scale + bias in place. fp16 scales make the product exact, so each weight is rounded
    once.
    """
    factors = scale.float()
    offsets = factors * -(1 << (bits - 1)) if bias is None else bias.float()
    grouped = floats.view(scale.shape[0], -1, floats.shape[1])
    torch.addcmul(offsets, grouped, factors, out=grouped)
