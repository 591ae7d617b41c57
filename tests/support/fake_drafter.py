"""A drafter that knows what the fake pipeline will draw, and is right as often as it is told to be."""

from __future__ import annotations

import random
from collections.abc import Sequence

from support.fake_pipeline import VOCABULARY, solo_run


class SeerDrafter:
    """Proposes up to the limit, each token right with probability `right`; checks what it is told of the outcomes."""

    def __init__(self, n_stages: int, rng: random.Random, right: float) -> None:
        self.known: set[int] = set()
        self.proposed = self.accepted = 0
        self._n_stages = n_stages
        self._rng = rng
        self._right = right
        self._pending: dict[int, int] = {}

    def propose(self, seq: int, tokens: Sequence[int], limit: int) -> list[int]:
        assert limit > 0, "nobody is asked for nothing"
        self.known.add(seq)
        count = self._rng.randint(0, min(limit, 6))
        guesses = solo_run(list(tokens), self._n_stages, count) if count else []
        self._pending[seq] = count
        return [one if self._rng.random() < self._right else (one + 1) % VOCABULARY for one in guesses]

    def observe(self, seq: int, proposed: int, accepted: int) -> None:
        assert self._pending.pop(seq) == proposed
        assert 0 <= accepted <= proposed
        self.proposed += proposed
        self.accepted += accepted

    def forget(self, seq: int) -> None:
        self.known.discard(seq)
        self._pending.pop(seq, None)
