"""Write a random Llama model of about a billion parameters as a Q4_0 GGUF file: right in size, senseless in content.

python bench/synthetic_model.py [FILE]

Speed depends on shapes and types, not on what the weights say, so that a billion-parameter figure needs no download.
Hidden size 2048, 16 layers, 32 heads on 8 KV heads, ffn 8192, vocabulary 49152 with tied embeddings; every matrix in
Q4_0, 605 MB. Tokenizer and chat template come from the default model's file. The same bytes for the same seed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from workloads import cache_folder, default_model

# As much as is drawn and quantized at a time: 2^22 values are 16 MB in fp32.
VALUES_AT_ONCE = 1 << 22
# Far below one, so that the sum over 16 layers of residuals stays finite in every format.
WEIGHT_SCALE = 0.5
COPIED_PREFIX = "tokenizer."


@dataclass(frozen=True)
class Shape:
    """A Llama shape; sizes in elements."""

    name: str = "synthetic-1b"
    n_layers: int = 16
    hidden_size: int = 2048
    n_heads: int = 32
    n_kv_heads: int = 8
    ffn_size: int = 8192
    vocab_size: int = 49152
    context_length: int = 8192

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(GGUF name, shape as [out, in]) in the order in which they stand in the file."""
        hidden, keys = self.hidden_size, self.hidden_size // self.n_heads * self.n_kv_heads
        yield "token_embd.weight", (self.vocab_size, hidden)
        for layer in range(self.n_layers):
            block = f"blk.{layer}."
            yield block + "attn_norm.weight", (hidden,)
            yield block + "attn_q.weight", (hidden, hidden)
            yield block + "attn_k.weight", (keys, hidden)
            yield block + "attn_v.weight", (keys, hidden)
            yield block + "attn_output.weight", (hidden, hidden)
            yield block + "ffn_norm.weight", (hidden,)
            yield block + "ffn_gate.weight", (self.ffn_size, hidden)
            yield block + "ffn_up.weight", (self.ffn_size, hidden)
            yield block + "ffn_down.weight", (hidden, self.ffn_size)
        yield "output_norm.weight", (hidden,)


def write_model(path: Path, tokenizer_from: Path, shape: Shape | None = None, seed: int = 1) -> None:
    """Write the file, atomically; memory stays under 100 MB beside the tokenizer's."""
    shape = shape or Shape()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        unfinished = Path(folder) / path.name
        writer = GGUFWriter(unfinished, "llama")
        _add_metadata(writer, shape)
        _copy_tokenizer(writer, tokenizer_from)
        for name, size in shape.tensors():
            kind = _type_of(size)
            stored = gguf.quant_shape_to_byte_shape(size, kind) if len(size) > 1 else size
            dtype = np.dtype(np.uint8 if len(size) > 1 else np.float32)
            writer.add_tensor_info(name, stored, dtype, int(np.prod(stored)) * dtype.itemsize, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        draw = np.random.default_rng(seed)
        for _, size in shape.tensors():
            writer.write_tensor_data(_random_tensor(draw, size))
        writer.close()
        os.replace(unfinished, path)


def synthetic_model(shape: Shape | None = None) -> Path:
    """The file, from the cache; written on first use."""
    shape = shape or Shape()
    path = cache_folder() / f"{shape.name}-q4_0.gguf"
    if not path.exists():
        print(f"writing {path} (once, about 20 s)", file=sys.stderr)
        write_model(path, default_model(), shape)
    return path


def _type_of(size: tuple[int, ...]) -> GGMLQuantizationType:
    return GGMLQuantizationType.Q4_0 if len(size) > 1 else GGMLQuantizationType.F32


def _random_tensor(draw: np.random.Generator, size: tuple[int, ...]) -> np.ndarray:
    """A norm of ones, or a matrix of normal values quantized by `gguf` itself, as raw blocks."""
    if len(size) == 1:
        return np.ones(size, np.float32)
    rows, columns = size
    blocks = np.empty(gguf.quant_shape_to_byte_shape(size, GGMLQuantizationType.Q4_0), np.uint8)
    step = max(1, VALUES_AT_ONCE // columns)
    for begin in range(0, rows, step):
        values = draw.standard_normal((min(step, rows - begin), columns), np.float32)
        values *= np.float32(WEIGHT_SCALE / columns**0.5)
        blocks[begin : begin + step] = gguf.quantize(values, GGMLQuantizationType.Q4_0)
    return blocks


def _add_metadata(writer: GGUFWriter, shape: Shape) -> None:
    writer.add_name(shape.name)
    writer.add_block_count(shape.n_layers)
    writer.add_context_length(shape.context_length)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.ffn_size)
    writer.add_head_count(shape.n_heads)
    writer.add_head_count_kv(shape.n_kv_heads)
    writer.add_rope_dimension_count(shape.hidden_size // shape.n_heads)
    writer.add_rope_freq_base(100_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _copy_tokenizer(writer: GGUFWriter, source: Path) -> None:
    for name, field in GGUFReader(source).fields.items():
        if name.startswith(COPIED_PREFIX):
            kinds = field.types
            writer.add_key_value(name, field.contents(), kinds[0], kinds[1] if len(kinds) > 1 else None)


def main() -> None:
    """Write the model to a file of choice, or into the cache."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", help="where to (default: the lab's cache)")
    options = parser.parse_args()
    if options.file:
        write_model(options.file, default_model())
    print(options.file or synthetic_model())


if __name__ == "__main__":
    main()
