"""Which implementation computes a stage, by device: the one place that knows them all. Each is imported when needed."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
from typing import Literal

from swarmd.node.engine.stage_compute import Kernels, StageCompute
from swarmd.node.engine.weights import ReportProgress
from swarmd.node.models.checkpoint import Checkpoint

log = logging.getLogger("swarmd.engine")


KINDS = ("cpu", "cuda", "metal", "mlx-cpu")
"""The kinds of devices on which something here computes: what stands before the colon in a device's id."""


def require_backend(device: str) -> None:
    """Raises ValueError when nothing here computes on that device."""
    if device.partition(":")[0] not in KINDS:
        raise ValueError(f"this version of swarmd does not compute on {device}; it does on {', '.join(KINDS)}")


def import_compute(device: str) -> None:
    """Import what computes on a device, without touching that; so far as it is there."""
    with contextlib.suppress(ImportError):
        if device.startswith("cuda"):
            importlib.import_module("swarmd.node.engine.cuda_compute")
        elif device in ("metal", "mlx-cpu"):
            importlib.import_module("swarmd.node.engine.backends.mlx")
        else:
            _import_cpu_compute()


def _import_cpu_compute() -> None:
    from swarmd.node.engine.cpu.bindings import NativeMissing, load

    try:
        load()
        importlib.import_module("swarmd.node.engine.cpu.native_compute")
    except NativeMissing:
        importlib.import_module("swarmd.node.engine.backends.torch_cpu")


def load_compute(
    checkpoint: Checkpoint,
    start: int,
    end: int,
    *,
    device: str,
    kernels: Kernels,
    threads: int,
    kv_tokens: int,
    context: int | None = None,
    progress: ReportProgress | None = None,
) -> StageCompute:
    """See `StageEngine.load`."""
    require_backend(device)
    if device == "metal" or device == "mlx-cpu":
        return _load_mlx(checkpoint, start, end, device, kv_tokens, context, progress)
    if device.startswith("cuda"):
        from swarmd.node.engine.cuda_compute import CudaCompute

        return CudaCompute.load(checkpoint, start, end, device, kv_tokens=kv_tokens, context=context, progress=progress)
    if kernels == "torch" or not _native_usable(checkpoint, start, end, required=kernels == "native"):
        return _load_torch(checkpoint, start, end, threads, kv_tokens, context, progress)
    from swarmd.node.engine.cpu.native_compute import NativeCompute

    return NativeCompute.load(
        checkpoint, start, end, threads=threads, kv_tokens=kv_tokens, context=context, progress=progress
    )


def _native_usable(checkpoint: Checkpoint, start: int, end: int, *, required: bool) -> bool:
    """Whether our own kernels are there and can compute the model. Raises NativeMissing if they are `required`."""
    from swarmd.node.engine.cpu.bindings import NativeMissing, load
    from swarmd.node.engine.cpu.native_compute import why_not

    try:
        load()
        if reason := why_not(checkpoint, start, end):
            raise NativeMissing(f"the native kernels cannot compute {checkpoint.name}: {reason}")
    except NativeMissing as error:
        if required:
            raise
        log.warning("%s; computing with plain torch, which is slower", error)
        return False
    return True


def _load_torch(
    checkpoint: Checkpoint,
    start: int,
    end: int,
    threads: int,
    kv_tokens: int,
    context: int | None,
    progress: ReportProgress | None,
) -> StageCompute:
    """Plain torch on the CPU; `threads` sets torch's thread count for the whole process."""
    import torch

    from swarmd.node.engine.backends.torch_cpu import TorchCpuBackend
    from swarmd.node.engine.decoder_compute import DecoderCompute

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    return DecoderCompute.load(
        checkpoint, start, end, TorchCpuBackend(), kv_tokens=kv_tokens, context=context, progress=progress
    )


def _load_mlx(
    checkpoint: Checkpoint,
    start: int,
    end: int,
    device: Literal["metal", "mlx-cpu"],
    kv_tokens: int,
    context: int | None,
    progress: ReportProgress | None,
) -> StageCompute:
    """MLX, which takes the number of its threads itself. Raises ValueError where it is not, or has no such device."""
    if importlib.util.find_spec("mlx") is None:
        raise ValueError(f"{device} needs MLX, which is not installed: pip install 'swarmd[mlx]'")
    from swarmd.node.engine.backends.mlx import MlxBackend
    from swarmd.node.engine.decoder_compute import DecoderCompute

    return DecoderCompute.load(
        checkpoint, start, end, MlxBackend(device), kv_tokens=kv_tokens, context=context, progress=progress
    )
