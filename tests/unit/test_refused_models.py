"""What people will try and swarmd does not do: refused before a node starts, by name, with what to do instead."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import transformers as hf
from safetensors.numpy import save_file
from support.gguf_from_hf import write_gguf_of
from support.tiny_hf import CASES, SIZES

from swarmd.node.cli.models import check_servable
from swarmd.node.config import ConfigError
from swarmd.node.data_dir import DataDir
from swarmd.node.engine.gguf_blocks import DENSE_TYPES, QUANTIZED_FORMS
from swarmd.node.models import gguf_families, hf_families
from swarmd.node.models.gguf_types import GGUF_BLOCK, GGUFType

ADVICE = re.compile(r"(?<!not )supported|\b[gG]et\b|\bgive\b|check the path|\bare\b|is named by|download it too")
"""What to do, or what there is to choose from."""

MODEL_TYPES = ("mamba", "falcon_mamba", "jamba", "rwkv", "gpt2", "gpt_neox", "gptj", "opt", "bloom", "falcon", "mpt")
MODEL_TYPES += ("phi", "cohere2", "glm4", "stablelm", "starcoder2", "nemotron", "bert", "t5", "whisper", "mllama")
MODEL_TYPES += ("qwen2_5_vl", "llava", *hf_families.WHY_NOT)
MODEL_TYPES = tuple(name for name in MODEL_TYPES if name not in hf_families.FAMILIES)
GGUF_NAMES = ("mamba", "rwkv6", "gpt2", "falcon", "bert", "t5", "clip", "command-r", "glm4", "stablelm", "starcoder2")
GGUF_NAMES += ("deepseek2", "llama4", "gemma3n", "qwen3next", "phi2", "granitehybrid", "minicpm3")
GGUF_NAMES = tuple(name for name in GGUF_NAMES if name not in gguf_families.FAMILIES)
OTHER_TYPES = [kind for kind in GGUF_BLOCK if kind not in {**DENSE_TYPES, **QUANTIZED_FORMS}]

DESCRIPTIONS: dict[str, tuple[str, Any, str]] = {
    "bitsandbytes": ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    "exl2": ("quantization_config", {"quant_method": "exl2", "bits": 4.0}, "exl2"),
    "exl3": ("quantization_config", {"quant_method": "exl3", "bits": 4.0}, "exl3"),
    "hqq": ("quantization_config", {"quant_method": "hqq"}, "hqq"),
    "aqlm": ("quantization_config", {"quant_method": "aqlm"}, "aqlm"),
    "quanto": ("quantization_config", {"quant_method": "quanto", "weights": "int8"}, "quanto"),
    "torchao": ("quantization_config", {"quant_method": "torchao"}, "torchao"),
    "compressed-tensors": (
        "quantization_config",
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        "compressed-tensors",
    ),
    "nvfp4 of ModelOpt": ("quantization_config", {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt"),
    "nvfp4 of MLX": ("quantization", {"group_size": 16, "bits": 4, "mode": "nvfp4"}, "nvfp4"),
    "MLX, 7 bits": ("quantization", {"group_size": 64, "bits": 7}, "7 bits"),
    "fp8 with one scale per matrix": (
        "quantization_config",
        {"quant_method": "fp8", "activation_scheme": "static"},
        "weight_block_size",
    ),
    "gptq, 3 bits": ("quantization_config", {"quant_method": "gptq", "bits": 3, "group_size": 128}, "3 bits"),
    "gptq, one group": ("quantization_config", {"quant_method": "gptq", "bits": 4, "group_size": -1}, "groups of -1"),
    "gptq of Marlin": (
        "quantization_config",
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"},
        "marlin",
    ),
    "awq, gemv": (
        "quantization_config",
        {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"},
        "gemv",
    ),
}
"""By name: the key and the description in config.json, and what the message must name."""


def refusal(path: Path, tmp_path: Path) -> str:
    """What a person reads who gives this as --model, without the folder in which the test has put it."""
    with pytest.raises(ConfigError) as caught:
        check_servable(DataDir(tmp_path / "data"), str(path))
    words = str(caught.value)
    assert words.startswith("--model: ")
    assert ADVICE.search(words), f"what is to be done is not said: {words}"
    return words.removeprefix("--model: ").replace(f"{tmp_path}/", "").replace(str(tmp_path), "the folder")


def folder_with(tmp_path: Path, config: dict[str, Any]) -> Path:
    """A folder with weights whose config.json is this."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"weight": np.ones((2, 2), np.float32)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", MODEL_TYPES)
def test_folders_of_other_architectures(name: str, tmp_path: Path, proves: Callable[..., None]) -> None:
    words = refusal(folder_with(tmp_path, {"model_type": name}), tmp_path)
    assert f"model_type in config.json is {name!r}" in words
    proves("refused architectures", name, "folder", "refused", words=words)


@pytest.mark.parametrize("name", GGUF_NAMES)
def test_files_of_other_architectures(name: str, tmp_path: Path, proves: Callable[..., None]) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", name)
    writer.add_tensor("token_embd.weight", np.ones((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    words = refusal(tmp_path / "model.gguf", tmp_path)
    assert f"architecture is {name!r}" in words
    proves("refused architectures", name, "gguf", "refused", words=words)


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_other_ways_to_quantize(name: str, tmp_path: Path, proves: Callable[..., None]) -> None:
    key, description, named = DESCRIPTIONS[name]
    config = json.loads(CASES["llama"]().config.to_json_string(use_diff=False))
    words = refusal(folder_with(tmp_path, {**config, key: description}), tmp_path)
    assert named in words
    proves("refused formats", name, "words", "refused", words=words)


@pytest.mark.parametrize("kind", OTHER_TYPES)
def test_other_types_of_tensors(kind: GGUFType, tmp_path: Path, proves: Callable[..., None]) -> None:
    ggml = gguf.GGMLQuantizationType(int(kind))
    elements, nbytes = gguf.GGML_QUANT_SIZES[ggml]
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**SIZES, "hidden_size": 256, "intermediate_size": 256}))

    def zeros(values: np.ndarray) -> tuple[gguf.GGMLQuantizationType, np.ndarray]:
        return ggml, np.zeros(values.size // elements * nbytes, np.uint8)

    path = write_gguf_of(model, tmp_path / "model.gguf", raw_of=zeros)
    words = refusal(path, tmp_path)
    assert kind.name in words
    assert ".weight" in words, "which tensor"
    proves("refused formats", f"GGUF type {kind.name}", "words", "refused", words=words)


def pickled(tmp_path: Path) -> Path:
    folder = folder_with(tmp_path, {"model_type": "llama"})
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return folder


def without_config(tmp_path: Path) -> Path:
    folder = folder_with(tmp_path, {})
    (folder / "config.json").rename(folder / "adapter_config.json")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    return folder


def single(name: str) -> Callable[[Path], Path]:
    def write(tmp_path: Path) -> Path:
        (tmp_path / name).write_bytes(b"something else" * 99)
        return tmp_path / name

    return write


def lost_shard(tmp_path: Path) -> Path:
    write_gguf_of(CASES["llama"](), tmp_path / "m.gguf", split_max_tensors=20)
    shards = sorted(tmp_path.glob("m-*.gguf"))
    shards[1].unlink()
    return shards[0]


OTHER_THINGS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "pickled weights (`*.bin`, `*.pt`)": (pickled, "pickled weights"),
    "a folder of an adapter (LoRA)": (without_config, "config.json"),
    "one safetensors file without its folder": (single("model.safetensors"), "model.safetensors"),
    "an old GGML file": (single("ggml-model.bin"), "ggml-model.bin"),
    "an ONNX file": (single("model.onnx"), "model.onnx"),
    "a file called GGUF that is none": (single("model.gguf"), "model.gguf"),
    "a split GGUF model of which a file is missing": (lost_shard, "missing"),
    "a name at a hub (`owner/model`)": (lambda tmp_path: tmp_path / "owner" / "model", "owner/model"),
}
"""By name: what writes it, and what the message must name."""


@pytest.mark.parametrize("name", OTHER_THINGS)
def test_other_files(name: str, tmp_path: Path, proves: Callable[..., None]) -> None:
    write, named = OTHER_THINGS[name]
    words = refusal(write(tmp_path), tmp_path)
    assert named in words
    proves("refused files", name, "words", "refused", words=words)
