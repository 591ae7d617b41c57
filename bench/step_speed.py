"""Time a whole model's steps: a prompt of 256 tokens, then single tokens, by each kind of kernels in turns.

python bench/step_speed.py [MODEL] [--threads N] [--kernels native torch]

Without a MODEL, a random mixture of experts: 4 layers of 32 experts with 4-bit weights, 4 of them for each row, hidden
size 768, experts of 512. No links, no sampling, no HTTP: what computing alone allows.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from figures import Metric
from support.memory_checkpoint import MemoryCheckpoint

from swarmd.node.engine.computes import load_compute
from swarmd.node.engine.spec import ArchSpec, LayerSpec, MoeSpec, RopeSpec
from swarmd.node.engine.stage_compute import Span, StageCompute
from swarmd.node.models.checkpoint import Checkpoint, open_checkpoint

PROMPT, REPLY, TURNS = 256, 24, 5
SPEED = Metric("speed", "tok/s", higher_is_better=True)

MIXTURE = ArchSpec(
    architecture="mixture",
    hidden_size=768,
    n_heads=12,
    n_kv_heads=4,
    head_dim=64,
    ffn_size=512,
    vocab_size=8192,
    context_length=4096,
    rms_eps=1e-5,
    layers=(LayerSpec(moe=True),) * 4,
    ropes=(RopeSpec(10000.0, 64),),
    qk_norm="head",
    moe=MoeSpec(n_experts=32, top_k=4, ffn_size=512),
)


def speeds(stage: StageCompute, seq: int) -> tuple[float, float]:
    """(prompt, single tokens) in tok/s of one sequence; the best token counts, since others have the cores as well."""
    stage.open(seq)
    began = time.perf_counter()
    stage.forward([Span(seq, 0, range(PROMPT))], None, "f32", [PROMPT - 1])
    prompt = PROMPT / (time.perf_counter() - began)
    best = 0.0
    for position in range(PROMPT, PROMPT + REPLY):
        began = time.perf_counter()
        stage.forward([Span(seq, position, [position])], None, "f32", [0])
        best = max(best, 1 / (time.perf_counter() - began))
    stage.free(seq)
    return prompt, best


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--kernels", nargs="+", choices=["native", "torch"], default=["native", "torch"])
    asked = parser.parse_args()
    checkpoint: Checkpoint = open_checkpoint(asked.model) if asked.model else MemoryCheckpoint(MIXTURE, bits=4)
    layers, tokens = checkpoint.spec.n_layers, 2 * PROMPT
    stages = [
        load_compute(checkpoint, 0, layers, device="cpu", kernels=kind, threads=asked.threads, kv_tokens=tokens)
        for kind in asked.kernels
    ]
    found: list[list[tuple[float, float]]] = [[] for _ in stages]
    for turn in range(TURNS):
        for stage, results in zip(stages, found, strict=True):
            results.append(speeds(stage, turn))
    print(f"{asked.threads} threads, load {os.getloadavg()[0]:.1f}, {TURNS} turns\n")
    print("| kernels | prompt | single tokens |\n| --- | --- | --- |")
    for stage, results in zip(stages, found, strict=True):
        prompts, singles = zip(*results, strict=True)
        print(f"| {stage.name} | {SPEED.cell(prompts)} | {SPEED.cell(singles)} |")


if __name__ == "__main__":
    main()
