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


@dataclass
class Sequence:
    """`tokens` is prompt and output so far; the first `sent` of them are in the pipeline or in the stages' KV caches.

    `max_tokens` is how many may still be generated when it is submitted; `reported` counts what was.
    """

    seq: int
    tokens: list[int]
    sampling: SamplingParams
    max_tokens: int
    stop_tokens: frozenset[int]
    phase: Phase = Phase.WAITING
    sent: int = 0
    awaiting_sample: bool = False
    generated: int = 0
    kv_reserved: int = 0
    # A sequence that was put back runs again under a new id, so that late samples of the old one are told apart.
    pipeline_id: int = field(default=-1)

    @property
    def unsent(self) -> int:
        """Tokens that the stages have not been given yet."""
        return len(self.tokens) - self.sent

    @property
    def prefilling(self) -> bool:
        """Whether more than the newest token is still to be sent."""
        return self.phase is Phase.RUNNING and self.unsent > 1

    @property
    def can_decode(self) -> bool:
        """Whether exactly the newest token is to be sent and nothing is awaited."""
        return self.phase is Phase.RUNNING and self.unsent == 1 and not self.awaiting_sample

    @property
    def can_prefill(self) -> bool:
        """Whether a chunk of prompt may go; chunks may follow each other through the stages without waiting."""
        return self.prefilling and not self.awaiting_sample
