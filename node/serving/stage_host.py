"""The daemon's side of its stage processes: start them, give them their layers, wire them, watch them, end them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from swarmd.discovery.records import LoadRecord
from swarmd.node.serving.liveness import Silence
from swarmd.node.serving.messages import (
    Connect,
    EngineBeat,
    EngineLoad,
    EngineLoaded,
    EngineProgress,
    EngineTrouble,
    LoadEngine,
)
from swarmd.node.serving.stage_child import Child, StageKey, StageStatus, can_be_kept, start_process, terminate
from swarmd.node.serving.stage_starts import StageStarts, Started
from swarmd.transport.link import Link, LinkClosed, RemoteError

log = logging.getLogger("swarmd.stages")

SPAWN_SECONDS = 60.0
CONNECT_SECONDS = 15.0
# A step of the epoch before must be over first.
RENEW_SECONDS = 10.0
TICK_SECONDS = 0.25
SILENCE_SECONDS = 2.5
# While layers are loaded, and until compiled kernels are there: both may hold the interpreter's lock for long.
UNSETTLED_SILENCE_SECONDS = 120.0

OnLost = Callable[[LoadEngine, str, bool], None]
"""(its job, the reason, whether the fault is the stage's own and not a neighbour's)."""
OnProgress = Callable[[LoadEngine, int, int], None]


class StageHost:
    """All stage processes of this node: of an instance one per stage that the plan puts here, each on its own device.

    `on_lost` hears when one ends, breaks or hangs without having been told to; `on_progress` while it loads. One that
    hangs is killed. With `keeps_spare` one process waits for the next stage. `clock` gives seconds.
    """

    def __init__(
        self,
        data_dir: Path,
        name: str,
        daemon_port: Callable[[], int],
        *,
        on_lost: OnLost,
        on_progress: OnProgress,
        on_load: Callable[[], None],
        keeps_spare: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_lost = on_lost
        self._on_progress = on_progress
        self._on_load = on_load
        self._children: list[Child] = []  # until their processes have ended
        self._by_link: dict[Link, Child] = {}
        self._clock = clock

        def launch(ticket: str, spare_for: str) -> Awaitable[asyncio.subprocess.Process]:
            return start_process(data_dir, daemon_port(), ticket, name, spare_for)

        self._starts = StageStarts(launch, clock, keeps_spare=keeps_spare)
        self._silence: Silence[Child] = Silence(TICK_SECONDS)
        self._guard: asyncio.Task[None] | None = None

    @property
    def loads(self) -> tuple[LoadRecord, ...]:
        """How busy the drivers among the stages are."""
        return tuple(child.load for child in self._children if child.load is not None and not child.stopping)

    @property
    def jobs(self) -> tuple[LoadEngine, ...]:
        """What the stages of this node hold."""
        return tuple(child.job for child in self._children if not child.stopping)

    @property
    def stages(self) -> tuple[StageStatus, ...]:
        """The stages of this node as they are now."""
        return tuple(StageStatus(c.job, c.process.pid, c.beat) for c in self._children if not c.stopping)

    async def start(self, job: LoadEngine, *, beside: bool = False) -> EngineLoaded:
        """Start a stage process and wait until it holds its layers.

        A process of the instance, of an earlier epoch or another owner, that holds just these layers serves the new
        epoch with what it holds. Otherwise what the job replaces is ended first, for its memory: the instance's stages
        on the same device, of an earlier epoch or of another owner, and an earlier start of the same stage. Those on
        other devices have orders of their own on the way, or are pruned. A stage that is to stand `beside` the others
        ends and keeps nothing. Raises RemoteError: `stale_epoch`,
        `spawn_failed`, or `load_failed` with the engine's own words.
        """
        newest = max((present.epoch for present in self.jobs if present.instance == job.instance), default=0)
        if newest > job.epoch:
            raise RemoteError("stale_epoch", f"this node serves epoch {newest} already")
        key = StageKey.of(job)
        replaced = [child for child in self._children if not beside and key.replaces(StageKey.of(child.job))]
        kept = next((child for child in replaced if can_be_kept(child, job)), None)
        if kept is not None and (renewed := await self._renew(kept, job)) is not None:
            return renewed
        await self._end([c for c in replaced if c.job.device == job.device or c.job.index == job.index])
        child = await self._spawn(job)
        try:
            async with asyncio.timeout(SPAWN_SECONDS):
                link = await child.up
            self._attach(child, link)
            loaded, _ = await link.request(job, timeout=None)
        except TimeoutError:
            await self._end([child])
            raise RemoteError("spawn_failed", f"the stage process did not start in {SPAWN_SECONDS:.0f} s") from None
        except (LinkClosed, RemoteError) as error:
            await self._end([child])
            raise (error if isinstance(error, RemoteError) else RemoteError("spawn_failed", str(error))) from error
        assert isinstance(loaded, EngineLoaded)
        child.loaded = loaded
        self._starts.refill(job.device)
        return loaded

    async def connect(self, instance: str, epoch: int, index: int, wiring: Connect) -> None:
        """Have stage `index` of an instance connect to the next one. Raises RemoteError when that fails."""
        wanted = (instance, epoch, index)
        here = (c for c in self._children if (c.job.instance, c.job.epoch, c.job.index) == wanted and not c.stopping)
        child = next(here, None)
        if child is None or child.loaded is None:
            raise RemoteError("stale_epoch", f"this node has no stage {index} of epoch {epoch}")
        try:
            await child.up.result().request(wiring, timeout=CONNECT_SECONDS)
        except (LinkClosed, TimeoutError) as error:
            raise RemoteError("stage_lost", str(error)) from error

    def take(self, owner: str, instance: str, epoch: int, index: int) -> bool:
        """Stage `index` of an instance belongs to another owner now; False when it is not here."""
        found = False
        for child in self._children:
            if (child.job.instance, child.job.epoch, child.job.index) == (instance, epoch, index):
                found = found or not (child.stopping or child.troubled)
                child.job = replace(child.job, owner=owner)
        return found

    async def stop(self, instance: str, since: int, epoch: int) -> None:
        """End the stages of an instance of the epochs `since` to `epoch`."""
        await self._end([c for c in self._children if c.job.instance == instance and since <= c.job.epoch <= epoch])

    async def end(self, job: LoadEngine) -> None:
        """End the stage that holds this job, if it is still there."""
        await self._end([child for child in self._children if child.job is job])

    async def close(self) -> None:
        """End every stage process."""
        if self._guard is not None:
            self._guard.cancel()
        await asyncio.gather(self._starts.close(), self._end(self._children))

    def tell(self, message: Struct) -> None:
        """A message to every stage process; one whose link is down is missed."""
        self._starts.tell(message)

    def on_link(self, link: Link) -> bool:
        """A process with this node's own key presents itself; False when it holds no ticket of ours."""
        return self._starts.on_link(link)

    async def on_message(self, link: Link, message: Struct) -> None:
        """A report of a stage process."""
        self._starts.on_message(link)
        child = self._by_link.get(link)
        if child is None:
            return
        self._silence.heard(child, self._clock())
        match message:
            case EngineBeat(settled=settled):
                child.beat = message
                self._silence.allow(child, SILENCE_SECONDS if settled else UNSETTLED_SILENCE_SECONDS)
            case EngineProgress(done_bytes=done, total_bytes=total):
                self._on_progress(child.job, done, total)
            case EngineLoad(load=load):
                child.load = load
                self._on_load()
            case EngineTrouble(reason=reason, sound=sound):
                child.sick |= not sound
                self._lose(child, reason)

    def on_closed(self, link: Link, reason: str) -> None:
        """The link to a stage process is down; the process's end follows."""
        self._starts.on_closed(link)
        child = self._by_link.pop(link, None)
        if child is not None:
            child.sick = True
            self._lose(child, f"the stage process's link ended: {reason}")

    def check(self, now: float) -> None:
        """Kill the stage processes that hang, and report them. Called every TICK_SECONDS."""
        for child, silent in self._silence.overdue(now):
            self._silence.forget(child)
            child.sick = True
            self._lose(child, f"the stage process has said nothing for {silent:.1f} s and was killed")
            if child.process.returncode is None:
                child.process.kill()

    async def _renew(self, child: Child, job: LoadEngine) -> EngineLoaded | None:
        """Have a stage process serve the epoch of a job; None, and it is ended, when it does not."""
        # It belongs to the new epoch from here on, so that other orders of that do not end it.
        child.job, child.load, child.troubled = job, None, True
        try:
            loaded, _ = await child.up.result().request(job, timeout=RENEW_SECONDS)
        except (LinkClosed, RemoteError, TimeoutError) as error:
            log.warning("stage process %d cannot be kept: %s", child.process.pid, error)
            await self._end([child])
            return None
        assert isinstance(loaded, EngineLoaded)
        if child.job is not job:
            raise RemoteError("stale_epoch", "a later order replaced this one")
        child.loaded, child.troubled = loaded, False
        log.info("stage process %d keeps its layers for epoch %d", child.process.pid, job.epoch)
        return loaded

    async def _spawn(self, job: LoadEngine) -> Child:
        started = await self._starts.take()
        process = started.process
        child = Child(job, process, started.up)
        self._children.append(child)
        if self._guard is None or self._guard.done():
            self._guard = asyncio.create_task(self._watch_over(), name="guard of the stage processes")
        child.watcher = asyncio.create_task(self._watch(child, started), name=f"stage process {process.pid}")
        log.info("stage process %d starts for layers %d to %d on %s", process.pid, job.start, job.end - 1, job.device)
        return child

    def _attach(self, child: Child, link: Link) -> None:
        """What comes by this link is the stage's."""
        self._by_link[link] = child
        self._silence.watch(child, self._clock(), UNSETTLED_SILENCE_SECONDS)

    async def _watch(self, child: Child, started: Started) -> None:
        code = await child.process.wait()
        words = f"the stage process ended with signal {-code}" if code < 0 else f"the stage process exited ({code})"
        self._starts.forget(started, words)
        self._children.remove(child)
        self._silence.forget(child)
        child.sick = True
        self._lose(child, words)

    async def _watch_over(self) -> None:
        while self._children:
            self.check(self._clock())
            await asyncio.sleep(TICK_SECONDS)

    def _lose(self, child: Child, reason: str) -> None:
        if not child.stopping and not child.troubled:
            child.troubled = True
            job = child.job
            log.warning("stage %d of %s, epoch %d: %s", job.index, job.instance, job.epoch, reason)
            self._on_lost(child.job, reason, child.sick)

    async def _end(self, children: Iterable[Child]) -> None:
        """Terminate stage processes and wait until they are gone, also those that end already; one that does not listen
        is killed.
        """
        ending = list(children)
        for child in ending:
            child.stopping = True
        await asyncio.gather(*map(terminate, ending))
