"""The instances of the swarm: those that this node owns, and whose word counts for the others.

A thin pump around the `Ledger`: it tells it what happens, and carries out its actions by orders to members.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence

from msgspec import Struct

from swarmd.discovery.records import Claim, InstanceRecord, InstanceState, ModelSummary, NodeRecord, StageRecord
from swarmd.node.cluster.actions import Action, FetchStages, StartStages, StopStages, TakeStages, WireStages
from swarmd.node.cluster.bring_up import BringUp
from swarmd.node.cluster.ledger import Ledger, Ordered, View
from swarmd.node.cluster.messages import (
    StageFetched,
    StageLost,
    StageProgress,
    StageStarted,
    StartStage,
    StopStage,
    TakeStage,
    WireStage,
)
from swarmd.node.cluster.orders import carries, start_order
from swarmd.node.cluster.ownership import OwnedInstance
from swarmd.node.cluster.wire_choice import LinkEnd, WireWish, link_dtype
from swarmd.node.models.manifest import ModelManifest
from swarmd.partition.costs import ModelCosts
from swarmd.partition.plan import Promise
from swarmd.transport.link import LinkClosed, RemoteError
from swarmd.transport.log_limit import LogLimit

log = logging.getLogger("swarmd.instances")

WIRE_SECONDS = 20.0
STOP_SECONDS = 10.0

Order = Callable[[str, Struct, float | None], Awaitable[Struct]]
"""Have a node carry out an order: (node id, order, seconds or None) -> its answer.

Raises RemoteError, LinkClosed or TimeoutError.
"""


class Instances:
    """What this node owns and knows of instances.

    `view` gives what this node sees of the swarm at present; `changed` is called when something that this node
    publishes has changed.
    """

    def __init__(
        self,
        own_id: str,
        view: Callable[[], View],
        order: Order,
        changed: Callable[[], None],
        *,
        wire_dtype: WireWish,
        split: bool,
    ) -> None:
        self._own_id = own_id
        self._view = view
        self._order = order
        self._changed = changed
        self._wire_dtype: WireWish = wire_dtype
        self._ledger = Ledger(own_id, split=split)
        self._manifests: dict[str, ModelManifest] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._limit = LogLimit()

    @property
    def owned(self) -> tuple[InstanceRecord, ...]:
        """The records of the instances that this node owns."""
        return self._ledger.records

    def all(self) -> list[tuple[str, InstanceRecord]]:
        """Every instance of the swarm with its owner; of rival claims the one that counts."""
        return self._ledger.all(self._view().nodes)

    def claims(self) -> dict[str, Claim]:
        """Whose word counts per instance, also of owners that only other nodes see."""
        return self._ledger.claims(self._view().nodes)

    def follows(self, nodes: Sequence[NodeRecord]) -> tuple[Claim, ...]:
        """What this node tells the others of the owners that it sees."""
        return self._ledger.follows(nodes)

    def own(
        self, model: ModelSummary, costs: ModelCosts, promises: Sequence[Promise], manifest: ModelManifest
    ) -> InstanceRecord:
        """Become the owner of a model's instance. Raises ValueError when this node owns as many as it may."""
        record = self._ledger.own(model, costs, promises)
        self._manifests.setdefault(record.id, manifest)
        self.reconsider()
        return self._ledger.owned[record.id].record if record.id in self._ledger.owned else record

    def take_over(
        self, left: InstanceRecord, costs: ModelCosts, promises: Sequence[Promise], manifest: ModelManifest
    ) -> None:
        """Become the owner of what another node has left, unless somebody did in the meantime."""
        if all(record.id != left.id for record in self.orphans()):
            return
        log.info("this node takes over %s", left.model.name)
        self._manifests[left.id] = manifest
        orders = self._ledger.take_over(left, costs, promises, self._view(), time.monotonic())
        self._changed()
        self._carry_out(orders)
        self.reconsider()

    def reconsider(self) -> None:
        """Act on who is there now; called on every change of the members and every tick."""
        view = self._view()
        self._yield_to_winners(view)
        busy = {load.instance for node in view.nodes for load in node.loads if load.running or load.waiting}
        self._act(lambda: self._ledger.consider(view, time.monotonic(), busy))

    def orphans(self) -> list[InstanceRecord]:
        """The instances that this node is to take over."""
        return self._ledger.orphans(self._view())

    def on_gone(self, node: str) -> None:
        """A member went without a word."""
        self._ledger.on_gone(node, time.monotonic())

    def on_heard_again(self, node: str) -> None:
        """A member was away for a moment: ask for the stages that it should hold, end those that it should not."""
        self._carry_out(self._ledger.on_heard_again(node))
        for instance_id, owned in self._ledger.owned.items():
            if owned.record.state is InstanceState.READY:
                for index, stage in enumerate(owned.record.stages):
                    if stage.node == node:
                        self._spawn(self._take_stage(node, TakeStage(instance_id, owned.epoch, index)))

    def on_report(self, sender: str, report: StageProgress | StageLost) -> None:
        """A member reports on a stage that this node ordered of it; reports on others' stages are refused."""
        owned = self._ledger.owned.get(report.instance)
        if owned is None or not carries(owned, report, sender):
            # What is about an earlier epoch, or instances given up, is late and not wrong.
            if owned is not None and report.epoch >= owned.record.epoch:
                self._log_liar(sender)
            return
        if isinstance(report, StageProgress):
            done, total = report.done_bytes, report.total_bytes
            self._feed(owned, lambda: owned.on_progress(report.epoch, report.index, done, total))
            return
        culprit = sender if report.own_fault else ""
        self._act(
            lambda: self._ledger.on_stage_lost(
                report.instance, report.epoch, report.reason, time.monotonic(), culprit=culprit
            )
        )

    def _log_liar(self, sender: str) -> None:
        if self._limit.admit(sender, time.monotonic()) is not None:
            log.warning("node %s reports on a stage that it does not hold; refused", sender[:12])

    async def close(self) -> None:
        """Stop acting; the members' stages end with their own daemons or their next orders."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _yield_to_winners(self, view: View) -> None:
        for claim in self._ledger.yield_to_winners(view.nodes):
            log.info("node %s owns %s now, epoch %d", claim.owner[:12], claim.model, claim.epoch)
            self._manifests.pop(claim.instance, None)
            self._changed()

    def _act(self, event: Callable[[], Sequence[Ordered]]) -> None:
        """Tell the ledger of an event, publish what that changes and carry out what it orders."""
        before = {record.id: record for record in self._ledger.records}
        orders = event()
        for record in self._ledger.records:
            self._note(before.get(record.id), record)
        self._carry_out(orders)

    def _feed(self, owned: OwnedInstance, event: Callable[[], Sequence[Action] | None]) -> None:
        instance_id = owned.record.id
        self._act(lambda: [Ordered(instance_id, action) for action in event() or ()])

    def _note(self, before: InstanceRecord | None, record: InstanceRecord) -> None:
        if record is before:
            return
        if before is None or (record.state, record.reason) != (before.state, before.reason):
            reason = f": {record.reason}" if record.reason else ""
            log.info("%s, epoch %d, is %s%s", record.model.name, record.epoch, record.state, reason)
        self._changed()

    def _carry_out(self, orders: Sequence[Ordered]) -> None:
        for instance_id, action in orders:
            match action:
                case FetchStages(epoch=epoch, plan=plan):
                    log.info("another plan is prepared: %s", "; ".join(plan.explanation))
                    self._start_all(instance_id, epoch, plan.promise, fetch_only=True, beside=True)
                case StartStages(epoch=epoch, plan=plan, beside=beside):
                    self._start_all(instance_id, epoch, plan.promise, fetch_only=False, beside=beside)
                case WireStages(epoch=epoch, stages=stages):
                    for index in range(len(stages)):
                        self._spawn(self._wire_stage(instance_id, epoch, index, stages))
                case StopStages(epoch=epoch, nodes=nodes, since=since):
                    for node in nodes:
                        self._spawn(self._tell(node, StopStage(instance_id, epoch, since)))
                case TakeStages(epoch=epoch, stages=stages):
                    for index, stage in enumerate(stages):
                        order = TakeStage(instance_id, epoch, index)
                        self._spawn(self._take_stage(stage.node, order))

    def _start_all(self, instance_id: str, epoch: int, promise: Promise, *, fetch_only: bool, beside: bool) -> None:
        build = self._build(instance_id, epoch)
        if build is None:
            return
        for index, stage in enumerate(build.stages):
            key = (instance_id, epoch, index)
            manifest = self._manifests[instance_id]
            order = start_order(key, stage, manifest, promise, fetch_only=fetch_only, beside=beside)
            self._spawn(self._start_stage(stage.node, order))

    def _build(self, instance_id: str, epoch: int) -> BringUp | None:
        owned = self._ledger.owned.get(instance_id)
        return owned.building(epoch) if owned is not None else None

    async def _start_stage(self, node: str, order: StartStage) -> None:
        reply = await self._order_stage(node, order, None, starting=True)
        owned = self._ledger.owned.get(order.instance)
        if owned is None:
            return
        if isinstance(reply, StageStarted):
            self._feed(owned, lambda: owned.on_started(order.epoch, order.index, reply.addresses))
        elif isinstance(reply, StageFetched):
            self._feed(owned, lambda: owned.on_fetched(order.epoch, order.index))

    async def _wire_stage(self, instance_id: str, epoch: int, index: int, stages: tuple[StageRecord, ...]) -> None:
        stage, following = stages[index], stages[(index + 1) % len(stages)]
        dtype = link_dtype(self._wire_dtype, self._link_end(stage), self._link_end(following))
        previous = stages[index - 1].node
        order = WireStage(instance_id, epoch, index, len(stages), following.node, following.addresses, dtype, previous)
        if await self._order_stage(stage.node, order, WIRE_SECONDS) is None:
            return
        owned = self._ledger.owned.get(instance_id)
        if owned is not None:
            self._feed(owned, lambda: owned.on_wired(epoch, index, time.monotonic()))

    def _link_end(self, stage: StageRecord) -> LinkEnd:
        wishes: list[WireWish] = [node.wire_dtype for node in self._view().nodes if node.id == stage.node]
        return LinkEnd(stage.device.partition(":")[0], wishes[0] if wishes else "auto")

    async def _take_stage(self, node: str, order: TakeStage) -> None:
        """A stage that its node does not have is lost; whether its node is, others find out."""
        with contextlib.suppress(LinkClosed, TimeoutError):
            try:
                await self._order(node, order, STOP_SECONDS)
            except RemoteError as error:
                self._lose(order, f"node {node[:12]}: {error.message}")

    async def _tell(self, node: str, order: StopStage) -> None:
        try:
            await self._order(node, order, STOP_SECONDS)
        except (RemoteError, LinkClosed, TimeoutError) as error:
            log.debug("stage on %s not stopped: %s", node[:12], error)

    async def _order_stage(
        self, node: str, order: StartStage | WireStage, seconds: float | None, *, starting: bool = False
    ) -> Struct | None:
        """The answer, or None after the failure was fed back as the loss of the stage."""
        try:
            return await self._order(node, order, seconds)
        except (RemoteError, LinkClosed, TimeoutError) as error:
            code, words = (error.code, error.message) if isinstance(error, RemoteError) else ("", str(error))
            # Who serves a later order is not to blame.
            culprit = node if starting and code != "stale_epoch" else ""
            reason = f"node {node[:12]}: {words}"
            self._lose(order, reason, culprit=culprit, starting=starting, refused=code == "refused")
            return None

    def _lose(
        self,
        order: StartStage | WireStage | TakeStage,
        reason: str,
        *,
        culprit: str = "",
        starting: bool = False,
        refused: bool = False,
    ) -> None:
        lose, now = self._ledger.on_stage_lost, time.monotonic()
        self._act(
            lambda: lose(order.instance, order.epoch, reason, now, culprit=culprit, starting=starting, refused=refused)
        )

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
