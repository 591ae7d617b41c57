"""What one more row of a decode step costs, learnt from the steps as they come back. Pure: times are passed in."""

from __future__ import annotations

from swarmd.node.serving.draft_policy import DEFAULT_ROW_COST

MOST_ROWS = 32
LEAST_COST = 0.005

_DECAY = 0.995
_ASSUMED_SHARE = 0.2
_ASSUMED_WEIGHT = 1.0
_OUTLIER = 4.0
_BESIDE_WEIGHT = 0.1


class StepCost:
    """Fits compute time = fixed + rows * row_us to the latest few hundred decode steps, by least squares.

    Until steps of different sizes were seen, a row is taken for a fifth of a step. Larger steps than MOST_ROWS tell
    nothing of small ones, and are left out.
    """

    def __init__(self) -> None:
        self._weight = self._rows = self._us = self._rows_squared = self._rows_us = 0.0
        self._beside_us = 0.0
        self._sequences = 1
        self._alone = True

    def observe(self, rows: int, sequences: int, compute_us: float, round_trip_us: float, *, alone: bool) -> None:
        """A step of `rows` tokens of so many sequences came back: computed in all stages together in `compute_us`,
        after `round_trip_us` in all; `alone` when no other step was in flight.
        """
        if not 0 < rows <= MOST_ROWS or compute_us <= 0:
            return
        if self._weight > 8:
            # A stage that was not running for a while says nothing of rows.
            compute_us = min(compute_us, _OUTLIER * self._us / self._weight)
        self._weight = self._weight * _DECAY + 1
        self._rows = self._rows * _DECAY + rows
        self._us = self._us * _DECAY + compute_us
        self._rows_squared = self._rows_squared * _DECAY + rows * rows
        self._rows_us = self._rows_us * _DECAY + rows * compute_us
        self._sequences, self._alone = sequences, alone
        if alone:
            beside = max(0.0, round_trip_us - compute_us)
            share = _BESIDE_WEIGHT if self._beside_us else 1.0
            self._beside_us += share * (beside - self._beside_us)

    @property
    def row_us(self) -> float:
        """The time that one more row takes in all stages together; 0 before the first step."""
        return self._fit()[1]

    @property
    def step_us(self) -> float:
        """The time of a step without guesses, of as many sequences as the latest; 0 before the first.

        For a sequence alone that is the whole round trip; where steps overlap, the time in which nobody computes is
        somebody else's.
        """
        fixed, row_us = self._fit()
        return fixed + self._sequences * row_us + (self._beside_us if self._alone else 0.0)

    @property
    def row_cost(self) -> float:
        """A row's time as a part of a step's, times the sequences that it holds up; assumed before the first step."""
        step_us = self.step_us
        return max(LEAST_COST, self._sequences * self.row_us / step_us) if step_us > 0 else DEFAULT_ROW_COST

    def _fit(self) -> tuple[float, float]:
        """(fixed, per row) in microseconds, neither below 0; a ridge keeps the slope near the assumed one."""
        if not self._weight:
            return 0.0, 0.0
        rows, us = self._rows / self._weight, self._us / self._weight
        assumed = _ASSUMED_SHARE * us / (1 + _ASSUMED_SHARE * (rows - 1))
        spread = self._rows_squared - self._weight * rows * rows
        together = self._rows_us - self._weight * rows * us
        slope = (together + _ASSUMED_WEIGHT * assumed) / (spread + _ASSUMED_WEIGHT)
        row_us = min(max(slope, 0.0), us / rows)
        return us - rows * row_us, row_us
