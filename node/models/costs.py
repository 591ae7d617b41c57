"""What a model costs to hold, computed from its header: the bytes that the engine will hold, before anything
is loaded.
"""

from __future__ import annotations

from swarmd.node.engine.backends.base import TILE_ELEMENTS, tile_rows
from swarmd.node.engine.quantized import held_bytes
from swarmd.node.engine.spec import EMBEDDING, HEAD, OUTPUT_NORM, ArchSpec, tensor_shapes
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.gguf import GGUFFile
from swarmd.partition.costs import ModelCosts

STEP_ROWS = 512
"""Tokens of the largest step that the workspace provides for."""
SAMPLED_ROWS = 64
"""Sequences sampled in one step that the workspace provides for."""


def model_costs(gguf: GGUFFile, spec: ArchSpec) -> ModelCosts:
    """The costs of every possible stage. Raises ModelFileError for missing tensors and unsupported types
    anywhere.
    """
    shapes = tensor_shapes(spec, 0, spec.n_layers)
    sizes = {name: _held(gguf, name, shape) for name, shape in shapes.items()}
    head = sizes[EMBEDDING if spec.tied_embeddings else HEAD]
    return ModelCosts(
        layer_bytes=tuple(_layer_bytes(sizes, layer) for layer in range(spec.n_layers)),
        embedding_bytes=sizes[EMBEDDING],
        head_bytes=sizes[OUTPUT_NORM] + head,
        kv_bytes_per_token=2 * spec.n_kv_heads * spec.head_dim * 4,
        workspace_bytes=workspace_bytes(spec),
        shared_bytes=head if spec.tied_embeddings else 0,
    )


def workspace_bytes(spec: ArchSpec) -> int:
    """A stage's scratch: one dequantized tile (fp32 + codes), the activations of one step, and the sampled
    logits.
    """
    columns = max(spec.hidden_size, spec.ffn_size, spec.n_heads * spec.head_dim)
    tile = max(TILE_ELEMENTS, tile_rows(columns) * columns) * 5
    qkv = (spec.n_heads + 2 * spec.n_kv_heads) * spec.head_dim
    activations = STEP_ROWS * 4 * (4 * spec.hidden_size + 2 * qkv + 4 * spec.ffn_size)
    # fp32 logits twice (tiles, then joined), and sampling's float64 temporaries for one row at a time.
    logits = spec.vocab_size * (2 * 4 * SAMPLED_ROWS + 6 * 8)
    frequencies = spec.rope_dim // 2 * 4
    return tile + activations + logits + frequencies


def _held(gguf: GGUFFile, name: str, shape: tuple[int, ...]) -> int:
    info = gguf.tensors.get(name)
    if info is None:
        raise ModelFileError(f"{gguf.path.name} lacks tensor {name!r}; it is incomplete or of another kind of model")
    if info.shape != shape:
        raise ModelFileError(f"tensor {name!r} of {gguf.path.name} has shape {info.shape}; the header implies {shape}")
    return held_bytes(name, info.type, shape)


def _layer_bytes(sizes: dict[str, int], layer: int) -> int:
    return sum(size for name, size in sizes.items() if name.startswith(f"blk.{layer}."))
