"""The CUDA compute on the CPU: the same code on tensors that lie in the host's memory, in fp32, nothing captured."""

from __future__ import annotations

from pathlib import Path

import torch

from swarmd.node.engine.backends.torch_cuda import TorchCudaBackend
from swarmd.node.engine.cuda_compute import CudaCompute
from swarmd.node.engine.cuda_graphs import Calls, Replays
from swarmd.node.engine.stage_compute import StageCompute
from swarmd.node.engine.weights import load_stage_weights
from swarmd.node.models.checkpoint import open_checkpoint


def load_twin(
    path: Path,
    start: int,
    end: int,
    context: int,
    *,
    device: str = "cpu",
    kind: torch.dtype = torch.float32,
    fused: bool = False,
    replays: Replays | None = None,
) -> StageCompute:
    """See `support.architectures.LoadStage`; on another `device` it is the real thing."""
    torch.set_grad_enabled(False)
    backend = TorchCudaBackend(torch.device(device), kind, fused=fused)
    with open_checkpoint(path) as checkpoint:
        weights = load_stage_weights(checkpoint, start, end, backend, context=context)
        # Room for what two sequences take in whole blocks, and for the copies of a fork.
        tokens = 3 * context + 64
        return CudaCompute(checkpoint.spec, start, end, weights, backend, tokens, replays or Calls())
