"""The spare stage process: there before it is needed, used once, and never when something is wrong with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from support.fake_stages import FakeStage, FakeStages

from swarmd.node.serving import stage_starts
from swarmd.node.serving.messages import EngineBeat, LoadEngine
from swarmd.node.serving.stage_host import StageHost
from swarmd.node.serving.stage_starts import SPARE_SILENCE_SECONDS


class SpareNode:
    """A real host around stages that are fakes."""

    def __init__(self, stages: FakeStages, *, keeps_spare: bool = True) -> None:
        self.stages = stages
        self.now = 0.0
        self.lost: list[str] = []
        self.host = StageHost(
            Path("/nowhere"),
            "node",
            lambda: 1,
            on_lost=lambda job, reason, own_fault: self.lost.append(reason),
            on_progress=lambda job, done, total: None,
            on_load=lambda: None,
            keeps_spare=keeps_spare,
            clock=lambda: self.now,
        )
        stages.host = self.host

    async def start(self, epoch: int) -> FakeStage:
        """The process that holds the stage of a new epoch."""
        await self.host.start(LoadEngine("i", epoch, "/model.gguf", False, 0, 3 + epoch, 64, 64, 1))
        [holder] = [one for one in self.stages.running if one.job is not None]
        return holder

    async def spare(self) -> FakeStage:
        """The one that waits, once it is there and has presented itself."""
        for _ in range(20):
            await asyncio.sleep(0)
        [spare] = [one for one in self.stages.running if one.job is None]
        return spare

    async def beat(self, spare: Any) -> None:
        await self.host.on_message(spare, EngineBeat(False))


@pytest.fixture
async def node(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SpareNode]:
    monkeypatch.setattr(stage_starts, "SPARE_DELAY_SECONDS", 0.0)
    stages = FakeStages()
    stages.install(monkeypatch)
    node = SpareNode(stages)
    yield node
    await node.host.close()
    assert stages.running == []


async def test_after_a_start_another_process_waits_and_takes_the_next_stage(node: SpareNode):
    first = await node.start(1)
    spare = await node.spare()
    assert spare is not first
    assert await node.start(2) is spare
    assert first.returncode is not None
    third = await node.spare()
    assert await node.start(3) is third
    assert node.lost == []


async def test_one_that_has_died_is_not_used(node: SpareNode):
    await node.start(1)
    spare = await node.spare()
    spare.end(-9)
    assert await node.start(2) is not spare
    assert node.lost == [], "it held no stage"


async def test_one_whose_link_is_down_is_not_used(node: SpareNode):
    await node.start(1)
    spare: Any = await node.spare()
    node.host.on_closed(spare, "cut")
    assert await node.start(2) is not spare
    assert spare.returncode is not None


async def test_one_that_says_nothing_is_not_used(node: SpareNode):
    await node.start(1)
    silent = await node.spare()
    node.now += SPARE_SILENCE_SECONDS + 0.1
    assert await node.start(2) is not silent
    assert silent.returncode is not None

    living = await node.spare()
    node.now += SPARE_SILENCE_SECONDS
    await node.beat(living)
    node.now += SPARE_SILENCE_SECONDS
    assert await node.start(3) is living


async def test_one_that_does_not_present_itself_is_not_waited_for_long(
    node: SpareNode, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stage_starts, "SPARE_ARRIVAL_SECONDS", 0.0)
    await node.start(1)
    node.stages.mute = True
    stuck = await node.spare()
    node.stages.mute = False
    assert await node.start(2) is not stuck
    assert stuck.returncode is not None


async def test_a_start_that_is_given_up_while_it_waits_for_one_leaves_none_behind(node: SpareNode):
    await node.start(1)
    node.stages.mute = True
    late = await node.spare()
    start = asyncio.create_task(node.start(2))
    for _ in range(20):
        await asyncio.sleep(0)
    start.cancel()
    await asyncio.wait({start})
    assert late.returncode is not None


async def test_it_is_told_whom_to_trust_like_the_others(node: SpareNode):
    first = await node.start(1)
    spare = await node.spare()
    told = {one: len(one.told) for one in (first, spare)}
    node.host.tell(EngineBeat(True))
    assert {one: len(one.told) - told[one] for one in (first, spare)} == {first: 1, spare: 1}


async def test_it_is_no_stage_of_the_node(node: SpareNode):
    first = await node.start(1)
    await node.spare()
    assert [stage.pid for stage in node.host.stages] == [first.pid]


async def test_a_host_keeps_none_unless_told_to(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stage_starts, "SPARE_DELAY_SECONDS", 0.0)
    stages = FakeStages()
    stages.install(monkeypatch)
    node = SpareNode(stages, keeps_spare=False)
    await node.start(1)
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(stages.all) == 1
    await node.host.close()
