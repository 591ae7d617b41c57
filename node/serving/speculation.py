"""Speculation as the driver has it: who guesses, what came of it, and what it costs. Pure: times are passed in."""

from __future__ import annotations

from collections.abc import Sequence

from swarmd.node.serving.drafting import NgramDrafter, PreparedDrafts
from swarmd.node.serving.messages import StepTimes
from swarmd.node.serving.step_cost import StepCost


class Speculation:
    """The scheduler's `Drafter`: passes on what is guessed, counts it, and keeps its price true to the steps' times.

    `drafted` tokens were guessed and verified, `accepted` of them were right. `prepared` is the part that must be fed
    on another thread, where there is one.
    """

    def __init__(self, drafter: NgramDrafter | PreparedDrafts) -> None:
        self._drafter = drafter
        self._cost = StepCost()
        self.drafted = 0
        self.accepted = 0

    @property
    def prepared(self) -> PreparedDrafts | None:
        """Guesses that have to be made beforehand, or None where all are made at once."""
        return self._drafter if isinstance(self._drafter, PreparedDrafts) else None

    def propose(self, seq: int, tokens: Sequence[int], limit: int) -> list[int]:
        """See `Drafter`."""
        return self._drafter.propose(seq, tokens, limit)

    def observe(self, seq: int, proposed: int, accepted: int) -> None:
        """See `Drafter`."""
        self.drafted += proposed
        self.accepted += accepted
        self._drafter.observe(seq, proposed, accepted)

    def forget(self, seq: int) -> None:
        """See `Drafter`."""
        self._drafter.forget(seq)

    def on_decoded(self, rows: int, sequences: int, times: StepTimes, round_trip_us: float, *, alone: bool) -> None:
        """A step that only decoded came back, `rows` tokens of so many sequences; `alone`: no other was in flight."""
        self._cost.observe(rows, sequences, times.compute_us, round_trip_us, alone=alone)
        self._drafter.price(self._cost)
