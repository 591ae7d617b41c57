"""Whatever happens to a node, a process, a link or a disk: every stream goes on, equal to the undisturbed one.

Six clients talk and two wait for their first token when it happens. `bench/recovery.py` runs each phase alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.answers import Answer
from support.fault_cases import (
    CASES_PER_SWARM,
    CONTEXT,
    FAULTS,
    HEIRS,
    MIXED,
    SHIPS,
    STAGES,
    Fault,
    machines,
    restore,
    run_case,
)
from support.fault_lab import FaultLab
from support.host_faults import why_no_small_disk
from support.stream_load import Outcome, Question, compare

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

# Generous: the machines that run this are busy. What a quiet one needs is in docs/benchmarks.md.
LONGEST_GAP = 15.0
NOTHING_FOR = 40.0


class Shelf:
    """One swarm for several cases; a new one after a failure."""

    def __init__(self, root: Path, model: Path) -> None:
        self._root, self._model = root, model
        self._stack = ExitStack()
        self._lab: FaultLab | None = None
        self._made = self._cases = 0
        self.spoilt = False

    def take(self) -> FaultLab:
        """A whole swarm."""
        self._cases += 1
        if self.spoilt or self._lab is None or self._cases > CASES_PER_SWARM:
            self.close()
            self._made, self._cases = self._made + 1, 1
            made = machines(self._model, disk=why_no_small_disk() is None)
            lab = FaultLab(self._root / str(self._made), made, ids=HEIRS, context=CONTEXT)
            self._lab = self._stack.enter_context(lab)
            lab.serve("outside", self._model)
            lab.until_whole(STAGES)
        return self._lab

    def close(self) -> None:
        """End what runs."""
        self._lab = None
        self._stack.close()


@pytest.fixture(scope="module")
def shelf(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shelf]:
    shelf = Shelf(tmp_path_factory.mktemp("matrix"), smollm2_path)
    yield shelf
    shelf.close()


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_every_stream_goes_on(
    fault: Fault, shelf: Shelf, expected: Callable[[Question], Answer], request: Any, note_gaps: Any
) -> None:
    lab = shelf.take()
    skip_what_cannot_be_done(lab, fault)
    number = request.node.callspec.indices["fault"] * 2
    for question in MIXED.questions(number):
        expected(question)
    shelf.spoilt = True
    outcomes = run_case(lab, fault, MIXED, number, silence=NOTHING_FOR)
    note_gaps(fault.name, outcomes)
    assert compare(outcomes, expected) == []
    assert_json_where_asked_for(outcomes)
    assert_never_long_silent(outcomes)
    restore(lab)
    shelf.spoilt = False


def skip_what_cannot_be_done(lab: FaultLab, fault: Fault) -> None:
    if fault.needs == "network" and lab.network is None:
        pytest.skip(str(lab.why_no_network))
    if fault.needs == "disk" and (reason := why_no_small_disk()):
        pytest.skip(reason)


def assert_never_long_silent(outcomes: Sequence[Outcome]) -> None:
    slow = [str(outcome) for outcome in outcomes if outcome.gap > LONGEST_GAP]
    assert not slow, slow


def assert_json_where_asked_for(outcomes: Sequence[Outcome]) -> None:
    texts = [o.answer.text for o in outcomes if o.answer and "response_format" in dict(o.question.options)]
    assert [list(json.loads(text)) for text in texts] == [list(SHIPS["properties"])]
