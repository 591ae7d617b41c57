"""What a process's memory grows by when it loads a stage; run as a program, it measures itself.

Also makes models that are large enough to measure.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 16}
VOCAB_SIZE = 256


def layer_shapes() -> dict[str, tuple[int, ...]]:
    """One layer's tensors in Hugging Face's names."""
    hidden, ffn = SIZES["hidden_size"], SIZES["intermediate_size"]
    square, wide = (hidden, hidden), (ffn, hidden)
    return {
        "input_layernorm": (hidden,),
        **{f"self_attn.{part}_proj": square for part in "qkvo"},
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": wide,
        "mlp.up_proj": wide,
        "mlp.down_proj": (hidden, ffn),
    }


def write_bf16_folder(folder: Path, n_layers: int) -> Path:
    """A Llama of so many layers as safetensors."""
    folder.mkdir()
    config = {
        **SIZES,
        "model_type": "llama",
        "num_hidden_layers": n_layers,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens": (VOCAB_SIZE, SIZES["hidden_size"]), "model.norm": (SIZES["hidden_size"],)}
    for layer in range(n_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in layer_shapes().items()}
    entries, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        entries[f"{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": (begin, end)}
    header = json.dumps(entries).encode()
    filling = os.urandom(1 << 20)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for done in range(0, end, len(filling)):
            file.write(filling[: end - done])
    return folder


def write_q8_gguf(path: Path, n_layers: int) -> Path:
    """A Llama of so many layers in Q8_0."""
    import gguf
    import numpy as np
    from support.tiny_tokenizers import byte_level_metadata

    hidden, ffn = SIZES["hidden_size"], SIZES["intermediate_size"]
    values = np.random.default_rng(0).standard_normal((ffn, hidden), dtype=np.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    wide = gguf.quantize(values, kind)
    down = gguf.quantize(np.ascontiguousarray(values.T), kind)
    tokens = byte_level_metadata()["tokenizer.ggml.tokens"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(n_layers)
    writer.add_context_length(256)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(tokens)
    writer.add_tensor("token_embd.weight", wide[: len(tokens)], raw_dtype=kind)
    writer.add_tensor("output_norm.weight", values[0])
    for layer in range(n_layers):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", values[layer])
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", wide[:hidden], raw_dtype=kind)
        for name, matrix in (("ffn_gate", wide), ("ffn_up", wide), ("ffn_down", down)):
            writer.add_tensor(f"blk.{layer}.{name}.weight", matrix, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def measure(path: Path, kernels: str, start: int, end: int) -> dict[str, int]:
    """Bytes by which a process's memory grows as it loads layers [start, end), having loaded one layer before.

    "resident": anonymous and file pages at the end; "peak": the most that there was at any time; "weights": what the
    engine says that it holds; "stored": what these layers take in the file.
    """
    command = [sys.executable, __file__, str(path), kernels, str(start), str(end)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=120)
    return json.loads(done.stdout)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))


def _load(path: Path, kernels: Any, start: int, end: int) -> Any:
    from swarmd.node.engine.stage_engine import StageEngine
    from swarmd.node.models.checkpoint import open_checkpoint

    with open_checkpoint(path) as checkpoint:
        spec = checkpoint.spec
    return StageEngine.load(path, spec, start, end, threads=1, kv_tokens=64, kernels=kernels)


def main() -> None:
    """Measure this process."""
    from swarmd.node.engine.tensors import tensor_shapes
    from swarmd.node.models.checkpoint import open_checkpoint

    path, kernels, start, end = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    warm = _load(path, kernels, start - 1, start)  # libraries, and memory that the allocator keeps for later
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on
    before = _status("VmRSS")
    engine = _load(path, kernels, start, end)
    found = {"resident": _status("VmRSS") - before, "peak": _status("VmHWM") - before}
    with open_checkpoint(path) as checkpoint:
        stored = sum(map(checkpoint.stored_bytes, tensor_shapes(checkpoint.spec, start, end)))
    print(json.dumps({**found, "weights": engine.weight_bytes, "stored": stored}))
    del warm


if __name__ == "__main__":
    main()
