"""What the owner of links implements."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable
from typing import TYPE_CHECKING, Protocol

from msgspec import Struct

from swarmd.transport.exchanges import Answer

if TYPE_CHECKING:
    from swarmd.transport.link import Link


class LinkHandler(Protocol):
    """What the owner of an endpoint does with its links.

    Handlers run on the event loop and must not block it.
    """

    async def on_link(self, link: Link) -> None:
        """Both hellos are accepted.

        Nothing is dispatched before this returns, so it must not await an answer.
        """

    def on_message(self, link: Link, message: Struct, payload: bytearray) -> Awaitable[None] | None:
        """A one-way message, in order.

        The link reads on when this returns None, or when what it returns (the coroutine of an `async def`) is done: it
        must not await an answer on this link. A plain function is called straight from the loop's callback, without a
        change of tasks: for what must be quick.
        """

    async def on_request(self, link: Link, message: Struct, payload: bytearray) -> Answer:
        """Answer a request, in a task of its own, cancelled if the asker gives up or the link goes down."""
        ...

    def on_stream(self, link: Link, message: Struct, payload: bytearray) -> AsyncIterator[Struct]:
        """Answer with a stream; its `aclose` is called when the reader leaves or the link goes down."""
        ...

    async def on_closed(self, link: Link, reason: str) -> None:
        """The link is down; called once, and only if `on_link` was."""
