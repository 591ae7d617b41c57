"""Models of several files, with the right outside and any bytes inside, for tests of layouts, stores and exchanges."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np

MIB = 1 << 20


def safetensors_bytes(nbytes: int, *, tensor: str = "weight", seed: int = 0) -> bytes:
    """A safetensors file of one tensor of so many random bytes."""
    header = json.dumps({tensor: {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}}).encode()
    return len(header).to_bytes(8, "little") + header + random.Random(seed).randbytes(nbytes)


def write_folder(folder: Path, weights: Mapping[str, int], *, indexed: bool = True) -> Path:
    """A folder as Hugging Face's tools write it, its weights in files of these names with so many bytes of data."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {}}))
    for number, (name, nbytes) in enumerate(weights.items()):
        (folder / name).write_bytes(safetensors_bytes(nbytes, tensor=f"weight.{number}", seed=number))
    if indexed:
        where = {f"weight.{number}": name for number, name in enumerate(weights)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def write_split_gguf(folder: Path, count: int, *, megabytes: int = 1, stem: str = "Tiny Model") -> list[Path]:
    """Valid shards of a split GGUF model, named and numbered as llama.cpp's gguf-split does."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    for number, path in enumerate(paths):
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        values = np.random.default_rng(number).standard_normal((megabytes, 1 << 18), dtype=np.float32)
        writer.add_tensor(f"blk.{number}.weight", values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths
