"""On a real GPU: the architectures in fp32, graphs against plain calls, the Triton kernel. Skips without one."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.architectures import FOLDERS, Oracle, check_batch, check_model, load_torch, prompt_of
from support.cuda_twin import load_twin

from swarmd.node.engine.stage_compute import Span, StageCompute

NO_GPU = not torch.cuda.is_available()
pytestmark = pytest.mark.skipif(NO_GPU, reason="this machine has no CUDA GPU, or its torch is built without CUDA")
ON_GPU: dict[str, Any] = {"device": "cuda:0", "fused": True}
STEPS = 40


def graphs() -> Any:
    from swarmd.node.engine.cuda_graphs import CudaGraphs

    return CudaGraphs()


def load_captured(path: Path, start: int, end: int, context: int) -> StageCompute:
    return load_twin(path, start, end, context, **ON_GPU, replays=graphs())


def gpu_then_cpu(path: Path, start: int, end: int, context: int) -> StageCompute:
    return (load_captured if start == 0 else load_torch)(path, start, end, context)


@pytest.fixture(scope="module", params=[name for name in FOLDERS if not name.startswith("deepseek")])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Oracle, Path, int]:
    model = FOLDERS[request.param]()
    folder = tmp_path_factory.mktemp("gpu") / "model"
    model.save_pretrained(folder)
    return Oracle.of(model, prompt_of(request.param)), folder, model.config.num_hidden_layers


def test_architectures_in_fp32(saved: tuple[Oracle, Path, int]) -> None:
    oracle, folder, n_layers = saved
    check_model(oracle, folder, [0, n_layers], load_captured)
    check_model(oracle, folder, [0, n_layers // 2, n_layers], gpu_then_cpu)
    other = Oracle.of(oracle.model, oracle.prompt - 7, seed=5)
    check_batch(oracle, other, folder, [0, n_layers], load_captured)


def test_graphs_give_what_calls_give_on_the_default_model(smollm2_path: Path) -> None:
    """In bf16, for one sequence and for five, across the sizes of the tables."""
    load = partial(load_twin, smollm2_path, 0, 30, 512, **ON_GPU, kind=torch.bfloat16)
    captured, called = load(replays=graphs()), load()
    for stage in (captured, called):
        for seq in range(5):
            stage.open(seq)
            stage.forward([Span(seq, 0, list(range(100, 110 + 7 * seq)))], None, "f32", ())
    for step in range(STEPS):
        spans = [Span(seq, 10 + 7 * seq + step, [500 + step]) for seq in range(5)]
        first, second = (stage.forward(spans, None, "f32", range(5)).logits for stage in (captured, called))
        assert first is not None
        assert second is not None
        assert np.array_equal(first, second)


def test_the_triton_kernel_compiled() -> None:
    script = Path(__file__).parents[1] / "support" / "triton_forms.py"
    command = [sys.executable, str(script), "cuda:0"]
    done = subprocess.run(command, env={"PYTHONPATH": str(script.parents[1])}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
