"""What goes into a step of a stage, and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from swarmd.node.engine.wire import WireDtype


class StepChunk(Protocol):
    """What a step needs to know of one sequence: `append(seq, start, tokens)`, and after how many of the last tokens
    to sample.
    """

    @property
    def seq(self) -> int: ...  # noqa: D102
    @property
    def start(self) -> int: ...  # noqa: D102
    @property
    def tokens(self) -> Sequence[int]: ...  # noqa: D102
    @property
    def sample(self) -> int: ...  # noqa: D102


class SequenceChunk(msgspec.Struct, frozen=True):
    """The plain `StepChunk`: consecutive tokens of one sequence, the first at position `start`."""

    seq: int
    start: int
    tokens: tuple[int, ...]
    sample: int = 0


class Sample(msgspec.Struct, frozen=True):
    """The token chosen for `position` of a sequence; see `sampling.Choice` for the rest."""

    seq: int
    position: int
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class StepResult(msgspec.Struct, frozen=True):
    """`payload`: hidden states of all rows in `dtype`, None on the last stage; `samples`: on the last stage only."""

    payload: memoryview | None
    samples: tuple[Sample, ...]
    dtype: WireDtype = "f32"
