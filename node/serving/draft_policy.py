"""How many tokens to guess ahead, learnt from how earlier guesses fared. Pure.

A step that verifies k guesses takes 1 + k*c times as long as one without, c being the cost of a row, and gives
1 + p + ... + p**k tokens when each guess is right with probability p, after the right one before it (Leviathan et al.
2022, arXiv:2211.17192, section 3.3). So that length is chosen which gives most tokens for the time. On top there is a
budget: whatever the guesses meet, a sequence takes at most REFILL longer than without, and BURST steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

LENGTHS = (1, 2, 4, 8, 12)
DEFAULT_ROW_COST = 0.15
LEAST_GAIN = 1.05
PROBE_TOKENS = 32

BURST, REFILL, SAVINGS = 0.6, 0.03, 3.0

_SEQUENCE_WINDOW, _SEQUENCE_WEIGHT = 4.0, 2.0
_GLOBAL_WINDOW, _GLOBAL_WEIGHT = 32.0, 4.0


@dataclass
class _Rate:
    """How often a guess was right, of about the last `window` of them, and of `weight` more that are assumed."""

    window: float
    weight: float
    right: float = 0.0
    wrong: float = 0.0

    def add(self, right: int, wrong: int) -> None:
        self.right += right
        self.wrong += wrong
        keep = min(1.0, self.window / (self.right + self.wrong))
        self.right *= keep
        self.wrong *= keep

    def estimate(self, assumed: float) -> float:
        return (self.right + self.weight * assumed) / (self.right + self.wrong + self.weight)


@dataclass
class _Record:
    """One sequence: its rates by kind of guess, and its budget in steps."""

    length: int
    rates: list[_Rate]
    budget: float = BURST
    quiet_since: int = field(init=False)
    pending_kind: int = 0
    pending_row_cost: float = 0.0

    def __post_init__(self) -> None:
        self.quiet_since = self.length


class DraftPolicy:
    """Decides for every sequence how many tokens to guess.

    Guesses are of as many kinds as there are `assumed` rates, the probabilities to begin with that a guess of that
    kind is right. What one sequence teaches of a kind is where the next one begins. `row_cost` is the time of one more
    row as a part of a step's time, anything above 0; whoever measures it sets it.
    """

    def __init__(self, assumed: tuple[float, ...], row_cost: float = DEFAULT_ROW_COST) -> None:
        self.row_cost = row_cost
        self._assumed = assumed
        self._global = [_Rate(_GLOBAL_WINDOW, _GLOBAL_WEIGHT) for _ in assumed]
        self._records: dict[int, _Record] = {}

    def __len__(self) -> int:
        """Sequences remembered."""
        return len(self._records)

    def length(self, seq: int, tokens: int, kind: int, limit: int) -> int:
        """How many tokens, 0 to `limit`, to guess after the first `tokens` of a sequence.

        Where guesses do not pay, one is tried every PROBE_TOKENS tokens, as texts change.
        """
        record = self._record(seq, tokens)
        record.budget = min(record.budget + REFILL * (tokens - record.length), SAVINGS)
        record.length = tokens
        affordable = min(limit, int(record.budget / self.row_cost))
        count = self._best(self._probability(record, kind), affordable)
        if count == 0 and affordable > 0 and tokens - record.quiet_since >= PROBE_TOKENS:
            count = 1
        if count:
            record.quiet_since = tokens
            record.pending_kind, record.pending_row_cost = kind, self.row_cost
        return count

    def observe(self, seq: int, proposed: int, accepted: int) -> None:
        """The outcome of the latest guess of a sequence: so many tokens proposed, so many of them right."""
        record = self._records.get(seq)
        if record is None or proposed <= 0:
            return
        record.budget += accepted - proposed * record.pending_row_cost
        wrong = int(accepted < proposed)
        for rate in (record.rates[record.pending_kind], self._global[record.pending_kind]):
            rate.add(accepted, wrong)

    def forget(self, seq: int) -> None:
        """A sequence has ended."""
        self._records.pop(seq, None)

    def _record(self, seq: int, tokens: int) -> _Record:
        record = self._records.get(seq)
        if record is None:
            rates = [_Rate(_SEQUENCE_WINDOW, _SEQUENCE_WEIGHT) for _ in self._assumed]
            record = self._records[seq] = _Record(tokens, rates)
        return record

    def _probability(self, record: _Record, kind: int) -> float:
        return record.rates[kind].estimate(self._global[kind].estimate(self._assumed[kind]))

    def _best(self, probability: float, most: int) -> int:
        """The length with the greatest gain, 0 when none is worth it."""
        best, best_gain = 0, LEAST_GAIN
        for count in (*(n for n in LENGTHS if n < most), min(most, LENGTHS[-1])):
            if count > 0 and (gain := speedup(probability, count, self.row_cost)) > best_gain:
                best, best_gain = count, gain
        return best


def speedup(probability: float, count: int, row_cost: float) -> float:
    """Tokens per time with `count` guesses, each right with this probability in [0, 1], against none."""
    expected = sum(probability**n for n in range(count + 1))
    return expected / (1 + count * row_cost)
