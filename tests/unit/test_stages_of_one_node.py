"""Several stages of one instance on one node: orders, reports and ends of each, with processes that are fakes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec import Struct
from support.fake_stages import FakeStages

from swarmd.discovery.records import Address, Claim
from swarmd.node.cluster.messages import (
    StageLost,
    StageProgress,
    StageStarted,
    StageWired,
    StartStage,
    StopStage,
    TakeStage,
    WireStage,
)
from swarmd.node.cluster.stage_orders import UNOWNED_SECONDS, UNTAKEN_SECONDS, StageOrders
from swarmd.node.models.manifest import ModelManifest
from swarmd.node.models.progress import Progress
from swarmd.node.serving import stage_child, stage_host
from swarmd.node.serving.messages import EngineBeat, EngineProgress, EngineTrouble
from swarmd.node.serving.stage_host import StageHost
from swarmd.transport.link import RemoteError

OWN, OWNER, RIVAL = "a" * 64, "b" * 64, "c" * 64
HERE = "192.0.2.1"


class FakeExchange:
    """Has every file at once."""

    async def stage_file(
        self, manifest: ModelManifest, start: int, end: int, progress: Callable[[Progress], None]
    ) -> tuple[Path, bool]:
        progress(Progress(manifest.name, 10 * (end - start), 10 * (end - start), "peer"))
        return Path("/model.gguf"), False


class OneNode:
    """A node with two devices: real orders and a real host around stages that are fakes."""

    def __init__(self, stages: FakeStages) -> None:
        self.stages = stages
        self.told: list[tuple[str, Struct]] = []
        self.now = 0.0
        mesh: Any = SimpleNamespace(link_to=lambda node: None)
        exchange: Any = FakeExchange()
        self.orders = StageOrders(
            OWN,
            lambda: mesh,
            exchange,
            devices=lambda: ("cuda:0", "cpu"),
            threads=1,
            kernels="auto",
            speculate=True,
            hosts=lambda: [HERE],
            deliver=lambda owner, report: self.told.append((owner, report)),
        )
        self.host = StageHost(
            Path("/nowhere"),
            "node",
            lambda: 1,
            on_lost=self.orders.on_lost,
            on_progress=self.orders.on_progress,
            on_load=lambda: None,
            clock=lambda: self.now,
        )
        self.orders.host = stages.host = self.host

    async def start(
        self,
        index: int,
        *,
        epoch: int = 1,
        owner: str = OWNER,
        instance: str = "i",
        kv_tokens: int = 64,
        beside: bool = False,
    ) -> StageStarted:
        manifest: Any = SimpleNamespace(name="tiny")
        device = ("cuda:0", "cpu", "cuda:7")[index]
        order = StartStage(instance, epoch, index, manifest, device, 3 * index, 3 * index + 3, kv_tokens, 64, beside)
        started = await self.orders.carry_out(owner, order)
        assert isinstance(started, StageStarted)
        return started

    async def both(self, **options: Any) -> list[StageStarted]:
        return list(await asyncio.gather(*(self.start(index, **options) for index in (0, 1))))

    def running(self) -> list[tuple[int, int, str]]:
        jobs = [stage.job for stage in self.stages.running if stage.job is not None]
        return sorted((job.epoch, job.index, job.device) for job in jobs)

    def losses(self) -> list[tuple[str, int, int]]:
        return [(owner, m.epoch, m.index) for owner, m in self.told if isinstance(m, StageLost)]


@pytest.fixture
async def node(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[OneNode]:
    stages = FakeStages()
    stages.install(monkeypatch)
    node = OneNode(stages)
    yield node
    await node.host.close()
    assert stages.running == []


async def turns() -> None:
    """Let what is due happen."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_each_stage_has_its_process_its_device_and_its_layers(node: OneNode):
    started = await node.both()
    assert node.running() == [(1, 0, "cuda:0"), (1, 1, "cpu")]
    assert len({answer.addresses[0].port for answer in started}) == 2
    jobs = node.host.jobs
    assert [(job.start, job.end, job.speculate) for job in jobs] == [(0, 3, True), (3, 6, False)]


async def test_each_is_wired_by_its_index_and_reaches_the_other_over_loopback(node: OneNode):
    first, second = await node.both()
    for index, following in ((0, second), (1, first)):
        await node.orders.carry_out(OWNER, WireStage("i", 1, index, 2, OWN, following.addresses, "f32"))
    wired = {stage.job.index: stage.next for stage in node.stages.running if stage.job is not None}
    for index, following in ((0, second), (1, first)):
        assert wired[index] == (Address("127.0.0.1", following.addresses[0].port), *following.addresses)
    with pytest.raises(RemoteError, match="no stage 2 of epoch 1"):
        await node.orders.carry_out(OWNER, WireStage("i", 1, 2, 2, OWN, first.addresses, "f32"))


async def test_a_device_that_is_not_here_is_refused_in_words(node: OneNode):
    with pytest.raises(RemoteError, match=r"no device 'cuda:7' for layers; it has cuda:0, cpu"):
        await node.start(2)
    assert node.stages.all == []


async def test_progress_and_loss_are_told_of_the_right_stage(node: OneNode):
    await node.both()
    node.told.clear()
    link: Any = node.stages.all[1]
    await node.host.on_message(link, EngineProgress(5, 10))
    assert node.told == [(OWNER, StageProgress("i", 1, 1, 15, 20))]
    node.stages.all[0].end(1)
    await turns()
    assert node.losses() == [(OWNER, 1, 0)]
    assert node.running() == [(1, 1, "cpu")], "the owner ends the other one"
    await node.host.on_message(link, EngineTrouble("its neighbour is gone"))
    assert node.losses() == [(OWNER, 1, 0), (OWNER, 1, 1)]


async def test_one_order_ends_all_stages_of_the_epoch(node: OneNode):
    await node.both()
    await node.both(instance="j")
    await node.orders.carry_out(OWNER, StopStage("i", 1))
    assert [job.instance for job in node.host.jobs] == ["j", "j"]
    assert node.losses() == [], "who is told to end is not lost"


async def test_a_later_plan_ends_the_stage_on_a_device_before_it_starts_its_own(node: OneNode):
    await node.both()
    await node.start(1, epoch=2, kv_tokens=128)
    assert node.running() == [(1, 0, "cuda:0"), (2, 1, "cpu")], "the order for the other may be on its way"
    await node.orders.prune(claimed(OWNER, 2), 0.0)
    await node.orders.prune(claimed(OWNER, 2), 0.1 + UNTAKEN_SECONDS)
    assert node.running() == [(2, 1, "cpu")], "or there is none"
    with pytest.raises(RemoteError, match="serves epoch 2 already"):
        await node.start(0, epoch=1)


async def test_a_stage_waits_for_the_one_before_it_on_its_device_to_be_gone(
    node: OneNode, monkeypatch: pytest.MonkeyPatch
):
    """Or there would be too little memory for it."""
    monkeypatch.setattr(stage_child, "EXIT_SECONDS", 60.0)
    await node.both()
    old = node.stages.all[0]
    old.deaf = True
    starting = asyncio.ensure_future(node.both(epoch=2, kv_tokens=128))
    await turns()
    assert node.running() == [(1, 0, "cuda:0"), (2, 1, "cpu")]
    old.kill()
    await starting
    assert node.running() == [(2, 0, "cuda:0"), (2, 1, "cpu")]


async def test_stages_that_hold_what_a_later_plan_asks_for_are_kept(node: OneNode):
    before = await node.both()
    pids = [stage.pid for stage in node.stages.running]
    after = await node.both(epoch=2)
    assert [stage.pid for stage in node.stages.running] == pids
    assert node.running() == [(2, 0, "cuda:0"), (2, 1, "cpu")]
    assert [stage.addresses for stage in after] == [stage.addresses for stage in before]
    assert {(job.epoch, job.index) for job in node.host.jobs} == {(2, 0), (2, 1)}
    node.stages.running[0].end(1)
    await turns()
    assert node.losses() == [(OWNER, 2, 0)], "losses are of the epoch that it belongs to"


async def test_a_plan_that_keeps_one_stage_and_has_no_use_for_the_other(node: OneNode):
    await node.both()
    kept = node.stages.running[1]
    await node.start(1, epoch=2, owner=RIVAL)
    await node.orders.prune(claimed(RIVAL, 2), 0.0)
    await node.orders.prune(claimed(RIVAL, 2), 0.1 + UNTAKEN_SECONDS)
    assert node.stages.running == [kept]


async def test_a_stage_that_lost_a_neighbour_is_kept_and_one_that_is_not_sound_is_not(node: OneNode):
    await node.both()
    first, second = node.stages.running
    for stage, sound in ((first, True), (second, False)):
        link: Any = stage
        await node.host.on_message(link, EngineTrouble("it broke", sound))
    assert node.losses() == [(OWNER, 1, 0), (OWNER, 1, 1)]
    await node.start(0, epoch=2)
    await node.start(1, epoch=2)
    assert (first.returncode, second.returncode) == (None, -15)
    assert node.running() == [(2, 0, "cuda:0"), (2, 1, "cpu")]
    link = first
    await node.host.on_message(link, EngineTrouble("it broke again", True))
    assert node.losses()[2:] == [(OWNER, 2, 0)]


async def test_a_stage_that_does_not_take_the_new_epoch_is_replaced(node: OneNode):
    await node.both()
    old = node.stages.running[0]
    old.refuses = True
    await node.start(0, epoch=2)
    assert old.returncode == -15
    assert (2, 0, "cuda:0") in node.running()
    assert node.losses() == []


async def test_a_process_that_hangs_is_killed_and_reported_and_those_that_beat_are_not(node: OneNode):
    await node.both()
    lively, hung = node.stages.running
    links: list[Any] = [lively, hung]
    now = node.now = 100.0
    for link in links:
        await node.host.on_message(link, EngineBeat(settled=True, sequences=2, kv_tokens=20))
    assert [stage.beat and stage.beat.kv_tokens for stage in node.host.stages] == [20, 20]
    while not node.losses():
        node.now += stage_host.TICK_SECONDS
        node.host.check(node.now)
        await node.host.on_message(links[0], EngineBeat(settled=True))
        await turns()
        assert node.now < now + 4
    assert node.now > now + stage_host.SILENCE_SECONDS
    assert (lively.returncode, hung.returncode) == (None, -9)
    assert node.losses() == [(OWNER, 1, 1)]
    await node.start(1, epoch=2)
    assert node.running() == [(1, 0, "cuda:0"), (2, 1, "cpu")], "what was killed is not kept"


async def test_a_process_that_loads_or_compiles_may_be_silent_for_longer(node: OneNode):
    node.stages.loading.clear()
    starting = asyncio.ensure_future(node.start(0))
    await turns()
    for _ in range(100):
        node.now += stage_host.TICK_SECONDS
        node.host.check(node.now)
    node.stages.loading.set()
    await starting
    link: Any = node.stages.running[0]
    await node.host.on_message(link, EngineBeat(settled=False))
    for _ in range(100):
        node.now += stage_host.TICK_SECONDS
        node.host.check(node.now)
    assert node.losses() == []


async def test_one_that_does_not_listen_is_killed(node: OneNode, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stage_child, "EXIT_SECONDS", 0.01)
    await node.both()
    node.stages.all[1].deaf = True
    await node.orders.carry_out(OWNER, StopStage("i", 1))
    assert [stage.returncode for stage in node.stages.all] == [-15, -9]


async def test_the_plan_of_a_rival_with_the_same_epoch_replaces_all(node: OneNode):
    await node.both()
    await node.start(1, owner=RIVAL, kv_tokens=128)
    await node.orders.prune(claimed(RIVAL, 1), 0.0)
    await node.orders.prune(claimed(RIVAL, 1), 0.1 + UNTAKEN_SECONDS)
    assert [(job.owner, job.index) for job in node.host.jobs] == [(RIVAL, 1)]
    assert len(node.stages.running) == 1


async def test_orders_replace_those_that_still_start(node: OneNode):
    node.stages.loading.clear()
    early = asyncio.gather(node.start(0), node.start(1), return_exceptions=True)
    await turns()
    late = asyncio.ensure_future(node.both(epoch=2))
    assert [str(error) for error in await early] == ["stale_epoch: a later order replaced this one"] * 2
    with pytest.raises(RemoteError, match="starts epoch 2 already"):
        await node.start(0)
    node.stages.loading.set()
    await late
    assert node.running() == [(2, 0, "cuda:0"), (2, 1, "cpu")]


def claimed(owner: str, epoch: int) -> dict[str, Claim]:
    return {"i": Claim("i", "tiny", owner, epoch, 0)}


async def test_stages_that_a_later_plan_does_without_are_pruned_and_no_others(node: OneNode):
    await node.both(epoch=3)
    await node.orders.prune(claimed(OWNER, 3), 0.0)
    await node.orders.prune(claimed(OWNER, 2), 1000.0)
    assert len(node.stages.running) == 2, "also one that is to take over from what serves"
    await node.orders.prune(claimed(OWNER, 4), 1000.0 + UNTAKEN_SECONDS)
    assert len(node.stages.running) == 2, "an order that keeps them may be on its way"
    await node.orders.prune(claimed(OWNER, 4), 1000.1 + UNTAKEN_SECONDS)
    assert node.stages.running == []


async def test_stages_that_a_new_owner_takes_stay_and_others_are_pruned(node: OneNode):
    await node.both(epoch=3)
    assert isinstance(await node.orders.carry_out(RIVAL, TakeStage("i", 3, 1)), StageWired)
    await node.orders.prune(claimed(RIVAL, 3), 0.0)
    assert len(node.stages.running) == 2, "the new owner's word may be on its way"
    await node.orders.prune(claimed(RIVAL, 3), UNTAKEN_SECONDS + 0.1)
    assert node.running() == [(3, 1, "cpu")]
    with pytest.raises(RemoteError, match="no stage 0 of epoch 3"):
        await node.orders.carry_out(RIVAL, TakeStage("i", 3, 0))


async def test_stages_without_an_owner_are_pruned_after_a_while(node: OneNode):
    await node.both()
    await node.orders.prune({}, 0.0)
    await node.orders.prune({}, UNOWNED_SECONDS)
    assert len(node.stages.running) == 2
    await node.orders.prune({}, UNOWNED_SECONDS + 0.1)
    assert node.stages.running == []


async def test_a_stage_beside_another_ends_nothing_and_is_stopped_alone(node: OneNode):
    await node.both(epoch=3)
    await node.start(1, epoch=4, beside=True)
    assert node.running() == [(3, 0, "cuda:0"), (3, 1, "cpu"), (4, 1, "cpu")]
    await node.orders.carry_out(OWNER, StopStage("i", 4, 4))
    assert node.running() == [(3, 0, "cuda:0"), (3, 1, "cpu")]
    await node.start(1, epoch=5, beside=True)
    await node.orders.carry_out(OWNER, StopStage("i", 3))
    assert node.running() == [(5, 1, "cpu")]


async def test_a_loss_is_reported_until_somebody_acts_on_it_whoever_owns_the_instance_then(node: OneNode):
    await node.both(epoch=3)
    node.stages.running[0].end(1)
    await turns()
    assert node.losses() == [(OWNER, 3, 0)]
    await node.orders.prune(claimed(RIVAL, 3), 0.0)
    assert node.losses() == [(OWNER, 3, 0), (RIVAL, 3, 0)]
    await node.orders.prune(claimed(RIVAL, 4), 0.0)
    await node.orders.prune(claimed(RIVAL, 3), 0.0)
    assert len(node.losses()) == 2
