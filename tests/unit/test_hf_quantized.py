"""Folders quantized by other tools become canonical weights with just the values that they stand for."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from support.architectures import FOLDERS
from support.quantized_folders import Folder, awq, fp8, gptq, mlx, mxfp4_folder, write_folder
from support.tiny_hf import CASES, SIZES

from swarmd.node.engine.quantized import QuantizedWeight, form_of
from swarmd.node.engine.tensors import tensor_shapes
from swarmd.node.models.checkpoint import open_checkpoint
from swarmd.node.models.errors import ModelFileError

HAS_MLX = importlib.util.find_spec("mlx") is not None
needs_mlx = pytest.mark.skipif(not HAS_MLX, reason="MLX is not installed (pip install 'swarmd[mlx]')")

INT4 = {
    "gptq 4 bits": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}, gptq(4, 32)),
    "gptq 8 bits": ({"quant_method": "gptq", "bits": 8, "group_size": 32, "desc_act": False}, gptq(8, 32)),
    "gptq v2, bf16 scales": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"},
        gptq(4, 32, added=0, scale_type=torch.bfloat16),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}, awq(32)),
}
MLX = [(bits, group, "float16") for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64)]
MLX += [(4, 32, "bfloat16"), (8, 64, "float32")]


def tiny_llama() -> hf.PreTrainedModel:
    return CASES["llama"]()


def assert_holds(folder: Folder, *, tolerance: float = 0.0) -> None:
    """Every canonical tensor of a Llama folder is what it stands for, in the form and size that was announced."""
    names = {"pre_feedforward_layernorm": "post_attention_layernorm"}
    with open_checkpoint(folder.path) as checkpoint:
        spec = checkpoint.spec
        checkpoint.check(0, spec.n_layers)
        for tensor, shape in tensor_shapes(spec, 0, spec.n_layers).items():
            weight = checkpoint.read(tensor)
            name = next((tensor.replace(ours, theirs) for ours, theirs in names.items() if ours in tensor), tensor)
            expected = folder.values[name].numpy()
            assert np.abs(weight.dequantize() - expected).max() <= tolerance * np.abs(expected).max(), tensor
            if len(shape) == 2:
                assert form_of(weight) == checkpoint.form(tensor)
                assert weight.nbytes == checkpoint.form(tensor).nbytes(*shape)


@pytest.mark.parametrize("name", INT4)
def test_gptq_and_awq(name: str, tmp_path: Path) -> None:
    description, pack = INT4[name]
    # A product and a sum, each rounded once, where the tools multiply an exact difference.
    assert_holds(write_folder(tmp_path / "m", tiny_llama(), description, pack, "quantization_config"), tolerance=1e-6)


def test_fp8_in_blocks_is_rounded_to_bf16(tmp_path: Path) -> None:
    description = {"quant_method": "fp8", "weight_block_size": [48, 48], "activation_scheme": "dynamic"}
    folder = write_folder(tmp_path / "m", tiny_llama(), description, fp8(48), "quantization_config")
    for name, values in folder.values.items():
        if name.endswith("_proj.weight"):
            folder.values[name] = values.bfloat16().float()
    assert_holds(folder)


@pytest.mark.parametrize("name", ["deepseek_v2 in groups", "deepseek_v3"])
def test_fp8_of_latent_attention_is_cut_and_ordered_as_floats_are(name: str, tmp_path: Path) -> None:
    """Latents and shared keys are parts of one matrix, cut within a block; rows of what is rotated are put in order."""
    description = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    folder = write_folder(tmp_path / "m", FOLDERS[name](), description, fp8(16), "quantization_config")
    floats = tmp_path / "floats"
    floats.mkdir()
    save_file(folder.values, floats / "model.safetensors")
    config = json.loads((folder.path / "config.json").read_text())
    (floats / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    with open_checkpoint(folder.path) as packed, open_checkpoint(floats) as plain:
        packed.check(0, packed.spec.n_layers)
        assert packed.form("model.layers.1.self_attn.k_rope_proj.weight").float_type == "bf16"
        for tensor in tensor_shapes(packed.spec, 0, packed.spec.n_layers):
            weight, expected = packed.read(tensor), torch.from_numpy(plain.read(tensor).dequantize())
            if packed.form(tensor).float_type == "bf16":
                expected = expected.bfloat16().float()
            assert np.array_equal(weight.dequantize(), expected.numpy()), tensor


@needs_mlx
@pytest.mark.parametrize(("bits", "group", "scales"), MLX)
def test_mlx_affine(bits: int, group: int, scales: str, tmp_path: Path) -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**SIZES, "num_hidden_layers": 1, "intermediate_size": 128}))
    description = {"group_size": group, "bits": bits}
    folder = write_folder(tmp_path / "m", model, description, mlx(bits, group, scale_type=scales), "quantization")
    assert_holds(folder, tolerance=1e-6)


@needs_mlx
def test_mlx_mxfp4_and_overrides_for_single_tensors(tmp_path: Path) -> None:
    wide, usual = mlx(8, 64), mlx(4, 32, "mxfp4")
    special = "model.layers.2.self_attn.q_proj"

    def pack(stem: str, weight: torch.Tensor) -> Any:
        return wide(stem, weight) if stem == special else usual(stem, weight)

    description = {
        "group_size": 32,
        "bits": 4,
        "mode": "mxfp4",
        special: {"group_size": 64, "bits": 8, "mode": "affine"},
    }
    folder = write_folder(tmp_path / "m", tiny_llama(), description, pack, "quantization")
    assert_holds(folder, tolerance=1e-6)


def test_gpt_oss_in_mxfp4_equals_transformers(tmp_path: Path) -> None:
    _, expected = mxfp4_folder(tmp_path / "m")
    with open_checkpoint(tmp_path / "m") as checkpoint:
        checkpoint.check(0, checkpoint.spec.n_layers)
        for layer in range(checkpoint.spec.n_layers):
            prefix = f"model.layers.{layer}.mlp.experts"
            both, down = expected[f"{prefix}.gate_up_proj"], expected[f"{prefix}.down_proj"]
            for expert in range(len(both)):
                parts = {"gate": both[expert, :, 0::2], "up": both[expert, :, 1::2], "down": down[expert]}
                for part, values in parts.items():
                    weight = checkpoint.read(f"{prefix}.{expert}.{part}_proj.weight")
                    assert isinstance(weight, QuantizedWeight)
                    assert np.array_equal(weight.dequantize(), values.T.numpy())


@pytest.mark.parametrize(
    ("key", "description", "says"),
    [
        ("quantization_config", {"quant_method": "bitsandbytes"}, "'bitsandbytes'.*not supported"),
        ("quantization_config", {"quant_method": "gptq", "bits": 3, "group_size": 128}, "GPTQ with 3 bits"),
        ("quantization_config", {"quant_method": "gptq", "bits": 4, "group_size": -1}, "groups of -1"),
        ("quantization_config", {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "'marlin'"),
        ("quantization_config", {"quant_method": "awq", "bits": 4, "version": "gemv"}, "version gemv"),
        ("quantization_config", {"quant_method": "fp8"}, "weight_block_size None"),
        ("quantization_config", {"quant_method": "fp8", "weight_block_size": [0, 1]}, "weight_block_size"),
        ("quantization_config", "gptq", "the file is damaged"),
        ("quantization", {"group_size": 48, "bits": 4}, "groups of 48"),
        ("quantization", {"group_size": 64, "bits": 7}, "7 bits"),
        ("quantization", {"group_size": 64, "bits": 4, "mode": "nvfp4"}, "'nvfp4'"),
    ],
)
def test_other_ways_are_refused_by_name(key: str, description: Any, says: str, tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text()) | {key: description}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFileError, match=says):
        open_checkpoint(tmp_path / "m")


def test_gptq_with_groups_of_scattered_inputs_is_refused(tmp_path: Path, proves: Callable[..., None]) -> None:
    description, pack = INT4["gptq 4 bits"]
    folder = write_folder(tmp_path / "m", tiny_llama(), description, pack, "quantization_config")
    tensors = load_file(folder.path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.g_idx"
    tensors[name] = tensors[name].flip(0)
    save_file(tensors, folder.path / "model.safetensors")
    with (
        open_checkpoint(folder.path) as checkpoint,
        pytest.raises(ModelFileError, match=r"q_proj\.g_idx.*desc_act") as caught,
    ):
        checkpoint.read("model.layers.0.self_attn.q_proj.weight")
    proves("refused formats", "gptq with desc_act, when it is loaded", "words", "refused", words=str(caught.value))


@pytest.mark.parametrize("part", ["qzeros", "scales"])
def test_parts_that_do_not_fit_are_refused(part: str, tmp_path: Path) -> None:
    description, pack = INT4["awq"]
    folder = write_folder(tmp_path / "m", tiny_llama(), description, pack, "quantization_config")
    tensors = load_file(folder.path / "model.safetensors")
    name = f"model.layers.1.mlp.up_proj.{part}"
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, folder.path / "model.safetensors")
    with open_checkpoint(folder.path) as checkpoint, pytest.raises(ModelFileError, match=name.replace(".", r"\.")):
        checkpoint.check(0, checkpoint.spec.n_layers)
