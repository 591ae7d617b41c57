"""Figures of repeated measurements: medians with their spread, ratios, bars, and tables in markdown. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of `values` that at least `share` (0 to 1) of them do not exceed: the nearest-rank percentile."""
    if not values:
        raise ValueError("a percentile of no values")
    if not 0 <= share <= 1:
        raise ValueError(f"a share is between 0 and 1, not {share}")
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


@dataclass(frozen=True)
class Metric:
    """One thing that is measured. `higher_is_better` decides which of several baselines is the best.

    `reads_weights`: a speed in tokens per second, each of which reads all weights, so that memory bandwidth limits it.
    """

    name: str
    unit: str
    higher_is_better: bool
    reads_weights: bool = False

    def show(self, value: float) -> str:
        """A value with as many digits as mean something, without the unit."""
        if value >= 100:
            return f"{value:.0f}"
        return f"{value:.1f}" if value >= 10 else f"{value:.2f}"

    def cell(self, values: Sequence[float]) -> str:
        """`median unit (lowest-highest)`, or a dash for nothing."""
        if not values:
            return "–"
        low, high = self.show(min(values)), self.show(max(values))
        return f"{self.show(median(values))} {self.unit} ({low}-{high})"

    def best(self, candidates: Mapping[str, Sequence[float]]) -> str | None:
        """The name of the candidate with the best median; None when none has a value."""
        medians = {name: median(values) for name, values in candidates.items() if values}
        if not medians:
            return None
        pick = max if self.higher_is_better else min
        return pick(medians, key=lambda name: medians[name])


@dataclass(frozen=True)
class Bar:
    """What must be reached: the ratio of medians, subject over baseline, at least (or at most) `ratio`."""

    metric: str
    ratio: float

    def met(self, found: float, metric: Metric) -> bool:
        """Whether a ratio is good enough."""
        return found >= self.ratio if metric.higher_is_better else found <= self.ratio

    def show(self, metric: Metric) -> str:
        """Like `≥ 2 ×`."""
        return f"{'≥' if metric.higher_is_better else '≤'} {self.ratio:.3g} ×"


def ratio(subject: Sequence[float], base: Sequence[float]) -> float | None:
    """Median over median, or None when one side was not measured."""
    return median(subject) / median(base) if subject and base else None


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in GitHub's markdown; a `|` inside a cell is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    if any(len(line) != len(head) for line in lines):
        raise ValueError("every row of a table needs as many cells as its head")
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
