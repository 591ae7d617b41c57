"""The driver with a pipeline of fake stages: every request gets its tokens, whatever the others do."""

import asyncio
import contextlib
from contextlib import aclosing, asynccontextmanager

import pytest
from msgspec.structs import replace
from support.fake_pipeline import VOCABULARY, FakePipeline, solo_run

from swarmd.node.cluster.signal import Signal
from swarmd.node.engine.sampling_params import NO_TOKEN, SamplingParams
from swarmd.node.serving.drafting import NgramDrafter
from swarmd.node.serving.driver import Driver
from swarmd.node.serving.messages import Finished, Generate, Sampled, StepFailed, StepTimes, Token
from swarmd.node.serving.speculation import Speculation
from swarmd.node.serving.steps import Limits, PlannedStep
from swarmd.transport.link import RemoteError
from swarmd.transport.streams import STREAM_WINDOW, SendWindow, produce

SMALL = {"step_tokens": 16, "growth": 4, "max_running": 8, "kv_block": 1, "max_retained": 0}
LIMITS = Limits(n_stages=2, kv_tokens=200, context=60, max_waiting=4, **SMALL)


class Ring:
    """A driver and its pipeline. While `held`, steps wait before the first stage. A step takes `seconds` on its way."""

    def __init__(self, limits: Limits, speculation: Speculation | None = None, seconds: float = 0.0) -> None:
        self.pipeline = FakePipeline(limits)
        self.driver = Driver("instance", limits, self.run_step, speculation, clock=lambda: self.now)
        self.moved = Signal()
        self.held = False
        self.begun = 0
        self.most_in_flight = 0
        self.now = 0.0
        self._seconds = seconds

    async def run_step(self, step: PlannedStep) -> None:
        self.begun += 1
        self.pipeline.begin(step)
        self.most_in_flight = max(self.most_in_flight, self.pipeline.in_flight)
        asyncio.get_running_loop().call_soon(self.turn)

    def turn(self) -> None:
        """Every step that was begun runs, and its answer comes back."""
        if not self.held:
            self.now += self._seconds
            self.pipeline.flush()
            while self.pipeline.answers:
                message = self.pipeline.answers.popleft()
                if isinstance(message, Sampled):
                    self.driver.on_sampled(message)
                else:
                    self.driver.on_step_failed(message)
        self.moved.notify()

    def release(self) -> None:
        self.held = False
        self.turn()

    async def until(self, condition) -> None:
        async with asyncio.timeout(5):
            while not condition():
                await self.moved.wait()

    @property
    def cached(self) -> int:
        return sum(len(stage.kv) for stage in self.pipeline.stages)


@asynccontextmanager
async def running(limits=LIMITS, speculation=None, seconds=0.0):
    ring = Ring(limits, speculation, seconds)
    task = asyncio.create_task(ring.driver.run())
    try:
        yield ring
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def request(prompt, max_tokens=10, stop=()):
    return Generate("instance", 1, tuple(prompt), SamplingParams(), max_tokens, tuple(stop))


async def collect(ring, order):
    """The token ids of a request and how it ended."""
    items = [item async for item in ring.driver.generate(order)]
    assert all(isinstance(item, Token) for item in items[:-1])
    assert isinstance(items[-1], Finished), "Finished comes once, at the end"
    return [item.token for item in items[:-1]], items[-1].reason


async def drain(stream, into):
    async for item in stream:
        assert isinstance(item, Token)
        into.append(item.token)


async def test_a_request_gets_its_tokens_and_an_end():
    async with running() as ring:
        assert await collect(ring, request([1, 2, 3])) == (solo_run([1, 2, 3], 2, 10), "length")


async def test_a_stop_token_ends_a_request_and_is_not_sent():
    expected = solo_run([1, 2, 3], 2, 10)
    stop = expected[4]
    async with running() as ring:
        tokens, reason = await collect(ring, request([1, 2, 3], stop=[stop]))
    assert (tokens, reason) == (expected[: expected.index(stop)], "stop")


@pytest.mark.parametrize("n_stages", [1, 2, 3])
async def test_concurrent_requests_each_equal_their_solo_run(n_stages):
    limits = Limits(n_stages=n_stages, kv_tokens=100, context=60, **SMALL)
    prompts = [list(range(index, 3 * index + 2)) for index in range(12)]
    async with running(limits) as ring:
        answers = await asyncio.gather(*(collect(ring, request(prompt, 12)) for prompt in prompts))
        await ring.until(lambda: not ring.cached)
    assert answers == [(solo_run(prompt, n_stages, 12), "length") for prompt in prompts]


async def test_a_replay_goes_on_where_the_stream_broke_off():
    """What the next epoch's driver is given after a loss: the prompt and the tokens so far."""
    expected = solo_run([1, 2, 3], 2, 10)
    async with running() as ring:
        tokens, _ = await collect(ring, request([1, 2, 3, *expected[:4]], 6))
    assert tokens == expected[4:]


async def test_leaving_early_frees_every_stage_and_disturbs_nobody():
    async with running() as ring:
        other = asyncio.create_task(collect(ring, request([4, 5], 40)))
        async with aclosing(ring.driver.generate(request([1, 2, 3], 50))) as tokens:
            seen = [await anext(tokens) for _ in range(3)]
        assert [token.token for token in seen if isinstance(token, Token)] == solo_run([1, 2, 3], 2, 3)
        assert await other == (solo_run([4, 5], 2, 40), "length")
        await ring.until(lambda: not ring.cached)
        assert (ring.driver.load.running, ring.driver.load.kv_tokens_used) == (0, 0)


async def test_a_consumer_that_is_cancelled_before_its_first_token_frees_its_place():
    async with running() as ring:
        ring.held = True
        waiting = asyncio.create_task(collect(ring, request([1, 2, 3])))
        await ring.until(lambda: ring.pipeline.in_flight)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert ring.driver.load.running == 0
        ring.release()
        await ring.until(lambda: not ring.cached and not ring.pipeline.in_flight)


async def test_load_says_how_busy_the_instance_is():
    limits = Limits(n_stages=2, kv_tokens=30, context=25, **SMALL)
    async with running(limits) as ring:
        ring.held = True
        tasks = [asyncio.create_task(collect(ring, request(range(16), 3))) for _ in range(2)]
        await ring.until(lambda: ring.pipeline.in_flight)
        load = ring.driver.load
        assert (load.instance, load.running, load.waiting) == ("instance", 1, 1)
        assert (load.kv_tokens_used, load.kv_tokens) == (20, 30)
        ring.release()
        await asyncio.gather(*tasks)
        assert (ring.driver.load.running, ring.driver.load.waiting) == (0, 0)


async def test_overload_is_said_at_once_and_passes():
    limits = Limits(n_stages=1, kv_tokens=200, context=60, max_waiting=2, **(SMALL | {"max_running": 1}))
    async with running(limits) as ring:
        ring.held = True
        tasks = [asyncio.create_task(collect(ring, request([0], 3)))]
        await ring.until(lambda: ring.driver.load.running == 1)
        tasks += [asyncio.create_task(collect(ring, request([index], 3))) for index in (1, 2)]
        late = asyncio.create_task(collect(ring, request([9])))
        with pytest.raises(RemoteError) as refused:
            await late
        assert refused.value.code == "overloaded"
        assert ring.driver.load.waiting == 2
        ring.release()
        assert [await task for task in tasks] == [(solo_run([index], 1, 3), "length") for index in range(3)]
        assert await collect(ring, request([9])) == (solo_run([9], 1, 10), "length")


async def test_who_is_not_let_in_for_a_minute_is_told_and_who_was_goes_on():
    limits = Limits(n_stages=1, kv_tokens=200, context=60, **(SMALL | {"max_running": 1}))
    async with running(limits) as ring:
        ring.held = True
        first = asyncio.create_task(collect(ring, request([0], 3)))
        await ring.until(lambda: ring.driver.load.running == 1)
        ring.now = 10.0
        late, later = (asyncio.create_task(collect(ring, request([index], 3))) for index in (1, 2))
        await asyncio.sleep(0)
        ring.now = 69.0
        ring.driver.expire()
        assert ring.driver.load.waiting == 2
        late.cancel()  # who leaves in time is not missed
        ring.now = 70.0
        ring.driver.expire()
        with pytest.raises(RemoteError) as ended:
            await later
        assert ended.value.code == "queue_timeout"
        assert (ring.driver.load.running, ring.driver.load.waiting) == (1, 0)
        ring.release()
        assert await first == (solo_run([0], 1, 3), "length")


async def test_long_prompts_that_wait_are_bounded_by_their_tokens():
    limits = Limits(n_stages=1, kv_tokens=60, context=60, **(SMALL | {"max_running": 1}))
    async with running(limits) as ring:
        ring.held = True
        tasks = [asyncio.create_task(collect(ring, request([0], 3)))]
        await ring.until(lambda: ring.driver.load.running == 1)
        prompts = [[index, *range(47)] for index in range(10)]
        tasks += [asyncio.create_task(collect(ring, request(prompt, 3))) for prompt in prompts]
        with pytest.raises(RemoteError) as refused:
            await asyncio.create_task(collect(ring, request(range(48), 3)))
        assert refused.value.code == "overloaded"
        ring.release()
        assert [await task for task in tasks] == [(solo_run(prompt, 1, 3), "length") for prompt in ([0], *prompts)]


@pytest.mark.parametrize(("prompt", "max_tokens"), [(range(60), 5), ((), 5), ((1,), 0)])
async def test_what_cannot_be_served_is_refused_as_invalid(prompt, max_tokens):
    async with running() as ring:
        with pytest.raises(RemoteError) as refused:
            await collect(ring, request(prompt, max_tokens))
        assert refused.value.code == "invalid"


async def test_a_step_that_fails_ends_only_the_request_that_made_it_fail():
    async with running() as ring:
        ring.pipeline.poison = VOCABULARY + 1
        ring.held = True
        spared = [asyncio.create_task(collect(ring, request([4, index]))) for index in range(3)]
        hit = asyncio.create_task(collect(ring, request([1, VOCABULARY + 1, 3])))
        await ring.until(lambda: ring.driver.load.running + ring.driver.load.waiting == 4)
        ring.release()
        with pytest.raises(RemoteError) as failed:
            await hit
        assert (failed.value.code, failed.value.message) == ("engine_error", "a stage failed")
        assert [await task for task in spared] == [(solo_run([4, index], 2, 10), "length") for index in range(3)]
        await ring.until(lambda: not ring.cached)


async def test_who_gets_no_token_is_told_and_nobody_else():
    async with running() as ring:
        ring.held = True
        unfit = asyncio.create_task(collect(ring, request([1, 2, 3])))
        spared = asyncio.create_task(collect(ring, request([4, 5])))
        await ring.until(lambda: ring.driver.load.running + ring.driver.load.waiting == 2)
        on_sampled = ring.driver.on_sampled

        def none_for_one(message: Sampled) -> None:
            choices = [replace(one, token=NO_TOKEN) if one.seq == 0 else one for one in message.choices]
            on_sampled(replace(message, choices=tuple(choices)))

        ring.driver.on_sampled = none_for_one
        ring.release()
        with pytest.raises(RemoteError, match="JSON schema") as failed:
            await unfit
        assert failed.value.code == "unfit"
        assert await spared == (solo_run([4, 5], 2, 10), "length")


async def test_a_pipeline_that_can_compute_nothing_is_reported_and_ends_nobody():
    async with running() as ring:
        said: list[str] = []
        ring.driver.on_sick = said.append
        ring.pipeline.sick = True
        tasks = [asyncio.create_task(collect(ring, request([4, index]))) for index in range(3)]
        await ring.until(lambda: said)
        assert said[0] == "a stage failed"
        assert not any(task.done() for task in tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_when_the_pipeline_breaks_everybody_is_told_after_the_tokens_that_came_before():
    ring = Ring(LIMITS)
    run = asyncio.create_task(ring.driver.run())
    streams = [ring.driver.generate(request([index], 50)) for index in range(3)]
    firsts = [await anext(stream) for stream in streams]
    assert [first.token for first in firsts if isinstance(first, Token)] == [
        solo_run([index], 2, 1)[0] for index in range(3)
    ]
    ring.held = True
    ring.driver.fail("stage_lost", "node b is gone")
    ring.driver.fail("stage_lost", "the same again, as its neighbours see it")
    for index, stream in enumerate(streams):
        rest: list[int] = []
        with pytest.raises(RemoteError) as lost:
            await drain(stream, rest)
        assert (lost.value.code, lost.value.message) == ("stage_lost", "node b is gone")
        assert rest == solo_run([index], 2, 1 + len(rest))[1:], "what had come before is not lost"
    with pytest.raises(RemoteError, match="node b is gone"):
        await collect(ring, request([7]))
    async with asyncio.timeout(5):
        await run


async def test_answers_that_nobody_asked_for_are_refused():
    async with running() as ring:
        with pytest.raises(ValueError, match="not in flight"):
            ring.driver.on_sampled(Sampled(1, 3, ()))
        ring.driver.on_step_failed(StepFailed(1, 3, "of a step that was ended before"))
        assert await collect(ring, request([1])) == (solo_run([1], 2, 10), "length")


async def test_what_ended_sequences_keep_of_the_cache_is_not_shown_as_used_and_serves_the_next_turn():
    limits = Limits(n_stages=2, kv_tokens=200, context=100, **(SMALL | {"max_retained": 8}))
    async with running(limits) as ring:
        prompt = list(range(30))
        first, _ = await collect(ring, request(prompt, 10))
        assert (ring.driver.load.running, ring.driver.load.kv_tokens_used) == (0, 0)
        assert ring.cached == 2, "each stage keeps it"
        turn = [*prompt, *first, 7, 7]
        assert await collect(ring, request(turn, 10)) == (solo_run(turn, 2, 10), "length")
        assert ring.driver.prefix_tokens_reused == len(prompt) + len(first) - 1


class Repeats(NgramDrafter):
    """Guesses what is expected to come, and is wrong now and then."""

    def __init__(self, expected):
        super().__init__()
        self.expected = expected
        self.step_us = 0.0

    def price(self, cost):
        self.step_us = cost.step_us

    def propose(self, seq, tokens, limit):
        guesses = self.expected[len(tokens) : len(tokens) + min(3, limit)]
        return [*guesses[:-1], (guesses[-1] + 1) % VOCABULARY] if len(tokens) % 3 == 0 and guesses else guesses


@pytest.mark.parametrize("n_stages", [1, 2])
async def test_several_tokens_of_one_step_come_in_order_and_guesses_are_counted(n_stages):
    prompt = [1, 2, 3]
    expected = solo_run(prompt, n_stages, 30)
    drafter = Repeats([*prompt, *expected])
    limits = Limits(n_stages=n_stages, kv_tokens=200, context=60, **SMALL)
    async with running(limits, Speculation(drafter)) as ring:
        ring.pipeline.times = StepTimes(2000, 1000, 0)
        assert await collect(ring, request(prompt, 30)) == (expected, "length")
        load = ring.driver.load
        assert load.draft_tokens > load.accepted_draft_tokens > 10
        assert ring.begun < 20, "fewer steps than tokens"
        assert drafter.step_us > 0, "the price of a guess was measured"


async def test_slow_links_bring_more_steps_into_flight():
    """The driver measures how long a step is away; what was neither computing nor waiting was on links."""
    async with running(seconds=0.01) as ring:
        ring.pipeline.times = StepTimes(2000, 1000, 0)
        answers = await asyncio.gather(*(collect(ring, request([index, 1], 40)) for index in range(4)))
    assert [tokens for tokens, _ in answers] == [solo_run([index, 1], 2, 40) for index in range(4)]
    assert ring.most_in_flight == 4, "one for each sequence, as ten would fit"


async def test_a_reader_that_stands_still_holds_up_nobody_and_frees_its_place_when_it_is_dropped():
    """Its tokens fill the window of its stream over the link; another's, as many, all arrive."""
    limits = Limits(n_stages=2, kv_tokens=2000, context=1000, **SMALL)
    count = 3 * STREAM_WINDOW
    async with running(limits) as ring:
        stalled, read = [], []

        async def to_stalled(item):
            stalled.append(item)

        async def to_reader(item):
            read.append(item)
            window.grant(1)

        window = SendWindow()
        left = asyncio.create_task(produce(ring.driver.generate(request([1, 2], count)), SendWindow(), to_stalled))
        await produce(ring.driver.generate(request([4, 5], count)), window, to_reader)
        assert [item.token for item in read[:-1]] == solo_run([4, 5], 2, count)
        assert len(stalled) == STREAM_WINDOW
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        await ring.until(lambda: not ring.cached)
        assert (ring.driver.load.running, ring.driver.load.kv_tokens_used) == (0, 0)
