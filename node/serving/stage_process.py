"""A stage process: it loads layers for its daemon, takes its place in the ring and, as the first stage, drives."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING

from msgspec import Struct

from swarmd.node.serving.compute_thread import ComputeThread
from swarmd.node.serving.driver import Driver
from swarmd.node.serving.messages import (
    Connect,
    Connected,
    EngineLoad,
    EngineLoaded,
    EngineProgress,
    EngineTrouble,
    Generate,
    JoinRing,
    LoadEngine,
    Sampled,
    Step,
    StepFailed,
    TrustChanged,
)
from swarmd.node.serving.profile import Profile, profile_of
from swarmd.node.serving.ring import RingStage, watch
from swarmd.node.serving.speculation import Speculation
from swarmd.node.serving.steps import Limits, PlannedStep
from swarmd.transport.endpoint import Endpoint, LinkRefused
from swarmd.transport.link import Link, LinkClosed, RemoteError

if TYPE_CHECKING:
    from swarmd.node.engine.stage_engine import StageEngine

log = logging.getLogger("swarmd.stage")

ReportBytes = Callable[[int, int], None]
LoadStage = Callable[[LoadEngine, ReportBytes], "StageEngine"]
"""Blocking: builds the engine of a job, reporting (bytes done, bytes in all). Raises whatever makes that impossible."""

LoadSpeculation = Callable[[LoadEngine], Speculation | None]
"""Blocking: builds what guesses tokens for a job, None for nothing. Raises whatever makes a draft model impossible."""

LOAD_REPORT_SECONDS = 0.5
DIAL_SECONDS = 3.0
# Python's default is 700: several rounds per second while serving, each while a step waits.
GC_ALLOCATIONS = 50_000


class StageProcess:
    """Handler of all links of one stage process. It ends (`ended` is set) when its daemon's link goes down."""

    def __init__(self, load_stage: LoadStage, load_speculation: LoadSpeculation = lambda job: None) -> None:
        self._load_stage = load_stage
        self._load_speculation = load_speculation
        self.ended = asyncio.Event()
        self.on_trust_changed: Callable[[], None] = lambda: None
        self._endpoint: Endpoint | None = None
        self._daemon: Link | None = None
        self._job: LoadEngine | None = None
        self._engine: StageEngine | None = None
        self._speculation: Speculation | None = None
        self._ring: RingStage | None = None
        self._ring_links: list[Link] = []
        self._compute = ComputeThread()
        self._profile: Profile | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def serve(self, endpoint: Endpoint, daemon_port: int) -> None:
        """Dial the daemon on this machine and work for it until the link ends."""
        self._endpoint = endpoint
        self._daemon = await endpoint.dial("127.0.0.1", daemon_port, expect=endpoint.node_id)
        await self.ended.wait()
        if self._profile is not None:
            self._profile.report()

    async def on_link(self, link: Link) -> None:
        """Links are told apart by what they ask for."""

    async def on_request(self, link: Link, message: Struct, payload: bytearray) -> Struct:
        """Orders of the daemon, and the stage before this one introducing itself."""
        match message:
            case LoadEngine() if link is self._daemon:
                return await self._load(message)
            case Connect() if link is self._daemon:
                return await self._connect(message)
            case JoinRing():
                return self._take_previous(link, message)
        raise RemoteError("unknown", f"a stage does not answer {type(message).__name__}")

    def on_message(self, link: Link, message: Struct, payload: bytearray) -> None:
        """Steps and samples from the stage before this one; anything else is ignored."""
        if isinstance(message, TrustChanged) and link is self._daemon:
            self.on_trust_changed()
            return
        if self._ring is None or link not in self._ring_links:
            log.warning("%s sent %s without being part of the ring", link.peer.name, type(message).__name__)
            return
        match message:
            case Step():
                self._ring.begin(message, payload)
            case Sampled():
                self._ring.on_sampled(message)
            case StepFailed():
                self._ring.on_failed(message)

    def on_stream(self, link: Link, message: Struct, payload: bytearray) -> AsyncIterator[Struct]:
        """A generation, on the first stage."""
        ring, job = self._ring, self._job
        if not isinstance(message, Generate) or ring is None or ring.driver is None or job is None:
            raise RemoteError("not_driver", "this process does not drive an instance")
        if (message.instance, message.epoch) != (job.instance, job.epoch):
            raise RemoteError("stale_epoch", f"this driver serves epoch {job.epoch}, not {message.epoch}")
        return ring.driver.generate(message)

    async def on_closed(self, link: Link, reason: str) -> None:
        """Without its daemon a stage ends; without a neighbour its epoch does."""
        if link is self._daemon:
            self.ended.set()
        elif link in self._ring_links:
            self._ring_links.remove(link)
            await self._break_ring(f"the link with {link.peer.name} ended: {reason}")

    async def _load(self, job: LoadEngine) -> EngineLoaded:
        if self._job is not None:
            raise RemoteError("busy", "this process has its layers already")
        assert self._endpoint is not None
        self._job = job
        loop = asyncio.get_running_loop()
        try:
            engine = await loop.run_in_executor(self._compute, self._load_engine, job, loop)
        except Exception as error:
            log.exception("layers %d to %d could not be loaded", job.start, job.end - 1)
            raise RemoteError("load_failed", f"{type(error).__name__}: {error}") from error
        self._engine = engine
        _settle_memory()
        return EngineLoaded(await self._endpoint.listen(None, 0), engine.weight_bytes)

    def _load_engine(self, job: LoadEngine, loop: asyncio.AbstractEventLoop) -> StageEngine:
        def report(done: int, total: int) -> None:
            asyncio.run_coroutine_threadsafe(self._tell_daemon(EngineProgress(done, total)), loop)

        self._speculation = self._load_speculation(job)
        return self._load_stage(job, report)

    async def _connect(self, order: Connect) -> Connected:
        job, engine = self._job, self._engine
        if job is None or engine is None:
            raise RemoteError("not_loaded", "this process holds no layers yet")
        try:
            self._profile = profile_of(f"stage {job.start}-{job.end - 1}", os.environ.get("SWARMD_PROFILE", ""))
        except OSError as error:
            log.warning("no profile is written to SWARMD_PROFILE: %s", error)
        self._ring = RingStage(
            engine, job.epoch, order.wire_dtype, self._compute, on_broken=self._on_broken, profile=self._profile
        )
        if order.n_stages > 1:
            self._ring.following = await self._dial_next(order)
            await self._ring.following.request(JoinRing(job.instance, job.epoch), timeout=DIAL_SECONDS)
            self._ring_links.append(self._ring.following)
        if engine.first:
            self._start_driver(self._ring, job, order)
        return Connected()

    async def _dial_next(self, order: Connect) -> Link:
        assert self._endpoint is not None
        reason = "the next stage has no address"
        for address in order.next_addresses:
            try:
                return await self._endpoint.dial(
                    address.host, address.port, expect=order.next_node, timeout=DIAL_SECONDS
                )
            except LinkRefused as error:
                reason = error.reason
        raise RemoteError("unreachable", f"the next stage cannot be reached: {reason}")

    def _take_previous(self, link: Link, message: JoinRing) -> Connected:
        job = self._job
        if job is None or (message.instance, message.epoch) != (job.instance, job.epoch):
            raise RemoteError("stale_epoch", "this stage belongs to another epoch")
        self._ring_links.append(link)
        return Connected()

    def _start_driver(self, ring: RingStage, job: LoadEngine, order: Connect) -> None:
        async def run_step(step: PlannedStep) -> None:
            ring.begin(Step(job.epoch, step.step, step.open, step.chunks, step.free, order.wire_dtype), None)

        def make_guesses(guess: Callable[[], list[list[int]]]) -> Awaitable[list[list[int]]]:
            return asyncio.get_running_loop().run_in_executor(self._compute, guess)

        limits = Limits(n_stages=order.n_stages, kv_tokens=job.kv_tokens, context=job.context)
        ring.driver = Driver(job.instance, limits, run_step, self._speculation, make_guesses)
        ring.driver.profile = self._profile
        self._start(ring.driver.run())
        self._start(self._report_load(ring.driver))

    async def _report_load(self, driver: Driver) -> None:
        told = None
        while True:
            if (load := driver.load) != told:
                await self._tell_daemon(EngineLoad(load))
                told = load
            await asyncio.sleep(LOAD_REPORT_SECONDS)

    def _start(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.append(task)
        watch(task, self._on_broken)

    def _on_broken(self, error: BaseException) -> None:
        self._start(self._break_ring(f"{type(error).__name__}: {error}"))

    async def _break_ring(self, reason: str) -> None:
        """This epoch is over: tell the requests, the neighbours (who pass it on by closing too) and the daemon."""
        if self._ring is not None and self._ring.driver is not None:
            self._ring.driver.fail("stage_lost", reason)
        links, self._ring_links = self._ring_links, []
        for link in links:
            await link.close("a neighbour in the ring was lost")
        await self._tell_daemon(EngineTrouble(reason[:400]))

    async def _tell_daemon(self, message: Struct) -> None:
        if self._daemon is not None:
            try:
                await self._daemon.send(message)
            except LinkClosed:
                self.ended.set()


def _settle_memory() -> None:
    """Spare the garbage collector the model and the libraries, which stay for good, and most of its short rounds: what
    a step leaves behind is freed without it.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_ALLOCATIONS, 20, 20)
