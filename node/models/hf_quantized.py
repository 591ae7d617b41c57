"""Which way of quantization a config.json names, and what reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.hf_fp8 import Fp8Packing
from swarmd.node.models.hf_int4 import AwqPacking, GptqPacking
from swarmd.node.models.hf_mlx import MlxPacking
from swarmd.node.models.hf_mxfp4 import Mxfp4Packing
from swarmd.node.models.hf_packing import Packing, PlainPacking

KEYS = ("quantization", "quantization_config", "compression_config")
"""MLX's key, Hugging Face's (MLX writes that too), and an older one of compressed-tensors."""

METHODS: dict[str, Callable[[Mapping[str, Any]], Packing]] = {
    "gptq": GptqPacking,
    "awq": AwqPacking,
    "fp8": Fp8Packing,
    "mxfp4": lambda described: Mxfp4Packing(),
}
"""By `quant_method`. MLX's description has none."""


def packing_of(config: Mapping[str, Any]) -> Packing:
    """How the matrices are stored. Raises ModelFileError for a way that is not supported, naming it."""
    for key in KEYS:
        described = config.get(key)
        if described is None:
            continue
        if not isinstance(described, dict):
            raise ModelFileError(f"{key} in config.json is {described!r:.40}; the file is damaged")
        method = described.get("quant_method")
        if method is None and "group_size" in described:
            return MlxPacking(described)
        if method not in METHODS:
            raise ModelFileError(
                f"this model cannot be served: {key} in config.json says that it is quantized by {method!r:.60}, which "
                f"is not supported; {', '.join(METHODS)} and MLX's quantization are. Get another variant, or GGUF"
            )
        return METHODS[method](described)
    return PlainPacking()
