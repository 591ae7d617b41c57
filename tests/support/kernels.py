"""Whether our own CPU kernels were built here."""

from __future__ import annotations

import pytest

from swarmd.node.engine.cpu.bindings import NativeMissing, load


def why_missing() -> str:
    """Why the kernels cannot be used; empty when they can."""
    try:
        load()
    except NativeMissing as error:
        return str(error)
    return ""


needs_kernels = pytest.mark.skipif(bool(why_missing()), reason=why_missing() or "they are there")
