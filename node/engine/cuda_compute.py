"""A stage computed on a CUDA GPU: the decoder over torch, with a paged KV cache and decode steps replayed as graphs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from swarmd.node.engine.backends.base import RowSpan
from swarmd.node.engine.backends.torch_cuda import TorchCudaBackend
from swarmd.node.engine.backends.torch_experts import StackedExperts
from swarmd.node.engine.backends.torch_paged import LoneRows, LongSpan, PagedBatch, PagedPool
from swarmd.node.engine.block_table import BLOCK, BlockTable
from swarmd.node.engine.cuda_graphs import Calls, CudaGraphs, Replays
from swarmd.node.engine.decoder import Decoder
from swarmd.node.engine.spec import ArchSpec
from swarmd.node.engine.stage_compute import Span, StageOutput, WireDtype, summarize
from swarmd.node.engine.weights import MoeWeights, ReportProgress, StageWeights, load_stage_weights
from swarmd.node.models.checkpoint import Checkpoint

MOST_SEQUENCES = 64
"""The largest decode step that is captured."""


@dataclass(frozen=True)
class StaticStep:
    """What a decode step of so many rows reads, always in the same memory.

    `plan` int32 [rows, 2 + blocks]: a row's token, its position, the blocks of its sequence. `hidden` [rows, hidden]:
    None on the first stage.
    """

    plan: torch.Tensor
    hidden: torch.Tensor | None


class CudaCompute:
    """See `StageCompute`. Forks share blocks of the cache. `replays` runs decode steps."""

    def __init__(
        self,
        spec: ArchSpec,
        start: int,
        end: int,
        weights: StageWeights,
        backend: TorchCudaBackend,
        kv_tokens: int,
        replays: Replays,
    ) -> None:
        self.name = backend.name
        self.weight_bytes = weights.nbytes
        self._first, self._last = start == 0, end == spec.n_layers
        self._hidden_size = spec.hidden_size
        self._backend = backend
        self._device = backend.device
        self._decoder = Decoder(spec, start, weights, backend)
        self._table = BlockTable(-(-kv_tokens // BLOCK))
        # What the decoder takes for the caches of one sequence: the layers' numbers, see `TorchCudaBackend`.
        self._layers: Any = range(end - start)
        # One block more than the table hands out: the rows that fill up a decode step write there.
        self._spare = self._table.n_blocks
        self._most_blocks = min(self._table.n_blocks, -(-spec.context_length // BLOCK))
        backend.pools = [self._pool(spec) for _ in range(start, end)]
        self._steps: dict[tuple[int, int], StaticStep] = {}
        self._replays = replays if _capturable(weights) else Calls()

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        start: int,
        end: int,
        device: str,
        *,
        kv_tokens: int,
        context: int | None = None,
        progress: ReportProgress | None = None,
    ) -> CudaCompute:
        """See `StageEngine.load`. Raises ValueError, in words, where torch finds no such GPU; MemoryError."""
        require_gpu(device)
        torch.set_grad_enabled(False)
        with torch.cuda.device(device), memory_errors(f"layers {start} to {end - 1} do not fit on {device}"):
            backend = TorchCudaBackend(torch.device(device))
            weights = load_stage_weights(checkpoint, start, end, backend, context=context, progress=progress)
            return cls(checkpoint.spec, start, end, weights, backend, kv_tokens, CudaGraphs())

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
        """See `StageCompute`. Raises MemoryError, the lengths being as they were."""
        rows = sum(len(span.tokens) for span in spans)
        with self._here(), memory_errors(f"a step of {rows} tokens does not fit on {self._device}"):
            self._reserve(spans)
            out = self._computed(spans, hidden, dtype, wanted) if rows else None
            if not self._last:
                given = memoryview(b"") if out is None else self._backend.send(out, dtype)
            else:
                given = None if out is None or not wanted else out.cpu().numpy()
        for span in spans:
            self._table.commit(span.seq, span.end)
        if given is None or isinstance(given, memoryview):
            return StageOutput(given)
        return StageOutput(None, given, [summarize(row) for row in given])

    def _here(self) -> AbstractContextManager[Any]:
        """Kernels are launched on a thread's current GPU."""
        return nullcontext() if self._device.type == "cpu" else torch.cuda.device(self._device)

    def _reserve(self, spans: Sequence[Span]) -> None:
        for old, new in self._table.reserve({span.seq: span.end for span in spans}):
            for pool in self._backend.pools:
                pool.keys[new] = pool.keys[old]
                pool.values[new] = pool.values[old]

    def _computed(self, spans: Sequence[Span], hidden: Any, dtype: WireDtype, wanted: Sequence[int]) -> torch.Tensor:
        """Hidden states of all rows; on the last stage logits of the wanted ones."""
        rows = sum(len(span.tokens) for span in spans)
        states = None if self._first else self._backend.receive(hidden, dtype, rows, self._hidden_size)
        if rows == len(spans) <= MOST_SEQUENCES:
            out = self._decode(spans, states)
            return self._backend.select(out, wanted) if self._last else out[:rows]
        batch, row_spans = self._batch(spans)
        self._backend.batch = batch
        x = self._decoder.embed([token for span in spans for token in span.tokens]) if states is None else states
        x = self._decoder.forward(x, row_spans, [self._layers] * len(spans))
        return self._head(self._backend.select(x, wanted)) if self._last and wanted else x

    def _batch(self, spans: Sequence[Span]) -> tuple[PagedBatch, list[RowSpan]]:
        """Where the rows of a step of any kind stand."""
        row_spans: list[RowSpan] = []
        for span in spans:
            begin = row_spans[-1].end if row_spans else 0
            row_spans.append(RowSpan(begin, begin + len(span.tokens), span.start))
        positions = [position for span in spans for position in range(span.start, span.end)]
        slots = [self._slot(span.seq, position) for span in spans for position in range(span.start, span.end)]
        tables = self._on_device(self._tables(spans))
        alone = [i for i, span in enumerate(spans) if len(span.tokens) == 1]
        together = [i for i, span in enumerate(spans) if len(span.tokens) > 1]
        lone = None
        if alone:
            firsts, starts = [row_spans[i].begin for i in alone], [spans[i].start for i in alone]
            lone = LoneRows(self._on_device(firsts), self._on_device(starts), tables[self._on_device(alone)])
        long = tuple(LongSpan(row_spans[i].begin, row_spans[i].end, spans[i].start, tables[i]) for i in together)
        return PagedBatch(self._on_device(positions), self._on_device(slots), lone, long), row_spans

    def _decode(self, spans: Sequence[Span], states: torch.Tensor | None) -> torch.Tensor:
        """One token of each sequence, filled up to sizes that are captured.

        These are powers of two of rows and, where attention reads whole tables (without Triton), of blocks.
        """
        tables = self._tables(spans)
        key = (_power_of_two(len(spans)), self._most_blocks if self._backend.fused else _power_of_two(tables.shape[1]))
        step = self._steps.get(key)
        if step is None:
            step = self._steps[key] = self._static_step(*key)
        plan = np.full((key[0], 2 + tables.shape[1]), self._spare, np.int32)
        plan[:, :2] = 0
        plan[: len(spans), 0] = [span.tokens[0] for span in spans]
        plan[: len(spans), 1] = [span.start for span in spans]
        plan[: len(spans), 2:] = tables
        step.plan[:, : plan.shape[1]].copy_(torch.from_numpy(plan))
        if step.hidden is not None and states is not None:
            step.hidden[: len(spans)].copy_(states)
        return self._replays.run(key, lambda: self._decode_step(step))

    def _static_step(self, rows: int, blocks: int) -> StaticStep:
        plan = torch.zeros((rows, 2 + blocks), dtype=torch.int32, device=self._device)
        hidden = None if self._first else torch.zeros((rows, self._hidden_size), device=self._device)
        return StaticStep(plan, hidden)

    def _decode_step(self, step: StaticStep) -> torch.Tensor:
        """What is captured: hidden states, or on the last stage logits, of all rows."""
        self._backend.batch = PagedBatch.of_lone(step.plan[:, 1], step.plan[:, 2:])
        tokens: Any = step.plan[:, 0]
        x = self._decoder.embed(tokens) if step.hidden is None else step.hidden.clone()
        # The spans say nothing that the batch does not.
        x = self._decoder.forward(x, [RowSpan(i, i + 1, 0) for i in range(len(x))], [self._layers] * len(x))
        return self._head(x) if self._last else x

    def _head(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, on the device: see `TorchCudaBackend.logits`."""
        logits: Any = self._decoder.head(x)
        return logits

    def _slot(self, seq: int, position: int) -> int:
        return self._table.blocks(seq)[position // BLOCK] * BLOCK + position % BLOCK

    def _tables(self, spans: Sequence[Span]) -> np.ndarray:
        """The sequences' blocks, int32 [sequences, blocks], filled up with the spare block."""
        blocks = [self._table.blocks(span.seq) for span in spans]
        tables = np.full((len(spans), max(map(len, blocks))), self._spare, np.int32)
        for row, own in zip(tables, blocks, strict=True):
            row[: len(own)] = own
        return tables

    def _on_device(self, numbers: Sequence[int] | np.ndarray) -> torch.Tensor:
        return torch.as_tensor(numbers, device=self._device)

    def _pool(self, spec: ArchSpec) -> PagedPool:
        shape, kept = (self._spare + 1, BLOCK, spec.cache.heads), self._backend.product_type
        dims = (spec.cache.key_dim, spec.cache.value_dim)
        return PagedPool(*(torch.zeros((*shape, dim), dtype=kept, device=self._device) for dim in dims))


def require_gpu(device: str) -> None:
    """Raises ValueError, with what to do, where torch finds no such GPU."""
    if not torch.cuda.is_available():
        raise ValueError(
            f"{device} cannot compute: this PyTorch ({torch.__version__}) finds no CUDA GPU; install the build of "
            "torch for CUDA and NVIDIA's driver, or use --device cpu"
        )
    if torch.device(device).index not in range(torch.cuda.device_count()):
        raise ValueError(f"there is no {device} here; torch finds {torch.cuda.device_count()} GPU(s)")


@contextmanager
def memory_errors(what: str) -> Iterator[None]:
    """A GPU's running out of memory becomes a MemoryError that says what was too much, and what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"{what}; give that device less with --memory: {error}") from error


def _capturable(weights: StageWeights) -> bool:
    """Whether decode steps ask the host nothing: experts that could not be stacked are chosen there."""
    mixtures = (layer.mlp for layer in weights.layers if isinstance(layer.mlp, MoeWeights))
    return all(isinstance(mixture.experts, StackedExperts) for mixture in mixtures)


def _power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()
