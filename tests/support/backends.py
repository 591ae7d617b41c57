"""What computes a stage, as a person chooses it: the columns of docs/models.md."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from support.architectures import STEPS, LoadStage, Oracle, Stages
from support.kernels import why_missing
from support.mlx_device import MLX_DEVICE

from swarmd.node.engine.computes import load_compute
from swarmd.node.engine.devices import look
from swarmd.node.engine.stage_compute import StageCompute
from swarmd.node.models.checkpoint import open_checkpoint

Backend = Literal["native", "torch", "mlx", "cuda"]
BACKENDS: tuple[Backend, ...] = ("native", "torch", "mlx", "cuda")
KINDS = {"mlx": "metal" if MLX_DEVICE == "metal" else "mlx", "cuda": "cuda"}
"""By what name each is looked for."""


@cache
def found(backend: Backend) -> tuple[str, str]:
    """The device and "", or "" and why there is none here."""
    if backend == "native":
        return "cpu", why_missing()
    if backend == "torch":
        return "cpu", ""
    seen = look([KINDS[backend]])
    device = next((device["id"] for device in seen["devices"]), "")
    return device, "" if device else "; ".join(seen["missing"].values())


def loader_of(backend: Backend) -> LoadStage:
    """Loads as a stage process does. Skips the test where there is no such device, with the reason."""
    device, missing = found(backend)
    if missing:
        pytest.skip(missing)

    def load(path: Path, start: int, end: int, context: int) -> StageCompute:
        with open_checkpoint(path) as checkpoint:
            return load_compute(
                checkpoint,
                start,
                end,
                device=device,
                kernels="native" if backend == "native" else "torch",
                threads=2,
                kv_tokens=3 * context,
                context=context,
            )

    return load


def differences(oracle: Oracle, path: Path, layers: int, load: LoadStage) -> np.ndarray:
    """Prefill, then token by token, unsplit: each token's worst logit against the oracle's, of their whole range."""
    stages = Stages(path, [0, layers], load, len(oracle.tokens))
    logits = [stages.step({0: oracle.tokens[: oracle.prompt]})[0]]
    logits += [stages.step({0: [token]})[0] for token in oracle.tokens[oracle.prompt :]]
    assert len(logits) == STEPS + 1
    return np.abs(np.concatenate(logits) - oracle.logits).max(-1) / (oracle.logits.max() - oracle.logits.min())
