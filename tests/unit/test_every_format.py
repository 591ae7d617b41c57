"""Every format of weights, on every kind of device: the logits of `transformers` with the values that it stands for.

The broad view, of which docs/models.md is made. That the values themselves are the file's, to the last bit, is shown
where each format is read.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers as hf
from support.architectures import Oracle
from support.backends import BACKENDS, Backend, differences, found, loader_of
from support.gguf_blocks import weight_blocks
from support.gguf_from_hf import write_gguf_of
from support.quantized_folders import awq, fp8, gptq, mlx, mxfp4_folder, write_folder
from support.tiny_hf import CASES, SIZES

from swarmd.node.engine.cpu.native_compute import why_not
from swarmd.node.engine.gguf_blocks import DENSE_TYPES, QUANTIZED_FORMS
from swarmd.node.engine.quantized import BITS, GROUP_SIZES
from swarmd.node.engine.tensors import tensor_shapes
from swarmd.node.models.checkpoint import Checkpoint, open_checkpoint
from swarmd.node.models.gguf_types import GGUFType
from swarmd.node.models.hf_int4 import GPTQ_BITS

WIDTHS = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
MATRIX = "model.layers.0.self_attn.q_proj.weight"
EXPERT = "model.layers.0.mlp.experts.0.gate_proj.weight"
TOLERANCE = {"native": 1.5e-2, "torch": 2e-4, "mlx": 2e-4, "cuda": 3e-2}
"""Of the logits' whole range. The kernels multiply codes with activations of 8 bits, which may tip a token's attention
where that is sharp: of them the common token counts. CUDA computes in bf16."""

Build = Callable[[Path], tuple[hf.PreTrainedModel, Path]]
"""Writes a model below a folder -> the oracle with the values that are written, and what to open."""


def tiny(**options: Any) -> hf.PreTrainedModel:
    torch.manual_seed(1)
    config = hf.LlamaConfig(**{**SIZES, **WIDTHS, "attn_implementation": "eager", **options})
    return hf.LlamaForCausalLM(config).float().eval()


def of_gguf(kind: GGUFType) -> Build:
    ggml = gguf.GGMLQuantizationType(int(kind))

    def build(place: Path) -> tuple[hf.PreTrainedModel, Path]:
        model = CASES["llama"]() if kind in DENSE_TYPES else tiny(tie_word_embeddings=True)

        def raw_of(values: Any) -> Any:
            deviation = 1.2 * values.shape[1] ** -0.5
            return ggml, weight_blocks(kind, *values.shape, deviation=deviation, seed=len(values))

        raw: Any = {"kind": ggml} if kind in DENSE_TYPES else {"raw_of": raw_of}
        path = write_gguf_of(model, place / "m.gguf", **raw)
        with open_checkpoint(path) as checkpoint:
            model.load_state_dict(state_of(checkpoint))
        return model, path

    return build


def of_folder(key: str, description: dict[str, Any], pack: Any, *, rounded: bool = False) -> Build:
    def build(place: Path) -> tuple[hf.PreTrainedModel, Path]:
        model = tiny()
        folder = write_folder(place / "m", model, description, pack(), key)
        values = {
            name: value.bfloat16().float() if rounded and name.endswith("_proj.weight") else value
            for name, value in folder.values.items()
        }
        model.load_state_dict(values)
        return model, folder.path

    return build


def of_floats(kind: torch.dtype) -> Build:
    def build(place: Path) -> tuple[hf.PreTrainedModel, Path]:
        model: Any = CASES["llama"]()
        rounded = copy.deepcopy(model).to(kind)
        rounded.save_pretrained(place / "m")
        model.load_state_dict(rounded.state_dict())  # and not its rotary angles, which are no part of a file
        return model, place / "m"

    return build


def of_gpt_oss(place: Path) -> tuple[hf.PreTrainedModel, Path]:
    model, expected = mxfp4_folder(place / "m")
    model.load_state_dict(expected, strict=False)
    return model, place / "m"


def state_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """What a file of a Llama holds, under `transformers`' names; `test_quantized` compares the values themselves."""
    names = tensor_shapes(checkpoint.spec, 0, checkpoint.spec.n_layers)
    state = {name: torch.from_numpy(checkpoint.read(name).dequantize()) for name in names}
    state = {name.replace("pre_feedforward", "post_attention"): values for name, values in state.items()}
    return {"lm_head.weight": state["model.embed_tokens.weight"], **state}


def _gptq(bits: int, **more: Any) -> Build:
    described = {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": False, **more}
    added = 0 if "checkpoint_format" in more else 1
    return of_folder("quantization_config", described, lambda: gptq(bits, 32, added=added))


def _mlx(bits: int, group: int, mode: str = "affine") -> Build:
    described = {"group_size": group, "bits": bits, "mode": mode}
    return of_folder("quantization", described, lambda: mlx(bits, group, mode))


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
MLX_GROUPS = [group for group in GROUP_SIZES if group >= 32]
"""Smaller ones MLX does not make."""

FORMATS: dict[str, tuple[str, Build]] = {
    **{kind.name: ("gguf types", of_gguf(kind)) for kind in (*DENSE_TYPES, *QUANTIZED_FORMS)},
    "F32": ("gguf types", of_gguf(GGUFType.F32)),
    "folder F32": ("folder formats", of_floats(torch.float32)),
    "folder F16": ("folder formats", of_floats(torch.float16)),
    "folder BF16": ("folder formats", of_floats(torch.bfloat16)),
    "fp8": ("folder formats", of_folder("quantization_config", FP8, lambda: fp8(128), rounded=True)),
    **{f"gptq, {bits} bits": ("folder formats", _gptq(bits)) for bits in GPTQ_BITS},
    "gptq_v2, 4 bits": ("folder formats", _gptq(4, checkpoint_format="gptq_v2")),
    "awq": ("folder formats", of_folder("quantization_config", AWQ, lambda: awq(32))),
    "mxfp4": ("folder formats", of_gpt_oss),
    "MLX mxfp4": ("folder formats", _mlx(4, 32, "mxfp4")),
    **{
        f"MLX {bits} bits, groups of {group}": ("folder formats", _mlx(bits, group))
        for bits in BITS
        for group in MLX_GROUPS
    },
}
"""By name: the table that it belongs to, and how such a model is made."""


@dataclass(frozen=True)
class Written:
    table: str
    name: str
    oracle: Oracle
    path: Path


@pytest.fixture(scope="module", params=FORMATS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    name: str = request.param
    if name.startswith("MLX") and importlib.util.find_spec("mlx") is None:
        pytest.skip("MLX, which writes such folders, is not installed (pip install mlx)")
    table, build = FORMATS[name]
    model, path = build(tmp_path_factory.mktemp("format"))
    return Written(table, name.removeprefix("folder "), Oracle.of(model, 32), path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_are_those_of_the_values(written: Written, backend: Backend, proves: Callable[..., None]) -> None:
    with open_checkpoint(written.path) as checkpoint:
        layers, moe = checkpoint.spec.n_layers, checkpoint.spec.moe is not None
        matrix = EXPERT if moe else MATRIX
        rows, columns = tensor_shapes(checkpoint.spec, 0, 1)[matrix]
        bits = checkpoint.form(matrix).nbytes(rows, columns) * 8 / (rows * columns)
        reason = why_not(checkpoint, 0, layers) if backend == "native" else ""
    if missing := found(backend)[1] or reason:
        proves(written.table, written.name, backend, "torch instead" if reason else "not run", words=missing, bits=bits)
        pytest.skip(missing)
    errors = differences(written.oracle, written.path, layers, loader_of(backend))
    worst = float(np.median(errors) if backend == "native" else errors.max())
    assert worst < TOLERANCE[backend]
    proves(written.table, written.name, backend, "works", delta=worst, bits=bits)
