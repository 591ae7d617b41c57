"""Run as a script with TRITON_INTERPRET=1: whole stages with the Triton kernels, as on a GPU, against plain torch."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from support.architectures import FOLDERS, load_torch
from support.cuda_twin import load_twin
from support.tiny_gguf import TinyModel, Type, write_tiny_gguf

from swarmd.node.engine.backends import triton_attention
from swarmd.node.engine.stage_compute import Span, StageCompute


def steps() -> Sequence[list[Span]]:
    """Two prompts, one beside a single token, then single tokens of both across the end of a block."""
    begin = [[Span(0, 0, list(range(20, 45)))], [Span(0, 25, [9]), Span(1, 0, list(range(30, 45)))]]
    return [*begin, *([Span(1, 15 + i, [50 + i]), Span(0, 26 + i, [60 + i])] for i in range(3))]


def logits_of(stage: StageCompute) -> list[np.ndarray]:
    """Of every step's last row of each sequence."""
    for seq in range(2):
        stage.open(seq)
    found = []
    for spans in steps():
        ends = np.cumsum([len(span.tokens) for span in spans]) - 1
        logits = stage.forward(spans, None, "f32", ends.tolist()).logits
        assert logits is not None
        found.append(logits.copy())
    return found


def check(path: Path, layers: int) -> None:
    """Raises AssertionError."""
    expected = logits_of(load_torch(path, 0, layers, 64))
    found = logits_of(load_twin(path, 0, layers, 64, fused=True))
    for step, (mine, oracle) in enumerate(zip(found, expected, strict=True)):
        worst = np.abs(mine - oracle).max() / (oracle.max() - oracle.min())
        assert worst < 2e-5, f"step {step}: logits are off by {worst:.2g} of their range"


def main() -> None:
    """Quantized; windows and soft caps; experts and sinks; latents."""
    triton_attention.PROGRAMS = 8  # each takes the interpreter milliseconds
    with tempfile.TemporaryDirectory() as folder:
        types = {"token_embd": Type.Q8_0, "attn_v": Type.Q5_1}
        check(write_tiny_gguf(Path(folder) / "quantized.gguf", TinyModel(type=Type.Q4_0, types=types)), 4)
        print("quantized ok", flush=True)
        for name in ("gemma2", "gpt-oss", "deepseek_v3"):
            path = Path(folder) / name
            FOLDERS[name]().save_pretrained(path)
            check(path, 4)
            print(f"{name} ok", flush=True)


if __name__ == "__main__":
    main()
