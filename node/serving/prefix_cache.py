"""Which prefixes the stages' KV caches hold, of who runs and of who has ended, and who gives way. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from swarmd.node.serving.prefix_tree import Match, PrefixTree
from swarmd.node.serving.sequences import Sequence

LEAST_TOKENS = 16
"""Shorter prefixes are computed anew: a fork would cost about as much."""


class Fork(NamedTuple):
    """Begin with the first `length` tokens of the sequence `source`; -1 and 0 for nothing in common with anybody."""

    source: int
    length: int


NO_FORK = Fork(-1, 0)


@dataclass(frozen=True)
class _Retained:
    """The first `valid` tokens of `tokens` are cached; `held` is the room that is taken, rejected drafts included."""

    tokens: list[int]
    valid: int
    held: int


class PrefixCache:
    """Sequences by their pipeline ids. Those that ended are retained until their room is needed.

    Methods that make the cache let go of a sequence return its id: whoever calls has the stages free it.
    """

    def __init__(self, max_retained: int) -> None:
        self._max_retained = max_retained
        self._tree = PrefixTree()
        self._running: dict[int, Sequence] = {}
        # Least recently used first.
        self._retained: OrderedDict[int, _Retained] = OrderedDict()
        self.retained_tokens = 0

    def begin(self, sequence: Sequence) -> None:
        """A sequence runs: as far as it is sent, others may share its prompt."""
        self._running[sequence.pipeline_id] = sequence
        self._tree.insert(sequence.pipeline_id, sequence.tokens)

    def find(self, tokens: list[int], sent_before: Mapping[int, int]) -> Fork | None:
        """What a new sequence begins with; None when it had better wait for the next step, since its prefix is being
        computed in this one.

        A fork sees what earlier steps have sent: for sequences with a chunk in this one that is in `sent_before`.
        At least one token is left to compute, as there is nothing to sample from otherwise.
        """
        match = self._longest(tokens, sent_before)
        if match is None:
            return NO_FORK
        length, common = (min(count, len(tokens) - 1) for count in (match.length, match.common))
        if common - length >= LEAST_TOKENS:
            return None
        if length < LEAST_TOKENS:
            return NO_FORK
        return Fork(match.holder, length)

    def supersede(self, fork: Fork) -> list[int]:
        """A fork was taken. When it has nearly all that its source retains, the source is of no more use."""
        source = self._retained.get(fork.source)
        if source is None or source.valid - fork.length >= LEAST_TOKENS:
            return []
        return [self._drop_retained(fork.source)]

    def end(self, sequence: Sequence, held: int) -> list[int]:
        """A sequence ended with the first `sent` tokens in the caches, in room for `held`; it is retained if it pays.

        It is not when it is short or somebody holds the same, and whoever holds no more than it does goes.
        """
        one = sequence.pipeline_id
        self._forget_running(one)
        if sequence.sent < LEAST_TOKENS or not self._max_retained:
            return [one]
        tokens, valid = sequence.tokens, sequence.sent
        match = self._longest(tokens[:valid], {})
        if match is not None and match.length == valid:
            return [one]
        gone = [self._drop_retained(other) for other in self._covered_by(tokens, valid)]
        self._retained[one] = _Retained(tokens, valid, held)
        self.retained_tokens += held
        self._tree.insert(one, tokens[:valid])
        while len(self._retained) > self._max_retained:
            gone.append(self.evict())
        return gone

    def drop(self, pipeline_id: int) -> list[int]:
        """Let go of a sequence, running or retained, whose KV is not to be used by anybody any more."""
        if pipeline_id in self._retained:
            return [self._drop_retained(pipeline_id)]
        known = pipeline_id in self._running
        self._forget_running(pipeline_id)
        return [pipeline_id] if known else []

    def evict(self) -> int:
        """Let go of the sequence retained that was used least recently. Raises StopIteration when there is none."""
        return self._drop_retained(next(iter(self._retained)))

    def _longest(self, tokens: list[int], sent_before: Mapping[int, int]) -> Match | None:
        def available(holder: int) -> int:
            if holder in sent_before:
                return sent_before[holder]
            running = self._running.get(holder)
            return running.sent if running is not None else self._retained[holder].valid

        match = self._tree.match(tokens, available)
        if match is not None and match.length >= LEAST_TOKENS and match.holder in self._retained:
            self._retained.move_to_end(match.holder)
        return match

    def _covered_by(self, tokens: list[int], valid: int) -> list[int]:
        return [
            other
            for other, kept in self._retained.items()
            if kept.valid <= valid
            and kept.tokens[kept.valid - 1] == tokens[kept.valid - 1]
            and kept.tokens[: kept.valid] == tokens[: kept.valid]
        ]

    def _drop_retained(self, pipeline_id: int) -> int:
        self.retained_tokens -= self._retained.pop(pipeline_id).held
        self._tree.remove(pipeline_id)
        return pipeline_id

    def _forget_running(self, pipeline_id: int) -> None:
        if self._running.pop(pipeline_id, None) is not None:
            self._tree.remove(pipeline_id)
