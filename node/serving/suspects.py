"""Whose fault it is that a step failed: the sequences of such a step are tried again, each alone. Pure."""

from __future__ import annotations

from collections import deque
from enum import Enum, auto
from typing import NamedTuple

from swarmd.node.serving.sequences import Sequence


class Verdict(Enum):
    """What is to become of a sequence that failed alone: it is GUILTY and ends; or others are tried before, LATER; or
    nobody gets anything computed, so that it is the stage that is SICK.
    """

    GUILTY = auto()
    LATER = auto()
    SICK = auto()


class Failure(NamedTuple):
    """What comes of a step that failed: who ends by it, and whether the stage is sick rather than anybody guilty."""

    ended: list[Sequence]
    sick: bool = False


class Suspects:
    """The sequences that were in steps that failed and have not been cleared, in the order in which they are tried.

    A stage that could not compute a step because of its own state, as one that is out of memory, may be unable to
    compute any. So nobody is found guilty of such a failure before some other step has gone through all stages.
    """

    def __init__(self) -> None:
        self._order: deque[Sequence] = deque()
        self._deferred: set[int] = set()
        # How many steps went through, and how many of them before each suspect's first failure.
        self._answered = 0
        self._before: dict[int, int] = {}

    def __bool__(self) -> bool:
        return bool(self._order)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.seq in self._before

    @property
    def current(self) -> Sequence | None:
        """Who is to be tried alone now."""
        return self._order[0] if self._order else None

    def answered(self) -> None:
        """A step with tokens went through all stages."""
        self._answered += 1

    def verdict(self, hit: list[Sequence], *, alone: bool, own: bool) -> Verdict:
        """What comes of a step that failed: of the one in it, if it was `alone` and a suspect; the others are now.

        `own`: it failed by what was asked of it, not by the state of the stage.
        """
        verdict = self.judge(hit[0], own=own) if alone and hit[0] in self else Verdict.LATER
        for sequence in hit:
            self.add(sequence)
        return verdict

    def add(self, sequence: Sequence) -> None:
        """A sequence was in a step that failed."""
        if sequence not in self:
            self._order.append(sequence)
            self._before[sequence.seq] = self._answered

    def clear(self, sequence: Sequence) -> None:
        """A sequence was computed, or has ended; others are let be."""
        if sequence in self:
            self._order.remove(sequence)
            self._deferred.discard(sequence.seq)
            del self._before[sequence.seq]

    def judge(self, sequence: Sequence, *, own: bool) -> Verdict:
        """A suspect failed alone. `own`: by what was asked for it, not by the state of the stage."""
        if own or self._answered > self._before[sequence.seq]:
            return Verdict.GUILTY
        self._deferred.add(sequence.seq)
        self._order.remove(sequence)
        self._order.append(sequence)
        return Verdict.SICK if len(self._deferred) == len(self._order) else Verdict.LATER
