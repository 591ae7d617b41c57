"""Clients of a virtual swarm: each asks at some node and checks every token that comes back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from support.fake_pipeline import VOCABULARY, solo_run
from support.virtual_swarm.stages import FAKE_STAGES, Process

from swarmd.discovery.records import InstanceRecord
from swarmd.node.engine.sampling_params import SamplingParams
from swarmd.node.models.token_texts import TokenTexts
from swarmd.node.serving.generation import Ending, GenerationError, GenerationRequest, Piece
from swarmd.node.serving.messages import Generate
from swarmd.transport.link import LinkClosed, RemoteError

if TYPE_CHECKING:
    from support.virtual_swarm.node import VirtualNode

CONNECT_SECONDS = 3.0
# What any request may take: its deadline, and what comes before it (a model is brought, and gets ready).
PATIENCE_SECONDS = 130.0
# Who has got no token for so long, though its instance was ready for as long, was forgotten.
STARVED_SECONDS = 30.0
TEXTS = TokenTexts(lambda token: b"%d " % token, VOCABULARY, eos_ids=frozenset(), hidden=frozenset(), strip_space=False)


class Front:
    """As `ModelText`, for prompts that are tokens."""

    tokenizer = TEXTS


class Items:
    """As `RemoteStream`: what a driver sends to one request."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Struct | Exception] = asyncio.Queue()

    def put(self, item: Struct | Exception) -> None:
        self._queue.put_nowait(item)

    def abandon(self, reason: str) -> None:
        """Wait no longer."""
        self.put(LinkClosed(reason))

    def arrived(self) -> list[Struct]:
        return []

    def __aiter__(self) -> AsyncIterator[Struct]:
        return self

    async def __anext__(self) -> Struct:
        item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item


@dataclass(eq=False)
class DriverLink:
    """As a link with a driver process."""

    entry: VirtualNode
    process: Process

    @asynccontextmanager
    async def stream(self, order: Generate) -> AsyncGenerator[Items]:
        items, world = Items(), self.entry.world
        world.open_streams.setdefault((self.entry, self.process.node.id), {})[items] = None
        pump = asyncio.ensure_future(self._pump(order, items))
        try:
            yield items
        finally:
            pump.cancel()
            del world.open_streams[self.entry, self.process.node.id][items]

    async def _pump(self, order: Generate, items: Items) -> None:
        world, here = self.entry.world, self.process.node
        await self._travel()
        try:
            if not self.process.alive:
                raise LinkClosed("the driver has ended")
            outcomes = self.process.generate(order)
            try:
                async for outcome in outcomes:
                    await self._travel()
                    items.put(outcome)
            finally:
                await outcomes.aclose()
            return
        except (RemoteError, LinkClosed) as error:
            lost = error
        if here.closed or not self.process.alive:
            lost = LinkClosed("the driver's process ended")
        await self._travel()
        if world.network.reach(self.entry.id, here.id):
            items.put(lost)

    async def _travel(self) -> None:
        """Until the path is free and both ends are awake."""
        network = self.entry.network
        await asyncio.sleep(network.delay(self.entry.id, self.process.node.id))
        while not (network.reach(self.entry.id, self.process.node.id) and not self.process.node.frozen):  # noqa: ASYNC110
            await asyncio.sleep(0.1)


class DriverLinks:
    """As the daemon's, for one entry node."""

    def __init__(self, entry: VirtualNode) -> None:
        self._entry = entry

    async def __call__(self, record: InstanceRecord) -> DriverLink:
        network, world = self._entry.network, self._entry.world
        stage = record.stages[0] if record.stages else None
        if stage is None or not stage.addresses:
            raise RemoteError("unreachable", "the instance has no driver at present")
        process = world.processes.by_port.get(stage.addresses[0].port)
        if not network.reach(self._entry.id, stage.node) or (process is not None and process.node.frozen):
            await asyncio.sleep(CONNECT_SECONDS)
            raise RemoteError("unreachable", "the driver does not answer")
        await asyncio.sleep(network.delay(self._entry.id, stage.node))
        if process is None or process.node.id != stage.node:
            raise RemoteError("unreachable", "the driver cannot be reached: nobody listens")
        return DriverLink(self._entry, process)


@dataclass(eq=False)
class Client:
    """One request and what came of it. It gives up after `PATIENCE_SECONDS`, which no request may need."""

    entry: str
    model: str
    prompt: list[int]
    count: int
    text: str = ""
    outcome: str = ""
    started: float = 0.0
    over: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, node: VirtualNode) -> None:
        """Ask; `outcome` is `done`, the code of an error, `hung` without either, or `starved` beside a sound driver."""
        loop = node.world.loop
        self.started = heard = loop.time()
        expected = "".join(f"{token} " for token in solo_run(self.prompt, FAKE_STAGES, self.count))
        request = GenerationRequest(self.model, SamplingParams(), self.count, prompt=tuple(self.prompt))
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                prepared = await node.gateway.prepare(request)
                async for piece in node.gateway.stream(prepared):
                    heard = loop.time()
                    if isinstance(piece, Piece):
                        self.text += piece.text
                    assert expected.startswith(self.text), "a token was lost, doubled or changed"
                    if isinstance(piece, Ending):
                        assert (self.text, piece.completion_tokens) == (expected, self.count)
                        self.outcome = "done"
        except GenerationError as error:
            late = error.code == "deadline" and loop.time() - heard > STARVED_SECONDS
            self.outcome = "starved" if late and node.world.serves(node, self.model) else error.code
        except TimeoutError:
            self.outcome = "hung"


def client(rng: Any, entry: str, model: str) -> Client:
    """A request at random."""
    prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 40))]
    return Client(entry, model, prompt, rng.randint(1, 60))
