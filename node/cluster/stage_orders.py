"""What a member does at an owner's orders: bring the bytes, start the stage, wire it, stop it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from msgspec import Struct

from swarmd.discovery.addresses import advertised
from swarmd.discovery.records import Address, Claim
from swarmd.node.cluster.admission import Admission
from swarmd.node.cluster.mesh import Mesh
from swarmd.node.cluster.messages import (
    StageFetched,
    StageLost,
    StageProgress,
    StageStarted,
    StageWired,
    StartStage,
    StopStage,
    TakeStage,
    WireStage,
)
from swarmd.node.cluster.model_exchange import ModelExchange
from swarmd.node.cluster.order_limits import OrderRefusedError
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.progress import Progress
from swarmd.node.models.wheel_source import ModelSourceError
from swarmd.node.serving.messages import Connect, Kernels, LoadEngine
from swarmd.node.serving.stage_host import StageHost, StageKey
from swarmd.transport.link import LinkClosed, RemoteError

log = logging.getLogger("swarmd.stages")

# An owner that is lost has a successor long before.
UNOWNED_SECONDS = 30.0
# An owner that takes over, or plans anew, tells the stages that it keeps at once.
UNTAKEN_SECONDS = 5.0
MAX_LOST = 32


@dataclass(frozen=True, eq=False)
class _Starting:
    """A stage that is being brought up."""

    key: StageKey
    task: asyncio.Task[StageStarted | StageFetched]


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
        self._wanted: dict[LoadEngine, float] = {}
        self._lost: list[StageLost] = []
        self.host: StageHost | None = None
        self.admission: Admission | None = None

    async def carry_out(self, owner: str, order: Struct) -> Struct:
        """Do what `owner` orders. Raises RemoteError with the reason when it cannot be done."""
        match order:
            case StartStage():
                return await self._start(owner, order)
            case WireStage():
                return await self._wire(order)
            case StopStage():
                await self._stop(order)
                return StageWired()
            case TakeStage():
                return self._take(owner, order)
        raise RemoteError("unknown", f"not an order: {type(order).__name__}")

    def on_lost(self, job: LoadEngine, reason: str, own_fault: bool) -> None:
        """A stage of this node ended by itself, or by the fault of a neighbour."""
        report = StageLost(job.instance, job.epoch, job.index, reason[:1000], own_fault)
        self._lost = [*self._lost[1 - MAX_LOST :], report]
        self._deliver(job.owner, report)

    def on_progress(self, job: LoadEngine, done: int, total: int) -> None:
        """A stage of this node reads its weights; fetching counts as the first half."""
        self._deliver(job.owner, StageProgress(job.instance, job.epoch, job.index, total + done, 2 * total))

    async def prune(self, claims: Mapping[str, Claim], now: float) -> None:
        """End this node's stages that nobody orders any more, and report again the losses that nobody acted on.

        Their instance has moved on to a later epoch without this node, or has another owner who did not take them; or
        it has had no owner for long. `claims` are those that count, by instance; `now` is in seconds.
        """
        assert self.host is not None
        jobs = self.host.jobs
        self._wanted = {job: self._wanted.get(job, now) for job in jobs}
        # Whoever owned the stage may have been away when it was lost, or is another one now.
        self._lost = [lost for lost in self._lost if _counts(lost, claims.get(lost.instance))]
        for lost in self._lost:
            self._deliver(claims[lost.instance].owner, lost)
        for job in jobs:
            claim = claims.get(job.instance)
            if claim is not None and claim.owner == job.owner and claim.epoch <= job.epoch:
                self._wanted[job] = now
            if now - self._wanted[job] > (UNOWNED_SECONDS if claim is None else UNTAKEN_SECONDS):
                log.info("stage %d of %s, epoch %d, is no longer wanted", job.index, job.instance, job.epoch)
                await self.host.end(job)

    async def _start(self, owner: str, order: StartStage) -> StageStarted | StageFetched:
        """An order replaces those before it, also while they are still fetching."""
        if order.device not in self._devices():
            has = ", ".join(self._devices())
            raise RemoteError("no_device", f"this node has no device {order.device!r} for layers; it has {has}")
        key = StageKey(order.instance, owner, order.epoch, order.index)
        newest = max((s.key.epoch for s in self._starting if s.key.instance == order.instance), default=0)
        if newest > order.epoch:
            raise RemoteError("stale_epoch", f"this node starts epoch {newest} already")
        if not order.beside:
            self._cancel(before for before in self._starting if key.replaces(before.key))
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

    def _cancel(self, starting: Iterable[_Starting]) -> None:
        for one in starting:
            one.task.cancel()

    async def _bring_up(self, owner: str, order: StartStage) -> StageStarted | StageFetched:
        assert self.host is not None

        def fetched(progress: Progress) -> None:
            done, total = progress.done_bytes, 2 * progress.total_bytes
            self._deliver(owner, StageProgress(order.instance, order.epoch, order.index, done, total))

        try:
            if self.admission is not None:
                key = StageKey(order.instance, owner, order.epoch, order.index)
                await self.admission.check(key, order, self._present, fetched)
            path, sparse = await self._exchange.stage_file(order.model, order.start, order.end, fetched)
        except OrderRefusedError as error:
            log.warning("an order of %s is refused: %s", owner[:12], error)
            raise RemoteError("refused", str(error)) from error
        except (ModelFileError, ModelSourceError, OSError) as error:
            raise RemoteError("fetch_failed", str(error)) from error
        if order.fetch_only:
            return StageFetched()
        loaded = await self.host.start(self._job(owner, order, path, sparse), beside=order.beside)
        return StageStarted(advertised(self._hosts(), loaded.port), loaded.weight_bytes)

    def _job(self, owner: str, order: StartStage, path: Path, sparse: bool) -> LoadEngine:
        first = order.start == 0
        return LoadEngine(
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
            speculate=self._speculate and first,
            draft_path=str(self.draft_path) if self.draft_path is not None and first else "",
            index=order.index,
            device=order.device,
            owner=owner,
        )

    def _take(self, owner: str, order: TakeStage) -> StageWired:
        assert self.host is not None
        if not self.host.take(owner, order.instance, order.epoch, order.index):
            raise RemoteError("stale_epoch", f"this node has no stage {order.index} of epoch {order.epoch}")
        return StageWired()

    def _present(self) -> set[StageKey]:
        assert self.host is not None
        return {starting.key for starting in self._starting} | set(map(StageKey.of, self.host.jobs))

    async def _wire(self, order: WireStage) -> StageWired:
        assert self.host is not None
        addresses = self._reachable_first(order.next_node, order.next_addresses)
        wiring = Connect(order.n_stages, order.next_node, addresses, order.wire_dtype, order.previous_node or "")
        await self.host.connect(order.instance, order.epoch, order.index, wiring)
        return StageWired()

    async def _stop(self, order: StopStage) -> None:
        assert self.host is not None
        self._cancel(
            one
            for one in self._starting
            if one.key.instance == order.instance and order.since <= one.key.epoch <= order.epoch
        )
        await self.host.stop(order.instance, order.since, order.epoch)

    def _reachable_first(self, node: str, addresses: tuple[Address, ...]) -> tuple[Address, ...]:
        return reachable_first(self._own_id, self._mesh(), node, addresses)


def _counts(lost: StageLost, claim: Claim | None) -> bool:
    return claim is not None and claim.epoch == lost.epoch


def reachable_first(own_id: str, mesh: Mesh, node: str, addresses: tuple[Address, ...]) -> tuple[Address, ...]:
    """The addresses of a process on `node`, the host over which that node is reached at present first."""
    if not addresses:
        return ()
    link = mesh.link_to(node)
    host = "127.0.0.1" if node == own_id else link.remote_address[0] if link is not None and not link.closed else None
    if host is None:
        return addresses
    return (Address(host, addresses[0].port), *(a for a in addresses if a.host != host))


async def order_over_link(mesh: Mesh, node: str, order: Struct, seconds: float | None) -> Struct:
    """What a node on the network answers to an order. Raises LinkClosed, RemoteError, TimeoutError."""
    link = mesh.link_to(node)
    if link is None:
        raise LinkClosed("no link with that node at present")
    reply, _ = await link.request(order, timeout=seconds)
    return reply


async def deliver_over_link(mesh: Mesh, owner: str, report: Struct) -> None:
    """Send a report to an owner on another node; one that cannot be reached finds out by itself."""
    link = mesh.link_to(owner)
    if link is not None:
        try:
            await link.send(report)
        except LinkClosed:
            log.debug("%s is gone; %s not delivered", owner[:12], type(report).__name__)
