"""What a member does at an owner's orders: bring the bytes, start the stage, wire it, stop it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from msgspec import Struct

from swarmd.discovery.addresses import advertised
from swarmd.discovery.records import Address
from swarmd.node.cluster.mesh import Mesh
from swarmd.node.cluster.messages import (
    StageLost,
    StageProgress,
    StageStarted,
    StageWired,
    StartStage,
    StopStage,
    WireStage,
)
from swarmd.node.cluster.model_exchange import ModelExchange
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.progress import Progress
from swarmd.node.serving.messages import Connect, Kernels, LoadEngine
from swarmd.node.serving.stage_host import StageHost, StageKey
from swarmd.transport.link import LinkClosed, RemoteError

log = logging.getLogger("swarmd.stages")

# An owner that is lost has a successor long before.
UNOWNED_SECONDS = 30.0


@dataclass(frozen=True, eq=False)
class _Starting:
    """A stage that is being brought up."""

    key: StageKey
    task: asyncio.Task[StageStarted]


class StageOrders:
    """Carries out orders for this node's stages and reports back to whoever gave them.

    `devices` are the ids of what may compute here. Stages of one plan stand side by side, each on its device.

    `deliver` hands a report to its owner: over the link, or directly when this node is the owner itself. The drivers
    among the stages guess tokens ahead if they are to `speculate`; `draft_path` is their draft model, if there is one.
    """

    def __init__(
        self,
        own_id: str,
        mesh: Callable[[], Mesh],
        exchange: ModelExchange,
        *,
        devices: Callable[[], Collection[str]],
        threads: int,
        kernels: Kernels,
        speculate: bool,
        hosts: Callable[[], list[str]],
        deliver: Callable[[str, Struct], None],
    ) -> None:
        self._own_id = own_id
        self._mesh = mesh
        self._exchange = exchange
        self._threads = threads
        self._hosts = hosts
        self._deliver = deliver
        self._devices = devices
        self._starting: list[_Starting] = []
        self._kernels: Kernels = kernels
        self._speculate = speculate
        self.draft_path: Path | None = None
        self._unowned: dict[str, float] = {}
        self.host: StageHost | None = None

    async def carry_out(self, owner: str, order: Struct) -> Struct:
        """Do what `owner` orders. Raises RemoteError with the reason when it cannot be done."""
        match order:
            case StartStage():
                return await self._start(owner, order)
            case WireStage():
                return await self._wire(order)
            case StopStage():
                await self._stop(order.instance, order.epoch)
                return StageWired()
        raise RemoteError("unknown", f"not an order: {type(order).__name__}")

    def on_lost(self, job: LoadEngine, reason: str) -> None:
        """A stage of this node ended by itself."""
        self._deliver(job.owner, StageLost(job.instance, job.epoch, job.index, reason[:1000]))

    def on_progress(self, job: LoadEngine, done: int, total: int) -> None:
        """A stage of this node reads its weights; fetching counts as the first half."""
        self._deliver(job.owner, StageProgress(job.instance, job.epoch, job.index, total + done, 2 * total))

    async def prune(self, claims: Mapping[str, tuple[str, int]]) -> None:
        """End this node's stages that nobody orders any more.

        Their instance has moved on to a later epoch without this node, or, after a split network healed, to another
        owner's plan of the same epoch; or it has had no owner for long. `claims` is the (owner, epoch) that counts per
        instance.
        """
        assert self.host is not None
        now = time.monotonic()
        self._unowned = {job.instance: self._unowned.get(job.instance, now) for job in self.host.jobs}
        for job in self.host.jobs:
            if job.instance in claims:
                self._unowned[job.instance] = now
            if _is_passed(job, claims.get(job.instance)) or now - self._unowned[job.instance] > UNOWNED_SECONDS:
                log.info("stage %d of %s, epoch %d, is no longer wanted", job.index, job.instance, job.epoch)
                await self.host.end(job)

    async def _start(self, owner: str, order: StartStage) -> StageStarted:
        """An order replaces those before it, also while they are still fetching."""
        if order.device not in self._devices():
            has = ", ".join(self._devices())
            raise RemoteError("no_device", f"this node has no device {order.device!r} for layers; it has {has}")
        key = StageKey(order.instance, owner, order.epoch, order.index)
        newest = max((s.key.epoch for s in self._starting if s.key.instance == order.instance), default=0)
        if newest > order.epoch:
            raise RemoteError("stale_epoch", f"this node starts epoch {newest} already")
        for before in self._starting:
            if key.replaces(before.key):
                before.task.cancel()
        starting = _Starting(key, asyncio.create_task(self._bring_up(owner, order)))
        self._starting.append(starting)
        try:
            return await starting.task
        except asyncio.CancelledError:
            if starting.task.cancelled():
                raise RemoteError("stale_epoch", "a later order replaced this one") from None
            starting.task.cancel()
            raise
        finally:
            self._starting.remove(starting)

    async def _bring_up(self, owner: str, order: StartStage) -> StageStarted:
        assert self.host is not None

        def fetched(progress: Progress) -> None:
            done, total = progress.done_bytes, 2 * progress.total_bytes
            self._deliver(owner, StageProgress(order.instance, order.epoch, order.index, done, total))

        try:
            path, sparse = await self._exchange.stage_file(order.model, order.start, order.end, fetched)
        except (ModelFileError, OSError) as error:
            raise RemoteError("fetch_failed", str(error)) from error
        loaded = await self.host.start(
            LoadEngine(
                instance=order.instance,
                epoch=order.epoch,
                model_path=str(path),
                sparse=sparse,
                start=order.start,
                end=order.end,
                kv_tokens=order.kv_tokens,
                context=order.context,
                threads=self._threads,
                kernels=self._kernels,
                speculate=self._speculate and order.start == 0,
                draft_path=str(self.draft_path) if self.draft_path is not None and order.start == 0 else "",
                index=order.index,
                device=order.device,
                owner=owner,
            )
        )
        return StageStarted(advertised(self._hosts(), loaded.port), loaded.weight_bytes)

    async def _wire(self, order: WireStage) -> StageWired:
        assert self.host is not None
        addresses = self._reachable_first(order.next_node, order.next_addresses)
        wiring = Connect(order.n_stages, order.next_node, addresses, order.wire_dtype, order.previous_node or "")
        await self.host.connect(order.instance, order.epoch, order.index, wiring)
        return StageWired()

    async def _stop(self, instance: str, epoch: int) -> None:
        assert self.host is not None
        for starting in self._starting:
            if starting.key.instance == instance and starting.key.epoch <= epoch:
                starting.task.cancel()
        await self.host.stop(instance, epoch)

    def _reachable_first(self, node: str, addresses: tuple[Address, ...]) -> tuple[Address, ...]:
        return reachable_first(self._own_id, self._mesh(), node, addresses)


def _is_passed(job: LoadEngine, claim: tuple[str, int] | None) -> bool:
    """Whether another plan than the one of this job counts: `claim` is the (owner, epoch) that does."""
    if claim is None:
        return False
    owner, epoch = claim
    return job.epoch < epoch or (job.epoch == epoch and job.owner != owner)


def reachable_first(own_id: str, mesh: Mesh, node: str, addresses: tuple[Address, ...]) -> tuple[Address, ...]:
    """The addresses of a process on `node`, the host over which that node is reached at present first."""
    if not addresses:
        return ()
    link = mesh.link_to(node)
    host = "127.0.0.1" if node == own_id else link.remote_address[0] if link is not None and not link.closed else None
    if host is None:
        return addresses
    return (Address(host, addresses[0].port), *(a for a in addresses if a.host != host))


async def deliver_over_link(mesh: Mesh, owner: str, report: Struct) -> None:
    """Send a report to an owner on another node; one that cannot be reached finds out by itself."""
    link = mesh.link_to(owner)
    if link is not None:
        try:
            await link.send(report)
        except LinkClosed:
            log.debug("%s is gone; %s not delivered", owner[:12], type(report).__name__)
