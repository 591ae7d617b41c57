"""The steps that are on their way through the pipeline, and what those that came back say of it. Pure."""

from __future__ import annotations

from swarmd.node.serving.chunking import StepPace
from swarmd.node.serving.depth import DepthMeter
from swarmd.node.serving.messages import Chunk, Opening, StepTimes
from swarmd.node.serving.steps import PlannedStep


class StepsInFlight:
    """Counts steps up, and knows how many there may be and how many sequences each is to decode."""

    def __init__(self, n_stages: int) -> None:
        self.pace = StepPace()
        self._meter = DepthMeter(n_stages)
        self._planned: dict[int, PlannedStep] = {}
        # How many sequences each of those gives tokens to.
        self._sizes: dict[int, int] = {}
        # Those that were in flight when one before them failed.
        self._tainted: set[int] = set()
        self._next_step = 0

    @property
    def depth(self) -> int:
        """How many steps may be in flight at present."""
        return self._meter.depth

    @property
    def full(self) -> bool:
        """Whether there are as many."""
        return len(self._planned) >= self._meter.depth

    @property
    def doubtful(self) -> bool:
        """Whether any is in flight that may fail because one before it did.

        Whoever begins with what such a step computes may fail in turn, and the next one with it, for ever.
        """
        return bool(self._tainted)

    def share(self, decoding: int) -> int:
        """How many of so many sequences the next step decodes, 1 or more: all, evenly among the steps in flight.

        Where they do not come out even, just so many steps have one more: a step that was small once is not so for
        ever. Nobody waits for long, as who is served is in flight until `depth` steps later, and so many shares cover
        all.
        """
        share, more = divmod(decoding, self._meter.depth)
        if sum(size > share for size in self._sizes.values()) < more:
            share += 1
        return max(1, share)

    def begin(self, opened: list[Opening], chunks: list[Chunk], freed: tuple[int, ...]) -> PlannedStep:
        """The next step."""
        step = PlannedStep(self._next_step, tuple(opened), tuple(chunks), freed)
        self._next_step += 1
        self._planned[step.step] = step
        self._sizes[step.step] = sum(chunk.sample > 0 for chunk in chunks)
        return step

    def returned(self, step: int, times: StepTimes, round_trip_us: float) -> PlannedStep:
        """A step came back `round_trip_us` after it was planned. Raises ValueError for one that is not in flight."""
        planned = self._planned.pop(step, None)
        if planned is None:
            raise ValueError(f"step {step} is not in flight")
        del self._sizes[step]
        self._tainted.discard(step)
        self._meter.observe(times, round_trip_us)
        self.pace.observe(*planned.rows, times.slowest_us)
        return planned

    def failed(self, step: int) -> tuple[PlannedStep, bool] | None:
        """A step failed; the answer tells whether one before it had failed when it was in flight already, and may be
        the cause. None for one that is not in flight.
        """
        planned = self._planned.pop(step, None)
        if planned is None:
            return None
        del self._sizes[step]
        tainted = step in self._tainted
        self._tainted = {other for other in self._planned if other > step or other in self._tainted}
        return planned, tainted
