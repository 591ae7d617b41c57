"""What stage processes hold of requests whose clients have left: nothing that anybody else needs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from support.stage_swarm import StageSwarm, ask, stage_swarm
from support.tiny_gguf import TinyModel, write_tiny_gguf

from swarmd.discovery.records import LoadRecord
from swarmd.node.serving.messages import Token

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

CUTS = (0, 1, 2, 4)
KV_TOKENS = 8192  # as the support has it
# More than there is room for at once; and of how many a step can be on its way beside those that were there before.
PROMPTS, MOST_BEGUN = 24, 8


@pytest.fixture
async def swarm(tmp_path: Path) -> AsyncIterator[StageSwarm]:
    async with stage_swarm(tmp_path, nodes=3) as made:
        yield made


def prompt_of(index: int) -> tuple[int, ...]:
    """A long prompt that has no prefix in common with another's."""
    return tuple((index + place) % 200 + 10 for place in range(480))


def load_of(swarm: StageSwarm) -> LoadRecord | None:
    """What the driver said last."""
    loads = swarm.nodes[0].host.loads
    return loads[0] if loads else None


def held(swarm: StageSwarm) -> list[tuple[int, int]]:
    """(sequences, KV tokens) of each stage, as its latest beat says."""
    return [(stage.beat.sequences, stage.beat.kv_tokens) for stage in swarm.stages if stage.beat is not None]


async def test_when_clients_leave_their_room_is_free_on_every_stage(swarm: StageSwarm, tmp_path: Path):
    """One of the stages stands still while they leave, so that nothing can be finished instead."""
    model = write_tiny_gguf(tmp_path / "tiny.gguf", TinyModel(n_layers=CUTS[-1]))
    port = await swarm.serve(model, "i", *CUTS)
    expected = await swarm.generate("i", port)
    link = await swarm.driver(port)
    async with AsyncExitStack() as stack:
        decoding = await stack.enter_async_context(link.stream(ask("i", 1, count=500)))
        assert isinstance(await anext(decoding), Token)
        swarm.process_of(1).suspend()
        for index in range(PROMPTS):
            await stack.enter_async_context(link.stream(ask("i", 1, prompt_of(index), 30)))
        await swarm.until(lambda: (load := load_of(swarm)) and load.running + load.waiting == PROMPTS + 1)
    idle = (0, 0, 0)
    await swarm.until(lambda: (load := load_of(swarm)) and (load.running, load.waiting, load.kv_tokens_used) == idle)
    swarm.process_of(1).resume()
    # The stages hold what the driver retains: of the few whose first tokens were on their way, not of those who waited.
    await swarm.until(lambda: len(held(swarm)) == 3 and len(set(held(swarm))) == 1)
    sequences, tokens = held(swarm)[0]
    assert sequences <= MOST_BEGUN < PROMPTS
    assert tokens <= KV_TOKENS

    # So many that they need the room of everybody who left, on every stage.
    crowd = [prompt_of(index) for index in range(30, 46)]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(read(swarm, port, prompt)) for prompt in crowd]
    assert [task.result() for task in tasks] == [20] * len(crowd)
    assert await swarm.generate("i", port) == expected
    assert swarm.lost.empty()


async def read(swarm: StageSwarm, port: int, prompt: tuple[int, ...]) -> int:
    """How many tokens a request gets."""
    link = await swarm.driver(port)
    async with link.stream(ask("i", 1, prompt, 20)) as items:
        return len([item async for item in items if isinstance(item, Token)])
