"""Which way of quantization a config.json names, and what reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.hf_packing import Packing, PlainPacking

KEYS = ("quantization_config", "quantization", "compression_config")
"""Hugging Face's key, MLX's, and an older one of compressed-tensors."""


def packing_of(config: Mapping[str, Any]) -> Packing:
    """How the matrices are stored. Raises ModelFileError for a way that is not supported, naming it."""
    for key in KEYS:
        described = config.get(key)
        if described is None:
            continue
        name = described.get("quant_method") if isinstance(described, dict) else None
        raise ModelFileError(
            f"this model cannot be served: {key} in config.json says that it is quantized ({name or described!r:.60}), "
            "in a way that is not supported yet; get it as bf16 or as GGUF"
        )
    return PlainPacking()
