"""The fake pipeline in virtual time: stages compute for as long as they are told to, links delay, and steps queue."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from support.fake_pipeline import FakePipeline, solo_run

from swarmd.node.engine.sampling_params import SamplingParams
from swarmd.node.serving.drafting import Drafter
from swarmd.node.serving.messages import Sampled, StepTimes
from swarmd.node.serving.scheduler import Scheduler
from swarmd.node.serving.sequences import Sequence
from swarmd.node.serving.steps import Limits, PlannedStep, Progress


@dataclass
class Stream:
    """What one client asked for and what it has seen."""

    sequence: Sequence
    expected: list[int]
    reason: str
    got: list[int] = field(default_factory=list)
    finish: str | None = None
    dropped: bool = False

    def take(self, progress: Progress) -> None:
        assert not self.dropped, "nothing comes for who was cancelled"
        assert self.finish is None, "nothing comes after the end"
        if progress.choice is not None:
            self.got.append(progress.choice.token)
        self.finish = progress.finish

    def check(self) -> None:
        assert self.got == self.expected[: len(self.got)], "its own tokens, in order, none lost, none twice"
        if self.finish is not None:
            assert (self.got, self.finish) == (self.expected, self.reason)


def stream(seq: int, prompt: list[int], max_tokens: int, stop: frozenset[int], limits: Limits) -> Stream:
    """A request with the answer that a lone run without any cache gives."""
    count = min(max_tokens, limits.room - len(prompt))
    expected = solo_run(prompt, limits.n_stages, count)
    ends = [index for index, token in enumerate(expected) if token in stop]
    reason = "stop" if ends else "length"
    if ends:
        expected = expected[: ends[0]]
    return Stream(Sequence(seq, list(prompt), SamplingParams(), max_tokens, stop), expected, reason)


@dataclass
class _Timed:
    planned: float
    arrived: float
    compute: float = 0.0
    slowest: float = 0.0
    wait: float = 0.0

    def times(self) -> StepTimes:
        return StepTimes(round(self.compute * 1e6), round(self.slowest * 1e6), round(self.wait * 1e6))


class ClockedPipeline:
    """A step takes each stage `base` seconds and `per_token` for every token in it, and each link `link` seconds."""

    def __init__(
        self,
        limits: Limits,
        *,
        base: float = 1.0,
        per_token: float = 0.0,
        link: float = 0.0,
        drafter: Drafter | None = None,
    ) -> None:
        self.limits = limits
        self.scheduler = Scheduler(limits, drafter)
        self.pipeline = FakePipeline(limits)
        self.now = 0.0
        self.busy = [0.0] * limits.n_stages
        self.planned: list[PlannedStep] = []
        self.token_times: dict[int, list[float]] = {}
        self.token_steps: dict[int, list[int]] = {}
        self._base, self._per_token, self._link = base, per_token, link
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._timed: dict[int, _Timed] = {}
        self._lines: list[deque[PlannedStep]] = [deque() for _ in range(limits.n_stages)]
        self._working = [False] * limits.n_stages
        self._streams: dict[int, Stream] = {}

    @property
    def rows_computed(self) -> int:
        """Tokens in all steps so far."""
        return sum(len(chunk.tokens) for step in self.planned for chunk in step.chunks)

    def step_seconds(self, tokens: int) -> float:
        """What a step takes on each stage; one that only frees takes nothing."""
        return self._base + self._per_token * tokens if tokens else 0.0

    def submit(self, one: Stream) -> None:
        """A client comes now."""
        seq = one.sequence.seq
        self.token_times[seq], self.token_steps[seq], self._streams[seq] = [], [], one
        self.scheduler.submit(one.sequence)

    def run(self, *, until: float = float("inf")) -> None:
        """Let time pass until everything is done, or until then."""
        self._plan()
        while self._events and self._events[0][0] <= until:
            self.now, _, happen = heapq.heappop(self._events)
            happen()

    def _after(self, seconds: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._order), happen))

    def _plan(self) -> None:
        while step := self.scheduler.next_step():
            assert not {opening.seq for opening in step.open} & set(step.free)
            self.planned.append(step)
            self._timed[step.step] = _Timed(self.now, self.now)
            self.pipeline.begin(step)
            self._arrive(0, step)

    def _arrive(self, index: int, step: PlannedStep) -> None:
        self._timed[step.step].arrived = self.now
        self._lines[index].append(step)
        self._compute(index)

    def _compute(self, index: int) -> None:
        if self._working[index] or not self._lines[index]:
            return
        step = self._lines[index].popleft()
        seconds = self.step_seconds(sum(len(chunk.tokens) for chunk in step.chunks))
        timed = self._timed[step.step]
        timed.wait += self.now - timed.arrived
        timed.compute += seconds
        timed.slowest = max(timed.slowest, seconds)
        self._working[index] = True
        self.busy[index] += seconds
        self._after(seconds, lambda: self._computed(index, step))

    def _computed(self, index: int, step: PlannedStep) -> None:
        self._working[index] = False
        self.pipeline.advance(index)
        if index + 1 < self.limits.n_stages:
            self._after(self._link, lambda: self._arrive(index + 1, step))
        else:
            self._after(self._link, self._answer)
        self._compute(index)

    def _answer(self) -> None:
        message = self.pipeline.answers.popleft()
        assert isinstance(message, Sampled)
        timed = self._timed.pop(message.step)
        round_trip_us = (self.now - timed.planned) * 1e6
        for progress in self.scheduler.on_sampled(message.step, message.choices, timed.times(), round_trip_us):
            self._streams[progress.seq].take(progress)
            self.token_times[progress.seq].append(self.now)
            self.token_steps[progress.seq].append(len(self.planned))
        self._plan()
