"""One generation on the driver: its tokens and how far they have gone into the pipeline. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from swarmd.node.engine.sampling_params import SamplingParams


class Phase(Enum):
    """Where a sequence stands."""

    WAITING = auto()
    RUNNING = auto()
    DONE = auto()


@dataclass(eq=False)
class Sequence:
    """`tokens` is prompt and output so far; the first `sent` of them are in the pipeline or in the stages' KV caches.

    `max_tokens` is how many may still be generated when it is submitted; `generated` counts those that were since.
    """

    seq: int
    tokens: list[int]
    sampling: SamplingParams
    max_tokens: int
    stop_tokens: frozenset[int]
    phase: Phase = Phase.WAITING
    sent: int = 0
    # How many tokens there were when it began, or began again: so many are prefill, the others decode.
    prefix: int = 0
    generated: int = 0
    kv_reserved: int = 0
    # A sequence that was put back runs again under a new id, so that late samples of the old one are told apart.
    pipeline_id: int = field(default=-1)

    @property
    def prefilling(self) -> bool:
        """Whether some of its prefix is still to be sent; its chunks may follow each other without waiting."""
        return self.phase is Phase.RUNNING and self.sent < self.prefix

    @property
    def can_decode(self) -> bool:
        """Whether the newest token was sampled and is to be sent. When all are sent, a sample is awaited."""
        return self.phase is Phase.RUNNING and self.prefix <= self.sent < len(self.tokens)
