"""A node as the HTTP API sees it, with a script in place of a swarm; the API is the real one, on a real port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

from swarmd.discovery.records import InstanceRecord, InstanceState, ModelSummary
from swarmd.node.api.event_stream import StreamLimits
from swarmd.node.api.server import HttpServer, make_app
from swarmd.node.cluster.signal import Signal
from swarmd.node.models.progress import Progress
from swarmd.node.models.text_process import ModelText
from swarmd.node.serving.gateway import Prepared
from swarmd.node.serving.generation import Ending, GenerationError, GenerationRequest, Piece, PieceToken

MODEL = "fake:1b"


def piece(text: str, logprob: float = -0.5, top: tuple[tuple[str, float], ...] = ()) -> Piece:
    """One token with its text."""
    return Piece(text, (PieceToken(text, logprob, top),))


class FakeNode:
    """Answers every request with `script`, an error in it is raised there.

    `refusal` is raised by `prepare` and `launch`. While `hold` is cleared, an answer stops after its first item.
    `left` is set when a client leaves in the middle of an answer. `requests` are those that were prepared.
    """

    def __init__(self, *script: Piece | Ending | Exception) -> None:
        self.script = script or (piece("Paris"), piece("."), Ending("stop", 7, 2))
        self.refusal: GenerationError | None = None
        self.requests: list[GenerationRequest] = []
        self.launched: list[str] = []
        self.state: dict[str, Any] = {"nodes": [], "instances": []}
        self.under_way: tuple[Progress, ...] = ()
        self.changed = Signal()
        self.hold = asyncio.Event()
        self.hold.set()
        self.left = asyncio.Event()

    async def prepare(self, request: GenerationRequest) -> Prepared:
        self.requests.append(request)
        if self.refusal is not None:
            raise self.refusal
        record = InstanceRecord("i", ModelSummary(MODEL, "0" * 64, 1, 4096, "llama"), InstanceState.READY, 1)
        return Prepared(request, record, cast(ModelText, None), [1], 16)

    async def observe(self, prepared: Prepared) -> AsyncGenerator[Piece | Ending]:
        try:
            for item in self.script:
                if isinstance(item, Exception):
                    raise item
                yield item
                await self.hold.wait()
        except (GeneratorExit, asyncio.CancelledError):
            self.left.set()
            raise

    def served_models(self) -> list[tuple[str, int]]:
        return [(MODEL, 1_700_000_000)]

    def swarm_state(self) -> dict[str, Any]:
        return self.state

    def progress(self) -> tuple[Progress, ...]:
        return self.under_way

    async def launch(self, name: str) -> str:
        self.launched.append(name)
        if self.refusal is not None:
            raise self.refusal
        return MODEL

    def metrics(self) -> bytes:
        return b"swarmd_nodes_alive 1.0\n"


@asynccontextmanager
async def serving(
    node: FakeNode,
    *,
    api_key: str | None = None,
    known_hosts: frozenset[str] = frozenset(),
    limits: StreamLimits = StreamLimits(),  # noqa: B008 - frozen
) -> AsyncIterator[str]:
    """The real API over a fake node; its URL."""
    server = HttpServer(make_app(node, api_key=api_key, known_hosts=known_hosts, limits=limits))
    await server.start(("127.0.0.1", 0))
    try:
        yield server.url
    finally:
        node.hold.set()
        await server.close()
