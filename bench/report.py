"""What came out of a scenario, and its table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from figures import Metric, markdown_table, ratio
from machine import Machine
from processes import Place
from scenarios import Comparison, Scenario
from workloads import BenchModel


@dataclass
class Column:
    """One contender's results: values by metric, one per repeat, and cores that others used, one per measurement."""

    detail: str = ""
    place: Place | None = None
    values: dict[str, list[float]] = field(default_factory=dict)
    others: list[float] = field(default_factory=list)
    missing: str = ""

    def of(self, metric: Metric) -> list[float]:
        """The values of a metric; empty if it was not measured."""
        return self.values.get(metric.name, [])


@dataclass
class Outcome:
    """All of a scenario. `columns` by contender."""

    scenario: Scenario
    model: BenchModel
    machine: Machine
    columns: dict[str, Column]
    repeats: int

    def markdown(self) -> str:
        """The table with all that one must know to read it."""
        shown = {name: column for name, column in self.columns.items() if column.values}
        metrics = [metric for load in self.scenario.loads for metric in load.metrics]
        head = ["", *shown, *(comparison.title for comparison in self.scenario.comparisons)]
        rows = []
        for metric in metrics:
            cells = [metric.cell(column.of(metric)) for column in shown.values()]
            rows.append([metric.name, *cells, *(self._ratio(c, metric) for c in self.scenario.comparisons)])
            if metric.reads_weights:
                limits = [self._limit(column, metric) for column in shown.values()]
                rows.append(["of the bandwidth limit", *limits, *("" for _ in self.scenario.comparisons)])
        parts = [f"### {self.scenario.title}", self._preamble(), markdown_table(head, rows), self._notes()]
        return "\n\n".join(parts) + "\n"

    def as_json(self) -> dict[str, Any]:
        """Everything, for machines."""
        return {
            "scenario": self.scenario.name,
            "title": self.scenario.title,
            "model": self.scenario.model,
            "decode_bytes": self.model.decode_bytes,
            "repeats": self.repeats,
            "machine": asdict(self.machine),
            "contenders": {name: asdict(column) for name, column in self.columns.items()},
        }

    def _preamble(self) -> str:
        lines = [
            *self.machine.lines(),
            f"{self.scenario.model}, {self.model.decode_bytes / 1e6:.0f} MB of weights read per token",
            f"median (lowest-highest) of {self.repeats}, contenders in turns",
        ]
        return "\n".join(f"- {line}" for line in lines)

    def _ratio(self, comparison: Comparison, metric: Metric) -> str:
        """`2.31 × (bar ≥ 2 ×: met)`; the better of several baselines counts, and is named."""
        subject = self.columns[comparison.subject].of(metric)
        best = metric.best({name: self.columns[name].of(metric) for name in comparison.baselines})
        found = ratio(subject, self.columns[best].of(metric)) if best else None
        if found is None:
            return "–"
        cell = f"{found:.2f} ×" + (f" {best}" if len(comparison.baselines) > 1 else "")
        for bar in comparison.bars:
            if bar.metric == metric.name:
                cell += f" (bar {bar.show(metric)}: {'met' if bar.met(found, metric) else 'missed'})"
        return cell

    def _limit(self, column: Column, metric: Metric) -> str:
        """`63 % of 345 tok/s`: what reading the weights once per token would allow."""
        if column.place is None or not column.of(metric):
            return ""
        limit = bandwidth_limit(column.place, self.machine, self.model.decode_bytes)
        return f"{median(column.of(metric)) / limit:.0%} of {metric.show(limit)} {metric.unit}"

    def _notes(self) -> str:
        lines = list(self.scenario.notes)
        for name, column in self.columns.items():
            if column.missing:
                lines.append(f"{name}: not measured: {column.missing}")
            if column.values:
                lines.append(f"{name}: {column.detail}; {_others(column.others)}")
        return "\n".join(f"- {line}" for line in lines)


def bandwidth_limit(place: Place, machine: Machine, decode_bytes: int) -> float:
    """Tokens per second of one stream if reading the weights were all: bandwidth over bytes.

    In a pipeline the stages read one after the other, so that a second node of one core does not raise it.
    """
    bandwidth = machine.bandwidth if place.threads == 1 else machine.bandwidth_all
    return bandwidth * (place.quota or 1.0) / decode_bytes


def _others(cores: Sequence[float]) -> str:
    return f"others used {median(cores):.2f} cores meanwhile, {max(cores):.2f} at most"
