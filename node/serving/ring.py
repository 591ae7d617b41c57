"""A stage's place in the ring: it takes steps from the stage before, computes, and hands on to the stage after."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from swarmd.node.serving.driver import Driver
from swarmd.node.serving.messages import Sampled, Step, StepFailed, TokenChoice, WireDtype
from swarmd.transport.link import Link

if TYPE_CHECKING:
    from swarmd.node.engine.stage_engine import StageEngine, StepResult

log = logging.getLogger("swarmd.stage")

# The driver never has more steps in flight than there are stages; a peer that sends more is not a driver.
MAX_QUEUED_STEPS = 256


class RingStage:
    """Runs the steps of one epoch in order, on a thread of its own so that links stay responsive.

    `following` is the link to the next stage, None when this stage is the whole pipeline. The first stage is given
    its `driver` and receives the samples.
    """

    def __init__(self, engine: StageEngine, epoch: int, dtype: WireDtype, compute: ThreadPoolExecutor) -> None:
        self.following: Link | None = None
        self.driver: Driver | None = None
        self._engine = engine
        self._epoch = epoch
        self._dtype: WireDtype = dtype
        self._compute = compute
        self._steps: asyncio.Queue[tuple[Step, bytearray | None]] = asyncio.Queue(MAX_QUEUED_STEPS)

    async def run(self) -> None:
        """The stage's main loop."""
        loop = asyncio.get_running_loop()
        while True:
            step, hidden = await self._steps.get()
            try:
                result = await loop.run_in_executor(self._compute, self._run_engine, step, hidden)
            except (RuntimeError, ValueError, MemoryError) as error:
                log.exception("step %d failed", step.step)
                await self.hand_on_failure(StepFailed(self._epoch, step.step, f"{type(error).__name__}: {error}"))
            else:
                await self._hand_on(step, result)

    def begin(self, step: Step, hidden: bytearray | None) -> None:
        """Queue a step; `hidden` is None on the first stage. Steps of another epoch are dropped.

        Raises ValueError when more steps are queued than any driver sends.
        """
        if step.epoch != self._epoch:
            return
        try:
            self._steps.put_nowait((step, hidden))
        except asyncio.QueueFull:
            raise ValueError(f"more than {MAX_QUEUED_STEPS} steps at once") from None

    def on_sampled(self, message: Sampled) -> None:
        """Samples arrived at the first stage."""
        if self.driver is not None and message.epoch == self._epoch:
            self.driver.on_sampled(message)

    async def hand_on_failure(self, message: StepFailed) -> None:
        """Tell the driver, the long way round, that a step failed."""
        if message.epoch != self._epoch:
            return
        if self.driver is not None:
            self.driver.on_step_failed(message)
        elif self.following is not None:
            await self.following.send(message)

    def _run_engine(self, step: Step, hidden: bytearray | None) -> StepResult:
        for seq in step.free:
            self._engine.free(seq)
        for opening in step.open:
            self._engine.open(opening.seq, opening.sampling)
        return self._engine.step(step.chunks, hidden, self._dtype)

    async def _hand_on(self, step: Step, result: StepResult) -> None:
        if not self._engine.last:
            assert self.following is not None
            await self.following.send(step, result.payload if result.payload is not None else b"")
            return
        choices = tuple(TokenChoice(s.seq, s.position, s.token, s.logprob, s.top) for s in result.samples)
        sampled = Sampled(self._epoch, step.step, choices)
        if self.following is None:
            self.on_sampled(sampled)
        else:
            await self.following.send(sampled)


def watch(task: asyncio.Task[None], on_failure: Callable[[BaseException], None]) -> None:
    """Call `on_failure` when a task that should run for ever ends with an error."""

    def done(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            on_failure(error)

    task.add_done_callback(done)
