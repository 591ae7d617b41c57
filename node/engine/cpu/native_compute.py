"""A stage computed by our own kernels: a whole step is one native call."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, cast

import numpy as np

from swarmd.node.engine.block_table import BLOCK, BlockTable
from swarmd.node.engine.cpu.bindings import GROUP, TILE, Batch, Summary, load
from swarmd.node.engine.cpu.matrices import NativeMatrix, aligned
from swarmd.node.engine.cpu.stage_structs import StageStructs
from swarmd.node.engine.quantized import Array, Weight
from swarmd.node.engine.spec import ArchSpec, MoeSpec
from swarmd.node.engine.stage_compute import RowSummary, Span, StageOutput, WireDtype
from swarmd.node.engine.tensors import tensor_shapes
from swarmd.node.engine.weights import MlpWeights, ReportProgress, StageWeights, load_stage_weights
from swarmd.node.models.checkpoint import Checkpoint

WIRES: dict[str, tuple[int, type[np.generic]]] = {"f32": (0, np.float32), "bf16": (1, np.uint16)}
"""Wire type -> (SwarmdWire, numpy type of its items)."""

# The workspace's positions are rounded up to a multiple of this, so that it is not taken anew too often.
CONTEXT_STEP = 512


class NativeWeights:
    """Packs weights for the kernels; see `WeightKeeper`."""

    def prepare_experts(self, experts: Sequence[MlpWeights]) -> tuple[MlpWeights, ...]:
        """As they are."""
        return tuple(experts)

    def prepare(self, parts: Sequence[Weight]) -> NativeMatrix:
        """Packed parts, stacked."""
        return NativeMatrix(parts)

    def prepare_vector(self, values: np.ndarray) -> Array:
        """A float32 copy."""
        return np.array(values, np.float32)


class NativeCompute:
    """See `StageCompute`. The KV cache is paged, in fp16; forks share blocks."""

    def __init__(
        self, spec: ArchSpec, start: int, end: int, weights: StageWeights, *, threads: int, kv_tokens: int
    ) -> None:
        """Raises NativeMissing."""
        self._library = load()
        self.name = f"native-{self._library.swarmd_isa().decode()}"
        self.weight_bytes = weights.nbytes
        self._spec = spec
        self._table = BlockTable(-(-kv_tokens // BLOCK))
        self._keys = self._pool(end - start, spec.head_dim, BLOCK)
        self._values = self._pool(end - start, BLOCK, -(-spec.head_dim // TILE) * TILE)
        self._structs = StageStructs(spec, spec.layers[start:end], weights, self._keys, self._values)
        self._stage = self._structs.stage
        self._workspace = aligned(0)
        self._room = (0, 0, 0)
        self._logits = np.empty((0, spec.vocab_size), np.float32)
        self._threads = self._library.swarmd_pool_new(threads)

    def __del__(self) -> None:
        if pool := getattr(self, "_threads", None):
            self._library.swarmd_pool_free(pool)

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        start: int,
        end: int,
        *,
        threads: int,
        kv_tokens: int,
        context: int | None = None,
        progress: ReportProgress | None = None,
    ) -> NativeCompute:
        """See `StageEngine.load`; it has a pool of `threads` threads, the caller's among them. Raises NativeMissing."""
        load()
        weights = load_stage_weights(checkpoint, start, end, NativeWeights(), context=context, progress=progress)
        return cls(checkpoint.spec, start, end, weights, threads=threads, kv_tokens=kv_tokens)

    def open(self, seq: int) -> None:
        """See `StageCompute`."""
        self._table.open(seq)

    def fork(self, seq: int, source: int, length: int) -> None:
        """See `StageCompute`. A block that both will write is copied when one does."""
        self._table.fork(seq, source, length)

    def length(self, seq: int) -> int:
        """See `StageCompute`."""
        return self._table.length(seq)

    def truncate(self, seq: int, length: int) -> None:
        """See `StageCompute`."""
        self._table.truncate(seq, length)

    def free(self, seq: int) -> None:
        """See `StageCompute`."""
        self._table.free(seq)

    def forward(self, spans: Sequence[Span], hidden: Any, dtype: WireDtype, wanted: Sequence[int]) -> StageOutput:
        """See `StageCompute`."""
        self._reserve(spans)
        rows = sum(len(span.tokens) for span in spans)
        wire, item = WIRES[dtype]
        payload = None if self._stage.head else np.empty((rows, self._spec.hidden_size), item)
        if rows:
            self._step(spans, rows, hidden, wire, payload, wanted)
        for span in spans:
            self._table.commit(span.seq, span.end)
        if payload is not None:
            return StageOutput(memoryview(cast(Any, payload.view(np.uint8).reshape(-1))))
        return StageOutput(None, self._logits[: len(wanted)], self._summaries(len(wanted)))

    def _reserve(self, spans: Sequence[Span]) -> None:
        for old, new in self._table.reserve({span.seq: span.end for span in spans}):
            for pool in (*self._keys, *self._values):
                pool[:, new] = pool[:, old]

    def _step(
        self, spans: Sequence[Span], rows: int, hidden: Any, wire: int, payload: Array | None, wanted: Sequence[int]
    ) -> None:
        blocks = [self._table.blocks(span.seq) for span in spans]
        first_row = array("i", accumulate((len(span.tokens) for span in spans), initial=0))
        first_block = array("i", accumulate(map(len, blocks), initial=0))
        start = array("i", [span.start for span in spans])
        joined, tokens, wanted_rows = array("i"), array("i"), array("i", wanted)
        for one in blocks:
            joined.extend(one)
        for span in spans:
            tokens.extend(span.tokens)
        states = None if hidden is None else np.frombuffer(hidden, np.uint8)
        context = max(span.end for span in spans)
        self._make_room(rows, len(wanted), context)
        batch = Batch(
            rows,
            len(spans),
            _address(first_row),
            _address(start),
            _address(first_block),
            _address(joined),
            _address(tokens) if states is None else None,
            None if states is None else states.ctypes.data,
            wire,
            None if payload is None else payload.ctypes.data,
            len(wanted),
            _address(wanted_rows),
            self._logits.ctypes.data,
        )
        self._library.swarmd_step(
            self._threads, ctypes.byref(self._stage), ctypes.byref(batch), self._workspace.ctypes.data, context
        )

    def _make_room(self, rows: int, wanted: int, context: int) -> None:
        if wanted > len(self._logits):
            self._logits = np.empty((wanted, self._spec.vocab_size), np.float32)
        if all(need <= room for need, room in zip((rows, wanted, context), self._room, strict=True)):
            return
        had_rows, had_wanted, had_context = self._room
        ahead = had_context if context <= had_context else -(-context // CONTEXT_STEP) * CONTEXT_STEP
        self._room = (max(rows, had_rows), max(wanted, had_wanted), ahead)
        # The old one goes first: only one of them counts against the memory that was planned for.
        self._workspace = aligned(0)
        self._workspace = aligned(self.workspace_bytes(*self._room))

    def workspace_bytes(self, rows: int, wanted: int, context: int) -> int:
        """Bytes for steps of at most `rows` rows, `wanted` of them sampled, in sequences of up to `context` tokens."""
        return self._library.swarmd_workspace(self._threads, ctypes.byref(self._stage), rows, wanted, context)

    def _summaries(self, rows: int) -> list[RowSummary]:
        found = (Summary * rows)()
        self._library.swarmd_summarize(self._logits.ctypes.data, rows, self._spec.vocab_size, found)
        return [RowSummary(bool(row.finite), row.best, row.log_normalizer) for row in found]

    def _pool(self, n_layers: int, *of_head: int) -> list[Array]:
        """One pool per layer. Untouched memory costs nothing: the system gives pages when they are first written."""
        shape = (self._spec.n_kv_heads, self._table.n_blocks, *of_head)
        return [np.zeros(shape, np.float16) for _ in range(n_layers)]


def why_not(checkpoint: Checkpoint, start: int, end: int) -> str:
    """Why the kernels cannot compute layers [start, end) of a model, or "". Raises ModelFileError."""
    spec = checkpoint.spec
    if spec.latent is not None:
        return "its multi-head latent attention is computed by plain torch only"
    if spec.moe is not None and not _routable(spec.moe):
        moe = spec.moe
        return f"{moe.top_k} of {moe.n_experts} experts in {moe.top_groups} of {moe.n_groups} groups cannot be chosen"
    for name, shape in tensor_shapes(spec, start, end).items():
        form = checkpoint.form(name)
        if len(shape) == 2 and form.float_type is None and shape[1] % GROUP:
            return f"tensor {name!r} is quantized and has {shape[1]} columns, which is no multiple of {GROUP}"
    return ""


def _routable(moe: MoeSpec) -> bool:
    """Whether there is what the kernels choose from: they check nothing."""
    if moe.n_groups > 1 and moe.group_best != 2:
        return False
    groups = 0 < moe.top_groups <= moe.n_groups and moe.n_experts % moe.n_groups == 0
    return groups and 0 < moe.top_k <= moe.n_experts


def _address(values: array[int]) -> int:
    return values.buffer_info()[0]
