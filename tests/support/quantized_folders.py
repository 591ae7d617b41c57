"""Tiny HF folders whose matrices are quantized as other tools do it, each beside the values that it stands for.

The packing here is written from the tools' own (named with each), not from the reader's code.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from support.tiny_hf import CASES

Tensors = dict[str, torch.Tensor]
Pack = Callable[[str, torch.Tensor], tuple[Tensors, torch.Tensor]]
"""A matrix by its stem (without ".weight") -> the tensors that hold it, and its values, float32."""


MXFP4_EXPONENTS = (120, 126)
"""Of the scales that experts get: values of some 0.02 to 2."""


@dataclass(frozen=True)
class Folder:
    """`values`: HF name -> what a reader must find, float32."""

    path: Path
    values: Tensors


def write_folder(path: Path, model: hf.PreTrainedModel, description: dict[str, Any], pack: Pack, key: str) -> Folder:
    """Save a model with all linear layers packed, and the description under `key` of config.json."""
    tensors: Tensors = {}
    values: Tensors = {}
    for name, tensor in model.state_dict().items():
        stem = name.removesuffix(".weight")
        if name.endswith(("_proj.weight", "_proj_with_mqa.weight")) and tensor.ndim == 2:
            stored, values[name] = pack(stem, tensor)
            tensors |= stored
        else:
            tensors[name] = values[name] = tensor.float().contiguous()
    path.mkdir()
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path / "model.safetensors")
    config = json.loads(model.config.to_json_string(use_diff=False)) | {key: description}
    (path / "config.json").write_text(json.dumps(config))
    return Folder(path, values)


def gptq(bits: int, group: int, *, added: int = 1, scale_type: torch.dtype = torch.float16) -> Pack:
    """As AutoGPTQ's `QuantLinear.pack` does; `added` is what its zero points lack."""

    def pack(stem: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        outputs, inputs = weight.shape
        random = torch.Generator().manual_seed(len(stem) + inputs)
        codes = torch.randint(0, 1 << bits, (inputs, outputs), generator=random)
        zeros = torch.randint(1, 1 << bits, (inputs // group, outputs), generator=random)
        scales = (torch.rand(zeros.shape, generator=random) / (1 << bits)).to(scale_type)
        per_word = 32 // bits
        qweight = torch.zeros(inputs // per_word, outputs, dtype=torch.int64)
        for i in range(inputs):
            qweight[i // per_word] |= codes[i] << (bits * (i % per_word))
        qzeros = torch.zeros(inputs // group, outputs // per_word, dtype=torch.int64)
        for o in range(outputs):
            qzeros[:, o // per_word] |= (zeros[:, o] - added) << (bits * (o % per_word))
        groups = torch.arange(inputs) // group
        values = scales.float()[groups] * (codes - zeros[groups]).float()
        stored = {
            "qweight": _int32(qweight),
            "qzeros": _int32(qzeros),
            "scales": scales,
            "g_idx": groups.to(torch.int32),
        }
        return {f"{stem}.{part}": tensor for part, tensor in stored.items()}, values.T.contiguous()

    return pack


def awq(group: int) -> Pack:
    """As AutoAWQ's `WQLinear_GEMM.from_linear` does."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def packed(codes: torch.Tensor) -> torch.Tensor:
        words = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
        for column in range(words.shape[1]):
            for i in range(8):
                words[:, column] |= codes[:, column * 8 + order[i]] << (i * 4)
        return _int32(words)

    def pack(stem: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        outputs, inputs = weight.shape
        random = torch.Generator().manual_seed(len(stem) + outputs)
        codes = torch.randint(0, 16, (inputs, outputs), generator=random)
        zeros = torch.randint(0, 16, (inputs // group, outputs), generator=random)
        scales = (torch.rand(zeros.shape, generator=random) / 16).half()
        groups = torch.arange(inputs) // group
        values = (codes - zeros[groups]).float() * scales.float()[groups]
        stored = {f"{stem}.qweight": packed(codes), f"{stem}.qzeros": packed(zeros), f"{stem}.scales": scales}
        return stored, values.T.contiguous()

    return pack


def fp8(block: int) -> Pack:
    """As DeepSeek-V3's `weight_dequant` reads it."""

    def pack(stem: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        rows, columns = weight.shape
        stored = (weight * 50).to(torch.float8_e4m3fn)
        blocks = (-(-rows // block), -(-columns // block))
        scales = torch.rand(blocks, generator=torch.Generator().manual_seed(rows)) / 40 + 0.01
        wide = scales.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]
        return {f"{stem}.weight": stored, f"{stem}.weight_scale_inv": scales}, stored.float() * wide

    return pack


def mxfp4_folder(path: Path) -> tuple[hf.PreTrainedModel, Tensors]:
    """Save a gpt-oss with random experts in MXFP4: the model, and its experts' values by `transformers`."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    model = CASES["gpt-oss"]()
    model.save_pretrained(path)
    tensors, random = load_file(path / "model.safetensors"), torch.Generator().manual_seed(3)
    expected: Tensors = {}
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=random, dtype=torch.uint8)
        scales = torch.randint(*MXFP4_EXPONENTS, blocks.shape[:-1], generator=random, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        expected[name] = convert_moe_packed_tensors(blocks.clone(), scales.clone(), dtype=torch.float32)
    save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (path / "config.json").write_text(json.dumps(config))
    return model, expected


def mlx(bits: int, group: int, mode: str = "affine", scale_type: str = "float16") -> Pack:
    """By MLX itself."""
    import mlx.core as mx

    def pack(stem: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        given = mx.array(weight.numpy()).astype(getattr(mx, scale_type))
        parts = mx.quantize(given, group_size=group, bits=bits, mode=mode)
        names = ("weight", "scales", "biases")
        stored = {f"{stem}.{name}": _from_mlx(part) for name, part in zip(names, parts, strict=False)}
        wide = [parts[0], *(part if part.dtype == mx.uint8 else part.astype(mx.float32) for part in parts[1:])]
        # In fp32: the values are products and sums of the stored numbers, not of rounded ones.
        values = mx.dequantize(*wide, group_size=group, bits=bits, mode=mode, dtype=mx.float32)
        return stored, torch.from_numpy(np.array(values))

    return pack


def _from_mlx(array: Any) -> torch.Tensor:
    import mlx.core as mx

    if array.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(array.view(mx.uint16)).astype(np.int16)).view(torch.bfloat16)
    values = np.array(array)
    return (
        torch.from_numpy(values.view(np.int32)).view(torch.uint32)
        if values.dtype == np.uint32
        else torch.from_numpy(values)
    )


def _int32(words: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(words.numpy().astype(np.uint32).view(np.int32))
