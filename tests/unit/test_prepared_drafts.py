"""The driver with guesses that take time: made elsewhere, before the step that sends them, they change no answer."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager

import pytest
from support.fake_pipeline import FakePipeline, solo_run

from swarmd.node.engine.sampling_params import SamplingParams
from swarmd.node.serving.drafting import NgramDrafter, PreparedDrafts
from swarmd.node.serving.driver import Driver
from swarmd.node.serving.messages import Finished, Generate, Sampled, Token
from swarmd.node.serving.speculation import Speculation
from swarmd.node.serving.step_cost import StepCost
from swarmd.node.serving.steps import Limits, PlannedStep

N_STAGES = 2
LIMITS = Limits(n_stages=N_STAGES, kv_tokens=640, context=80, step_tokens=32, growth=4, max_running=8, max_waiting=8)


class Oracle:
    """A draft model that knows the answers; of every third guess the last token is wrong."""

    def __init__(self) -> None:
        self.asked = 0
        self.outcomes: list[tuple[int, int]] = []
        self.forgotten: list[int] = []

    def propose(self, seq: int, tokens: Sequence[int], limit: int) -> list[int]:
        self.asked += 1
        guessed = solo_run(list(tokens), N_STAGES, min(limit, 4))
        if self.asked % 3 == 0:
            guessed[-1] += 1
        return guessed

    def observe(self, seq: int, proposed: int, accepted: int) -> None:
        self.outcomes.append((proposed, accepted))

    def forget(self, seq: int) -> None:
        self.forgotten.append(seq)

    def price(self, cost: StepCost) -> None:
        pass


class Ring:
    """A driver, its pipeline, and a thread for guesses that waits for `may_guess`."""

    def __init__(self) -> None:
        self.oracle = Oracle()
        self.steps: list[PlannedStep] = []
        self.may_guess = asyncio.Event()
        self.may_guess.set()
        self.guessing = asyncio.Event()
        self._pipeline = FakePipeline(LIMITS)
        speculation = Speculation(PreparedDrafts(NgramDrafter(), self.oracle))
        self.driver = Driver("instance", LIMITS, self.run_step, speculation, self.make_guesses)

    async def make_guesses(self, guess: Callable[[], list[list[int]]]) -> list[list[int]]:
        self.guessing.set()
        await self.may_guess.wait()
        return await asyncio.to_thread(guess)

    async def run_step(self, step: PlannedStep) -> None:
        self.steps.append(step)
        self._pipeline.begin(step)
        asyncio.get_running_loop().call_soon(self.turn)

    def turn(self) -> None:
        self._pipeline.flush()
        while self._pipeline.answers:
            message = self._pipeline.answers.popleft()
            assert isinstance(message, Sampled), "no step fails here"
            self.driver.on_sampled(message)

    def ask(self, prompt: list[int], max_tokens: int):
        return self.driver.generate(Generate("instance", 1, tuple(prompt), SamplingParams(), max_tokens, ()))

    async def collect(self, prompt: list[int], max_tokens: int) -> list[int]:
        items = [item async for item in self.ask(prompt, max_tokens)]
        assert items[-1] == Finished("length")
        return [item.token for item in items if isinstance(item, Token)]


@asynccontextmanager
async def running() -> AsyncIterator[Ring]:
    ring = Ring()
    task = asyncio.create_task(ring.driver.run())
    try:
        async with asyncio.timeout(20):
            yield ring
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_the_answer_is_the_same_in_fewer_steps():
    async with running() as ring:
        assert await ring.collect([1, 2, 3], 30) == solo_run([1, 2, 3], N_STAGES, 30)
    assert len(ring.steps) < 15
    load = ring.driver.load
    assert 15 < load.accepted_draft_tokens < load.draft_tokens
    assert ring.oracle.asked <= len(ring.steps), "nobody is asked twice for one step"


@pytest.mark.parametrize("requests", [2, 8])
async def test_requests_together_get_what_each_would_get_alone(requests: int):
    prompts = [[7 * index, 7 * index + 1, 2] for index in range(requests)]
    async with running() as ring:
        answers = await asyncio.gather(*(ring.collect(prompt, 25) for prompt in prompts))
    assert answers == [solo_run(prompt, N_STAGES, 25) for prompt in prompts]
    assert ring.driver.load.accepted_draft_tokens > 0


async def test_the_draft_model_hears_what_came_of_its_guesses_and_of_the_end():
    async with running() as ring:
        await ring.collect([1, 2, 3], 20)
        await ring.collect([4, 5, 6], 20)
    assert (4, 4) in ring.oracle.outcomes
    assert (4, 3) in ring.oracle.outcomes
    assert ring.oracle.forgotten == [0]


async def test_a_client_that_leaves_while_guesses_are_made_disturbs_nobody():
    async with running() as ring:
        ring.may_guess.clear()
        async with aclosing(ring.ask([1, 2, 3], 30)) as leaving:
            await anext(leaving)
            await ring.guessing.wait()
        ring.may_guess.set()
        assert await ring.collect([4, 5, 6], 20) == solo_run([4, 5, 6], N_STAGES, 20)
    assert ring.driver.load.running == 0
