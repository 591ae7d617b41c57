"""A soak: constant load on all nodes of a swarm while trouble after trouble befalls it, and every answer is checked.

report = soak(root, model, expected, seconds=1800, seed=0, say=print)
print(report.table())
assert not report.faults()
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from support.answers import Answer
from support.fault_cases import talk
from support.fault_lab import FaultLab, Machine
from support.soak_trouble import SETTLE_SECONDS, Troubles
from support.soak_watch import Growth, Sample, sample, slope_per_minute
from support.stream_load import Outcome, Question, ask, difference
from support.swarm import Node

# None can hold the model alone, any two can. The witness is never killed.
MEMORY = {"witness": "165MB", "b": "162MB", "c": "158MB", "d": "154MB", "e": "150MB"}
WITNESS, ENOUGH, CLIENTS = "witness", 2, 8
SAMPLE_SECONDS = 5.0
SAY_SECONDS = 10.0
TURN_SECONDS = 0.1
# A client that heard nothing for so long, on a node that nothing befell, hangs.
HUNG_SECONDS = 60.0
# A daemon that has served for a minute has made what it keeps.
WARM_SECONDS = 60.0
MOST_GROWTH_MB = 12.0
MOST_MORE_FILES = 12
# Told to go elsewhere, or to come again; the client asks another node.
_TURNED_AWAY = ("429 ", "503 ")


@dataclass
class Report:
    """What a soak found. `outcomes` counts requests by what became of them; `gaps` are the longest silences in seconds
    of the streams whose entry node nothing befell."""

    seconds: float
    seed: int
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    troubles: Counter[str] = field(default_factory=Counter)
    left_behind: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    stayed: bool = False

    def faults(self) -> list[str]:
        """What should not have happened: empty when all is well."""
        found = [*self.wrong, *self.left_behind]
        if not self.outcomes["answered, equal"]:
            found.append("nothing was answered")
        if not self.stayed:
            found.append("the swarm did not come back")
        warm = [s for s in self.samples if s.at >= WARM_SECONDS] or self.samples
        if warm:
            rss, files = Growth.of([s.rss_mb for s in warm]), Growth.of([float(s.files) for s in warm])
            if rss.more > MOST_GROWTH_MB:
                found.append(f"the daemon's memory grew from {rss.first:.0f} to {rss.last:.0f} MB")
            if files.more > MOST_MORE_FILES:
                found.append(f"the daemon's open files grew from {files.first:.0f} to {files.last:.0f}")
            if max(s.nodes for s in warm) > len(MEMORY):
                found.append(f"{max(s.nodes for s in warm)} nodes are named where there are {len(MEMORY)}")
        return found

    def line(self) -> str:
        """How it stands, in one line."""
        done = ", ".join(f"{count} {what}" for what, count in sorted(self.outcomes.items()))
        last = self.samples[-1] if self.samples else None
        memory = f"; {last.rss_mb:.0f} MB, {last.files} files" if last else ""
        return f"{done}; worst gap {max(self.gaps, default=0.0):.1f} s{memory}"

    def table(self) -> str:
        """Everything as a Markdown table."""
        rows = [("seconds, seed", f"{self.seconds:.0f}, {self.seed}")]
        rows += [(f"requests: {what}", str(count)) for what, count in sorted(self.outcomes.items())]
        rows += [("tokens compared", str(self.tokens))]
        gaps = sorted(self.gaps)
        if gaps:
            p99 = gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))]
            rows.append(
                ("longest silence in a stream: worst, p99, median", f"{gaps[-1]:.1f}, {p99:.1f}, {_mid(gaps):.2f} s")
            )
        rows += [(f"trouble: {kind}", str(count)) for kind, count in sorted(self.troubles.items())]
        warm = [s for s in self.samples if s.at >= WARM_SECONDS] or self.samples
        if warm:
            rows += [
                ("witness: resident MB, first and last quarter, most", _shown([s.rss_mb for s in warm])),
                ("witness: growth", f"{slope_per_minute(warm):+.3f} MB/min"),
                ("witness: open files", _shown([float(s.files) for s in warm])),
                ("witness: bytes of /api/swarm", _shown([float(s.state_bytes) for s in warm])),
                ("witness: nodes named, most", str(max(s.nodes for s in warm))),
            ]
        rows.append(("stage processes left behind", str(len(self.left_behind))))
        lines = [f"| {what} | {value} |" for what, value in rows]
        return "\n".join(["| figure | value |", "| --- | --- |", *lines])


class _Clients:
    """Eight clients, each asking one question after the other, of nodes in turn."""

    def __init__(
        self, lab: FaultLab, expected: Callable[[Question], Answer], troubles: Troubles, report: Report
    ) -> None:
        self._lab, self._expected, self._troubles, self._report = lab, expected, troubles, report
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(CLIENTS)]

    def start(self) -> None:
        """They begin to ask."""
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """They ask nothing more; waits for the answers that are under way."""
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * HUNG_SECONDS)
            if thread.is_alive():
                self._report.wrong.append("a client never came back")

    def _run(self, number: int) -> None:
        draw = random.Random(1000 * self._report.seed + number)
        questions = talk()
        while not self._stop.is_set():
            up = [node for node in self._lab.running() if node.is_up]
            if not up or self._stop.wait(0.05):
                continue
            node, question = draw.choice(up), draw.choice(questions)
            begin = time.monotonic()
            outcome = ask(node, question, silence=HUNG_SECONDS)
            self._note(node, outcome, begin, time.monotonic())

    def _note(self, node: Node, outcome: Outcome, begin: float, end: float) -> None:
        befell = self._troubles.of(node, begin, end)
        what, fault = self._verdict(node, outcome, begin, end, befell)
        with self._lock:
            report = self._report
            report.outcomes[what] += 1
            if fault:
                report.wrong.append(f"at {begin - self._troubles.started:.0f} s: {fault} [{outcome.question.prompt}]")
            if outcome.answer is not None:
                report.tokens += len(outcome.answer.tokens)
                if not befell:
                    report.gaps.append(outcome.gap)

    def _verdict(self, node: Node, outcome: Outcome, begin: float, end: float, befell: set[str]) -> tuple[str, str]:
        """(what became of a request, why that is a fault or empty)."""
        if outcome.answer is not None:
            right = self._expected(outcome.question)
            if outcome.answer == right:
                return "answered, equal", ""
            return "answered, WRONG", f"{outcome}: {difference(outcome.answer, right)}"
        gone = not node.running or "ConnectionRefused" in outcome.broken
        if befell & {"node killed", "daemon killed"} or (befell and outcome.broken and gone):
            return "excluded: the entry node went", ""
        if outcome.error.startswith(_TURNED_AWAY) and "node left" in befell:
            return "turned away by a node that leaves", ""
        # A node that was cut off needs a moment to find the others again.
        if outcome.error and self._troubles.of(node, begin - SETTLE_SECONDS, end) - {"node left"}:
            return "typed error: the entry node was cut off or stood still", ""
        if outcome.error and self._troubles.too_few(end - max(outcome.silence, 1.0), end):
            return "typed error: the memory was gone", ""
        if outcome.error:
            return "typed error, UNDULY", f"{outcome}, {outcome.silence:.1f} s after the last word: {outcome.said}"
        return "HUNG or broken", f"{outcome} ({sorted(befell)})"


def soak(
    root: Path,
    model: Path,
    expected: Callable[[Question], Answer],
    *,
    seconds: float,
    seed: int,
    say: Callable[[str], object] = print,
) -> Report:
    """Run it. `expected` is what one node alone answers; `say` gets a line of progress every ten seconds."""
    report = Report(seconds, seed)
    for question in talk():
        expected(question)
    held = {WITNESS: model, "b": model}
    machines = [Machine(name, memory, held.get(name)) for name, memory in MEMORY.items()]
    with FaultLab(root, machines, ids=("b", "c", "d", "e", WITNESS), seed=seed) as lab:
        lab.serve(WITNESS, model)
        lab.until_whole(len(machines))
        troubles = Troubles(lab, WITNESS, ENOUGH, seed)
        clients = _Clients(lab, expected, troubles, report)
        clients.start()
        _go_on(lab, troubles, report, seconds, say)
        troubles.finish()
        clients.finish()
        report.troubles, report.left_behind = troubles.done, troubles.faults
        report.stayed = _is_back(lab, report)
    return report


def _go_on(lab: FaultLab, troubles: Troubles, report: Report, seconds: float, say: Callable[[str], object]) -> None:
    begin = said = sampled = time.monotonic()
    while (now := time.monotonic()) < begin + seconds:
        troubles.turn()
        if now >= sampled + SAMPLE_SECONDS:
            sampled = now
            report.samples.append(sample(lab.nodes[WITNESS], now - begin))
        if now >= said + SAY_SECONDS:
            said = now
            say(f"{now - begin:5.0f} s  {report.line()}; {sum(troubles.done.values())} troubles")
        time.sleep(TURN_SECONDS)


def _is_back(lab: FaultLab, report: Report) -> bool:
    """Everybody sees everybody, and the model is served: perhaps by fewer, as who was struck too often is avoided."""
    try:
        for node in lab.running():
            node.until_members(len(lab.machines))
            node.until_ready()
    except AssertionError as error:
        report.wrong.append(str(error)[:4000])
        return False
    return True


def _mid(ordered: Sequence[float]) -> float:
    return ordered[len(ordered) // 2]


def _shown(values: Sequence[float]) -> str:
    growth = Growth.of(values)
    return f"{growth.first:.0f}, {growth.last:.0f}, {growth.most:.0f}"
