"""What the HTTP API sees of a node. It never sees engines or links."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable
from typing import Any, Protocol, TypeVar

from aiohttp import web

from swarmd.node.api.errors import ApiError
from swarmd.node.cluster.signal import Signal
from swarmd.node.models.progress import Progress
from swarmd.node.serving.gateway import Prepared
from swarmd.node.serving.generation import Ending, GenerationError, GenerationRequest, Piece

T = TypeVar("T")


class NodeView(Protocol):
    """The node behind the endpoint."""

    changed: Signal
    """Fires when what `swarm_state` tells may have changed."""

    async def prepare(self, request: GenerationRequest) -> Prepared:
        """Check and tokenize a request. Raises GenerationError; nothing is computed yet."""
        ...

    def observe(self, prepared: Prepared) -> AsyncGenerator[Piece | Ending]:
        """The answer, ended by Ending and counted by the metrics; closing it cancels it. Raises GenerationError."""
        ...

    def served_models(self) -> list[tuple[str, int]]:
        """Names of the models that instances of the swarm serve, each with its first sight (Unix seconds)."""
        ...

    def swarm_state(self) -> dict[str, Any]:
        """The public state feed: what `GET /api/swarm` answers."""
        ...

    def progress(self) -> tuple[Progress, ...]:
        """Downloads under way on this node."""
        ...

    async def launch(self, name: str) -> str:
        """Have a model served; the name of its instance. Waits for a download, which goes on if the caller leaves.

        Raises GenerationError in words for the user.
        """
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
