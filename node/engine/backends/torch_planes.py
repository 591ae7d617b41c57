"""Codes of 2 to 8 bits cut into planes of 8, 4, 2 or 1 bits, and joined again, in few vectorized operations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
"""Bits of a code -> the widths of its planes, the lowest first."""


def split_planes(codes: torch.Tensor, bits: int) -> Iterator[torch.Tensor]:
    """uint8 codes [columns, outputs] -> its planes, as torch_tiles describes them."""
    shift = 0
    for width in PLANES[bits]:
        plane = torch.zeros_like(codes[: codes.shape[0] * width // 8])
        for field, part in enumerate(codes.chunk(8 // width)):
            plane |= ((part >> shift) & ((1 << width) - 1)) << (field * width)
        yield plane
        shift += width


def join_planes(planes: Sequence[torch.Tensor], bits: int, codes: torch.Tensor) -> None:
    """The inverse of `split_planes`, written to `codes`."""
    shift = 0
    for width, plane in zip(PLANES[bits], planes, strict=True):
        mask = (1 << width) - 1
        for field, part in enumerate(codes.chunk(8 // width)):
            if shift == 0:
                torch.bitwise_right_shift(plane, field * width, out=part)
                part &= mask
            else:
                part |= ((plane >> (field * width)) & mask) << shift
        shift += width
