"""What the HTTP API sees of a node. It never sees engines or links."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable
from typing import Any, Protocol, TypeVar

from aiohttp import web

from swarmd.node.api.errors import ApiError
from swarmd.node.cluster.signal import Signal
from swarmd.node.models.progress import Progress
from swarmd.node.serving.gateway import Gateway, Prepared
from swarmd.node.serving.generation import Ending, GenerationError, Piece

T = TypeVar("T")


class NodeView(Protocol):
    """The node behind the endpoint."""

    gateway: Gateway
    changed: Signal

    def observe(self, prepared: Prepared) -> AsyncIterator[Piece | Ending]:
        """The gateway's stream, counted by the metrics on its way."""
        ...

    def served_models(self) -> list[tuple[str, int]]:
        """Names of the models that instances of the swarm serve, each with the time of its first sight (Unix seconds)."""
        ...

    def swarm_state(self) -> dict[str, Any]:
        """The public state feed: what `GET /api/swarm` answers."""
        ...

    def progress(self) -> tuple[Progress, ...]:
        """Downloads under way on this node."""
        ...

    async def launch(self, name: str) -> None:
        """Have a model served. Raises GenerationError in words for the user."""
        ...

    def metrics(self) -> bytes:
        """Prometheus' text format."""
        ...


NODE: web.AppKey[NodeView] = web.AppKey("node", NodeView)


async def guarded(work: Awaitable[T]) -> T:
    """Await, turning the token stream's errors into the API's."""
    try:
        return await work
    except GenerationError as error:
        raise ApiError.of(error) from error
