"""What a model costs to hold, computed from its header: the bytes that the engine will hold, before anything
is loaded.
"""

from __future__ import annotations

from math import prod

from swarmd.node.engine.backends.base import TILE_ELEMENTS, tile_rows
from swarmd.node.engine.cpu.bindings import TILE
from swarmd.node.engine.spec import ArchSpec, CacheShape
from swarmd.node.engine.tensors import EMBEDDING, OUTPUT_NORM, head_name, kept_dense, layer_shapes, tensor_shapes
from swarmd.node.models.checkpoint import Checkpoint
from swarmd.partition.costs import ModelCosts

STEP_ROWS = 512
"""Tokens of the largest step that the workspace provides for."""
SAMPLED_ROWS = 64
"""Sequences sampled in one step that the workspace provides for."""
ATTENTION_THREADS = 16
"""Threads that the workspace provides with room for attention scores, of 8 queries each."""
EXPERT_ROWS = 1024
"""Rows that go through the experts that they chose at a time (kMostPairs of cpu/native/step.h)."""


def model_costs(checkpoint: Checkpoint, *, native: bool = True) -> ModelCosts:
    """The costs of every possible stage, computed by our own kernels, if they can, or else by plain torch.

    Raises ModelFileError for missing tensors and unsupported types anywhere.
    """
    spec = checkpoint.spec
    native = native and spec.latent is None
    checkpoint.check(0, spec.n_layers)
    shapes = tensor_shapes(spec, 0, spec.n_layers)
    sizes = {name: _held(checkpoint, name, shape) for name, shape in shapes.items()}
    head = sizes[head_name(spec)]
    return ModelCosts(
        layer_bytes=tuple(sum(map(sizes.__getitem__, layer_shapes(spec, layer))) for layer in range(spec.n_layers)),
        embedding_bytes=sizes[EMBEDDING],
        head_bytes=sizes[OUTPUT_NORM] + head,
        kv_bytes_per_token=_kv_bytes(spec.cache, native),
        workspace_bytes=_native_workspace(spec) if native else _torch_workspace(spec),
        shared_bytes=head if spec.tied_embeddings else 0,
    )


def _kv_bytes(cache: CacheShape, native: bool) -> int:
    """Of a token in a layer. Our own kernels keep fp16, and values in whole tiles."""
    return cache.heads * (cache.key_dim + _whole_tiles(cache.value_dim)) * (2 if native else 4)


def _native_workspace(spec: ArchSpec) -> int:
    """What `swarmd_workspace` (cpu/native/buffers.cpp) takes for the largest step, with the sampled logits."""
    hidden, attended = spec.hidden_size, spec.n_heads * spec.head_dim
    qkv = attended + 2 * spec.n_kv_heads * spec.head_dim
    ffn = _widest_mlp(spec)
    most = max(hidden, attended, ffn)
    deltas = hidden if _adds_by_way_of_deltas(spec) else 0
    row = 4 * (hidden + deltas + qkv + attended + 2 * ffn + sum(rope.dim for rope in spec.ropes)) + _prepared(most)
    thread = 2 * _prepared(most) + 8 * 4 * (spec.context_length + spec.head_dim)
    payloads = 2 * STEP_ROWS * hidden * 4
    return STEP_ROWS * row + ATTENTION_THREADS * thread + _expert_workspace(spec) + payloads + _logits(spec, 4)


def _expert_workspace(spec: ArchSpec) -> int:
    """Scores, choices and the shared expert's outputs of all rows; inputs, middles and outputs of some chosen ones."""
    moe = spec.moe
    if moe is None:
        return 0
    pairs = STEP_ROWS * moe.top_k
    some = min(pairs, EXPERT_ROWS) * (_prepared(max(spec.hidden_size, moe.ffn_size)) + 8 * moe.ffn_size)
    outputs = 4 * spec.hidden_size * (min(pairs, EXPERT_ROWS) + STEP_ROWS)
    choices = 4 * STEP_ROWS * (moe.n_experts + 1) + 7 * 4 * pairs
    candidates = ATTENTION_THREADS * 4 * (moe.n_experts + moe.n_groups)
    return some + outputs + choices + candidates + 4 * (moe.n_experts + 1)


def _prepared(columns: int) -> int:
    """Bytes of a row of activations: values in fp32, two int8 codes each, and five fp32 numbers per group of 32."""
    return columns * (4 + 1 + 1) + columns // 32 * 20


def _widest_mlp(spec: ArchSpec) -> int:
    """Beside the experts that are chosen."""
    dense = 0 if spec.moe and all(layer.moe for layer in spec.layers) else spec.ffn_size
    return max(dense, spec.moe.shared_ffn_size if spec.moe else 0)


def _adds_by_way_of_deltas(spec: ArchSpec) -> bool:
    """Whether what a block gives is kept apart before it is added to the hidden states."""
    biased = spec.output_bias or spec.mlp_bias
    return spec.norms != "before" or biased or spec.residual_multiplier != 1.0 or spec.moe is not None


def _torch_workspace(spec: ArchSpec) -> int:
    """One dequantized tile (fp32 + codes), the activations of one step, and the sampled logits."""
    ffn = max(_widest_mlp(spec), spec.moe.ffn_size if spec.moe else 0)
    columns = max(spec.hidden_size, ffn, spec.n_heads * spec.head_dim)
    tile = max(TILE_ELEMENTS, tile_rows(columns) * columns) * 5
    qkv = (spec.n_heads + 2 * spec.n_kv_heads) * spec.head_dim
    if spec.latent:  # queries, and what they become and attention gives in the latents' space
        qkv = spec.n_heads * (spec.head_dim + spec.latent.kv_rank)
    activations = STEP_ROWS * 4 * (4 * spec.hidden_size + 2 * qkv + 4 * ffn)
    # fp32 logits twice: tiles, then joined.
    return tile + activations + _logits(spec, 2 * 4)


def _logits(spec: ArchSpec, bytes_each: int) -> int:
    """Logits of all rows that are sampled, and sampling's float64 temporaries for one row at a time."""
    return spec.vocab_size * (bytes_each * SAMPLED_ROWS + 6 * 8)


def _held(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> int:
    if len(shape) == 1 or kept_dense(name):
        return prod(shape) * 4
    # Our own kernels fill up a matrix's rows to whole tiles.
    return checkpoint.form(name).nbytes(_whole_tiles(shape[0]), shape[1])


def _whole_tiles(rows: int) -> int:
    return -(-rows // TILE) * TILE
