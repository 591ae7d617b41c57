"""Quantized matrices for plain torch: how they are kept, and how one tile becomes fp32 in few vectorized
operations.

A matrix [N, K] is cut along its outputs into tiles and each tile is kept K-major, [K, outputs], because then
a group's scale runs along contiguous memory and one `addcmul` with broadcasting turns codes into weights. The
codes are cut into planes of 8, 4, 2 or 1 bits, so that unpacking needs no interleaving: in a plane of w bits, field j
of byte row r belongs to input r + j*K*w/8. So with 4 bits, row r holds input r in its low nibble and input r + K/2 in
its high one; 5 bits are a plane of 4 and one of 1. On the machine this was written on, a 4-bit product 576 ->
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
from swarmd.node.engine.backends.torch_planes import PLANES, join_planes, split_planes
from swarmd.node.engine.quantized import Array, DenseWeight, FloatType, Scales, Weight


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
class TileScales:
    """`Scales` of a tile's outputs: `values` [groups, 1, outputs], `supers` [supers, 1, outputs] or None."""

    values: torch.Tensor
    supers: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.values.nbytes + (0 if self.supers is None else self.supers.nbytes)

    def expand(self) -> torch.Tensor:
        """fp32 [groups, 1, outputs]."""
        values = self.values.float()
        if self.supers is None:
            return values
        per_super = values.shape[0] // self.supers.shape[0]
        return values * self.supers.float().repeat_interleave(per_super, dim=0)

    def take(self, outputs: torch.Tensor) -> TileScales:
        """Of the chosen outputs."""
        return TileScales(self.values[..., outputs], None if self.supers is None else self.supers[..., outputs])


@dataclass(frozen=True)
class TileForm:
    """What neighbouring parts must have in common to share a tile."""

    bits: int
    group_size: int
    scale: str
    bias: str
    offset: int
    codebook: bytes


@dataclass(frozen=True)
class QuantizedTile:
    """Codes in planes as the module says, the lowest bits first: plane i is uint8 [columns*width/8, outputs]."""

    form: TileForm
    planes: tuple[torch.Tensor, ...]
    scale: TileScales
    bias: TileScales | None

    @property
    def columns(self) -> int:
        """Number of inputs."""
        return self.planes[0].shape[0] * 8 // PLANES[self.form.bits][0]

    @property
    def outputs(self) -> int:
        """Number of outputs."""
        return self.planes[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(part.nbytes for part in (*self.planes, self.scale, self.bias) if part is not None)

    def dequantize(self, scratch: Scratch) -> torch.Tensor:
        """fp32 [columns, outputs]; valid until the scratch is used again."""
        codes = self.planes[0]
        if len(self.planes) > 1 or self.form.bits != 8:
            codes = scratch.codes(self.columns, self.outputs)
            join_planes(self.planes, self.form.bits, codes)
        floats = scratch.floats(self.columns, self.outputs)
        self._fill(codes, self.scale, self.bias, floats)
        return floats

    def rows_at(self, outputs: torch.Tensor) -> torch.Tensor:
        """fp32 [len(outputs), columns]."""
        codes = torch.empty(self.columns, len(outputs), dtype=torch.uint8)
        join_planes([plane[:, outputs] for plane in self.planes], self.form.bits, codes)
        floats = torch.empty(codes.shape)
        self._fill(codes, self.scale.take(outputs), None if self.bias is None else self.bias.take(outputs), floats)
        return floats.t()

    def _fill(self, codes: torch.Tensor, scale: TileScales, bias: TileScales | None, floats: torch.Tensor) -> None:
        """level*scale + bias into `floats`, each value rounded as `QuantizedWeight.dequantize` says."""
        if self.form.codebook:
            table = torch.frombuffer(bytearray(self.form.codebook), dtype=torch.uint8).float()
            torch.index_select(table, 0, codes.reshape(-1).int(), out=floats.view(-1))
        else:
            floats.copy_(codes)
        grouped = floats.view(-1, self.form.group_size, floats.shape[1])
        if bias is None:
            grouped.sub_(self.form.offset).mul_(scale.expand())
        else:
            grouped.mul_(scale.expand()).add_(bias.expand())


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


def _form(weight: Weight) -> TileForm | FloatType:
    """Equal for weights that can be joined in one tile."""
    if isinstance(weight, DenseWeight):
        return weight.type
    codebook = b"" if weight.codebook is None else weight.codebook.tobytes()
    bias = "" if weight.bias is None else weight.bias.kind
    return TileForm(weight.bits, weight.group_size, weight.scale.kind, bias, weight.offset, codebook)


def _tile(weight: Weight) -> Tile:
    if isinstance(weight, DenseWeight):
        values = torch.from_numpy(np.array(weight.values.T, order="C"))
        return DenseTile(values.view(torch.bfloat16) if weight.type == "bf16" else values)
    form = _form(weight)
    assert isinstance(form, TileForm)
    codes = torch.from_numpy(weight.codes()).t().contiguous()
    bias = None if weight.bias is None else _grouped(weight.bias)
    return QuantizedTile(form, tuple(split_planes(codes, weight.bits)), _grouped(weight.scale), bias)


def _grouped(scales: Scales) -> TileScales:
    """[outputs, groups] -> [groups, 1, outputs]."""

    def turned(values: Array) -> torch.Tensor:
        return torch.from_numpy(np.array(values.T, order="C"))[:, None]

    values = turned(scales.values)
    if scales.kind == "bf16":
        values = values.view(torch.bfloat16)
    return TileScales(values, None if scales.supers is None else turned(scales.supers))


def _joined(tiles: Sequence[Tile]) -> Tile:
    """Tiles of one form, side by side."""
    dense = [tile for tile in tiles if isinstance(tile, DenseTile)]
    if dense:
        return DenseTile(torch.cat([tile.values for tile in dense], dim=1))
    parts = [tile for tile in tiles if isinstance(tile, QuantizedTile)]
    planes = tuple(torch.cat(same, dim=1) for same in zip(*(tile.planes for tile in parts), strict=True))
    biases = [tile.bias for tile in parts if tile.bias is not None]
    scale = _joined_scales([tile.scale for tile in parts])
    return QuantizedTile(parts[0].form, planes, scale, _joined_scales(biases) if biases else None)


def _joined_scales(parts: Sequence[TileScales]) -> TileScales:
    supers = [part.supers for part in parts if part.supers is not None]
    return TileScales(torch.cat([part.values for part in parts], dim=-1), torch.cat(supers, dim=-1) if supers else None)
