"""Real stage processes that are stopped, killed and kept, as their daemon and their neighbours see it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from support.stage_swarm import StageSwarm, ask, stage_swarm
from support.tiny_gguf import TinyModel, write_tiny_gguf

from swarmd.node.serving.messages import Token
from swarmd.transport.link import LinkClosed, RemoteError, RemoteStream

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

CUTS = (0, 1, 2, 4)


@pytest.fixture
async def swarm(tmp_path: Path) -> AsyncIterator[StageSwarm]:
    async with stage_swarm(tmp_path, nodes=3) as made:
        yield made


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_gguf(tmp_path / "tiny.gguf", TinyModel(n_layers=CUTS[-1]))


async def until_it_ends(items: RemoteStream) -> None:
    async for _ in items:
        pass


@pytest.mark.parametrize("struck", [0, 1, 2])
async def test_a_stage_process_that_stands_still_is_found_by_its_neighbours_and_killed_by_its_daemon(
    swarm: StageSwarm, model: Path, struck: int
):
    port = await swarm.serve(model, "i", *CUTS)
    await swarm.generate("i", port)  # then the first steps are done, whatever computes
    await swarm.until(lambda: all(stage.beat and stage.beat.settled for stage in swarm.stages))
    # With the next beat of each its neighbours know that too, and no longer allow for compilers.
    beats = [stage.beat for stage in swarm.stages]
    await swarm.until(lambda: all(s.beat is not beat for s, beat in zip(swarm.stages, beats, strict=True)))
    victim = swarm.process_of(struck)
    began = time.monotonic()
    victim.suspend()
    reasons = await swarm.losses(3)
    assert time.monotonic() - began < 10, "about two and a half seconds on a machine that is not busy"
    assert "was killed" in reasons.pop(struck)
    assert all("has said nothing for" in reason or "neighbour" in reason for reason in reasons.values()), reasons
    assert victim.wait(10) is None or not victim.is_running()


async def test_when_one_stage_is_lost_the_others_keep_their_layers_for_the_next_epoch(swarm: StageSwarm, model: Path):
    port = await swarm.serve(model, "i", *CUTS)
    expected = await swarm.generate("i", port)
    for epoch, struck in enumerate((1, 2, 0), start=2):
        before = {stage.job.index: stage.pid for stage in swarm.stages}
        link = await swarm.driver(port)
        async with link.stream(ask("i", epoch - 1, count=500)) as items:
            assert isinstance(await anext(items), Token)
            swarm.process_of(struck).kill()
            with pytest.raises((RemoteError, LinkClosed)):
                await until_it_ends(items)
        await swarm.losses(3)
        port = await swarm.serve(model, "i", *CUTS, epoch=epoch)
        after = {stage.job.index: stage.pid for stage in swarm.stages}
        assert [index for index in after if after[index] != before[index]] == [struck]
        assert await swarm.generate("i", port, epoch=epoch) == expected
        with pytest.raises(RemoteError, match="stale_epoch"):
            await swarm.generate("i", port, epoch=epoch - 1)


async def test_a_stage_that_is_kept_finishes_its_step_first_and_forgets_all_sequences(swarm: StageSwarm, model: Path):
    """In the middle of eight answers the owner makes another plan with the same stages."""
    port = await swarm.serve(model, "i", *CUTS)
    expected = await swarm.generate("i", port)
    link = await swarm.driver(port)
    for epoch in range(2, 6):
        async with AsyncExitStack() as stack:
            streams = [
                await stack.enter_async_context(link.stream(ask("i", epoch - 1, (1, 2, index), 500)))
                for index in range(8)
            ]
            for items in streams:
                assert isinstance(await anext(items), Token)
            assert await swarm.serve(model, "i", *CUTS, epoch=epoch) == port
            for items in streams:
                with pytest.raises(RemoteError, match=r"stage_lost|stale_epoch"):
                    await until_it_ends(items)
        assert await swarm.generate("i", port, epoch=epoch) == expected
    await swarm.until(lambda: all(stage.beat and stage.beat.sequences <= 1 for stage in swarm.stages))
    assert swarm.lost.empty(), "nothing was lost by that"
