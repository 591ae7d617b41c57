"""Giving memory that the process no longer uses back to the system."""

from __future__ import annotations

import ctypes
import gc


def give_back() -> None:
    """Free what nobody refers to, and have the C library return the pages of it.

    glibc keeps freed arrays of up to 32 MiB for later ones (mallopt(3), M_MMAP_THRESHOLD), which after loading never
    come: up to half as much again as the weights. Other C libraries have no such call, and nothing is done there.
    """
    gc.collect()
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return
    trim(ctypes.c_size_t(0))
