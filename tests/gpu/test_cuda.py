"""On a real GPU: the architectures, graphs against plain calls, the Triton kernels. Skips without one."""

from __future__ import annotations

import os
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

from swarmd.node.engine.cuda_graphs import Calls
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


@pytest.fixture(scope="module", params=FOLDERS)
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


@pytest.mark.parametrize("name", ["llama 3", "gemma2", "gpt-oss", "qwen2moe", "deepseek_v2 in groups"])
@pytest.mark.parametrize("fused", [True, False])
def test_graphs_give_what_calls_give(name: str, fused: bool, tmp_path: Path) -> None:
    """In fp32, in two stages, for sequences that come and go."""
    FOLDERS[name]().save_pretrained(tmp_path)
    options: dict[str, Any] = {"device": "cuda:0", "fused": fused}
    pipelines = [
        [load_twin(tmp_path, *layers, 200, **options, replays=way()) for layers in ((0, 2), (2, 4))]
        for way in (graphs, Calls)
    ]

    def step(spans: list[Span]) -> None:
        found = []
        for first, last in pipelines:
            payload = first.forward(spans, None, "f32", ()).payload
            found.append(last.forward(spans, payload, "f32", range(len(spans))).logits)
        assert np.allclose(*found, rtol=1e-5, atol=1e-5)  # cuBLAS may choose differently within a capture

    for seq in range(5):
        for stage in (stage for pipeline in pipelines for stage in pipeline):
            stage.open(seq)
        step([Span(seq, 0, list(range(20, 30 + 7 * seq)))])
    for at in range(20):
        step([Span(seq, 10 + 7 * seq + at, [40 + at]) for seq in range(5 if at < 10 else 3)])


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


@pytest.mark.parametrize("name", ["triton_forms", "triton_attention"])
def test_the_triton_kernels_compiled(name: str) -> None:
    script = Path(__file__).parents[1] / "support" / f"{name}.py"
    command, environment = [sys.executable, str(script), "cuda:0"], {**os.environ, "PYTHONPATH": str(script.parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
