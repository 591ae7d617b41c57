"""The instances of the swarm: those that this node owns, and whose word counts for the others.

A thin pump around `OwnedInstance`: it gathers capacities, carries out actions by orders to members, and feeds back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence

from msgspec import Struct

from swarmd.discovery.records import InstanceRecord, InstanceState, ModelSummary, NodeRecord, StageRecord
from swarmd.node.cluster.messages import (
    StageLost,
    StageProgress,
    StageStarted,
    StartStage,
    StopStage,
    WireStage,
)
from swarmd.node.cluster.ownership import (
    Action,
    OwnedInstance,
    StartStages,
    StopStages,
    WireStages,
    successor,
    winner,
)
from swarmd.node.cluster.wire_choice import LinkEnd, WireWish, link_dtype
from swarmd.node.models.manifest import ModelManifest
from swarmd.partition.costs import ModelCosts
from swarmd.partition.plan import Capacity, Promise
from swarmd.transport.link import LinkClosed, RemoteError

log = logging.getLogger("swarmd.instances")

WIRE_SECONDS = 20.0
STOP_SECONDS = 10.0
MAX_INSTANCES = 16
ACCELERATORS = frozenset({"cuda", "metal"})

Order = Callable[[str, Struct, float | None], Awaitable[Struct]]
"""Have a node carry out an order: (node id, order, seconds or None) -> its answer.

Raises RemoteError, LinkClosed or TimeoutError.
"""


class Instances:
    """What this node owns and knows of instances.

    `nodes` gives the records of all nodes that are alive, this one first; `changed` is called when something that this
    node publishes has changed.
    """

    def __init__(
        self,
        own_id: str,
        nodes: Callable[[], list[NodeRecord]],
        order: Order,
        changed: Callable[[], None],
        *,
        wire_dtype: WireWish,
        split: bool,
    ) -> None:
        self._own_id = own_id
        self._nodes = nodes
        self._order = order
        self._changed = changed
        self._wire_dtype: WireWish = wire_dtype
        self._split = split
        self._owned: dict[str, OwnedInstance] = {}
        self._manifests: dict[str, ModelManifest] = {}
        self._highest: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def owned(self) -> tuple[InstanceRecord, ...]:
        """The records of the instances that this node owns."""
        return tuple(instance.record for instance in self._owned.values())

    def all(self) -> list[tuple[str, InstanceRecord]]:
        """Every instance of the swarm with its owner; of rival claims the one that counts."""
        claims: dict[str, list[tuple[str, InstanceRecord]]] = {}
        for record in self.owned:
            claims.setdefault(record.id, []).append((self._own_id, record))
        for node in self._nodes():
            if node.id != self._own_id:
                for record in node.instances:
                    claims.setdefault(record.id, []).append((node.id, record))
        return [winner(rivals) for rivals in claims.values()]

    def own(
        self, model: ModelSummary, costs: ModelCosts, promises: Sequence[Promise], manifest: ModelManifest
    ) -> InstanceRecord:
        """Become the owner of a model's instance. Raises ValueError when this node owns as many as it may."""
        instance_id = model.sha256[:16]
        if instance_id not in self._owned:
            if len(self._owned) >= MAX_INSTANCES:
                raise ValueError(f"this node owns {MAX_INSTANCES} instances already")
            epoch = self._highest.get(instance_id, 0)
            self._owned[instance_id] = OwnedInstance(
                instance_id, model, costs, promises, epoch=epoch, split=self._split
            )
            self._manifests[instance_id] = manifest
            self.reconsider()
        return self._owned[instance_id].record

    def reconsider(self) -> None:
        """Act on who is there now; called on every change of the members and every tick."""
        now = time.monotonic()
        self._note_epochs()
        self._yield_to_winners()
        busy = {load.instance for node in self._nodes() for load in node.loads if load.running or load.waiting}
        for instance_id, instance in list(self._owned.items()):
            before = instance.record
            actions = instance.consider(self._capacities(instance_id), now, idle=instance_id not in busy)
            self._after(instance_id, before, actions)

    def orphans(self, gone: NodeRecord) -> list[InstanceRecord]:
        """The instances of a node that is gone which this node is to take over."""
        alive = self._nodes()
        claimed = {record.id for _, record in self.all()}
        mine = []
        for record in gone.instances:
            holders = [n.id for n in alive if any(m.sha256 == record.model.sha256 for m in n.models)]
            heir = successor(record, [node.id for node in alive], holders)
            if record.id not in claimed and heir == self._own_id:
                mine.append(record)
        return mine

    def on_report(self, sender: str, report: StageProgress | StageLost) -> None:
        """A member reports on a stage that this node ordered of it; reports on others' stages are ignored."""
        instance = self._owned.get(report.instance)
        stages = instance.record.stages if instance is not None else ()
        if instance is None or report.index >= len(stages) or stages[report.index].node != sender:
            return
        before, actions = instance.record, []
        if isinstance(report, StageProgress):
            instance.on_progress(report.epoch, report.index, report.done_bytes, report.total_bytes)
        else:
            actions = instance.on_stage_lost(report.epoch, report.reason, time.monotonic())
        self._after(report.instance, before, actions)

    async def close(self) -> None:
        """Stop acting; the members' stages end with their own daemons or their next orders."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _note_epochs(self) -> None:
        for _, record in self.all():
            self._highest[record.id] = max(self._highest.get(record.id, 0), record.epoch)
        while len(self._highest) > 8 * MAX_INSTANCES:
            del self._highest[next(iter(self._highest))]

    def _yield_to_winners(self) -> None:
        """Who holds the lower claim lets go without touching the stages: the winner's orders replace them."""
        for owner, record in self.all():
            if owner != self._own_id and self._owned.pop(record.id, None) is not None:
                log.info("node %s owns %s now, epoch %d", owner[:12], record.model.name, record.epoch)
                del self._manifests[record.id]
                self._changed()

    def _capacities(self, instance_id: str) -> list[Capacity]:
        """Every device, less what the stages of other instances take there."""
        used: dict[tuple[str, str], int] = {}
        for _, record in self.all():
            if record.id != instance_id:
                for stage in record.stages:
                    used[stage.node, stage.device] = used.get((stage.node, stage.device), 0) + stage.bytes
        return [
            Capacity(
                node.id,
                device.id,
                max(0, device.memory_limit - used.get((node.id, device.id), 0)),
                node.name if len(node.devices) == 1 else f"{node.name} ({device.id})",
                bandwidth=device.memory_bandwidth,
                accelerator=device.kind in ACCELERATORS,
            )
            for node in self._nodes()
            if not node.leaving
            for device in node.devices
        ]

    def _after(self, instance_id: str, before: InstanceRecord, actions: Sequence[Action]) -> None:
        record = self._owned[instance_id].record
        if record is not before:
            if (record.state, record.reason) != (before.state, before.reason):
                reason = f": {record.reason}" if record.reason else ""
                log.info("%s, epoch %d, is %s%s", record.model.name, record.epoch, record.state, reason)
            self._changed()
        for action in actions:
            self._spawn(self._execute(instance_id, action))

    async def _execute(self, instance_id: str, action: Action) -> None:
        match action:
            case StartStages(epoch=epoch, plan=plan):
                for index in range(len(plan.stages)):
                    self._spawn(self._start_stage(instance_id, epoch, index, plan.promise))
            case WireStages(epoch=epoch, stages=stages):
                for index in range(len(stages)):
                    self._spawn(self._wire_stage(instance_id, epoch, index, stages))
            case StopStages(epoch=epoch, nodes=nodes):
                for node in nodes:
                    self._spawn(self._stop_stage(instance_id, epoch, node))

    async def _start_stage(self, instance_id: str, epoch: int, index: int, promise: Promise) -> None:
        instance = self._owned.get(instance_id)
        if instance is None or instance.epoch != epoch or instance.record.state is not InstanceState.LOADING:
            return
        stage = instance.record.stages[index]
        order = StartStage(
            instance=instance_id,
            epoch=epoch,
            index=index,
            model=self._manifests[instance_id],
            device=stage.device,
            start=stage.start,
            end=stage.end,
            kv_tokens=promise.kv_tokens,
            context=promise.context,
        )
        reply = await self._order_stage(instance_id, epoch, stage.node, order, None)
        if isinstance(reply, StageStarted):
            self._feed(instance_id, lambda owned: owned.on_started(epoch, index, reply.addresses))

    async def _wire_stage(self, instance_id: str, epoch: int, index: int, stages: tuple[StageRecord, ...]) -> None:
        stage, following = stages[index], stages[(index + 1) % len(stages)]
        dtype = link_dtype(self._wire_dtype, self._link_end(stage), self._link_end(following))
        previous = stages[index - 1].node
        order = WireStage(instance_id, epoch, index, len(stages), following.node, following.addresses, dtype, previous)
        if await self._order_stage(instance_id, epoch, stage.node, order, WIRE_SECONDS) is not None:
            self._feed(instance_id, lambda owned: owned.on_wired(epoch, index))

    def _link_end(self, stage: StageRecord) -> LinkEnd:
        wishes: list[WireWish] = [node.wire_dtype for node in self._nodes() if node.id == stage.node]
        return LinkEnd(stage.device.partition(":")[0], wishes[0] if wishes else "auto")

    async def _stop_stage(self, instance_id: str, epoch: int, node: str) -> None:
        try:
            await self._order(node, StopStage(instance_id, epoch), STOP_SECONDS)
        except (RemoteError, LinkClosed, TimeoutError) as error:
            log.debug("stage on %s not stopped: %s", node[:12], error)

    async def _order_stage(
        self, instance_id: str, epoch: int, node: str, order: Struct, seconds: float | None
    ) -> Struct | None:
        """The answer, or None after the failure was fed back as the loss of the stage."""
        try:
            return await self._order(node, order, seconds)
        except (RemoteError, LinkClosed, TimeoutError) as error:
            reason = error.message if isinstance(error, RemoteError) else str(error)
            self._feed(
                instance_id,
                lambda owned: owned.on_stage_lost(epoch, f"node {node[:12]}: {reason}", time.monotonic()),
            )
            return None

    def _feed(self, instance_id: str, event: Callable[[OwnedInstance], Sequence[Action]]) -> None:
        instance = self._owned.get(instance_id)
        if instance is not None:
            before = instance.record
            self._after(instance_id, before, event(instance))

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
