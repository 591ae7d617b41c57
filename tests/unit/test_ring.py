"""A stage in the ring: steps in order, times added up, failures said, and a broken engine never silent."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, cast

import pytest
from support.link_fakes import eventually, new_credentials

from swarmd.node.engine.sampling_params import SamplingParams
from swarmd.node.serving.compute_thread import ComputeThread
from swarmd.node.serving.messages import DATA_MESSAGES, Chunk, Opening, Sampled, Step, StepFailed, StepTimes
from swarmd.node.serving.profile import Profile
from swarmd.node.serving.ring import MAX_QUEUED_STEPS, RingStage
from swarmd.transport.endpoint import Endpoint
from swarmd.transport.frames import FrameError
from swarmd.transport.link import PROTOCOL_VERSION, Hello, Vocabulary
from swarmd.transport.token import JoinToken


class Sample:
    def __init__(self, seq: int, position: int) -> None:
        self.seq, self.position, self.token, self.logprob, self.top = seq, position, 7, -0.5, ()


class Result:
    def __init__(self, payload: Any, samples: tuple[Sample, ...]) -> None:
        self.payload, self.samples, self.dtype = payload, samples, "bf16"


class Engine:
    """Records what it is asked for; `gate` holds every step up, `error` is raised instead of an answer."""

    def __init__(self, *, first: bool, last: bool) -> None:
        self.first, self.last = first, last
        self.calls: list[tuple[Any, ...]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.error: BaseException | None = None

    def open(self, seq: int, sampling: SamplingParams, source: int = -1, length: int = 0) -> None:
        self.calls.append(("open", seq, source, length))

    def free(self, seq: int) -> None:
        self.calls.append(("free", seq))

    def step(self, chunks: Any, hidden: Any, dtype: str, out_dtype: str) -> Result:
        assert self.gate.wait(10)
        if self.error is not None:
            raise self.error
        self.calls.append(("step", tuple(chunk.seq for chunk in chunks), None if hidden is None else bytes(hidden)))
        if self.last:
            return Result(None, tuple(Sample(chunk.seq, chunk.start + len(chunk.tokens)) for chunk in chunks))
        return Result(memoryview(b"h" * len(chunks)), ())


class Driver:
    """What the ring tells its driver."""

    def __init__(self) -> None:
        self.told: asyncio.Queue[Sampled | StepFailed] = asyncio.Queue()
        self.on_sampled = self.on_step_failed = self.told.put_nowait

    async def next(self) -> Sampled | StepFailed:
        async with asyncio.timeout(10):
            return await self.told.get()


def make_ring(engine: Engine, *, driver: Driver | None = None, broken: list[BaseException] | None = None) -> RingStage:
    told = broken if broken is not None else []
    ring = RingStage(cast(Any, engine), 3, "f32", ComputeThread(), on_broken=told.append)
    ring.driver = cast(Any, driver)
    return ring


def step(number: int, seq: int = 1, *, epoch: int = 3, times: StepTimes = StepTimes()) -> Step:  # noqa: B008 - frozen
    return Step(epoch, number, (), (Chunk(seq, 0, (5, 6), 1),), (), "f32", times)


async def test_steps_run_in_order_and_their_samples_reach_the_driver():
    engine, driver = Engine(first=True, last=True), Driver()
    ring = make_ring(engine, driver=driver)
    engine.gate.clear()
    for number in range(5):
        ring.begin(step(number, number), None)
    engine.gate.set()
    answers = [await driver.next() for _ in range(5)]
    assert [answer.step for answer in answers] == list(range(5))
    assert all(isinstance(answer, Sampled) and answer.choices[0].position == 2 for answer in answers)


async def test_forks_come_before_frees_so_that_a_source_may_end_in_the_same_step():
    engine, driver = Engine(first=True, last=True), Driver()
    ring = make_ring(engine, driver=driver)
    forked = Opening(9, SamplingParams(), source=4, length=16)
    ring.begin(Step(3, 0, (forked,), (), (4,), "f32"), None)
    await driver.next()
    assert engine.calls == [("open", 9, 4, 16), ("free", 4), ("step", (), None)]


async def test_what_is_too_large_to_be_sent_on_is_said_and_the_next_step_follows():
    engine, driver = Engine(first=True, last=False), Driver()
    ring, sent = make_ring(engine, driver=driver), []

    class Following:
        def send_soon(self, message: Step, payload: object) -> None:
            if message.step == 0:
                raise FrameError("a header of 2000000 bytes")
            sent.append(message.step)

    ring.following = cast(Any, Following())
    for number in range(2):
        ring.begin(step(number), None)
    failed = await driver.next()
    assert isinstance(failed, StepFailed)
    assert (failed.step, failed.own) == (0, True)
    await eventually(lambda: sent == [1], seconds=5)


async def test_a_stage_adds_its_times_to_those_of_the_stages_before():
    driver = Driver()
    ring = make_ring(Engine(first=False, last=True), driver=driver)
    ring.begin(step(0, times=StepTimes(compute_us=10**9, slowest_us=10**9, wait_us=10**9)), bytearray(2))
    answer = await driver.next()
    assert isinstance(answer, Sampled)
    assert answer.times.compute_us >= 10**9
    assert answer.times.slowest_us == 10**9  # nothing here was slower
    assert answer.times.wait_us >= 10**9


async def test_the_time_a_step_waits_behind_another_is_counted_as_waiting():
    engine, driver = Engine(first=True, last=True), Driver()
    ring = make_ring(engine, driver=driver)
    engine.gate.clear()
    ring.begin(step(0), None)
    ring.begin(step(1), None)
    loop = asyncio.get_running_loop()
    loop.call_later(0.05, engine.gate.set)
    await driver.next()
    second = await driver.next()
    assert isinstance(second, Sampled)
    assert second.times.wait_us > 40_000 > second.times.compute_us


async def test_a_step_of_another_epoch_is_dropped():
    engine, driver = Engine(first=True, last=True), Driver()
    ring = make_ring(engine, driver=driver)
    ring.begin(step(0, epoch=2), None)
    ring.begin(step(1), None)
    assert (await driver.next()).step == 1
    assert len(engine.calls) == 1


async def test_a_step_that_cannot_be_computed_is_said_and_the_next_one_runs(caplog):
    engine, driver = Engine(first=True, last=True), Driver()
    ring = make_ring(engine, driver=driver)
    engine.error = ValueError("no such sequence")
    ring.begin(step(0), None)
    failed = await driver.next()
    assert isinstance(failed, StepFailed)
    assert (failed.reason, failed.own) == ("ValueError: no such sequence", True)
    engine.error = None
    ring.begin(step(1), None)
    assert isinstance(await driver.next(), Sampled)
    assert "step 0 failed" in caplog.text


async def test_an_error_that_no_step_should_cause_breaks_the_ring_once():
    engine, broken = Engine(first=True, last=True), []
    ring = make_ring(engine, driver=Driver(), broken=broken)
    engine.error = KeyError("a bug")
    engine.gate.clear()
    ring.begin(step(0), None)
    ring.begin(step(1), None)
    engine.gate.set()
    await eventually(lambda: broken)
    ring.begin(step(2), None)
    assert [type(error) for error in broken] == [KeyError]
    assert engine.calls == []


async def test_no_driver_sends_so_many_steps():
    engine = Engine(first=True, last=True)
    ring = make_ring(engine, driver=Driver())
    engine.gate.clear()
    for number in range(MAX_QUEUED_STEPS + 1):
        ring.begin(step(number), None)
    with pytest.raises(ValueError, match="more than 256 steps"):
        ring.begin(step(999), None)
    engine.gate.set()


class FollowingStage:
    """Handler at the far end of a ring link: hands what comes to a queue, straight from the loop's callback."""

    def __init__(self) -> None:
        self.came: asyncio.Queue[tuple[Any, bytes]] = asyncio.Queue()

    async def on_link(self, link: Any) -> None:
        pass

    def on_message(self, link: Any, message: Any, payload: bytearray) -> None:
        self.came.put_nowait((message, bytes(payload)))

    async def on_closed(self, link: Any, reason: str) -> None:
        pass


async def test_hidden_states_go_on_over_a_real_link_with_the_times_so_far():
    token, following = JoinToken.generate(), FollowingStage()
    hello = Hello(PROTOCOL_VERSION, "stage", "stage", "test")
    ends = [
        Endpoint(new_credentials(token), Vocabulary(DATA_MESSAGES), cast(Any, following), hello=lambda: hello)
        for _ in range(2)
    ]
    ring = make_ring(Engine(first=False, last=False))
    ring._profile = Profile("stage 1-1", None)  # the profiled way out sends the same
    ring.following = await ends[0].dial("127.0.0.1", await ends[1].listen("127.0.0.1", 0))
    ring.begin(step(0, times=StepTimes(5, 5, 5)), bytearray(b"xy"))
    async with asyncio.timeout(10):
        message, payload = await following.came.get()
    assert payload == b"h"
    assert message.chunks == (Chunk(1, 0, (5, 6), 1),)
    assert message.times.compute_us >= 5
    ring._profile = None
    await ring.following.close("the ring is over")
    ring.begin(step(1), bytearray(b"xy"))  # whoever handles the link hears of that; here nothing is raised
    for end in ends:
        await end.close()
