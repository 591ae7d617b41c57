"""What a model costs to hold, computed from its header: the bytes that the engine will hold, before anything
is loaded.
"""

from __future__ import annotations

from swarmd.node.engine.backends.base import TILE_ELEMENTS, tile_rows
from swarmd.node.engine.cpu.bindings import TILE
from swarmd.node.engine.spec import ArchSpec
from swarmd.node.engine.tensors import EMBEDDING, OUTPUT_NORM, head_name, layer_prefix, tensor_shapes
from swarmd.node.models.checkpoint import Checkpoint
from swarmd.partition.costs import ModelCosts

STEP_ROWS = 512
"""Tokens of the largest step that the workspace provides for."""
SAMPLED_ROWS = 64
"""Sequences sampled in one step that the workspace provides for."""
ATTENTION_THREADS = 16
"""Threads that the workspace provides with room for attention scores, of 8 queries each."""


def model_costs(checkpoint: Checkpoint, *, native: bool = True) -> ModelCosts:
    """The costs of every possible stage, computed by our own kernels or else by plain torch.

    Raises ModelFileError for missing tensors and unsupported types anywhere.
    """
    spec = checkpoint.spec
    checkpoint.check(0, spec.n_layers)
    shapes = tensor_shapes(spec, 0, spec.n_layers)
    sizes = {name: _held(checkpoint, name, shape) for name, shape in shapes.items()}
    head = sizes[head_name(spec)]
    return ModelCosts(
        layer_bytes=tuple(_layer_bytes(sizes, layer) for layer in range(spec.n_layers)),
        embedding_bytes=sizes[EMBEDDING],
        head_bytes=sizes[OUTPUT_NORM] + head,
        kv_bytes_per_token=spec.n_kv_heads * (spec.head_dim + _whole_tiles(spec.head_dim)) * (2 if native else 4),
        workspace_bytes=_native_workspace(spec) if native else _torch_workspace(spec),
        shared_bytes=head if spec.tied_embeddings else 0,
    )


def _native_workspace(spec: ArchSpec) -> int:
    """What `swarmd_workspace` (cpu/native/stage.cpp) takes for the largest step, with the sampled logits."""
    attended = spec.n_heads * spec.head_dim
    qkv = attended + 2 * spec.n_kv_heads * spec.head_dim
    most = max(spec.hidden_size, attended, spec.ffn_size)
    # Values in fp32, two int8 codes each, and three fp32 numbers per group of 32.
    prepared = most * (4 + 1 + 1) + most // 32 * 12
    activations = STEP_ROWS * (4 * (spec.hidden_size + qkv + attended + 2 * spec.ffn_size + spec.head_dim) + prepared)
    scores = ATTENTION_THREADS * 8 * 4 * (spec.context_length + spec.head_dim)
    payloads = 2 * STEP_ROWS * spec.hidden_size * 4
    return activations + scores + payloads + _logits(spec, 4)


def _torch_workspace(spec: ArchSpec) -> int:
    """One dequantized tile (fp32 + codes), the activations of one step, and the sampled logits."""
    columns = max(spec.hidden_size, spec.ffn_size, spec.n_heads * spec.head_dim)
    tile = max(TILE_ELEMENTS, tile_rows(columns) * columns) * 5
    qkv = (spec.n_heads + 2 * spec.n_kv_heads) * spec.head_dim
    activations = STEP_ROWS * 4 * (4 * spec.hidden_size + 2 * qkv + 4 * spec.ffn_size)
    # fp32 logits twice: tiles, then joined.
    return tile + activations + _logits(spec, 2 * 4)


def _logits(spec: ArchSpec, bytes_each: int) -> int:
    """Logits of all rows that are sampled, and sampling's float64 temporaries for one row at a time."""
    return spec.vocab_size * (bytes_each * SAMPLED_ROWS + 6 * 8)


def _held(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> int:
    if len(shape) == 1:
        return shape[0] * 4
    # Our own kernels fill up a matrix's rows to whole tiles.
    return checkpoint.form(name).nbytes(_whole_tiles(shape[0]), shape[1])


def _layer_bytes(sizes: dict[str, int], layer: int) -> int:
    return sum(size for name, size in sizes.items() if name.startswith(layer_prefix(layer)))


def _whole_tiles(rows: int) -> int:
    return -(-rows // TILE) * TILE
