"""Decode speed on a CUDA GPU: `python bench/cuda_decode.py [--model PATH] [--device cuda:0]`.

One model whole on the GPU, in bf16, with 1, 8 and 32 sequences of 256 tokens each: tokens per second with steps
replayed as graphs and the fused kernel, with plain calls and the fused kernel, and with graphs and dequantized weights.
In turns, the median of five; the first row is what swarmd does.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from pathlib import Path

import torch

from swarmd.node.engine.backends.torch_cuda import TorchCudaBackend
from swarmd.node.engine.cuda_compute import CudaCompute
from swarmd.node.engine.cuda_graphs import Calls, CudaGraphs
from swarmd.node.engine.stage_compute import Span
from swarmd.node.engine.weights import load_stage_weights
from swarmd.node.models.catalog import DEFAULT_MODEL
from swarmd.node.models.checkpoint import open_checkpoint
from swarmd.node.models.store import ModelStore

PROMPT, STEPS, REPEATS = 256, 64, 5
WAYS = {"graphs, fused": (True, True), "calls, fused": (False, True), "graphs, dequantized": (True, False)}


def load(path: Path, device: str, *, graphs: bool, fused: bool) -> CudaCompute:
    """The whole model on the GPU."""
    torch.set_grad_enabled(False)
    torch.cuda.set_device(device)
    backend = TorchCudaBackend(torch.device(device), fused=fused)
    with open_checkpoint(path) as checkpoint:
        end = checkpoint.spec.n_layers
        weights = load_stage_weights(checkpoint, 0, end, backend)
        replays = CudaGraphs() if graphs else Calls()
        return CudaCompute(checkpoint.spec, 0, end, weights, backend, 32 * (PROMPT + 16 * STEPS), replays)


def speed(compute: CudaCompute, sequences: int) -> float:
    """Tokens per second of all sequences together; the first steps, which capture, are not counted."""
    for seq in range(sequences):
        compute.open(seq)
        compute.forward([Span(seq, 0, [7 + seq] * PROMPT)], None, "f32", ())
    began = 0.0
    for step in range(-2, STEPS):
        if step == 0:
            torch.cuda.synchronize()
            began = time.perf_counter()
        spans = [Span(seq, PROMPT + 2 + step, [11]) for seq in range(sequences)]
        compute.forward(spans, None, "f32", range(sequences))
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    for seq in range(sequences):
        compute.free(seq)
    return sequences * STEPS / seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--data-dir", type=Path, default=Path.home() / ".swarmd" / "models")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this machine has no CUDA GPU, or its torch is built without CUDA")
    path = asyncio.run(ModelStore(arguments.data_dir).ensure(arguments.model, lambda progress: None)).path
    computes = {name: load(path, arguments.device, graphs=way[0], fused=way[1]) for name, way in WAYS.items()}
    print(f"{arguments.model} on {torch.cuda.get_device_name(arguments.device)}, tokens per second\n")
    print("| way | 1 sequence | 8 | 32 |\n| --- | --- | --- | --- |")
    found: dict[str, list[list[float]]] = {name: [[], [], []] for name in WAYS}
    for _ in range(REPEATS):
        for name, compute in computes.items():
            for values, sequences in zip(found[name], (1, 8, 32), strict=True):
                values.append(speed(compute, sequences))
    for name, columns in found.items():
        print(f"| {name} | {' | '.join(f'{statistics.median(values):.0f}' for values in columns)} |")


if __name__ == "__main__":
    main()
