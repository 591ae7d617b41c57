"""A stage's place in the ring: it takes steps from the stage before, computes, and hands on to the stage after."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from swarmd.node.serving.compute_thread import ComputeThread
from swarmd.node.serving.driver import Driver
from swarmd.node.serving.messages import Sampled, Step, StepFailed, StepTimes, TokenChoice, WireDtype
from swarmd.node.serving.profile import Profile
from swarmd.transport.frames import FrameError
from swarmd.transport.link import Link, LinkClosed

if TYPE_CHECKING:
    from swarmd.node.engine.stage_engine import StageEngine, StepResult

log = logging.getLogger("swarmd.stage")

# The driver never has so many steps in flight; a peer that sends more is not a driver.
MAX_QUEUED_STEPS = 256


class _Arrival(NamedTuple):
    """A step that is to be computed here, and when it came: `time.perf_counter()`."""

    step: Step
    hidden: bytearray | None
    at: float


class _Clock(NamedTuple):
    """When a step came here, and when its computing began and ended: `time.perf_counter()`."""

    arrived: float
    began: float
    ended: float


class RingStage:
    """Runs the steps of one epoch in order, on a thread of its own so that links stay responsive.

    A step goes to that thread as soon as it is idle, and its result goes on to the next stage when it comes back to the
    loop: no task stands in between. The next step begins when the one before has been handed on; where both threads
    share a core, the next stage would otherwise wait for its input until this one is done once more.

    `following` is the link to the next stage, None when this stage is the whole pipeline. The first stage is given its
    `driver` and receives the samples. `on_broken` hears of an error that no step should cause; nothing is computed
    after it, nor after `end`.
    """

    def __init__(
        self,
        engine: StageEngine,
        epoch: int,
        dtype: WireDtype,
        compute: ComputeThread,
        *,
        on_broken: Callable[[BaseException], None],
        profile: Profile | None = None,
    ) -> None:
        self.following: Link | None = None
        self.driver: Driver | None = None
        # In a row, by the state of this stage.
        self.failures = 0
        self._engine = engine
        self._epoch = epoch
        self._dtype: WireDtype = dtype
        self._compute = compute
        self._on_broken = on_broken
        self._profile = profile
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[_Arrival] = deque()
        self._computing = False
        self._ended = False
        self._sent_at: dict[int, float] = {}
        self._last_ended = 0.0

    def begin(self, step: Step, hidden: bytearray | None) -> None:
        """Queue a step; `hidden` is None on the first stage. Steps of another epoch are dropped.

        Raises ValueError when more steps are queued than any driver sends.
        """
        if step.epoch != self._epoch or self._ended:
            return
        if len(self._waiting) >= MAX_QUEUED_STEPS:
            raise ValueError(f"more than {MAX_QUEUED_STEPS} steps at once")
        arrival = _Arrival(step, hidden, time.perf_counter())
        if self._profile is not None and self.driver is not None:
            self._sent_at[step.step] = arrival.at
        if self._computing:
            self._waiting.append(arrival)
        else:
            self._start(arrival)

    def end(self) -> None:
        """The epoch is over: of what was queued nothing is computed, and what is being computed goes nowhere."""
        self._ended = True
        self._waiting.clear()

    def on_sampled(self, message: Sampled) -> None:
        """Samples arrived at the first stage."""
        if self.driver is None or message.epoch != self._epoch:
            return
        if self._profile is None:
            self.driver.on_sampled(message)
            return
        now, times = time.perf_counter(), message.times
        if (sent := self._sent_at.pop(message.step, None)) is not None:
            self._profile.add("wire", now - sent - (times.compute_us + times.wait_us) / 1e6)
        self.driver.on_sampled(message)
        self._profile.add("answer", time.perf_counter() - now)

    def on_failed(self, message: StepFailed) -> None:
        """Tell the driver, the long way round, that a step failed."""
        if message.epoch != self._epoch:
            return
        if self.driver is not None:
            self._sent_at.pop(message.step, None)
            self.driver.on_step_failed(message)
        else:
            self._send(message)

    def _start(self, arrival: _Arrival) -> None:
        self._computing = True
        self._compute.post(partial(self._run, arrival))

    def _run(self, arrival: _Arrival) -> None:
        """On the compute thread: run a step and give its result back to the loop."""
        began = time.perf_counter()
        try:
            outcome = self._run_engine(arrival.step, arrival.hidden)
        except BaseException as error:
            outcome = error
        clock = _Clock(arrival.at, began, time.perf_counter())
        try:
            self._loop.call_soon_threadsafe(self._done, arrival.step, outcome, clock)
        except RuntimeError:
            return  # the loop is closed: the process is about to end

    def _run_engine(self, step: Step, hidden: bytearray | None) -> StepResult:
        for opening in step.open:
            self._engine.open(opening.seq, opening.sampling, opening.source, opening.length)
        for seq in step.free:
            self._engine.free(seq)
        return self._engine.step(step.chunks, hidden, step.dtype, self._dtype)

    def _done(self, step: Step, outcome: StepResult | BaseException, clock: _Clock) -> None:
        """On the loop: a step was computed here, or could not be."""
        self._computing = False
        if self._ended:
            return
        if not isinstance(outcome, BaseException):
            self.failures = 0
            try:
                self._hand_on(step, outcome, clock)
            except FrameError as error:  # it holds more than a message can
                log.error("step %d cannot be sent on: %s", step.step, error)
                self.on_failed(StepFailed(self._epoch, step.step, f"FrameError: {error}", own=True))
        elif isinstance(outcome, RuntimeError | ValueError | MemoryError):
            log.error("step %d failed", step.step, exc_info=outcome)
            own = _is_own(outcome)
            self.failures += not own
            self.on_failed(StepFailed(self._epoch, step.step, f"{type(outcome).__name__}: {outcome}", own))
        else:
            self.end()
            self._on_broken(outcome)
            return
        if self._waiting:
            self._start(self._waiting.popleft())

    def _hand_on(self, step: Step, result: StepResult, clock: _Clock) -> None:
        times = _add(step.times, clock)
        if self._profile is not None:
            self._account(self._profile, clock)
        if not self._engine.last:
            payload = result.payload if result.payload is not None else b""
            self._send(replace(step, times=times, dtype=result.dtype), payload)
        else:
            choices = tuple([TokenChoice(s.seq, s.position, s.token, s.logprob, s.top) for s in result.samples])
            sampled = Sampled(self._epoch, step.step, choices, times)
            if self.following is None:
                self.on_sampled(sampled)
            else:
                self._send(sampled)
        if self._profile is not None:
            self._profile.end_step(sum(len(chunk.tokens) for chunk in step.chunks))

    def _send(self, message: Struct, payload: memoryview | bytes = b"") -> None:
        """To the next stage. The engine's payloads are never written to again, so nobody waits until they are out; the
        driver bounds how many there are.
        """
        if self.following is None:
            return
        try:
            if self._profile is None:
                self.following.send_soon(message, payload)
                return
            begin = time.perf_counter()
            body = self.following.encode(message)
            encoded = time.perf_counter()
            self.following.send_soon(body, payload)
            self._profile.add("encode", encoded - begin)
            self._profile.add("send", time.perf_counter() - encoded)
        except LinkClosed:
            return  # whoever handles the link hears of that, and ends the epoch

    def _account(self, profile: Profile, clock: _Clock) -> None:
        """Split a step's way through this process. A step that found the thread idle waited for nothing but it."""
        waited = clock.began - clock.arrived
        back = time.perf_counter() - clock.ended
        was_idle = clock.arrived >= self._last_ended
        if was_idle and self._last_ended:
            profile.add("idle", clock.arrived - self._last_ended)
        profile.add("wait", 0.0 if was_idle else waited)
        profile.add("hand-off", back + (waited if was_idle else 0.0))
        profile.add("compute", clock.ended - clock.began)
        self._last_ended = clock.ended


def _add(times: StepTimes, clock: _Clock) -> StepTimes:
    """A step's times with this stage's own."""
    compute = int((clock.ended - clock.began) * 1e6)
    wait = int((clock.began - clock.arrived) * 1e6)
    return StepTimes(times.compute_us + compute, max(times.slowest_us, compute), times.wait_us + wait)


def _is_own(error: Exception) -> bool:
    """Whether a step failed by what it asks for, not by the state of the stage."""
    from swarmd.node.engine.stage_compute import KvExhausted, StepError

    return isinstance(error, KvExhausted | StepError | ValueError)


def watch(task: asyncio.Task[None], on_failure: Callable[[BaseException], None]) -> None:
    """Call `on_failure` when a task that should run for ever ends with an error."""

    def done(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            on_failure(error)

    task.add_done_callback(done)
