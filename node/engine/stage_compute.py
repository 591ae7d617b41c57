"""The seam between a stage's bookkeeping and its arithmetic: what computes a step, and keeps the KV cache for it.

Two implementations: `NativeCompute` runs a whole step in one call of our own kernels; `DecoderCompute` runs the decoder
over a `Backend`'s operations. Needs no array library but numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

Kernels = Literal["auto", "native", "torch"]
"""What computes on a CPU: our own kernels, plain torch, or our own where they were built and can."""

WireDtype = Literal["f32", "bf16"]
"""The types in which a compute takes and gives hidden states; wire.py has those that are made of them for a link."""

Logits = np.ndarray[Any, np.dtype[np.float32]]


class KvExhausted(RuntimeError):
    """The sequences would hold more tokens than the stage has room for; nothing was changed."""


class StepError(RuntimeError):
    """A step or a call does not fit the stage's state; nothing was changed."""


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of one sequence in a step, the first at position `start`."""

    seq: int
    start: int
    tokens: Sequence[int]

    @property
    def end(self) -> int:
        """The position after the last."""
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class RowSummary:
    """What sampling needs to know of a row of logits: whether all are finite, the first of the largest ones (`best`),
    and ln(sum(exp(logits))).
    """

    finite: bool
    best: int
    log_normalizer: float


@dataclass(frozen=True)
class StageOutput:
    """`payload`: hidden states of all rows, row-major in the wire's type; None on the last stage.

    `logits`: float32 [wanted rows, vocab], valid until the next step; None on other stages. `summaries` has one for
    each of its rows.
    """

    payload: memoryview | None
    logits: Logits | None = None
    summaries: Sequence[RowSummary] = ()


class StageCompute(Protocol):
    """Layers [start, end) of a model with the KV cache of their sequences. Not thread-safe."""

    name: str
    weight_bytes: int

    def open(self, seq: int) -> None:
        """Begin an empty sequence. Raises StepError when the id is taken."""
        ...

    def fork(self, seq: int, source: int, length: int) -> None:
        """Begin a sequence as a copy of the first `length` tokens of another.

        Raises StepError when the id is taken, the source is unknown or holds fewer.
        """
        ...

    def length(self, seq: int) -> int:
        """Tokens cached. Raises StepError for an unknown sequence."""
        ...

    def truncate(self, seq: int, length: int) -> None:
        """Forget all tokens from position `length` on. Raises StepError if fewer are cached."""
        ...

    def free(self, seq: int) -> None:
        """Forget the sequence; unknown ids are let be."""
        ...

    def forward(self, spans: Sequence[Span], hidden: Any, dtype: WireDtype, wanted: Sequence[int]) -> StageOutput:
        """Append the spans to their sequences and compute them together.

        `hidden` is None on the first stage, else the hidden states of all spans' tokens as any buffer of `dtype`;
        sizes and ids were checked. `wanted` are the rows whose logits the last stage gives. Each span begins where its
        sequence ends. Raises KvExhausted; the sequences are then as they were.
        """
        ...


def summarize(logits: Logits) -> RowSummary:
    """The summary of one row, float32 [vocab]."""
    if not np.isfinite(logits).all():
        return RowSummary(finite=False, best=0, log_normalizer=0.0)
    best = int(logits.argmax())
    shifted = logits.astype(np.float64) - float(logits[best])
    return RowSummary(True, best, float(logits[best]) + float(np.log(np.exp(shifted).sum())))
