"""The Triton kernels without a GPU: every canonical form and kind of attention against float64, in Triton's
interpreter, and compiled to machine code for several generations of GPUs.

The interpreter must be asked for before triton is imported, so what it checks runs in processes of their own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.weight_forms import FORMS

HAS_TRITON = importlib.util.find_spec("triton") is not None
pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not here (the dev extra brings it on Linux x86-64)")

GENERATIONS = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Compute capability (Ampere, Ada, Hopper, Blackwell) -> KiB of shared memory that a program may take (CUDA C++
Programming Guide, table of technical specifications)."""
ALL_KINDS = ("F16", "Q4_K", "Q6_K", "Q8_0", "IQ4_XS", "MXFP4", "MLX 3 bits, groups of 64", "fp32 scales")
"""Dense; scales and biases of one and two levels, and none; codes within words and across; codebooks."""


@pytest.mark.parametrize(
    ("script", "checks"), [("triton_forms", len(FORMS)), ("triton_attention", 8), ("triton_steps", 4)]
)
def test_against_float64_in_the_interpreter(script: str, checks: int) -> None:
    path = Path(__file__).parents[1] / "support" / f"{script}.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(path.parents[1])}
    done = subprocess.run([sys.executable, str(path)], env=environment, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(" ok\n") == checks


@pytest.fixture
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.slow
@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize("form", ALL_KINDS)
def test_products_compile(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from support.triton_compile import Compiler

    from swarmd.node.engine.backends import triton_product
    from swarmd.node.engine.backends.torch_packed import PackedPart, packed

    part = packed([FORMS[form](64, 256, np.random.default_rng(0))], torch.device("cpu")).parts[0]
    x, chosen = torch.zeros(2, 256, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int64)
    kernels = {name: getattr(triton_product, name) for name in ("multiply", "dequantize")}
    for capability in GENERATIONS if form == "Q4_K" else (80,):
        for name, kernel in kernels.items():
            compiler = Compiler(kernel, capability)
            monkeypatch.setattr(triton_product, name, compiler)
            if name == "multiply":
                triton_product.product(x, part)
                assert "mma" in compiler.assembly, "tensor cores are used"
                triton_product.chosen_product(x, part, chosen, 2)
            elif isinstance(part, PackedPart):
                triton_product.values(part, 0, 64, torch.bfloat16)
            assert all(size <= GENERATIONS[capability] << 10 for size in compiler.shared)


@pytest.mark.slow
@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dims", "latent", "options"),
    [
        pytest.param(32, 8, (128, 128), False, {}, id="Llama 3 8B"),
        pytest.param(16, 8, (256, 256), False, {"softcap": 50.0, "window": 4096}, id="Gemma 2 9B"),
        pytest.param(64, 8, (64, 64), False, {"window": 128, "sinks": torch.zeros(64)}, id="gpt-oss"),
        pytest.param(128, 1, (64, 512), True, {}, id="DeepSeek-V3"),
    ],
)
def test_attention_of_real_models_compiles(
    heads: int, kv_heads: int, dims: tuple[int, int], latent: bool, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    from support.triton_compile import Compiler

    from swarmd.node.engine.backends import triton_attention

    keys, values = (torch.zeros(2, 16, kv_heads, dim, dtype=torch.bfloat16) for dim in dims)
    queries, absorbed = torch.zeros(1, heads, dims[0]), torch.zeros(1, heads, dims[1])
    tables, positions = torch.zeros(1, 4, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    how = {"scale": 0.1, "softcap": None, "window": None, "sinks": None} | options
    for capability, kib in GENERATIONS.items():
        compilers = [Compiler(getattr(triton_attention, name), capability) for name in ("attend_part", "join")]
        with monkeypatch.context() as patch:
            patch.setattr(triton_attention, "attend_part", compilers[0])
            patch.setattr(triton_attention, "join", compilers[1])
            triton_attention.attend(queries, absorbed if latent else None, keys, values, tables, positions, **how)
        assert all(compiler.shared[0] <= kib << 10 for compiler in compilers)
        assert "mma" in compilers[0].assembly, "tensor cores are used"
