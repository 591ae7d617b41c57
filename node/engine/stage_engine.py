"""A stage's engine: the state of its sequences, and sampling, around what computes its layers."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from swarmd.node.engine import wire
from swarmd.node.engine.computes import load_compute
from swarmd.node.engine.constraint import Constraints
from swarmd.node.engine.sampler import Sampler, sampled_rows
from swarmd.node.engine.sampling_params import SamplingParams
from swarmd.node.engine.spare_memory import give_back
from swarmd.node.engine.spec import ArchSpec
from swarmd.node.engine.stage_compute import (
    Kernels,
    KvExhausted,
    Span,
    StageCompute,
    StageOutput,
    StepError,
)
from swarmd.node.engine.step import Sample, SequenceChunk, StepChunk, StepResult
from swarmd.node.engine.weights import ReportProgress
from swarmd.node.engine.wire import WireDtype
from swarmd.node.models.checkpoint import open_checkpoint
from swarmd.node.models.token_texts import TokenTexts

__all__ = ["KvExhausted", "Sample", "SequenceChunk", "StageEngine", "StepChunk", "StepError", "StepResult"]

log = logging.getLogger("swarmd.engine")


class StageEngine:
    """Layers [start, end) of a model. Not thread-safe: one caller, steps in order."""

    def __init__(
        self,
        spec: ArchSpec,
        start: int,
        end: int,
        compute: StageCompute,
        kv_tokens: int,
        constraints: Constraints | None = None,
    ) -> None:
        self.first = start == 0
        self.last = end == spec.n_layers
        self.weight_bytes = compute.weight_bytes
        self.kv_tokens = kv_tokens
        self.kernels = compute.name
        self._spec = spec
        self._compute = compute
        self._sampler = Sampler(spec.vocab_size, constraints if self.last else None)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        spec: ArchSpec | None,
        start: int,
        end: int,
        *,
        threads: int,
        kv_tokens: int,
        context: int | None = None,
        sparse: bool = False,
        device: str = "cpu",
        kernels: Kernels = "auto",
        progress: ReportProgress | None = None,
        defer: bool = False,
    ) -> StageEngine:
        """Load a stage of the model at `path` (`sparse`: of which only this stage's tensors need be there). `spec` is
        the model's if it was read already.

        `kv_tokens` is the capacity over all sequences, each counted in whole blocks of 16; `context` the longest of
        them, by default the model's. `device` is "cpu", and `kernels` what computes there: "native" are our own,
        "torch" is plain torch, "auto" our own if they are there and can. Raises ModelFileError for anything wrong with
        the file, ValueError for layers outside the model or a device without a backend, NativeMissing for "native"
        where they are not. The first sequence that is held to a JSON schema needs the model's tokenizer: with `defer`,
        it is answered with NOT_YET until that is read, instead of making everybody wait.
        """
        with open_checkpoint(path, sparse=sparse) as checkpoint:
            spec = spec or checkpoint.spec
            compute = load_compute(
                checkpoint,
                start,
                end,
                device=device,
                kernels=kernels,
                threads=threads,
                kv_tokens=kv_tokens,
                context=context,
                progress=progress,
            )
        give_back()
        constraints = Constraints(partial(_token_texts, Path(path)), wait=not defer)
        log.info(
            "loaded layers %d to %d: %d bytes of weights, kernels %s",
            start,
            end - 1,
            compute.weight_bytes,
            compute.name,
        )
        return cls(spec, start, end, compute, kv_tokens, constraints)

    def open(self, seq: int, sampling: SamplingParams, source: int = -1, length: int = 0) -> None:
        """Begin a sequence: empty, or as a copy of the first `length` tokens of `source`.

        Raises StepError when the id is taken, the source is unknown or shorter, or the sampling names an impossible
        token.
        """
        self._sampler.check(sampling)
        if source < 0:
            self._compute.open(seq)
        else:
            self._compute.fork(seq, source, length)
        self._sampler.open(seq, sampling, () if source < 0 else self._sampler.tokens(source)[:length])

    def reset(self) -> None:
        """Forget all sequences."""
        for seq in self._sampler.sequences:
            self.free(seq)

    @property
    def held(self) -> tuple[int, int]:
        """(sequences, tokens cached of them all); may be asked from any thread."""
        return self._sampler.held

    def length(self, seq: int) -> int:
        """Tokens cached. Raises StepError for an unknown sequence."""
        return self._compute.length(seq)

    def truncate(self, seq: int, length: int) -> None:
        """Forget all tokens from position `length` on. Raises StepError if fewer are cached."""
        self._compute.truncate(seq, length)
        self._sampler.truncate(seq, length)

    def free(self, seq: int) -> None:
        """Forget the sequence and release its memory; unknown ids are let be."""
        self._compute.free(seq)
        self._sampler.free(seq)

    def step(
        self, chunks: Sequence[StepChunk], hidden: Any, dtype: WireDtype, out_dtype: WireDtype | None = None
    ) -> StepResult:
        """Append the chunks to their sequences and compute them together.

        A chunk that begins before its sequence's end replaces what is cached from there on. The first stage takes
        `hidden` None and embeds the tokens; the others take the hidden states of all chunks' tokens, [tokens,
        hidden_size] row-major in `dtype`, as any buffer. What goes on to the next stage is in `out_dtype`, by default
        the same; the result says in which (see `wire.encode`).

        The last stage samples after the last `sample` tokens of a chunk, one position after the other, as long as what
        it draws is the chunk's own next token (a draft that was right). Raises StepError when a chunk does not continue
        its sequence, a size is wrong, or the results are not finite; KvExhausted when the cache is full. After either,
        the sequences are as they were, without what was to be replaced.
        """
        spans = self._checked_spans(chunks)
        self._check_input(spans, hidden, dtype)
        for span in spans:
            if span.start < self._compute.length(span.seq):
                self.truncate(span.seq, span.start)
        wanted = sampled_rows(chunks) if self.last else []
        output, sent_as = self._forward(spans, hidden, dtype, out_dtype or dtype, wanted)
        try:
            samples = self._sampler.sample(chunks, output) if wanted else ()
        except StepError:
            for span in spans:
                self._compute.truncate(span.seq, span.start)
            raise
        for span in spans:
            self._sampler.append(span.seq, span.tokens)
        return StepResult(output.payload, samples, sent_as)

    def _forward(
        self, spans: Sequence[Span], hidden: Any, dtype: WireDtype, out_dtype: WireDtype, wanted: Sequence[int]
    ) -> tuple[StageOutput, WireDtype]:
        """The compute takes and gives f32 or bf16, the same on both sides; all else is converted here."""
        given = out_dtype if self.first else dtype
        wanted_as = given if self.last else out_dtype
        if given == wanted_as and (given == "f32" or given == "bf16"):
            return self._compute.forward(spans, hidden, given, wanted), given
        rows, columns = sum(len(span.tokens) for span in spans), self._spec.hidden_size
        states = None if hidden is None else wire.decode(hidden, dtype, rows, columns)
        output = self._compute.forward(spans, states, "f32", wanted)
        if output.payload is None:
            return output, out_dtype
        sent_as, payload = wire.encode(wire.decode(output.payload, "f32", rows, columns), out_dtype)
        return StageOutput(payload), sent_as

    def _checked_spans(self, chunks: Sequence[StepChunk]) -> list[Span]:
        spans: list[Span] = []
        for chunk in chunks:
            length = self._compute.length(chunk.seq)
            if not 0 <= chunk.start <= length:
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
            if not 0 <= chunk.sample <= len(chunk.tokens):
                raise StepError(
                    f"sequence {chunk.seq}: {chunk.sample} samples were asked of {len(chunk.tokens)} tokens"
                )
            spans.append(Span(chunk.seq, chunk.start, chunk.tokens))
        if len({chunk.seq for chunk in chunks}) != len(chunks):
            raise StepError("a sequence stands twice in one step")
        return spans

    def _check_input(self, spans: Sequence[Span], hidden: Any, dtype: WireDtype) -> None:
        if dtype not in wire.WIRE_DTYPES:
            raise StepError(f"hidden states of type {dtype!r} are not understood; use {' or '.join(wire.WIRE_DTYPES)}")
        rows = sum(len(span.tokens) for span in spans)
        expected = 0 if self.first else wire.wire_bytes(dtype, rows, self._spec.hidden_size)
        given = 0 if hidden is None else memoryview(hidden).nbytes
        if given != expected:
            raise StepError(f"{given} bytes of hidden states came for {rows} tokens; {expected} are needed")


def _token_texts(path: Path) -> TokenTexts:
    """Raises ModelFileError."""
    from swarmd.node.models.tokenizer import Tokenizer  # brings a library along that few stages need

    return Tokenizer.of_model(path)
