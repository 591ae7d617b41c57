"""One epoch of a stage: its place in the ring, the links with its neighbours and, on the first stage, the driver."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING

from msgspec import Struct

from swarmd.node.serving.driver import Driver
from swarmd.node.serving.liveness import Silence
from swarmd.node.serving.messages import (
    Connect,
    EngineLoad,
    EngineTrouble,
    Generate,
    JoinRing,
    LoadEngine,
    RingBeat,
    Sampled,
    Step,
    StepFailed,
)
from swarmd.node.serving.profile import profile_of
from swarmd.node.serving.ring import RingStage, watch
from swarmd.node.serving.stage_parts import StageParts
from swarmd.node.serving.steps import Limits, PlannedStep
from swarmd.transport.endpoint import LinkRefused
from swarmd.transport.link import Link, LinkClosed, RemoteError
from swarmd.transport.log_limit import LogLimit

if TYPE_CHECKING:
    pass

log = logging.getLogger("swarmd.stage")

LOAD_REPORT_SECONDS = 0.5
# For all addresses of a neighbour together; but one that is busy needs some time.
DIAL_SECONDS, LEAST_DIAL_SECONDS = 3.0, 1.5
TICK_SECONDS = 0.25
RING_SILENCE_SECONDS = 2.0
# Compilers may hold the interpreter's lock for long.
UNSETTLED_SILENCE_SECONDS = 60.0
HUNG_TICKS = 8
# Of those who join before the owner's order tells who is to.
MAX_EARLY = 8
# A stage that failed so often in a row is not to be kept.
SICK_FAILURES = 2


class StageEpoch:
    """The ring as one stage sees it, from `connect` on until it breaks or a later epoch takes its place.

    It breaks when a neighbour is lost or silent, when a step is never answered, or when something fails that should
    not. Then the requests are told, the daemon, and the neighbours, who pass it on by closing too.
    """

    def __init__(self, job: LoadEngine, parts: StageParts) -> None:
        self.job = job
        self._parts = parts
        self._ring: RingStage | None = None
        self._order: Connect | None = None
        self._links: list[Link] = []
        self._early: list[Link] = []
        self._previous: Link | None = None
        self._last_step = -1
        self._limit = LogLimit()
        self._received: dict[Link, int] = {}
        self._silence: Silence[Link] = Silence(TICK_SECONDS)
        self._tasks: list[asyncio.Task[None]] = []
        self._hung_ticks = 0
        self._over = False
        self._loop = asyncio.get_running_loop()

    async def connect(self, order: Connect) -> None:
        """Join the ring: dial the next stage, and begin to drive on the first one. Raises RemoteError."""
        job, parts = self.job, self._parts
        self._order = order
        self._admit_early(order)
        if parts.profile is None:
            try:
                parts.profile = profile_of(f"stage {job.start}-{job.end - 1}", os.environ.get("SWARMD_PROFILE", ""))
            except OSError as error:
                log.warning("no profile is written to SWARMD_PROFILE: %s", error)
        ring = RingStage(
            parts.engine, job.epoch, order.wire_dtype, parts.compute, on_broken=self._on_broken, profile=parts.profile
        )
        if order.n_stages > 1:
            ring.following = await self._dial_next(order)
            await ring.following.request(JoinRing(job.instance, job.epoch), timeout=DIAL_SECONDS)
            self._add(ring.following)
        self._ring = ring
        if parts.engine.first:
            self._start_driver(ring, order)

    def take_previous(self, link: Link, message: JoinRing) -> None:
        """The stage before this one has dialled. Raises RemoteError when it belongs to another epoch."""
        if self._over or (message.instance, message.epoch) != (self.job.instance, self.job.epoch):
            self._refuse(link, f"wants to join epoch {message.epoch} of {message.instance}, not {self.job.epoch}")
            raise RemoteError("stale_epoch", "this stage belongs to another epoch")
        self._early = [early for early in self._early if early is not link and not early.closed]
        if self._order is None and len(self._early) < MAX_EARLY:
            self._early.append(link)
        elif self._order is not None and self._previous is None and _is_expected(link, self._order):
            self._previous = link
            self._add(link)
        else:
            self._refuse(link, "wants to join the ring, where it has no place")
            raise RemoteError("no_place", "the stage before this one is another")

    def on_message(self, link: Link, message: Struct, payload: bytearray) -> None:
        """Steps and samples from the stage before this one, and signs of life; anything else is refused."""
        if link not in self._links:
            if not self._over and not (link in self._early and isinstance(message, RingBeat)):
                self._refuse(link, f"sent {type(message).__name__} without being part of the ring")
        elif isinstance(message, RingBeat):
            self._silence.allow(link, RING_SILENCE_SECONDS if message.settled else UNSETTLED_SILENCE_SECONDS)
        elif self._ring is not None:
            if (fault := self._fault(link, message, self._ring)) is not None:
                self._refuse(link, f"sent {type(message).__name__} {fault}")
                return
            match message:
                case Step():
                    self._last_step = message.step
                    self._ring.begin(message, payload)
                case Sampled():
                    self._ring.on_sampled(message)
                case StepFailed():
                    self._ring.on_failed(message)

    def _fault(self, link: Link, message: Struct, ring: RingStage) -> str | None:
        """Why the stage before this one can't have sent this, if it can't."""
        if link is not self._previous or not isinstance(message, Step | Sampled | StepFailed):
            return "out of place"
        if message.epoch != self.job.epoch:
            return f"of epoch {message.epoch}, not {self.job.epoch}"
        if isinstance(message, Step):
            if ring.driver is not None:
                return "to the stage that drives"
            return f"{message.step} after {self._last_step}" if message.step <= self._last_step else None
        if ring.driver is None:
            return "to a stage that does not drive" if isinstance(message, Sampled) else None
        return None if ring.driver.awaits(message.step) else f"for step {message.step}, which is not under way"

    def _refuse(self, link: Link, what: str) -> None:
        """Say in the log what a link was refused: once in a while, whoever repeats it."""
        if (held := self._limit.admit(link.peer_id, self._loop.time())) is not None:
            log.warning("%s %s; refused%s", link.peer.name, what, f" (and {held} more from it)" if held else "")

    def generate(self, message: Generate) -> AsyncIterator[Struct]:
        """The stream of a request. Raises RemoteError when this is not the driver of its epoch."""
        if self._ring is None or self._ring.driver is None:
            raise RemoteError("not_driver", "this process does not drive an instance")
        if (message.instance, message.epoch) != (self.job.instance, self.job.epoch):
            raise RemoteError("stale_epoch", f"this driver serves epoch {self.job.epoch}, not {message.epoch}")
        return self._ring.driver.generate(message)

    def beat(self) -> None:
        """Tell the neighbours that this stage lives."""
        message = RingBeat(self._parts.settled)
        for link in self._links:
            try:
                link.send_soon(message)
            except LinkClosed:
                continue  # its handler hears of it

    async def check(self, now: float) -> None:
        """Break the ring if a neighbour is silent, or a step is not answered. Called every TICK_SECONDS."""
        for link in self._links:
            if link.received_bytes != self._received[link]:
                self._received[link] = link.received_bytes
                self._silence.heard(link, now)
        if found := self._silence.overdue(now):
            link, silent = found[0]
            await self.break_ring(f"{link.peer.name} has said nothing for {silent:.1f} s")
        elif self._ring is not None and (driver := self._ring.driver) is not None:
            self._parts.settled |= driver.settled
            driver.expire()
            waited = driver.hung_for()
            # One look is not enough: perhaps this process itself stood still, and the answer is about to be read.
            self._hung_ticks = self._hung_ticks + 1 if waited else 0
            if self._hung_ticks >= HUNG_TICKS:
                await self.break_ring(f"a step has not been answered for {waited:.0f} s")

    async def on_closed(self, link: Link, reason: str) -> None:
        """Without a neighbour the epoch is over."""
        if link in self._links:
            await self.break_ring(f"the link with {link.peer.name} ended: {reason}")

    async def break_ring(self, reason: str, *, sound: bool = True) -> None:
        """This epoch is over, once: tell the daemon at once, then the neighbours."""
        if not self._over:
            links = self._end("stage_lost", reason)
            sound &= self._ring is None or self._ring.failures < SICK_FAILURES
            await self._parts.tell(EngineTrouble(reason[:400], sound))
            await self._hang_up(links, "a neighbour in the ring was lost")

    def leave(self) -> None:
        """A later epoch takes the place of this one."""
        links = self._end("stale_epoch", f"epoch {self.job.epoch} is over")
        self._parts.spawn(self._hang_up(links, "a later epoch has begun"))

    def _end(self, code: str, reason: str) -> list[Link]:
        """Nothing is computed any more, and every request is told; the links that are to be closed."""
        self._over = True
        if self._ring is not None:
            self._ring.end()
            if self._ring.driver is not None:
                self._ring.driver.fail(code, reason)
        for task in self._tasks:
            task.cancel()
        links, self._links = self._links, []
        for link in links:
            self._silence.forget(link)
        return links

    async def _hang_up(self, links: list[Link], reason: str) -> None:
        await asyncio.gather(*(link.close(reason) for link in links))

    def _add(self, link: Link) -> None:
        self._links.append(link)
        self._received[link] = link.received_bytes
        self._silence.watch(link, self._loop.time(), UNSETTLED_SILENCE_SECONDS)

    def _admit_early(self, order: Connect) -> None:
        """Of those who joined before it was known who is to, keep the one; the others are closed."""
        early, self._early = self._early, []
        expected = [link for link in early if not link.closed and _is_expected(link, order)]
        for link in expected[-1:]:
            self._previous = link
            self._add(link)
        for link in early:
            if link is not self._previous and not link.closed:
                self._refuse(link, "has joined the ring, where it has no place")
                self._parts.spawn(link.close("the stage before this one is another"))

    async def _dial_next(self, order: Connect) -> Link:
        reason = "the next stage has no address"
        timeout = max(LEAST_DIAL_SECONDS, DIAL_SECONDS / max(1, len(order.next_addresses)))
        for address in order.next_addresses:
            try:
                return await self._parts.endpoint.dial(
                    address.host, address.port, expect=order.next_node, timeout=timeout
                )
            except LinkRefused as error:
                reason = error.reason
        raise RemoteError("unreachable", f"the next stage cannot be reached: {reason}")

    def _start_driver(self, ring: RingStage, order: Connect) -> None:
        job, parts = self.job, self._parts

        async def run_step(step: PlannedStep) -> None:
            ring.begin(Step(job.epoch, step.step, step.open, step.chunks, step.free, order.wire_dtype), None)

        def make_guesses(guess: Callable[[], list[list[int]]]) -> Awaitable[list[list[int]]]:
            return self._loop.run_in_executor(parts.compute, guess)

        limits = Limits(n_stages=order.n_stages, kv_tokens=job.kv_tokens, context=job.context)
        ring.driver = Driver(job.instance, limits, run_step, parts.speculation, make_guesses, numbers=parts.numbers)
        ring.driver.on_sick = lambda reason: parts.spawn(self.break_ring(f"no step can be computed: {reason}"))
        ring.driver.profile = parts.profile
        self._start(ring.driver.run())
        self._start(self._report_load(ring.driver))

    async def _report_load(self, driver: Driver) -> None:
        told = None
        while True:
            if (load := driver.load) != told:
                await self._parts.tell(EngineLoad(load))
                told = load
            await asyncio.sleep(LOAD_REPORT_SECONDS)

    def _start(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.append(task)
        watch(task, self._on_broken)

    def _on_broken(self, error: BaseException) -> None:
        self._parts.spawn(self.break_ring(f"{type(error).__name__}: {error}", sound=False))


def _is_expected(link: Link, order: Connect) -> bool:
    """Whether a link may be that of the stage before this one, as the owner has it."""
    return order.n_stages > 1 and order.previous_node in ("", link.peer_id)
