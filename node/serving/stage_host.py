"""The daemon's side of its stage processes: start them, give them their layers, wire them, watch them, end them."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from msgspec import Struct

from swarmd.discovery.records import Address, LoadRecord
from swarmd.node.serving.messages import (
    Connect,
    EngineLoad,
    EngineLoaded,
    EngineProgress,
    EngineTrouble,
    LoadEngine,
)
from swarmd.transport.link import Link, LinkClosed, RemoteError

log = logging.getLogger("swarmd.stages")

SPAWN_SECONDS = 60.0
CONNECT_SECONDS = 15.0
EXIT_SECONDS = 2.0
# libgomp's threads spin for milliseconds at every barrier by default. When anything else wants a core, one stage then
# runs at a tenth of its speed or less; a short spin costs some speed on an idle machine and none of that.
SHORT_SPIN = {"GOMP_SPINCOUNT": "1000"}

OnLost = Callable[[LoadEngine, str], None]
OnProgress = Callable[[LoadEngine, int, int], None]


@dataclass
class _Child:
    job: LoadEngine
    process: asyncio.subprocess.Process
    up: asyncio.Future[Link]
    watcher: asyncio.Task[None] | None = None
    load: LoadRecord | None = None
    stopping: bool = False
    troubled: bool = False


class StageHost:
    """All stage processes of this node, at most one per instance.

    `on_lost` hears when one ends or breaks without having been told to; `on_progress` while it loads.
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
    ) -> None:
        self._data_dir = data_dir
        self._name = name
        self._daemon_port = daemon_port
        self._on_lost = on_lost
        self._on_progress = on_progress
        self._on_load = on_load
        self._children: dict[str, _Child] = {}
        self._by_ticket: dict[str, _Child] = {}
        self._by_link: dict[Link, _Child] = {}

    @property
    def loads(self) -> tuple[LoadRecord, ...]:
        """How busy the drivers among the stages are."""
        return tuple(child.load for child in self._children.values() if child.load is not None)

    @property
    def jobs(self) -> tuple[LoadEngine, ...]:
        """What the stages of this node hold."""
        return tuple(child.job for child in self._children.values())

    def job(self, instance: str) -> LoadEngine | None:
        """What the stage of an instance on this node holds."""
        child = self._children.get(instance)
        return child.job if child is not None else None

    async def start(self, job: LoadEngine) -> EngineLoaded:
        """Start a stage process and wait until it holds its layers; an earlier epoch's is ended first.

        Raises RemoteError: `stale_epoch`, `spawn_failed`, or `load_failed` with the engine's own words.
        """
        present = self._children.get(job.instance)
        if present is not None and present.job.epoch > job.epoch:
            raise RemoteError("stale_epoch", f"this node serves epoch {present.job.epoch} already")
        await self.stop(job.instance, job.epoch)
        child = await self._spawn(job)
        try:
            async with asyncio.timeout(SPAWN_SECONDS):
                link = await child.up
            loaded, _ = await link.request(job, timeout=None)
        except TimeoutError:
            await self._end(child)
            raise RemoteError("spawn_failed", f"the stage process did not start in {SPAWN_SECONDS:.0f} s") from None
        except (LinkClosed, RemoteError) as error:
            await self._end(child)
            raise (error if isinstance(error, RemoteError) else RemoteError("spawn_failed", str(error))) from error
        assert isinstance(loaded, EngineLoaded)
        return loaded

    async def connect(
        self, instance: str, epoch: int, n_stages: int, next_node: str, addresses: tuple[Address, ...]
    ) -> None:
        """Have the stage of an instance connect to the next one. Raises RemoteError when that fails."""
        child = self._children.get(instance)
        if child is None or child.job.epoch != epoch or not child.up.done():
            raise RemoteError("stale_epoch", f"this node has no stage of epoch {epoch}")
        try:
            await child.up.result().request(Connect(n_stages, next_node, addresses), timeout=CONNECT_SECONDS)
        except (LinkClosed, TimeoutError) as error:
            raise RemoteError("stage_lost", str(error)) from error

    async def stop(self, instance: str, epoch: int) -> None:
        """End the stage of an instance if it is of this epoch or an earlier one."""
        child = self._children.get(instance)
        if child is not None and child.job.epoch <= epoch:
            await self._end(child)

    async def close(self) -> None:
        """End every stage process."""
        await asyncio.gather(*(self._end(child) for child in list(self._children.values())))

    def on_link(self, link: Link) -> bool:
        """A process with this node's own key presents itself; False when it holds no ticket of ours."""
        child = self._by_ticket.pop(link.peer.note, None)
        if child is None or child.up.done():
            return False
        self._by_link[link] = child
        child.up.set_result(link)
        return True

    async def on_message(self, link: Link, message: Struct) -> None:
        """A report of a stage process."""
        child = self._by_link.get(link)
        if child is None:
            return
        match message:
            case EngineProgress(done_bytes=done, total_bytes=total):
                self._on_progress(child.job, done, total)
            case EngineLoad(load=load):
                child.load = load
                self._on_load()
            case EngineTrouble(reason=reason):
                self._lose(child, reason)

    def on_closed(self, link: Link, reason: str) -> None:
        """The link to a stage process is down; the process's end follows."""
        child = self._by_link.pop(link, None)
        if child is not None:
            self._lose(child, f"the stage process's link ended: {reason}")

    async def _spawn(self, job: LoadEngine) -> _Child:
        ticket = secrets.token_hex(8)
        arguments = [
            *("--data-dir", str(self._data_dir), "--daemon-port", str(self._daemon_port())),
            *("--ticket", ticket, "--name", self._name),
            *("--log-level", logging.getLevelName(logging.getLogger().getEffectiveLevel())),
        ]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # or a folder named swarmd in the working directory would be imported instead
            "-m",
            "swarmd.node.serving.stage_main",
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            env={**SHORT_SPIN, **os.environ},
        )
        child = _Child(job, process, asyncio.get_running_loop().create_future())
        self._children[job.instance] = child
        self._by_ticket[ticket] = child
        child.watcher = asyncio.create_task(self._watch(child, ticket), name=f"stage process {process.pid}")
        log.info("stage process %d starts for layers %d to %d", process.pid, job.start, job.end - 1)
        return child

    async def _watch(self, child: _Child, ticket: str) -> None:
        code = await child.process.wait()
        self._by_ticket.pop(ticket, None)
        words = f"the stage process ended with signal {-code}" if code < 0 else f"the stage process exited ({code})"
        if not child.up.done():
            child.up.set_exception(RemoteError("spawn_failed", words))
            child.up.exception()
        if self._children.get(child.job.instance) is child:
            del self._children[child.job.instance]
        self._lose(child, words)

    def _lose(self, child: _Child, reason: str) -> None:
        if not child.stopping and not child.troubled:
            child.troubled = True
            log.warning("stage of %s, epoch %d: %s", child.job.instance, child.job.epoch, reason)
            self._on_lost(child.job, reason)

    async def _end(self, child: _Child) -> None:
        """Terminate a stage process and wait for it; one that does not listen is killed."""
        child.stopping = True
        if self._children.get(child.job.instance) is child:
            del self._children[child.job.instance]
        if child.process.returncode is None:
            child.process.terminate()
            try:
                async with asyncio.timeout(EXIT_SECONDS):
                    await child.process.wait()
            except TimeoutError:
                child.process.kill()
        if child.watcher is not None:
            await child.watcher
