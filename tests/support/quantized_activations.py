"""The plain decoder that sees what the kernels see: activations in int8 codes, keys and values in fp16."""

from __future__ import annotations

import torch
from support.half_cache import HalfCacheBackend
from support.native_kernels import quantized_activations

from swarmd.node.engine.backends.torch_tiles import TiledMatrix


class QuantizedActivationsBackend(HalfCacheBackend):
    """For models all of whose matrices are quantized: the kernels give dense ones the activations as they are."""

    def linear(self, x: torch.Tensor, weight: TiledMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The product with the activations' codes."""
        seen, _ = quantized_activations(x.numpy())
        return super().linear(torch.from_numpy(seen).float(), weight, bias)
