"""What the scheduler is given and gives: its limits, the steps that it plans, the progress that comes of them. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from swarmd.node.serving.messages import Chunk, Opening, TokenChoice

MOST_STEP_TOKENS = 512
"""A stage's workspace has room for so many tokens in one step."""


@dataclass(frozen=True)
class Limits:
    """`step_tokens` is one step's token budget; `growth` is the KV room kept for a sequence's next tokens.

    The stages hold `kv_tokens` in blocks of `kv_block` tokens, of which each belongs to one sequence. Drafts are sent
    only as far as a step's tokens stay within `draft_rows`. Of the sequences that ended, at most `max_retained` stay in
    the KV cache for those who come with the same prefix.

    Raises ValueError unless a step has room for a token of everybody who runs and one more, so that prefill always
    gets on, and for no more than MOST_STEP_TOKENS.
    """

    n_stages: int
    kv_tokens: int
    context: int
    step_tokens: int = 256
    growth: int = 32
    max_running: int = 64
    max_waiting: int = 256
    draft_rows: int = 16
    max_retained: int = 64
    kv_block: int = 16

    def __post_init__(self) -> None:
        if not 1 <= self.max_running < self.step_tokens <= MOST_STEP_TOKENS or self.growth < 1:
            raise ValueError(f"limits do not fit together: {self}")

    @property
    def room(self) -> int:
        """The most tokens that one sequence can have."""
        return min(self.context, self.kv_capacity)

    @property
    def kv_capacity(self) -> int:
        """The tokens in all whole blocks."""
        return self.kv_tokens - self.kv_tokens % self.kv_block

    def require_room(self, tokens: int, max_tokens: int) -> None:
        """Raises ValueError for a sequence that could never get a token."""
        if not 0 < tokens < self.room:
            raise ValueError(f"{tokens} tokens leave no room in a context of {self.room}")
        if max_tokens < 1:
            raise ValueError(f"{max_tokens} tokens were asked for; ask for 1 or more")

    def left_to(self, tokens: int, wanted: int) -> int:
        """How many more tokens a sequence gets that has so many, and wants so many."""
        return min(wanted, self.room - tokens)

    def draft_rows_beside(self, decoding: int) -> int:
        """How many drafts a step has room for beside the tokens of those who decode."""
        return max(0, min(self.draft_rows, self.step_tokens - 1) - decoding)

    def in_blocks(self, tokens: int) -> int:
        """The tokens of the blocks that hold so many."""
        return tokens + -tokens % self.kv_block


class QueueFull(Exception):
    """No more sequences are taken at present; try again later."""


@dataclass(frozen=True)
class PlannedStep:
    """What one step does to the stages, in the words of the wire."""

    step: int
    open: tuple[Opening, ...]
    chunks: tuple[Chunk, ...]
    free: tuple[int, ...]

    @property
    def rows(self) -> tuple[int, int]:
        """(tokens that decode, drafts among them; tokens of prefill).

        A chunk that is sampled after every token decodes, or is a prompt of which all but the last token was there.
        """
        decode = sum(chunk.sample for chunk in self.chunks if chunk.sample == len(chunk.tokens))
        return decode, sum(len(chunk.tokens) for chunk in self.chunks) - decode


class Progress(NamedTuple):
    """One sequence got a token, or came to its end (`finish` is the reason; a stop token is not shown). It is
    "unfit" to go on when its JSON schema leaves it no token."""

    seq: int
    choice: TokenChoice | None
    finish: Literal["stop", "length", "unfit"] | None = None


Choices = tuple[TokenChoice, ...]


def answered(planned: PlannedStep, choices: Choices) -> list[tuple[Chunk, Choices]]:
    """Each chunk that was to be sampled with its choices, in the step's order.

    Raises ValueError unless every such chunk has one choice or more, up to as many as it asked for, at consecutive
    positions, and each that is followed by another is the draft that the chunk had for this position.
    """
    found: list[tuple[Chunk, Choices]] = []
    at = 0
    for chunk in planned.chunks:
        if chunk.sample:
            drafts = len(chunk.tokens) - chunk.sample + 1
            begin, position = at, chunk.start + drafts
            while at < len(choices) and choices[at].seq == chunk.seq and choices[at].position == position:
                at += 1
                position += 1
            got = choices[begin:at]
            expected = chunk.tokens[drafts : drafts + len(got) - 1]
            if not 1 <= len(got) <= chunk.sample or tuple(choice.token for choice in got[:-1]) != expected:
                raise ValueError(
                    f"step {planned.step} was answered for other positions of {chunk.seq} than it asked for"
                )
            found.append((chunk, got))
    if at < len(choices):
        raise ValueError(f"step {planned.step} was answered for other positions than it asked for")
    return found
