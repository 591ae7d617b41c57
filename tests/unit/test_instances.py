"""What an owner counts on each device, and the orders that it gives for a plan with several stages on one node."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from msgspec import Struct

from swarmd.discovery.records import (
    Address,
    DeviceRecord,
    InstanceRecord,
    InstanceState,
    ModelSummary,
    NodeRecord,
    StageRecord,
)
from swarmd.node.cluster.instances import Instances
from swarmd.node.cluster.ledger import View
from swarmd.node.cluster.messages import (
    StageProgress,
    StageStarted,
    StageWired,
    StartStage,
    StopStage,
    TakeStage,
    WireStage,
)
from swarmd.partition.costs import ModelCosts
from swarmd.partition.plan import Promise
from swarmd.transport.link import RemoteError

MB = 1_000_000
A, B = "a" * 64, "b" * 64
MODEL = ModelSummary("tiny", "0" * 64, 90 * MB, 8192, "llama")
OTHER = ModelSummary("other", "1" * 64, 30 * MB, 8192, "llama")
COSTS = ModelCosts((10 * MB,) * 9, 0, 0, 0, 0)


def device(name: str, megabytes: int) -> DeviceRecord:
    kind = name.partition(":")[0]
    return DeviceRecord(name, kind, f"a {kind}", 999 * MB, 999 * MB, megabytes * MB, 1e9, 1e9)


def node(node_id: str, *devices: DeviceRecord, instances: tuple[InstanceRecord, ...] = ()) -> NodeRecord:
    return NodeRecord(node_id, f"node-{node_id[0]}", "1", 1, devices=devices, instances=instances)


class Swarm:
    """The owner A among these nodes; every order is noted and answered."""

    def __init__(self, *nodes: NodeRecord) -> None:
        self.orders: list[tuple[str, Struct]] = []
        self.instances = Instances(A, lambda: View(nodes), self.order, self.changed, wire_dtype="f32", split=False)
        self.ready = asyncio.Event()
        self.lost = asyncio.Event()
        self.stopped = asyncio.Event()
        self.forgotten = False
        self.full: str | None = None

    def changed(self) -> None:
        if any(record.state is InstanceState.READY for record in self.instances.owned):
            self.ready.set()
        elif self.ready.is_set():
            self.lost.set()

    async def order(self, to: str, order: Struct, seconds: float | None) -> Struct:
        self.orders.append((to, order))
        if isinstance(order, TakeStage) and self.forgotten:
            raise RemoteError("stale_epoch", "this node has no such stage")
        if isinstance(order, StartStage) and to == self.full:
            raise RemoteError("refused", "other stages take 90 MB of it")
        if sum(isinstance(order, StopStage) for _, order in self.orders) == 2:
            self.stopped.set()
        if isinstance(order, StartStage):
            self.instances.on_report(to, StageProgress(order.instance, order.epoch, order.index, 5, 10))
            self.instances.on_report(B, StageProgress(order.instance, order.epoch, order.index, 7, 10))
            return StageStarted((Address("192.0.2.1", 7000 + order.index),), 1)
        return StageWired()

    async def run(self) -> InstanceRecord:
        manifest: Any = SimpleNamespace()
        self.instances.own(MODEL, COSTS, [Promise(64, 64)], manifest)
        async with asyncio.timeout(10):
            await self.ready.wait()
        [record] = self.instances.owned
        return record


async def test_each_stage_is_ordered_with_its_device_and_wired_by_its_index():
    swarm = Swarm(node(A, device("cuda:0", 50), device("cpu", 40)))
    record = await swarm.run()
    assert [(s.node, s.device, s.start, s.end) for s in record.stages] == [(A, "cuda:0", 0, 5), (A, "cpu", 5, 9)]
    starts = [order for _, order in swarm.orders if isinstance(order, StartStage)]
    assert [(o.index, o.device, o.start, o.end) for o in starts] == [(0, "cuda:0", 0, 5), (1, "cpu", 5, 9)]
    wires = [order for _, order in swarm.orders if isinstance(order, WireStage)]
    assert [(o.index, o.next_node, o.next_addresses[0].port) for o in wires] == [(0, A, 7001), (1, A, 7000)]
    assert record.explanation[0].startswith("node-a (cuda:0): layers 0 to 4")
    assert (record.done_bytes, record.total_bytes) == (10, 20), "who does not hold a stage has no say"
    await swarm.instances.close()


async def test_what_another_instance_holds_is_taken_from_its_device_alone():
    """The GPU would be the first choice, but not with another model in it."""
    held = StageRecord(A, "cuda:0", 0, 3, 30 * MB)
    other = InstanceRecord("other-1", OTHER, InstanceState.READY, 1, stages=(held,))
    swarm = Swarm(node(A, device("cuda:0", 110), device("cpu", 95)), node(B, instances=(other,)))
    record = await swarm.run()
    assert [(stage.node, stage.device) for stage in record.stages] == [(A, "cpu")]
    await swarm.instances.close()
    free = Swarm(node(A, device("cuda:0", 110), device("cpu", 120)), node(B))
    assert [stage.device for stage in (await free.run()).stages] == ["cuda:0"], "an accelerator before a larger CPU"
    await free.instances.close()


async def test_a_member_that_was_away_is_asked_for_its_stages_and_a_loss_is_acted_on():
    swarm = Swarm(node(A, device("cpu", 50)), node(B, device("cpu", 95)))
    record = await swarm.run()
    assert [stage.node for stage in record.stages] == [B]
    swarm.instances.on_heard_again(A)
    swarm.forgotten = True
    swarm.instances.on_heard_again(B)
    async with asyncio.timeout(10):
        await swarm.lost.wait()
    assert [to for to, order in swarm.orders if isinstance(order, TakeStage)] == [B]
    await swarm.instances.close()


async def test_when_a_node_has_no_room_the_stages_on_the_others_are_ended():
    """Two instances that kept what they have while they wait for each other's room would wait for ever."""
    swarm = Swarm(node(A, device("cpu", 50)), node(B, device("cpu", 45)))
    swarm.full = B
    swarm.instances.own(MODEL, COSTS, [Promise(64, 64)], SimpleNamespace())  # type: ignore[arg-type]
    async with asyncio.timeout(10):
        await swarm.stopped.wait()
    assert [(to, type(order)) for to, order in swarm.orders[2:]] == [(A, StopStage), (B, StopStage)]
    assert swarm.instances.owned[0].state is InstanceState.PLANNING
    await swarm.instances.close()
