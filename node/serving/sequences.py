"""One generation on the driver: its tokens and how far they have gone into the pipeline. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum, auto

from swarmd.node.engine.sampling_params import MAX_SCHEMA, NO_TOKEN, NOT_YET, SamplingParams
from swarmd.node.serving.messages import Opening
from swarmd.node.serving.steps import Choices, Progress


class Phase(Enum):
    """Where a sequence stands."""

    WAITING = auto()
    RUNNING = auto()
    DONE = auto()


@dataclass(eq=False, slots=True)
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
    # What the stages hold after the steps sent so far: rejected drafts stay behind `sent` until they are overwritten.
    cached: int = 0
    # How many tokens there were when it began, or began again: so many are prefill, the others decode.
    prefix: int = 0
    generated: int = 0
    kv_reserved: int = 0
    # A sequence that was put back runs again under a new id, so that late samples of the old one are told apart.
    pipeline_id: int = -1

    @property
    def untouched(self) -> bool:
        """Whether nobody has had a token of it yet, here or in an earlier epoch, nor has it been put back."""
        return self.pipeline_id < 0 and len(self.tokens) <= self.sampling.prompt_tokens


def queue_up(line: deque[Sequence], sequence: Sequence) -> None:
    """Take a sequence into a line of those who wait: an answer that goes on after a loss, before the untouched ones."""
    place = len(line)
    if not sequence.untouched:
        while place and line[place - 1].untouched:
            place -= 1
    line.insert(place, sequence)


def may_open(line: deque[Sequence], opened: list[Opening]) -> bool:
    """Whether anybody waits whose opening has room in a step beside these: a message's header is bounded, and JSON
    schemas are the largest part of it."""
    if not line or not opened:
        return bool(line)
    sizes = [len(sampling.json_schema.encode()) for sampling in (line[0].sampling, *(one.sampling for one in opened))]
    return sizes[0] == 0 or sum(sizes) <= MAX_SCHEMA


def accept(sequence: Sequence, choices: Choices, room: int) -> tuple[list[Progress], bool]:
    """Append what was drawn for a sequence until it ends by it: what to tell, and whether it ended.

    A stop token is not shown, nor NO_TOKEN and NOT_YET. `room` is the most tokens that a sequence can have.
    """
    progress: list[Progress] = []
    for choice in choices:
        if choice.token == NOT_YET:
            break
        if choice.token == NO_TOKEN:
            return [*progress, Progress(sequence.seq, None, "unfit")], True
        if choice.token in sequence.stop_tokens:
            return [*progress, Progress(sequence.seq, None, "stop")], True
        sequence.tokens.append(choice.token)
        sequence.generated += 1
        if sequence.generated >= sequence.max_tokens or len(sequence.tokens) >= room:
            return [*progress, Progress(sequence.seq, choice, "length")], True
        progress.append(Progress(sequence.seq, choice))
    return progress, False
