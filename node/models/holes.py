"""Holes in files of full length that are being fetched piece by piece."""

from __future__ import annotations

import mmap
import os

FETCH_UNIT = 1 << 20
"""Sparse files are filled in pieces of so many bytes."""


def has_hole(descriptor: int, offset: int, nbytes: int) -> bool:
    """Whether bytes of the range were never written, as far as the file system says.

    Blocks at the range's edges may hold a neighbour's bytes, and a compressing file system may keep a run of
    zeros as a hole: so a hole counts when it is as large as a unit of fetching, or as the range inside its edges.
    """
    end = offset + nbytes
    enough = min(FETCH_UNIT, max(1, nbytes - 2 * mmap.PAGESIZE))
    position = offset
    while position < end:
        try:
            hole = os.lseek(descriptor, position, os.SEEK_HOLE)
        except OSError:
            return False  # this file system cannot say
        if hole >= end:
            return False
        try:
            position = os.lseek(descriptor, hole, os.SEEK_DATA)
        except OSError:
            position = end  # ENXIO: no data from here to the end of the file
        if min(position, end) - hole >= enough:
            return True
    return False
