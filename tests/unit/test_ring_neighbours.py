"""What a stage takes from whom: from the one stage before it, each step once, of its own epoch, and only what that
stage can have sent. The rest is dropped, with one line in the log.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from msgspec import Struct
from msgspec.structs import replace

from swarmd.node.engine.sampling_params import SamplingParams
from swarmd.node.serving.compute_thread import ComputeThread
from swarmd.node.serving.messages import (
    Chunk,
    Connect,
    EngineTrouble,
    Generate,
    JoinRing,
    LoadEngine,
    RingBeat,
    Sampled,
    Step,
    StepFailed,
    Token,
    TokenChoice,
)
from swarmd.node.serving.stage_epoch import MAX_EARLY, StageEpoch, StageParts
from swarmd.transport.link import RemoteError

BEFORE, AFTER, STRANGER = "b" * 64, "a" * 64, "e" * 64
STEP = Step(3, 5, (), (Chunk(0, 0, (1, 2), 1),), (), "f32")


class FakeLink:
    """A link that remembers what was sent over it."""

    def __init__(self, node: str) -> None:
        self.peer_id = node
        self.peer = SimpleNamespace(name=f"node {node[0]}")
        self.received_bytes = 0
        self.closed = False
        self.sent: asyncio.Queue[Struct] = asyncio.Queue()

    def send_soon(self, message: Struct, payload: Any = b"") -> None:
        self.sent.put_nowait(message)

    async def request(self, message: Struct, timeout: float | None = None) -> None:
        assert message == JoinRing("i", 3)

    async def close(self, reason: str) -> None:
        self.closed = True


class FakeEngine:
    """Answers each chunk with the token 7."""

    kernels = "native"

    def __init__(self, *, first: bool) -> None:
        self.first, self.last = first, not first
        self.steps = 0

    def open(self, *opening: Any) -> None: ...

    def free(self, seq: int) -> None: ...

    def step(self, chunks: Any, hidden: Any, dtype: str, out_dtype: str) -> Any:
        self.steps += 1
        samples = [SimpleNamespace(seq=c.seq, position=2, token=7, logprob=-0.5, top=()) for c in chunks]
        return SimpleNamespace(payload=None if self.last else memoryview(b"h"), samples=samples, dtype=out_dtype)


class Stage:
    """One of two stages, connected: `before` is the link that its neighbour dialled, `after` the one that it did."""

    def __init__(self, *, first: bool) -> None:
        self.engine = FakeEngine(first=first)
        self.before, self.after = FakeLink(BEFORE), FakeLink(AFTER)
        self.told: list[Struct] = []
        endpoint = SimpleNamespace(dial=self._dial)
        parts = StageParts(cast(Any, endpoint), cast(Any, self.engine), ComputeThread(), None, self._tell)
        self.epoch = StageEpoch(LoadEngine("i", 3, "m", False, 0, 1, 64, 64, 1), parts)

    async def _dial(self, *where: Any, **options: Any) -> FakeLink:
        return self.after

    async def _tell(self, message: Struct) -> None:
        self.told.append(message)

    def join(self, link: FakeLink, epoch: int = 3) -> None:
        self.epoch.take_previous(cast(Any, link), JoinRing("i", epoch))

    def take(self, message: Struct, link: FakeLink | None = None) -> None:
        self.epoch.on_message(cast(Any, link or self.before), message, bytearray(8))

    async def connect(self) -> None:
        address = cast(Any, SimpleNamespace(host="h", port=1))
        await self.epoch.connect(Connect(2, AFTER, (address,), "f32", BEFORE))


@pytest.fixture
async def second() -> AsyncIterator[Stage]:
    stage = Stage(first=False)
    stage.join(stage.before)
    await stage.connect()
    yield stage
    stage.epoch.leave()


@pytest.fixture
async def first() -> AsyncIterator[Stage]:
    stage = Stage(first=True)
    await stage.connect()
    stage.join(stage.before)
    yield stage
    stage.epoch.leave()


async def answer_of(stage: Stage) -> Sampled:
    async with asyncio.timeout(10):
        while not isinstance(message := await stage.after.sent.get(), Sampled):
            pass
    return message


def refusals(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "; refused" in record.getMessage()]


TO_SECOND: dict[str, tuple[Callable[[Stage], object], str]] = {
    "the same step again": (lambda s: s.take(STEP), "sent Step 5 after 5"),
    "an earlier step": (lambda s: s.take(replace(STEP, step=4)), "sent Step 4 after 5"),
    "a step of an old epoch": (lambda s: s.take(replace(STEP, epoch=2, step=6)), "of epoch 2, not 3"),
    "a step of a coming epoch": (lambda s: s.take(replace(STEP, epoch=4, step=6)), "of epoch 4, not 3"),
    "samples": (lambda s: s.take(Sampled(3, 5, ())), "to a stage that does not drive"),
    "a failure of an old epoch": (lambda s: s.take(StepFailed(2, 5, "x")), "of epoch 2, not 3"),
    "a daemon's message": (lambda s: s.take(EngineTrouble("x")), "out of place"),
    "a step from the stage behind": (lambda s: s.take(replace(STEP, step=6), s.after), "out of place"),
    "a step of a stranger": (lambda s: s.take(replace(STEP, step=6), FakeLink(STRANGER)), "without being part"),
    "a hundred steps again": (lambda s: [s.take(STEP) for _ in range(100)], "sent Step 5 after 5"),
}


@pytest.mark.parametrize("what", TO_SECOND)
async def test_what_the_second_stage_does_not_take(second: Stage, what: str, caplog: pytest.LogCaptureFixture) -> None:
    act, says = TO_SECOND[what]
    second.take(STEP)
    assert (await answer_of(second)).step == 5
    act(second)
    [line] = refusals(caplog)
    assert says in line
    second.take(replace(STEP, step=9))
    assert (await answer_of(second)).step == 9
    assert second.engine.steps == 2
    assert second.told == []


TO_FIRST: dict[str, tuple[Callable[[Stage], None], str]] = {
    "samples that nobody waits for": (lambda s: s.take(Sampled(3, 77, ())), "for step 77, which is not under way"),
    "samples of an old epoch": (lambda s: s.take(Sampled(2, 0, ())), "of epoch 2, not 3"),
    "a failure that is none": (lambda s: s.take(StepFailed(3, 77, "x")), "for step 77, which is not under way"),
    "a step": (lambda s: s.take(STEP), "to the stage that drives"),
}


@pytest.mark.parametrize("what", TO_FIRST)
async def test_what_the_first_stage_does_not_take(first: Stage, what: str, caplog: pytest.LogCaptureFixture) -> None:
    act, says = TO_FIRST[what]
    asked = Generate("i", 3, (1, 2), SamplingParams(temperature=0.0, prompt_tokens=2), 1, ())
    stream = first.epoch.generate(asked)
    token = asyncio.ensure_future(cast(Any, anext(stream)))
    async with asyncio.timeout(10):
        step = await first.after.sent.get()
    assert isinstance(step, Step)
    act(first)
    [line] = refusals(caplog)
    assert says in line
    first.take(Sampled(3, step.step, (TokenChoice(step.chunks[0].seq, 2, 7, -0.5),)))
    assert await token == Token(7, -0.5)
    # The same samples again: the step is not under way any more.
    first.take(Sampled(3, step.step, (TokenChoice(step.chunks[0].seq, 2, 8, -0.5),)))
    assert not [message for message in first.told if isinstance(message, EngineTrouble)]


async def test_only_the_node_that_the_owner_named_may_join(second: Stage, caplog: pytest.LogCaptureFixture) -> None:
    for node, epoch, code in ((STRANGER, 3, "no_place"), (BEFORE, 3, "no_place"), (BEFORE, 2, "stale_epoch")):
        with pytest.raises(RemoteError) as refused:
            second.join(FakeLink(node), epoch)
        assert refused.value.code == code
    assert len(refusals(caplog)) == 2, "one of each node"


async def test_who_joins_before_the_owner_has_named_the_node_is_looked_at_then(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stage, strangers = Stage(first=False), [FakeLink(STRANGER) for _ in range(MAX_EARLY - 1)]
    for link in (*strangers, stage.before):
        stage.join(link)
        stage.take(RingBeat(True), link)
    with pytest.raises(RemoteError, match="no_place"):
        stage.join(FakeLink(STRANGER))
    await stage.connect()
    async with asyncio.timeout(10):
        while not all(link.closed for link in strangers):  # noqa: ASYNC110
            await asyncio.sleep(0)
    assert not stage.before.closed
    assert len(refusals(caplog)) == 1
    stage.take(STEP)
    assert (await answer_of(stage)).step == 5
    stage.epoch.leave()
