"""How long a client waits for its next token when something befalls the swarm: every fault, in every phase.

python bench/recovery.py [--repeats N] [--only WORDS]

Five nodes, as root on Linux each in a network namespace; four carry stages. Every answer is compared with that of one
undisturbed node. The table gives the longest time without a token of any stream, in seconds: the worst of the repeats.
In prefill it is the time to the first token, to be compared with the first row. The exit status says whether every
stream was right. The bar: 5 s.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from harness import (
    CASES_PER_SWARM,
    CONTEXT,
    DECODE,
    EIGHT,
    FAULTS,
    HEIRS,
    PREFILL,
    STAGES,
    Answer,
    Fault,
    FaultLab,
    Load,
    Outcome,
    Phase,
    Question,
    alone,
    compare,
    disturbances,
    expecting,
    machines,
    restore,
    run_case,
    talk,
    why_no_network_faults,
    why_no_small_disk,
)
from machine import describe_machine
from workloads import default_model

PHASES = (PREFILL, DECODE, EIGHT)
BAR_SECONDS = 5.0


class Matrix:
    """The cases run so far: seconds by fault and phase, and what was wrong."""

    def __init__(self, root: Path, model: Path, expected: Callable[[Question], Answer]) -> None:
        self.seconds: dict[str, dict[str, list[float]]] = {}
        self.wrong: list[str] = []
        self._root, self._model, self._expected = root, model, expected
        self._swarms = 0
        self._number = 0

    @contextmanager
    def swarm(self) -> Iterator[FaultLab]:
        """A fresh one, whole."""
        self._swarms += 1
        made = machines(self._model, disk=why_no_small_disk() is None)
        with FaultLab(self._root / str(self._swarms), made, ids=HEIRS, context=CONTEXT) as lab:
            lab.serve("outside", self._model)
            lab.until_whole(STAGES)
            yield lab

    def run(self, phase: Phase, faults: list[Fault]) -> None:
        """One phase with all faults, each swarm as long as it recovers."""
        left = [fault for fault in faults if possible(fault)]
        while left:
            with self.swarm() as lab:
                self._undisturbed(lab, phase)
                of_this_swarm, left = left[:CASES_PER_SWARM], left[CASES_PER_SWARM:]
                while of_this_swarm:
                    fault = of_this_swarm.pop(0)
                    try:
                        self._case(lab, fault, phase)
                    except AssertionError as error:
                        self.wrong.append(f"{fault.name}, {phase.name}: {str(error)[:500]}")
                        left = of_this_swarm + left
                        break

    def lost(self) -> tuple[float, float]:
        """(seconds from a stream's last token to its typed error when the memory is gone, the longest of eight streams;
        seconds until there is service again after two nodes were started anew)."""
        with self.swarm() as lab:
            gone = lab.carriers()
            entries = [lab.nodes["outside"]]
            with Load(entries, talk(200)) as load:
                load.until_talking(6)
                for node in gone:
                    lab.kill(node)
                outcomes = load.finish()
            told = max(outcome.silence for outcome in outcomes if outcome.error)
            # One of the answers is so short that it was over before.
            self.wrong += [
                f"memory gone: {line}" for line in compare([o for o in outcomes if not o.error], self._expected)
            ]
            begin = time.monotonic()
            lab.revive(*(node.name for node in gone[:2]))
            entries[0].until_ready(stages=2)
            return told, time.monotonic() - begin

    def elsewhere(self) -> dict[str, float]:
        """The longest times between tokens of eight streams of one model, by what befalls the nodes of another."""
        found = {}
        for what, outcomes in disturbances(self._root / "elsewhere", self._model):
            self.wrong += [f"{what}: {line}" for line in compare(outcomes, self._expected)]
            found[what] = max(outcome.gap for outcome in outcomes)
        return found

    def _undisturbed(self, lab: FaultLab, phase: Phase) -> None:
        with Load(lab.running(), phase.questions(self._next())) as load:
            self._note("nothing", phase, load.finish())

    def _case(self, lab: FaultLab, fault: Fault, phase: Phase) -> None:
        number = self._next()
        for question in phase.questions(number):
            self._expected(question)
        outcomes = run_case(lab, fault, phase, number)
        self._note(fault.name, phase, outcomes)
        restore(lab)

    def _note(self, name: str, phase: Phase, outcomes: list[Outcome]) -> None:
        self.wrong += [f"{name}, {phase.name}: {line}" for line in compare(outcomes, self._expected)]
        longest = max(outcome.wait if phase is PREFILL else outcome.gap for outcome in outcomes)
        self.seconds.setdefault(name, {}).setdefault(phase.name, []).append(longest)
        print(f"{name}, {phase.name}: {longest:.2f} s", file=sys.stderr, flush=True)

    def _next(self) -> int:
        self._number += 2
        return self._number

    def table(self) -> str:
        """The worst of the repeats by fault and phase."""
        names = [phase.name for phase in PHASES]
        lines = [f"| what happens | {' | '.join(names)} |", f"| --- |{' --- |' * len(names)}"]
        for fault, found in self.seconds.items():
            cells = [f"{max(found[name]):.1f}" if name in found else "" for name in names]
            lines.append(f"| {fault} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def over_the_bar(self) -> list[str]:
        """The cases that took longer than the bar, beyond what the phase takes undisturbed."""
        usual = {phase: statistics.median(values) for phase, values in self.seconds.get("nothing", {}).items()}
        return [
            f"{name}, {phase}: {max(values):.1f} s"
            for name, found in self.seconds.items()
            for phase, values in found.items()
            if max(values) - (usual.get(phase, 0.0) if phase == PREFILL.name else 0.0) > BAR_SECONDS
        ]


def possible(fault: Fault) -> bool:
    """Whether this machine can do it; says why not otherwise."""
    reason = {"network": why_no_network_faults, "disk": why_no_small_disk}.get(fault.needs, lambda: None)()
    if reason:
        print(f"left out: {fault.name}: {reason}", file=sys.stderr)
    return reason is None


def main() -> None:
    """Run the matrix and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", default="", help="only faults with these words in their name")
    options = parser.parse_args()
    # Ended from outside, it still undoes what it has done to this machine.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    model = default_model()
    chosen = [fault for fault in FAULTS if options.only in fault.name]
    print(describe_machine(), flush=True)
    with (
        tempfile.TemporaryDirectory(prefix="swarmd-recovery-") as folder,
        alone(Path(folder) / "alone", model) as reference,
    ):
        matrix = Matrix(Path(folder), model, expecting(reference))
        for _ in range(options.repeats):
            for phase in PHASES:
                matrix.run(phase, chosen)
        told, again = matrix.lost()
        elsewhere = matrix.elsewhere()
    print(matrix.table())
    print(
        f"\nmemory gone: typed errors {told:.1f} s after the last token at the latest;"
        f" served again {again:.1f} s after two starts"
    )
    print("\nlongest times between tokens of eight streams of one model:")
    for what, seconds in elsewhere.items():
        print(f"{what}: {seconds:.2f} s")
    for line in matrix.over_the_bar():
        print(f"over {BAR_SECONDS:.0f} s: {line}")
    for line in matrix.wrong:
        print(f"WRONG: {line}")
    sys.exit(bool(matrix.wrong))


if __name__ == "__main__":
    main()
