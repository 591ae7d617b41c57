"""A stage's engine: weights, KV cache and sampling behind one `step`."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Sequence
from typing import Any, Protocol, cast

import msgspec
import torch

from swarmd.node.engine.backends.base import WIRE_ITEM_BYTES, Array, Backend, RowSpan, WireDtype
from swarmd.node.engine.backends.torch_cpu import TorchCpuBackend
from swarmd.node.engine.decoder import Decoder
from swarmd.node.engine.kv_cache import KvCache, KvExhausted, StepError
from swarmd.node.engine.sampling import choose
from swarmd.node.engine.sampling_params import SamplingParams
from swarmd.node.engine.spec import ArchSpec
from swarmd.node.engine.weights import ReportProgress, StageWeights, load_stage_weights
from swarmd.node.models.gguf import GGUFFile

__all__ = ["KvExhausted", "Sample", "SequenceChunk", "StageEngine", "StepChunk", "StepError", "StepResult"]

log = logging.getLogger("swarmd.engine")


class StepChunk(Protocol):
    """What a step needs to know of one sequence: `append(seq, start, tokens)`, and whether to sample after
    the last.
    """

    @property
    def seq(self) -> int: ...  # noqa: D102
    @property
    def start(self) -> int: ...  # noqa: D102
    @property
    def tokens(self) -> Sequence[int]: ...  # noqa: D102
    @property
    def sample(self) -> bool: ...  # noqa: D102


class SequenceChunk(msgspec.Struct, frozen=True):
    """The plain `StepChunk`: consecutive tokens of one sequence, the first at position `start`."""

    seq: int
    start: int
    tokens: tuple[int, ...]
    sample: bool = False


class Sample(msgspec.Struct, frozen=True):
    """The token chosen for `position` of a sequence; see `sampling.Choice` for the rest."""

    seq: int
    position: int
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class StepResult(msgspec.Struct, frozen=True):
    """`payload`: hidden states of all rows in the wire's type, None on the last stage; `samples`: on the last
    stage only.
    """

    payload: memoryview | None
    samples: tuple[Sample, ...]


class StageEngine:
    """Layers [start, end) of a model. Not thread-safe: one caller, steps in order."""

    def __init__(
        self, spec: ArchSpec, start: int, end: int, weights: StageWeights, backend: Backend, kv_tokens: int
    ) -> None:
        self.first = start == 0
        self.last = end == spec.n_layers
        self.weight_bytes = weights.nbytes
        self.kv_tokens = kv_tokens
        self._spec = spec
        self._backend = backend
        self._decoder = Decoder(spec, weights, backend)
        self._cache = KvCache(backend, end - start, spec.n_kv_heads, spec.head_dim, kv_tokens)
        self._sampling: dict[int, SamplingParams] = {}
        self._history: dict[int, list[int]] = {}

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        spec: ArchSpec,
        start: int,
        end: int,
        *,
        threads: int,
        kv_tokens: int,
        sparse: bool = False,
        progress: ReportProgress | None = None,
    ) -> StageEngine:
        """Load a stage from a GGUF file (`sparse`: of which only this stage's tensors need be there).

        `threads` sets torch's thread count for the whole process; `kv_tokens` is the capacity over all
        sequences. Raises ModelFileError for anything wrong with the file, ValueError for layers outside the
        model.
        """
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        backend = TorchCpuBackend()
        with GGUFFile.open(path, sparse=sparse) as gguf:
            weights = load_stage_weights(gguf, spec, start, end, backend, progress)
        gc.collect()
        log.info(
            "loaded layers %d to %d: %d bytes of weights, backend %s",
            start,
            end - 1,
            weights.nbytes,
            backend.name,
        )
        return cls(spec, start, end, weights, backend, kv_tokens)

    def open(self, seq: int, sampling: SamplingParams) -> None:
        """Begin an empty sequence. Raises StepError when the id is taken or the sampling names an impossible
        token.
        """
        outside = [token for token in sampling.logit_bias if not 0 <= token < self._spec.vocab_size]
        if outside:
            raise StepError(f"logit_bias names token {outside[0]}; the vocabulary has {self._spec.vocab_size}")
        self._cache.open(seq)
        self._sampling[seq] = sampling
        self._history[seq] = []

    def length(self, seq: int) -> int:
        """Tokens cached. Raises StepError for an unknown sequence."""
        return self._cache.length(seq)

    def truncate(self, seq: int, length: int) -> None:
        """Forget all tokens from position `length` on. Raises StepError if fewer are cached."""
        self._cache.truncate(seq, length)
        del self._history[seq][length:]

    def free(self, seq: int) -> None:
        """Forget the sequence and release its memory; unknown ids are let be."""
        self._cache.free(seq)
        self._sampling.pop(seq, None)
        self._history.pop(seq, None)

    def step(self, chunks: Sequence[StepChunk], hidden: Any, dtype: str) -> StepResult:
        """Append the chunks to their sequences and compute them together.

        The first stage takes `hidden` None and embeds the tokens; the others take the hidden states of all
        chunks' tokens, [tokens, hidden_size] row-major in `dtype` ("f32" or "bf16"), as any buffer. Raises
        StepError when a chunk does not continue its sequence, a size is wrong, or the results are not finite;
        KvExhausted when the cache is full. After either, the sequences are as they were.
        """
        spans = self._checked_spans(chunks)
        x = self._input(chunks, hidden, dtype)
        self._cache.reserve({chunk.seq: chunk.start + len(chunk.tokens) for chunk in chunks})
        if chunks:
            x = self._decoder.forward(x, spans, [self._cache.layers(chunk.seq) for chunk in chunks])
        samples = self._samples(x, chunks, spans) if self.last else ()
        for chunk in chunks:
            self._cache.commit(chunk.seq, chunk.start + len(chunk.tokens))
            self._history[chunk.seq] += chunk.tokens
        return StepResult(None if self.last else self._backend.send(x, cast(WireDtype, dtype)), samples)

    def _checked_spans(self, chunks: Sequence[StepChunk]) -> list[RowSpan]:
        spans: list[RowSpan] = []
        begin = 0
        for chunk in chunks:
            length = self._cache.length(chunk.seq)
            if chunk.start != length:
                raise StepError(
                    f"sequence {chunk.seq} holds {length} tokens; a chunk from position {chunk.start} does not fit"
                )
            if not chunk.tokens or chunk.start + len(chunk.tokens) > self._spec.context_length:
                raise StepError(
                    f"sequence {chunk.seq}: {len(chunk.tokens)} tokens from position {chunk.start} do not fit "
                    f"the model's context of {self._spec.context_length}"
                )
            if not 0 <= min(chunk.tokens) <= max(chunk.tokens) < self._spec.vocab_size:
                raise StepError(
                    f"sequence {chunk.seq}: a token id is outside the vocabulary of {self._spec.vocab_size}"
                )
            spans.append(RowSpan(begin, begin + len(chunk.tokens), chunk.start))
            begin = spans[-1].end
        if len({chunk.seq for chunk in chunks}) != len(chunks):
            raise StepError("a sequence stands twice in one step")
        return spans

    def _input(self, chunks: Sequence[StepChunk], hidden: Any, dtype: str) -> Array:
        if dtype not in WIRE_ITEM_BYTES:
            raise StepError(f"hidden states of type {dtype!r} are not understood; use {' or '.join(WIRE_ITEM_BYTES)}")
        tokens = [token for chunk in chunks for token in chunk.tokens]
        if self.first:
            return self._decoder.embed(tokens)
        columns = self._spec.hidden_size
        expected = len(tokens) * columns * WIRE_ITEM_BYTES[dtype]
        given = 0 if hidden is None else memoryview(hidden).nbytes
        if given != expected:
            raise StepError(f"{given} bytes of hidden states came for {len(tokens)} tokens; {expected} are needed")
        return self._backend.receive(hidden, cast(WireDtype, dtype), len(tokens), columns)

    def _samples(self, x: Array, chunks: Sequence[StepChunk], spans: Sequence[RowSpan]) -> tuple[Sample, ...]:
        wanted = [(chunk, span) for chunk, span in zip(chunks, spans, strict=True) if chunk.sample]
        if not wanted:
            return ()
        logits = self._decoder.head(self._backend.select(x, [span.end - 1 for _, span in wanted]))
        samples: list[Sample] = []
        for row, (chunk, _) in zip(logits, wanted, strict=True):
            position = chunk.start + len(chunk.tokens)
            history = [*self._history[chunk.seq], *chunk.tokens]
            try:
                choice = choose(row, self._sampling[chunk.seq], history, position)
            except ValueError as error:
                raise StepError(f"sequence {chunk.seq}: {error}") from error
            samples.append(Sample(chunk.seq, position, choice.token, choice.logprob, choice.top))
        return tuple(samples)
