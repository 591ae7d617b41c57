"""A stage process: it loads layers for its daemon, and serves one epoch after the other with them."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from msgspec import Struct

from swarmd.node.serving.compute_thread import ComputeThread
from swarmd.node.serving.messages import (
    Connect,
    Connected,
    EngineBeat,
    EngineLoaded,
    EngineProgress,
    Generate,
    JoinRing,
    LoadEngine,
    TrustChanged,
)
from swarmd.node.serving.ring import watch
from swarmd.node.serving.speculation import Speculation
from swarmd.node.serving.stage_epoch import TICK_SECONDS, StageEpoch, StageParts
from swarmd.transport.endpoint import Endpoint
from swarmd.transport.link import Link, LinkClosed, RemoteError
from swarmd.transport.log_limit import LogLimit

if TYPE_CHECKING:
    from swarmd.node.engine.stage_engine import StageEngine

log = logging.getLogger("swarmd.stage")

ReportBytes = Callable[[int, int], None]
LoadStage = Callable[[LoadEngine, ReportBytes], "StageEngine"]
"""Blocking: builds the engine of a job, reporting (bytes done, bytes in all). Raises whatever makes that impossible."""

LoadSpeculation = Callable[[LoadEngine], Speculation | None]
"""Blocking: builds what guesses tokens for a job, None for nothing. Raises whatever makes a draft model impossible."""

# Beats are sent at every second tick.
TICKS_PER_BEAT = 2
# Python's default is 700: several rounds per second while serving, each while a step waits.
GC_ALLOCATIONS = 50_000


class StageProcess:
    """Handler of all links of one stage process. It ends (`ended` is set) when its daemon's link goes down."""

    def __init__(self, load_stage: LoadStage, load_speculation: LoadSpeculation = lambda job: None) -> None:
        self._load_stage = load_stage
        self._load_speculation = load_speculation
        self.ended = asyncio.Event()
        self.on_trust_changed: Callable[[TrustChanged], None] = lambda message: None
        self._endpoint: Endpoint | None = None
        self._daemon: Link | None = None
        self._job: LoadEngine | None = None
        self._port = 0
        self._parts: StageParts | None = None
        self._epoch: StageEpoch | None = None
        self._compute = ComputeThread()
        self._limit = LogLimit()

    async def serve(self, endpoint: Endpoint, daemon_port: int) -> None:
        """Dial the daemon on this machine and work for it until the link ends."""
        self._endpoint = endpoint
        self._daemon = await endpoint.dial("127.0.0.1", daemon_port, expect=endpoint.node_id)
        pulse = asyncio.create_task(self._pulse())
        watch(pulse, lambda error: self.ended.set())
        await self.ended.wait()
        if self._parts is not None and self._parts.profile is not None:
            self._parts.profile.report()

    async def on_link(self, link: Link) -> None:
        """Links are told apart by what they ask for."""

    async def on_request(self, link: Link, message: Struct, payload: bytearray) -> Struct:
        """Orders of the daemon, and the stage before this one introducing itself."""
        match message:
            case LoadEngine() if link is self._daemon:
                return await (self._load(message) if self._job is None else self._renew(message))
            case Connect() if link is self._daemon:
                return await self._connect(message)
            case JoinRing():
                if self._epoch is None:
                    raise RemoteError("stale_epoch", "this stage belongs to no epoch")
                self._epoch.take_previous(link, message)
                return Connected()
        self._log_refusal(link, message, "a stage answers that to its daemon only")
        raise RemoteError("unknown", f"a stage does not answer {type(message).__name__}")

    def on_message(self, link: Link, message: Struct, payload: bytearray) -> None:
        """What the neighbours in the ring say, and what the daemon has to say."""
        if link is self._daemon:
            if isinstance(message, TrustChanged):
                self.on_trust_changed(message)
        elif self._epoch is not None:
            self._epoch.on_message(link, message, payload)

    def on_stream(self, link: Link, message: Struct, payload: bytearray) -> AsyncIterator[Struct]:
        """A generation, on the first stage."""
        try:
            if not isinstance(message, Generate) or self._epoch is None:
                raise RemoteError("not_driver", "this process does not drive an instance")
            return self._epoch.generate(message)
        except RemoteError as error:
            self._log_refusal(link, message, error.message)
            raise

    async def on_closed(self, link: Link, reason: str) -> None:
        """Without its daemon a stage ends; without a neighbour its epoch does."""
        if link is self._daemon:
            self.ended.set()
        elif self._epoch is not None:
            await self._epoch.on_closed(link, reason)

    def _log_refusal(self, link: Link, message: Struct, reason: str) -> None:
        """Once in a while, whoever repeats it."""
        if (held := self._limit.admit(link.peer_id, time.monotonic())) is not None:
            more = f" (and {held} more from it)" if held else ""
            log.info("refused %s of %s: %s%s", type(message).__name__, link.peer.name, reason, more)

    async def _load(self, job: LoadEngine) -> EngineLoaded:
        assert self._endpoint is not None
        self._job = job
        loop = asyncio.get_running_loop()

        def load() -> tuple[Speculation | None, StageEngine]:
            return self._load_speculation(job), self._load_stage(job, report)

        def report(done: int, total: int) -> None:
            asyncio.run_coroutine_threadsafe(self._tell_daemon(EngineProgress(done, total)), loop)

        try:
            speculation, engine = await loop.run_in_executor(self._compute, load)
        except Exception as error:
            log.exception("layers %d to %d could not be loaded", job.start, job.end - 1)
            raise RemoteError("load_failed", f"{type(error).__name__}: {error}") from error
        _settle_memory()
        self._parts = StageParts(self._endpoint, engine, self._compute, speculation, self._tell_daemon)
        self._parts.settled = engine.kernels.startswith("native")
        self._epoch = StageEpoch(job, self._parts)
        self._port = await self._endpoint.listen(None, 0)
        return EngineLoaded(self._port, engine.weight_bytes)

    async def _renew(self, job: LoadEngine) -> EngineLoaded:
        """Serve a later epoch with the layers that are here."""
        parts = self._parts
        if parts is None or self._job is None or not self._job.same_stage(job):
            raise RemoteError("busy", "this process holds other layers")
        if self._epoch is not None:
            epoch, self._epoch = self._epoch, None
            epoch.leave()
        # On that thread a step of the epoch before may still be at work: this comes after it.
        await asyncio.get_running_loop().run_in_executor(self._compute, parts.engine.reset)
        self._job = job
        self._epoch = StageEpoch(job, parts)
        return EngineLoaded(self._port, parts.engine.weight_bytes)

    async def _connect(self, order: Connect) -> Connected:
        if self._epoch is None:
            raise RemoteError("not_loaded", "this process holds no layers yet")
        await self._epoch.connect(order)
        return Connected()

    async def _pulse(self) -> None:
        """Say that this process lives, and see to it that its neighbours do."""
        loop = asyncio.get_running_loop()
        ticks = 0
        while True:
            if ticks % TICKS_PER_BEAT == 0:
                self._beat()
            if self._epoch is not None:
                await self._epoch.check(loop.time())
            await asyncio.sleep(TICK_SECONDS)
            ticks += 1

    def _beat(self) -> None:
        parts = self._parts
        beat = EngineBeat(parts.settled, *parts.engine.held) if parts is not None else EngineBeat(False)
        try:
            if self._daemon is not None:
                self._daemon.send_soon(beat)
        except LinkClosed:
            self.ended.set()
        if self._epoch is not None:
            self._epoch.beat()

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
