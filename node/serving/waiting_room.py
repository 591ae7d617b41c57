"""Bounds of a driver's queue: how long a request waits for its turn, and how many prompt tokens may wait. Pure."""

from __future__ import annotations

from swarmd.node.serving.sequences import Phase, Sequence
from swarmd.node.serving.steps import Limits, QueueFull

QUEUE_SECONDS = 60.0
"""A request that was not let in for so long is given back to who asked."""

MOST_WAITING_TOKENS = 1 << 20


class WaitingRoom:
    """The requests of a driver that have not begun yet. `now` is in seconds, of one clock that never goes back.

    Who has begun and was put back is not among them any more: an answer that has begun waits for as long as it must.
    """

    def __init__(self, limits: Limits, seconds: float = QUEUE_SECONDS) -> None:
        self._seconds = seconds
        # Never less than the longest prompt that can be served.
        self._most_tokens = max(limits.room, min(8 * limits.kv_tokens, MOST_WAITING_TOKENS))
        # In the order in which they came.
        self._since: dict[int, tuple[Sequence, float]] = {}
        self._tokens = 0

    @property
    def tokens(self) -> int:
        """The prompt tokens of all who wait."""
        return self._tokens

    def check(self, prompt_tokens: int) -> None:
        """Raises QueueFull when so many tokens more would be too many."""
        if self._tokens + prompt_tokens > self._most_tokens:
            raise QueueFull

    def enter(self, sequence: Sequence, now: float) -> None:
        """A sequence waits from now on."""
        self._since[sequence.seq] = sequence, now
        self._tokens += len(sequence.tokens)

    def leave(self, sequence: Sequence) -> None:
        """A sequence waits no longer: it has begun, or has ended. Its prompt must be as it was."""
        if self._since.pop(sequence.seq, None) is not None:
            self._tokens -= len(sequence.tokens)

    def let_in(self) -> None:
        """Forget those who have begun; to be called after each step that opens any, before its answer comes."""
        for sequence in [one for one, _ in self._since.values() if one.phase is not Phase.WAITING]:
            self.leave(sequence)

    def overdue(self, now: float) -> list[int]:
        """The numbers of those who have waited for too long. They wait no longer: each is named once."""
        late = [one for one, since in self._since.values() if now - since >= self._seconds]
        for sequence in late:
            self.leave(sequence)
        return [sequence.seq for sequence in late]
