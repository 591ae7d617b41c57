"""How far the fetching of a model has come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec


class Progress(msgspec.Struct, frozen=True):
    """`done_bytes` of `total_bytes` of `phase`: "download" from an index, "verify" of a file here, "peer":
    chunks from other nodes. Each phase counts from 0; `total_bytes` is 0 while it is not known."""

    model: str
    done_bytes: int
    total_bytes: int
    phase: Literal["download", "verify", "peer"]


ProgressCallback = Callable[[Progress], None]
"""Called on the event loop, in order, at most a few times per megabyte; must not raise or block."""
