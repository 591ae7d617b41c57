"""A stage computed on a CUDA GPU: the decoder over torch, with a paged KV cache and decode steps replayed as graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from swarmd.node.engine.backends.base import RowSpan
from swarmd.node.engine.backends.torch_cuda import BLOCK, PagedBatch, PagedPool, TorchCudaBackend
from swarmd.node.engine.block_table import BlockTable
from swarmd.node.engine.cuda_graphs import Calls, CudaGraphs, Replays
from swarmd.node.engine.decoder import Decoder
from swarmd.node.engine.spec import ArchSpec
from swarmd.node.engine.stage_compute import Span, StageOutput, WireDtype, summarize
from swarmd.node.engine.weights import ReportProgress, StageWeights, load_stage_weights
from swarmd.node.models.checkpoint import Checkpoint
from swarmd.node.models.errors import ModelFileError

MOST_SEQUENCES = 64
"""The largest decode step that is captured."""


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
        shape = (self._spare + 1, BLOCK, spec.n_kv_heads, spec.head_dim)
        kept = backend.product_type
        backend.pools = [
            PagedPool(*(torch.zeros(shape, dtype=kept, device=self._device) for _ in ("keys", "values")))
            for _ in range(start, end)
        ]
        # Choosing experts needs the host to know which were chosen.
        self._replays: Replays = Calls() if any(layer.moe for layer in spec.layers[start:end]) else replays

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
        if checkpoint.spec.latent is not None:
            raise ModelFileError(
                f"{checkpoint.name} has multi-head latent attention, which is not computed on {device} yet; use "
                "--device cpu"
            )
        if not torch.cuda.is_available():
            raise ValueError(
                f"{device} cannot compute: this PyTorch ({torch.__version__}) finds no CUDA GPU; install the build of "
                "torch for CUDA and NVIDIA's driver, or use --device cpu"
            )
        if torch.device(device).index not in range(torch.cuda.device_count()):
            raise ValueError(f"there is no {device} here; torch finds {torch.cuda.device_count()} GPU(s)")
        torch.set_grad_enabled(False)
        torch.cuda.set_device(device)
        backend = TorchCudaBackend(torch.device(device))
        try:
            weights = load_stage_weights(checkpoint, start, end, backend, context=context, progress=progress)
            return cls(checkpoint.spec, start, end, weights, backend, kv_tokens, CudaGraphs())
        except torch.cuda.OutOfMemoryError as error:
            raise MemoryError(f"layers {start} to {end - 1} do not fit on {device}: {error}") from error

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
        with torch.device(self._device):
            inputs = self._input(spans, hidden, dtype, rows)
            out = self._computed(spans, inputs, wanted) if rows else torch.empty(0, self._hidden_size)
            for span in spans:
                self._table.commit(span.seq, span.end)
            if not self._last:
                return StageOutput(self._backend.send(out, dtype))
        if not wanted:
            return StageOutput(None)
        logits = out.cpu().numpy()
        return StageOutput(None, logits, [summarize(row) for row in logits])

    def _reserve(self, spans: Sequence[Span]) -> None:
        for old, new in self._table.reserve({span.seq: span.end for span in spans}):
            for pool in self._backend.pools:
                pool.keys[new] = pool.keys[old]
                pool.values[new] = pool.values[old]

    def _input(self, spans: Sequence[Span], hidden: Any, dtype: WireDtype, rows: int) -> torch.Tensor:
        """Token ids [rows] on the first stage, else hidden states."""
        if self._first:
            return torch.tensor([token for span in spans for token in span.tokens], dtype=torch.int64)
        return self._backend.receive(hidden, dtype, rows, self._hidden_size)

    def _computed(self, spans: Sequence[Span], inputs: torch.Tensor, wanted: Sequence[int]) -> torch.Tensor:
        """Hidden states of all rows; on the last stage logits of the wanted ones."""
        if len(inputs) == len(spans) <= MOST_SEQUENCES:
            return self._decode(spans, inputs, wanted)
        positions = [position for span in spans for position in range(span.start, span.end)]
        slots = [self._slot(span.seq, position) for span in spans for position in range(span.start, span.end)]
        tables = self._tables(spans, max(len(self._table.blocks(span.seq)) for span in spans))
        self._backend.batch = PagedBatch(torch.tensor(positions), torch.tensor(slots), tables, decode=False)
        rows: list[RowSpan] = []
        for span in spans:
            begin = rows[-1].end if rows else 0
            rows.append(RowSpan(begin, begin + len(span.tokens), span.start))
        x = self._decoder.embed(inputs) if self._first else inputs  # pyright: ignore[reportArgumentType]  a tensor is fine
        x = self._decoder.forward(x, rows, [self._layers] * len(spans))
        if not self._last or not wanted:
            return x
        return self._head(x[torch.tensor(wanted, dtype=torch.int64)])

    def _decode(self, spans: Sequence[Span], inputs: torch.Tensor, wanted: Sequence[int]) -> torch.Tensor:
        """One token of each sequence, filled up to sizes that are captured: powers of two of rows and of blocks."""
        rows = _power_of_two(len(spans))
        more = rows - len(spans)
        blocks = _power_of_two(max(len(self._table.blocks(span.seq)) for span in spans))
        positions = torch.tensor([span.start for span in spans] + [0] * more)
        slots = torch.tensor([self._slot(span.seq, span.start) for span in spans] + [self._spare * BLOCK] * more)
        tables = torch.cat((self._tables(spans, blocks), torch.full((more, blocks), self._spare)))
        filled = torch.cat((inputs, torch.zeros((more, *inputs.shape[1:]), dtype=inputs.dtype)))
        out = self._replays.run(self._decode_step, (filled, positions, slots, tables))
        if not self._last:
            return out[: len(spans)].clone()
        return out[torch.tensor(wanted, dtype=torch.int64)]

    def _decode_step(
        self, inputs: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, tables: torch.Tensor
    ) -> torch.Tensor:
        """What is captured: hidden states, or on the last stage logits, of all rows."""
        self._backend.batch = PagedBatch(positions, slots, tables, decode=True)
        x = self._decoder.embed(inputs) if self._first else inputs.clone()  # pyright: ignore[reportArgumentType]
        x = self._decoder.forward(x, [RowSpan(i, i + 1, 0) for i in range(len(inputs))], [self._layers] * len(inputs))
        return self._head(x) if self._last else x

    def _head(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, on the device: see `TorchCudaBackend.logits`."""
        logits: Any = self._decoder.head(x)
        return logits

    def _slot(self, seq: int, position: int) -> int:
        return self._table.blocks(seq)[position // BLOCK] * BLOCK + position % BLOCK

    def _tables(self, spans: Sequence[Span], blocks: int) -> torch.Tensor:
        """[sequences, blocks], filled up with the spare block."""
        tables = np.full((len(spans), blocks), self._spare, np.int64)
        for row, span in zip(tables, spans, strict=True):
            own = self._table.blocks(span.seq)
            row[: len(own)] = own
        return torch.from_numpy(tables).to(self._device)


def _power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()
