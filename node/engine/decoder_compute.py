"""A stage computed by the decoder over a backend's operations: plain torch, CUDA, MLX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from swarmd.node.engine.backends.base import Array, CachingBackend, RowSpan
from swarmd.node.engine.decoder import Decoder
from swarmd.node.engine.kv_cache import KvCache
from swarmd.node.engine.spec import ArchSpec
from swarmd.node.engine.stage_compute import Span, StageOutput, WireDtype, summarize
from swarmd.node.engine.weights import ReportProgress, StageWeights, load_stage_weights
from swarmd.node.models.checkpoint import Checkpoint


class DecoderCompute:
    """See `StageCompute`. A fork copies what it shares."""

    def __init__(
        self, spec: ArchSpec, start: int, end: int, weights: StageWeights, backend: CachingBackend, kv_tokens: int
    ) -> None:
        self.name = backend.name
        self.weight_bytes = weights.nbytes
        self._first, self._last = start == 0, end == spec.n_layers
        self._hidden_size = spec.hidden_size
        self._backend = backend
        self._decoder = Decoder(spec, start, weights, backend)
        self._cache = KvCache(backend, end - start, spec.cache, kv_tokens)

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        start: int,
        end: int,
        backend: CachingBackend,
        *,
        kv_tokens: int,
        context: int | None = None,
        progress: ReportProgress | None = None,
    ) -> DecoderCompute:
        """See `StageEngine.load`. Raises ModelFileError."""
        weights = load_stage_weights(checkpoint, start, end, backend, context=context, progress=progress)
        return cls(checkpoint.spec, start, end, weights, backend, kv_tokens)

    def open(self, seq: int) -> None:
        """See `StageCompute`."""
        self._cache.open(seq)

    def fork(self, seq: int, source: int, length: int) -> None:
        """See `StageCompute`."""
        self._cache.fork(seq, source, length)
        self._backend.settle(self._cache.layers(seq))

    def length(self, seq: int) -> int:
        """See `StageCompute`."""
        return self._cache.length(seq)

    def truncate(self, seq: int, length: int) -> None:
        """See `StageCompute`."""
        self._cache.truncate(seq, length)

    def free(self, seq: int) -> None:
        """See `StageCompute`."""
        self._cache.free(seq)

    def forward(self, spans: Sequence[Span], hidden: Any, dtype: WireDtype, wanted: Sequence[int]) -> StageOutput:
        """See `StageCompute`."""
        rows: list[RowSpan] = []
        for span in spans:
            begin = rows[-1].end if rows else 0
            rows.append(RowSpan(begin, begin + len(span.tokens), span.start))
        x = self._input(spans, hidden, dtype)
        self._cache.reserve({span.seq: span.end for span in spans})
        if spans:
            x = self._decoder.forward(x, rows, [self._cache.layers(span.seq) for span in spans])
        for span in spans:
            self._cache.commit(span.seq, span.end)
        if not self._last:
            return StageOutput(self._backend.send(x, dtype))
        if not wanted:
            self._backend.settle([cache for span in spans for cache in self._cache.layers(span.seq)])
            return StageOutput(None)
        logits = self._decoder.head(self._backend.select(x, wanted))
        return StageOutput(None, logits, [summarize(row) for row in logits])

    def _input(self, spans: Sequence[Span], hidden: Any, dtype: WireDtype) -> Array:
        if self._first:
            return self._decoder.embed([token for span in spans for token in span.tokens])
        return self._backend.receive(hidden, dtype, sum(len(span.tokens) for span in spans), self._hidden_size)
