"""The plain decoder with keys and values rounded to fp16, as the native cache keeps them."""

from __future__ import annotations

import torch

from swarmd.node.engine.backends.base import AttentionShape
from swarmd.node.engine.backends.torch_cpu import TorchCpuBackend
from swarmd.node.engine.weights import AttentionWeights


class HalfCacheBackend(TorchCpuBackend):
    """Plain torch in everything else."""

    def attend(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        start: int,
        shape: AttentionShape,
        weights: AttentionWeights,
    ) -> torch.Tensor:
        return super().attend(queries, keys.half().float(), values.half().float(), start, shape, weights)
