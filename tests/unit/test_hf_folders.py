"""The same model in the forms that folders come in: names, stacks, wrappers, shards, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from support.architectures import FOLDERS, load_torch

from swarmd.node.engine.tensors import EMBEDDING, tensor_shapes
from swarmd.node.models.checkpoint import Checkpoint, open_checkpoint
from swarmd.node.models.errors import ModelFileError

Tensors = dict[str, np.ndarray]
N_EXPERTS = 6


def save(name: str, folder: Path, **options: Any) -> Path:
    FOLDERS[name]().save_pretrained(folder, **options)
    return folder


def rewritten(folder: Path, target: Path, change: Callable[[Tensors], Tensors], **config: Any) -> Path:
    """A copy with other tensors, and keys of config.json."""
    target.mkdir()
    old = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**old, **config}))
    changed = change(load_file(folder / "model.safetensors"))
    save_file({name: np.ascontiguousarray(values) for name, values in changed.items()}, target / "model.safetensors")
    return target


def same(one: Path, other: Path) -> None:
    """Both hold the same model."""
    with open_checkpoint(one) as first, open_checkpoint(other) as second:
        assert _without_name(first) == _without_name(second)
        second.check(0, second.spec.n_layers)
        total = 0
        for name, shape in tensor_shapes(first.spec, 0, first.spec.n_layers).items():
            values = second.read(name).dequantize()
            assert values.shape == shape
            assert np.array_equal(first.read(name).dequantize(), values), name
            assert first.stored_bytes(name) == second.stored_bytes(name)
            total += second.stored_bytes(name)
        assert total == sum(part.nbytes for part in second.stage_ranges(0, second.spec.n_layers))


def _without_name(checkpoint: Checkpoint) -> dict[str, Any]:
    return {key: value for key, value in vars(checkpoint.spec).items() if key != "architecture"}


def renamed(*pairs: tuple[str, str]) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        for old, new in pairs:
            tensors = {name.replace(old, new): values for name, values in tensors.items()}
        return tensors

    return change


def stacked(prefix: str, parts: Mapping[str, str], where: str) -> Callable[[Tensors], Tensors]:
    """Experts' matrices of all layers stacked, as MLX's tools do; `parts`: name there -> name here."""

    def change(tensors: Tensors) -> Tensors:
        out = {name: values for name, values in tensors.items() if ".experts." not in name}
        for layer in range(4):
            for new, old in parts.items():
                each = [tensors[f"model.layers.{layer}.{prefix}.experts.{n}.{old}.weight"] for n in range(N_EXPERTS)]
                out[f"model.layers.{layer}.{where}.{new}.weight"] = np.stack(each)
        return out

    return change


def of_mlx(tensors: Tensors) -> Tensors:
    """gpt-oss as MLX's tools write it: gate and up apart, matrices as they multiply."""
    out: Tensors = {}
    for name, values in tensors.items():
        stem, bias = name.removesuffix("_bias"), name.endswith("_bias")
        end = "bias" if bias else "weight"
        turned = values if bias else values.swapaxes(-1, -2) if values.ndim == 3 else values
        if stem.endswith("experts.gate_up_proj"):
            axis = stem.removesuffix("gate_up_proj")
            out[f"{axis}gate_proj.{end}"], out[f"{axis}up_proj.{end}"] = turned[:, ::2], turned[:, 1::2]
        elif stem.endswith("experts.down_proj"):
            out[f"{stem}.{end}"] = turned
        else:
            out[name] = values
    return out


GATES = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}
FORMS: dict[str, tuple[str, Callable[[Tensors], Tensors]]] = {
    "without prefix": ("llama tied", renamed(("model.", ""))),
    "text of a larger model": (
        "llama",
        renamed(("model.", "language_model.model."), ("lm_head", "language_model.lm_head")),
    ),
    "text of a larger model, newer": ("llama", renamed(("model.", "model.language_model."))),
    "frequencies stored": (
        "llama",
        lambda tensors: {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)},
    ),
    "a vision tower beside it": (
        "llama",
        lambda tensors: {**tensors, "vision_tower.layers.0.self_attn.q_proj.weight": np.ones((8, 8), np.float32)},
    ),
    "a tied head stored": ("llama tied", lambda tensors: {**tensors, "lm_head.weight": tensors[EMBEDDING]}),
    "qwen3moe, stacked": ("qwen3moe", stacked("mlp", GATES, "mlp.switch_mlp")),
    "mixtral, stacked": (
        "mixtral",
        stacked(
            "block_sparse_moe",
            {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
            "block_sparse_moe.switch_mlp",
        ),
    ),
    "gpt-oss of MLX": ("gpt-oss", of_mlx),
}


@pytest.mark.parametrize("form", FORMS)
def test_other_forms_of_a_model_are_the_same_model(form: str, tmp_path: Path) -> None:
    name, change = FORMS[form]
    folder = save(name, tmp_path / "model")
    same(folder, rewritten(folder, tmp_path / "other", change))


def test_shards_are_the_same_model(tmp_path: Path) -> None:
    one, many = save("qwen3moe", tmp_path / "one"), save("qwen3moe", tmp_path / "many", max_shard_size="100KB")
    assert len(list(many.glob("*.safetensors"))) > 3
    same(one, many)


def test_gemma_3_with_images_is_its_text_model(tmp_path: Path) -> None:
    folder = save("gemma3", tmp_path / "model")
    text = json.loads((folder / "config.json").read_text())
    wrapped = rewritten(folder, tmp_path / "other", renamed(("model.", "language_model.model.")))
    outer = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 8}}
    (wrapped / "config.json").write_text(json.dumps(outer))
    same(folder, wrapped)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["phi3", "gemma3", "gpt-oss"])
def test_half_precision_is_kept(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model: Any = FOLDERS[name]()
    model.to(dtype)
    model.save_pretrained(tmp_path / "model")
    with open_checkpoint(tmp_path / "model") as checkpoint:
        checkpoint.check(0, 4)
        tensor = "model.layers.1.self_attn.k_proj.weight"
        assert checkpoint.form(tensor).float_type == ("bf16" if dtype == torch.bfloat16 else "f16")
        keys = checkpoint.spec.n_kv_heads * checkpoint.spec.head_dim
        attention = model.model.layers[1].self_attn
        got = checkpoint.read(tensor).dequantize()
        whole = attention.qkv_proj.weight[-2 * keys : -keys] if name == "phi3" else attention.k_proj.weight
        assert np.array_equal(got, whole.detach().float().numpy())


@pytest.mark.parametrize(
    ("name", "change", "config", "says"),
    [
        (
            "llama",
            lambda t: {**t, "model.layers.2.self_attn.q_proj.bias": np.ones(64, np.float32)},
            {},
            "layers.2.self_attn.q_proj.bias.*not known to use",
        ),
        (
            "llama",
            lambda t: {**t, "model.layers.2.self_attn.q_proj.lora_A.weight": np.ones((4, 4), np.float32)},
            {},
            "lora_A",
        ),
        ("llama", lambda t: {k: v for k, v in t.items() if "lm_head" not in k}, {}, "lacks tensor 'lm_head.weight'"),
        ("llama", lambda t: {k: v for k, v in t.items() if "3.mlp.up" not in k}, {}, "lacks tensor .*3.mlp.up_proj"),
        ("llama", lambda t: t, {"intermediate_size": 128}, r"gate_proj.*\(96, 64\); config.json implies \(128, 64\)"),
        ("phi3", lambda t: t, {"num_key_value_heads": 4}, r"qkv_proj.*\(128, 64\); config.json implies \(192, 64\)"),
        ("gpt-oss", lambda t: t, {"num_local_experts": 5}, "router.*(6, 64)|6 experts|5 experts"),
        ("llama", lambda t: {k: v.astype(np.float64) for k, v in t.items()}, {}, "type F64"),
        ("llama", lambda t: t, {"quantization_config": {"quant_method": "bitsandbytes"}}, "by 'bitsandbytes'"),
    ],
)
def test_what_is_not_the_model_that_it_says_is_refused(
    name: str, change: Callable[[Tensors], Tensors], config: dict[str, Any], says: str, tmp_path: Path
) -> None:
    folder = rewritten(save(name, tmp_path / "model"), tmp_path / "other", change, **config)
    with pytest.raises(ModelFileError, match=says):
        load_torch(folder, 0, 4, 16)


def test_a_stage_needs_its_own_tensors_only(tmp_path: Path) -> None:
    """Ranges are of the files that hold them, and the rest may be holes."""
    folder = save("qwen2", tmp_path / "model", max_shard_size="60KB")
    with open_checkpoint(folder) as checkpoint:
        ranges = checkpoint.stage_ranges(1, 2)
        expected = {name: checkpoint.read(name).dequantize() for name in tensor_shapes(checkpoint.spec, 1, 2)}
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, copy)
            continue
        data = path.read_bytes()
        head = 8 + int.from_bytes(data[:8], "little")
        kept = bytearray(len(data))
        kept[:head] = data[:head]
        for part in ranges:
            if part.file == path.name:
                kept[part.offset : part.offset + part.nbytes] = data[part.offset : part.offset + part.nbytes]
        (copy / path.name).write_bytes(kept)
    with open_checkpoint(copy, sparse=True) as checkpoint:
        checkpoint.check(1, 2)
        for name, values in expected.items():
            assert np.array_equal(checkpoint.read(name).dequantize(), values), name
