"""The driver: one instance's scheduler at work. It lives beside the first stage and turns requests into steps."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field

from swarmd.discovery.records import LoadRecord
from swarmd.node.serving.messages import Finished, Generate, Sampled, StepFailed, Token
from swarmd.node.serving.scheduler import Limits, PlannedStep, Progress, QueueFull, Scheduler
from swarmd.node.serving.sequences import Sequence
from swarmd.transport.link import RemoteError

_Outcome = Token | Finished | RemoteError


@dataclass
class _Request:
    sequence: Sequence
    outcomes: asyncio.Queue[_Outcome] = field(default_factory=asyncio.Queue)


class Driver:
    """Takes requests, keeps the pipeline full, and gives every request its tokens.

    `run_step` hands a planned step to the first stage. One driver serves one epoch; when the pipeline breaks,
    `fail` ends every request with a typed error, so that its entry node can replay it in the next epoch.
    """

    def __init__(self, instance: str, limits: Limits, run_step: Callable[[PlannedStep], Awaitable[None]]) -> None:
        self._instance = instance
        self._limits = limits
        self._scheduler = Scheduler(limits)
        self._run_step = run_step
        self._requests: dict[int, _Request] = {}
        self._next_seq = 0
        self._wake = asyncio.Event()
        self._failure: RemoteError | None = None

    @property
    def load(self) -> LoadRecord:
        """How busy the instance is."""
        scheduler = self._scheduler
        return LoadRecord(
            self._instance,
            scheduler.running,
            scheduler.waiting,
            scheduler.kv_tokens_used,
            self._limits.kv_tokens,
        )

    async def run(self) -> None:
        """Plan and send steps for as long as the pipeline lives; returns after `fail`."""
        while self._failure is None:
            self._wake.clear()
            while (step := self._scheduler.next_step()) is not None:
                await self._run_step(step)
            await self._wake.wait()

    async def generate(self, request: Generate) -> AsyncGenerator[Token | Finished]:
        """The tokens of one request, ended by Finished. Leaving early cancels it on every stage.

        Raises RemoteError: `overloaded`, `invalid`, or what `fail` was told.
        """
        entry = self._submit(request)
        try:
            while True:
                outcome = await entry.outcomes.get()
                if isinstance(outcome, RemoteError):
                    raise outcome
                yield outcome
                if isinstance(outcome, Finished):
                    return
        finally:
            del self._requests[entry.sequence.seq]
            self._scheduler.cancel(entry.sequence)
            self._wake.set()

    def on_sampled(self, message: Sampled) -> None:
        """The last stage's answer to a step. Raises ValueError for one that was not asked for."""
        for progress in self._scheduler.on_sampled(message.step, message.choices):
            self._deliver(progress)
        self._wake.set()

    def on_step_failed(self, message: StepFailed) -> None:
        """A stage could not run a step: the requests in it end, the others go on."""
        for sequence in self._scheduler.on_failed(message.step):
            if request := self._requests.get(sequence.seq):
                request.outcomes.put_nowait(RemoteError("engine_error", message.reason))
        self._wake.set()

    def fail(self, code: str, reason: str) -> None:
        """End every request, and refuse those to come."""
        if self._failure is None:
            self._failure = RemoteError(code, reason)
            for request in self._requests.values():
                request.outcomes.put_nowait(self._failure)
            self._wake.set()

    def _submit(self, request: Generate) -> _Request:
        if self._failure is not None:
            raise self._failure
        sequence = Sequence(
            self._next_seq,
            list(request.tokens),
            request.sampling,
            request.max_tokens,
            frozenset(request.stop_tokens),
        )
        self._next_seq += 1
        try:
            self._scheduler.submit(sequence)
        except QueueFull:
            raise RemoteError("overloaded", "too many requests are waiting; try again in a few seconds") from None
        except ValueError as error:
            raise RemoteError("invalid", str(error)) from None
        entry = self._requests[sequence.seq] = _Request(sequence)
        self._wake.set()
        return entry

    def _deliver(self, progress: Progress) -> None:
        request = self._requests.get(progress.seq)
        if request is None:
            return
        if progress.choice is not None:
            choice = progress.choice
            request.outcomes.put_nowait(Token(choice.token, choice.logprob, choice.top))
        if progress.finish is not None:
            request.outcomes.put_nowait(Finished(progress.finish))
