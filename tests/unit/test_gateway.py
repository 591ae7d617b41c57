"""The entry node's side of a request, with drivers that are lost, stand still or refuse: no token lost, none twice."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any, cast

import pytest
from support.link_fakes import eventually
from support.tiny_tokenizers import byte_level_metadata

from swarmd.discovery.records import InstanceRecord, InstanceState, ModelSummary
from swarmd.node.cluster.signal import Signal
from swarmd.node.engine.sampling_params import SamplingParams
from swarmd.node.models.tokenizer import Tokenizer
from swarmd.node.serving.gateway import Gateway, Prepared
from swarmd.node.serving.generation import Ending, GenerationError, GenerationRequest, Piece
from swarmd.node.serving.messages import Finished, Generate, Token
from swarmd.node.serving.recovery import Patience
from swarmd.transport.link import LinkClosed, RemoteError
from swarmd.transport.streams import RemoteStream

TOKENIZER = Tokenizer.from_gguf(byte_level_metadata())
PROMPT = [5, 6, 7]
ANSWER = TOKENIZER.encode("Once upon a time there was a lighthouse", add_special=False)
MODEL = ModelSummary("m", "0" * 64, 1, 100, "llama")
PATIENCE = Patience(nobody=0.3, failing=0.3, loading=0.3, short=0.05, unnoticed=2.0, silent=0.1)


class Driver:
    """A driver that gives `count` tokens of the answer, going on where the request is, and then does as `then` says:
    an error to end with, or None to stand still."""

    def __init__(self, count: int, then: Exception | None) -> None:
        self.count, self.then = count, then
        self.asked: list[Generate] = []
        self.abandoned = 0

    def stream(self, order: Generate) -> RemoteStream:
        return RemoteStream(cast(Any, self), order, b"")

    async def open_stream(self, stream: RemoteStream, message: Generate, payload: bytes) -> int:
        self.asked.append(message)
        done = len(message.tokens) - len(PROMPT)
        assert list(message.tokens) == PROMPT + ANSWER[:done]
        assert message.max_tokens == len(ANSWER) - done
        for token in ANSWER[done : done + self.count]:
            stream.deliver(Token(token, 0.0))
        if done + self.count >= len(ANSWER):
            stream.deliver(Finished("length"))
            stream.finish(None)
        elif self.then is not None:
            stream.finish(self.then)
        return len(self.asked)

    def abandon_stream(self, stream_id: int) -> None:
        self.abandoned += 1

    def grant(self, stream_id: int, items: int) -> None:
        pass


class Swarm:
    """One instance whose driver in epoch n is the n-th; `record` is what the entry node knows."""

    def __init__(self, *drivers: Driver, **bounds: int) -> None:
        self.drivers = dict(enumerate(drivers, start=1))
        self.changed = Signal()
        self.record: InstanceRecord | None = InstanceRecord("i", MODEL, InstanceState.READY, 1)
        self.gateway = Gateway(
            lambda name: self.record, cast(Any, None), self.link, cast(Any, None), self.changed, PATIENCE, **bounds
        )

    async def link(self, record: InstanceRecord) -> Any:
        return self.drivers[record.epoch]

    def become(self, epoch: int, state: InstanceState = InstanceState.READY, missing: int = 0) -> None:
        self.record = InstanceRecord("i", MODEL, state, epoch, reason="too little", missing_bytes=missing)
        self.changed.notify()

    async def answer(self) -> tuple[str, list[str]]:
        request = GenerationRequest("m", SamplingParams(), None, prompt="?")
        assert self.record is not None
        prepared = Prepared(request, self.record, cast(Any, Front()), PROMPT, len(ANSWER))
        texts, tokens = [], []
        async with asyncio.timeout(10), aclosing(self.gateway.stream(prepared)) as items:
            async for item in items:
                if isinstance(item, Ending):
                    assert item.completion_tokens == len(ANSWER)
                    break
                assert isinstance(item, Piece)
                texts.append(item.text)
                tokens += [token.text for token in item.tokens]
        return "".join(texts), tokens


class Front:
    tokenizer = TOKENIZER


async def asked(driver: Driver, answering: asyncio.Task[Any]) -> None:
    """Wait until a driver is asked; raises what ended the answer before that."""
    await eventually(lambda: driver.asked or answering.done(), seconds=5)
    if not driver.asked:
        raise AssertionError(f"the answer ended: {answering.result()}")


async def undisturbed() -> tuple[str, list[str]]:
    return await Swarm(Driver(1000, None)).answer()


@pytest.mark.parametrize(
    "loss",
    [RemoteError("stage_lost", "gone"), RemoteError("stale_epoch", "moved"), LinkClosed("reset")],
    ids=["stage", "moved", "link"],
)
async def test_an_answer_goes_on_where_it_was_lost(loss):
    swarm = Swarm(Driver(3, loss), Driver(0, loss), Driver(4, loss), Driver(1000, None))
    task = asyncio.create_task(swarm.answer())
    for epoch in (2, 3, 4):
        await asked(swarm.drivers[epoch - 1], task)
        swarm.become(epoch, InstanceState.LOADING)
        await asyncio.sleep(0)
        swarm.become(epoch)
    assert await task == await undisturbed()


async def test_a_driver_that_stands_still_is_left_when_another_epoch_serves():
    swarm = Swarm(Driver(5, None), Driver(1000, None))
    task = asyncio.create_task(swarm.answer())
    await asked(swarm.drivers[1], task)
    swarm.become(2)
    assert await task == await undisturbed()
    assert swarm.drivers[1].abandoned == 1, "and told so, should it go on"


async def test_a_driver_that_stands_still_while_memory_is_lacking_ends_in_an_error():
    swarm = Swarm(Driver(5, None))
    task = asyncio.create_task(swarm.answer())
    await asked(swarm.drivers[1], task)
    swarm.become(1, InstanceState.WAITING, missing=1000)
    with pytest.raises(GenerationError) as failed:
        await task
    assert (failed.value.code, failed.value.message) == ("not_enough_memory", "too little")


async def test_when_only_the_link_was_lost_the_same_driver_goes_on():
    driver = Driver(6, LinkClosed("reset"))
    assert await Swarm(driver).answer() == await undisturbed()
    assert len(driver.asked) == -(-len(ANSWER) // 6)


@pytest.mark.parametrize(
    ("said", "code", "unavailable"),
    [
        ("overloaded", "overloaded", False),
        ("queue_timeout", "overloaded", True),
        ("engine_error", "engine_error", False),
        ("unfit", "invalid_request", False),
    ],
)
async def test_what_a_driver_refuses_is_said_at_once(said, code, unavailable):
    with pytest.raises(GenerationError) as failed:
        await Swarm(Driver(0, RemoteError(said, "no"))).answer()
    assert (failed.value.code, failed.value.unavailable) == (code, unavailable)
    assert (failed.value.retry_after is not None) == (code == "overloaded")


async def test_no_more_answers_are_taken_than_the_node_can_carry():
    swarm = Swarm(Driver(3, None), most_streams=2)
    request = GenerationRequest("m", SamplingParams(), None, prompt="?")
    tasks = [asyncio.create_task(swarm.answer()) for _ in range(2)]
    await eventually(lambda: swarm.gateway.streams == 2)
    for refused in (swarm.gateway.prepare(request), swarm.answer()):
        with pytest.raises(GenerationError) as full:
            await refused
        assert (full.value.code, full.value.unavailable, full.value.retry_after) == ("overloaded", True, 2)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert swarm.gateway.streams == 0
    swarm.drivers[1].count = 1000
    assert await swarm.answer() == await undisturbed()


async def test_requests_that_are_still_being_read_count_too():
    swarm = Swarm(Driver(1000, None), most_streams=2)
    swarm.become(1, InstanceState.LOADING)
    request = GenerationRequest("m", SamplingParams(), None, prompt="?")
    tasks = [asyncio.create_task(swarm.gateway.prepare(request)) for _ in range(2)]
    await asyncio.sleep(0)  # both wait for the model
    with pytest.raises(GenerationError) as full:
        await swarm.gateway.prepare(request)
    assert (full.value.code, full.value.unavailable) == ("overloaded", True)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    swarm.become(1)
    assert await swarm.answer() == await undisturbed()


async def test_an_answer_that_has_begun_waits_for_a_place_in_the_next_epoch():
    full = Driver(0, RemoteError("overloaded", "too many"))
    swarm = Swarm(Driver(3, RemoteError("stage_lost", "gone")), full)
    task = asyncio.create_task(swarm.answer())
    await asked(swarm.drivers[1], task)
    swarm.become(2)
    await asked(full, task)
    full.count = 1000
    assert await task == await undisturbed()


async def test_who_ended_three_pipelines_without_a_token_ends():
    lost = RemoteError("stage_lost", "signal 11")
    swarm = Swarm(*(Driver(0, lost) for _ in range(3)))
    task = asyncio.create_task(swarm.answer())
    for epoch in (2, 3, 4):
        await asked(swarm.drivers[epoch - 1], task)
        swarm.become(epoch)
    with pytest.raises(GenerationError, match="ended 3 pipelines"):
        await task
