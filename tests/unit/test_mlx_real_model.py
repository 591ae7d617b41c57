"""The default model, whole, by MLX: the same greedy tokens as plain torch in fp32, alone and in a pipeline with it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from support.mlx_device import MLX_DEVICE

from swarmd.node.engine.computes import load_compute
from swarmd.node.engine.stage_compute import Span, StageCompute
from swarmd.node.models.checkpoint import open_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
pytest.importorskip("mlx.core", reason="MLX is not installed (pip install 'swarmd[mlx]')")

PROMPT = [504, 3575, 282, 4649, 314]  # "The capital of France is"
N_TOKENS = 100
CUT = 17


def pipeline(path: Path, *devices: str) -> list[StageCompute]:
    with open_checkpoint(path) as checkpoint:
        edges = [0, CUT, checkpoint.spec.n_layers] if len(devices) == 2 else [0, checkpoint.spec.n_layers]
        return [
            load_compute(checkpoint, start, end, device=device, kernels="torch", threads=1, kv_tokens=256)
            for (start, end), device in zip(pairwise(edges), devices, strict=True)
        ]


def logits(stages: list[StageCompute], tokens: list[int], start: int, dtype: str, wanted: list[int]) -> np.ndarray:
    hidden, span, found = None, Span(1, start, tokens), None
    for stage in stages:
        out = stage.forward([span], hidden, dtype, wanted)  # pyright: ignore[reportArgumentType]
        hidden, found = out.payload, out.logits
    assert found is not None
    return found.copy()


@pytest.fixture(scope="module")
def expected(smollm2_path: Path) -> list[int]:
    """Greedy tokens of plain torch, fp32, step by step."""
    torch.set_grad_enabled(False)
    return greedy(pipeline(smollm2_path, "cpu"))


def greedy(stages: list[StageCompute]) -> list[int]:
    for stage in stages:
        stage.open(1)
    tokens, new = list(PROMPT), list(PROMPT)
    while len(tokens) < len(PROMPT) + N_TOKENS:
        row = logits(stages, new, len(tokens) - len(new), "f32", [len(new) - 1])[0]
        new = [int(row.argmax())]
        tokens += new
    return tokens[len(PROMPT) :]


@pytest.mark.parametrize("devices", [(MLX_DEVICE,), ("cpu", MLX_DEVICE), (MLX_DEVICE, "cpu")], ids="|".join)
def test_greedy_tokens_equal_those_of_plain_torch(
    devices: tuple[str, ...], smollm2_path: Path, expected: list[int]
) -> None:
    assert len(set(expected)) > 10, "a text that repeats itself would say little"
    assert greedy(pipeline(smollm2_path, *devices)) == expected


def test_bf16_on_the_wire_moves_logits_little(smollm2_path: Path, expected: list[int]) -> None:
    stages = pipeline(smollm2_path, "cpu", MLX_DEVICE)
    tokens, rows = PROMPT + expected[:24], list(range(len(PROMPT) + 24))
    found = {}
    for dtype in ("f32", "bf16"):
        for stage in stages:
            stage.free(1)
            stage.open(1)
        found[dtype] = logits(stages, tokens, 0, dtype, rows)
    moved = float(np.abs(found["bf16"] - found["f32"]).max())
    print(f"bf16 on the wire moves logits by at most {moved:.3f}")
    assert 0 < moved < 0.5
