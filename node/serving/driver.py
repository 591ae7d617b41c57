"""The driver: one instance's scheduler at work. It lives beside the first stage and turns requests into steps."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from swarmd.discovery.records import LoadRecord
from swarmd.node.serving.liveness import StepPatience
from swarmd.node.serving.messages import Finished, Generate, Sampled, StepFailed, StepTimes, Token
from swarmd.node.serving.profile import Profile
from swarmd.node.serving.scheduler import Scheduler
from swarmd.node.serving.sequences import Sequence
from swarmd.node.serving.speculation import Speculation
from swarmd.node.serving.steps import Limits, PlannedStep, Progress, QueueFull
from swarmd.node.serving.waiting_room import WaitingRoom
from swarmd.transport.link import RemoteError

_Outcome = Token | Finished | RemoteError

MakeGuesses = Callable[[Callable[[], list[list[int]]]], Awaitable[list[list[int]]]]
"""Runs blocking work where that holds up nothing but the computing of steps, and gives its result."""


@dataclass
class _Request:
    sequence: Sequence
    outcomes: asyncio.Queue[_Outcome] = field(default_factory=asyncio.Queue)


class _Sent(NamedTuple):
    """A step in flight: when it was planned, and whether no other was in flight then."""

    step: PlannedStep
    at: float
    alone: bool


class Driver:
    """Takes requests, keeps the pipeline full, and gives every request its tokens.

    `run_step` hands a planned step to the first stage. With `speculation`, tokens are guessed ahead; guesses that take
    time are made by `make_guesses`. One driver serves one epoch; when the pipeline breaks, `fail` ends every request
    with a typed error, so that its entry node can replay it in the next epoch. `on_sick` hears when the pipeline can
    compute nothing for anybody, though it lives. `clock` gives seconds. `numbers` are
    those of its sequences: one that two drivers have in common would mean one sequence to what guesses.
    """

    def __init__(
        self,
        instance: str,
        limits: Limits,
        run_step: Callable[[PlannedStep], Awaitable[None]],
        speculation: Speculation | None = None,
        make_guesses: MakeGuesses | None = None,
        clock: Callable[[], float] = time.perf_counter,
        numbers: Iterator[int] | None = None,
    ) -> None:
        self._instance = instance
        self._limits = limits
        self._speculation = speculation
        self._scheduler = Scheduler(limits, speculation)
        self._room = WaitingRoom(limits)
        self._run_step = run_step
        self._make_guesses = make_guesses
        self._clock = clock
        self._requests: dict[int, _Request] = {}
        self._sent: dict[int, _Sent] = {}
        self._numbers = numbers if numbers is not None else count()
        self._patience = StepPatience()
        self._wake = asyncio.Event()
        self._failure: RemoteError | None = None
        self.profile: Profile | None = None
        self.on_sick: Callable[[str], None] = lambda reason: self.fail("stage_lost", reason)

    @property
    def load(self) -> LoadRecord:
        """How busy the instance is. KV room that ended sequences take counts as free: whoever needs it gets it."""
        scheduler, speculation = self._scheduler, self._speculation
        return LoadRecord(
            self._instance,
            scheduler.running,
            scheduler.waiting,
            scheduler.kv_tokens_used,
            self._limits.kv_tokens,
            speculation.drafted if speculation else 0,
            speculation.accepted if speculation else 0,
        )

    @property
    def prefix_tokens_reused(self) -> int:
        """Prompt tokens that were not computed, since somebody before had the same prefix."""
        return self._scheduler.prefix_tokens_reused

    @property
    def settled(self) -> bool:
        """Whether the first steps are done, so that no kernels are compiled any more."""
        return self._patience.settled

    def hung_for(self) -> float:
        """Seconds that the oldest step has been in flight, if it is so long that something must hang; else 0."""
        oldest = next(iter(self._sent.values()), None)
        if oldest is None:
            return 0.0
        tokens = sum(len(chunk.tokens) for sent in self._sent.values() for chunk in sent.step.chunks)
        now = self._clock()
        return now - oldest.at if self._patience.overdue(now, oldest.at, tokens) else 0.0

    def awaits(self, step: int) -> bool:
        """Whether a step is under way."""
        return step in self._sent

    async def run(self) -> None:
        """Plan and send steps for as long as the pipeline lives; returns after `fail`."""
        while self._failure is None:
            self._wake.clear()
            await self._prepare_drafts()
            while (step := self._plan()) is not None:
                self._sent[step.step] = _Sent(step, self._clock(), not self._sent)
                await self._run_step(step)
                await self._prepare_drafts()
            await self._wake.wait()

    async def generate(self, request: Generate) -> AsyncGenerator[Token | Finished]:
        """The tokens of one request, ended by Finished. Leaving early cancels it on every stage.

        Raises RemoteError: `overloaded`, `queue_timeout` (see `expire`), `invalid`, or what `fail` was told.
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
            self._room.leave(entry.sequence)
            self._scheduler.cancel(entry.sequence)
            self._wake.set()

    def on_sampled(self, message: Sampled) -> None:
        """The last stage's answer to a step. Raises ValueError for one that was not asked for."""
        sent = self._sent.pop(message.step, None)
        round_trip_us = (self._clock() - sent.at) * 1e6 if sent is not None else 0.0
        self._wake.set()  # first in line: the next step goes out before the tokens of this one
        for progress in self._scheduler.on_sampled(message.step, message.choices, message.times, round_trip_us):
            self._deliver(progress)
        if sent is not None:
            self._learn(sent, message.times, round_trip_us)

    def on_step_failed(self, message: StepFailed) -> None:
        """A stage could not run a step: its sequences are tried again, each alone; who fails alone ends."""
        self._sent.pop(message.step, None)
        failure = self._scheduler.on_failed(message.step, own=message.own)
        for sequence in failure.ended:
            if request := self._requests.get(sequence.seq):
                request.outcomes.put_nowait(RemoteError("engine_error", message.reason))
        if failure.sick:
            self.on_sick(message.reason)
        self._wake.set()

    def expire(self) -> None:
        """End the requests that have waited too long for their turn. To be called a few times a second."""
        for seq in self._room.overdue(self._clock()):
            words = "the request waited too long for its turn; try again in a few seconds"
            self._requests[seq].outcomes.put_nowait(RemoteError("queue_timeout", words))

    def fail(self, code: str, reason: str) -> None:
        """End every request, and refuse those to come."""
        if self._failure is None:
            self._failure = RemoteError(code, reason)
            for request in self._requests.values():
                request.outcomes.put_nowait(self._failure)
            self._wake.set()

    def _plan(self) -> PlannedStep | None:
        begin = self._clock() if self.profile is not None else 0.0
        step = self._scheduler.next_step()
        if step is not None and step.open:
            self._room.let_in()
        if self.profile is not None and step is not None:
            self.profile.add("schedule", self._clock() - begin)
        return step

    async def _prepare_drafts(self) -> None:
        """Have the guesses that take time made before the step that sends them is planned."""
        drafts = self._speculation.prepared if self._speculation is not None else None
        if drafts is None or self._make_guesses is None or len(self._sent) >= self._scheduler.depth:
            return
        if asks := drafts.prepare(self._scheduler.to_decode()):
            drafts.keep(asks, await self._make_guesses(lambda: drafts.guess(asks)))

    def _learn(self, sent: _Sent, times: StepTimes, round_trip_us: float) -> None:
        """What a step took tells how long to wait for the others, and the speculation the price of a guess."""
        decode, prefill = sent.step.rows
        self._patience.answered(self._clock(), round_trip_us / 1e6, decode + prefill)
        if self._speculation is not None and not prefill:
            alone = sent.alone and not self._sent
            self._speculation.on_decoded(decode, len(sent.step.chunks), times, round_trip_us, alone=alone)

    def _submit(self, request: Generate) -> _Request:
        if self._failure is not None:
            raise self._failure
        sequence = Sequence(
            next(self._numbers),
            list(request.tokens),
            request.sampling,
            request.max_tokens,
            frozenset(request.stop_tokens),
        )
        try:
            self._room.check(len(sequence.tokens))
            self._scheduler.submit(sequence)
        except QueueFull:
            raise RemoteError("overloaded", "too many requests are waiting; try again in a few seconds") from None
        except ValueError as error:
            raise RemoteError("invalid", str(error)) from None
        entry = self._requests[sequence.seq] = _Request(sequence)
        self._room.enter(sequence, self._clock())
        self._wake.set()
        return entry

    def _deliver(self, progress: Progress) -> None:
        request = self._requests.get(progress.seq)
        if request is None:
            return
        if progress.choice is not None:
            choice = progress.choice
            request.outcomes.put_nowait(Token(choice.token, choice.logprob, choice.top))
        if progress.finish == "unfit":
            words = "the answer cannot go on under its JSON schema, which is too complex here; ask for a simpler one"
            request.outcomes.put_nowait(RemoteError("unfit", words))
        elif progress.finish is not None:
            request.outcomes.put_nowait(Finished(progress.finish))
