"""The public state feed and the actions of the page and the command line: `/api/...`."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Annotated

import msgspec
from aiohttp import web

from swarmd.node.api.errors import ApiError, json_response
from swarmd.node.api.openai_schema import parse
from swarmd.node.api.view import NODE, NodeView, guarded
from swarmd.node.config import is_loopback
from swarmd.node.models.catalog import is_path

# A change is shown at once; a storm of changes no more often than this.
FEED_SECONDS = 0.25
KEEPALIVE_SECONDS = 10.0
_PROXIED = ("Forwarded", "X-Forwarded-For", "X-Real-IP", "Via")

_CLOSING: web.AppKey[asyncio.Event] = web.AppKey("closing", asyncio.Event)


class InstanceRequest(msgspec.Struct, forbid_unknown_fields=True):
    """`POST /api/instances`: have a model served."""

    model: Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]


def add_routes(app: web.Application) -> None:
    """`/api/...`."""
    app[_CLOSING] = asyncio.Event()
    app.on_shutdown.append(_end_feeds)
    app.router.add_get("/api/swarm", swarm)
    app.router.add_get("/api/events", events, allow_head=False)
    app.router.add_post("/api/instances", create_instance)


async def swarm(request: web.Request) -> web.Response:
    """`GET /api/swarm`: nodes, instances and models as this node sees them."""
    return json_response(request.app[NODE].swarm_state())


async def create_instance(request: web.Request) -> web.Response:
    """`POST /api/instances`: answers with the instance's model name when it exists; the feed tells when it is ready."""
    asked = parse(await request.read(), InstanceRequest)
    if is_path(asked.model) and not _is_of_this_machine(request):
        message = "a path is for programs on the node's own machine (`swarmd run PATH` there); name a model"
        raise ApiError(403, message, param="model", code="path_not_allowed")
    name = await guarded(request.app[NODE].launch(asked.model))
    return json_response({"model": name}, status=202)


def _is_of_this_machine(request: web.Request) -> bool:
    """Whether the connection comes from here, and not through a proxy that may speak for anybody."""
    if any(name in request.headers for name in _PROXIED) or request.transport is None:
        return False
    peer, own = (request.transport.get_extra_info(name) for name in ("peername", "sockname"))
    return bool(peer and own) and (is_loopback(peer[0].removeprefix("::ffff:")) or peer[0] == own[0])


async def events(request: web.Request) -> web.StreamResponse:
    """`GET /api/events`: server-sent events, `swarm` with the whole state at once and after changes, `progress`."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(request)
    with contextlib.suppress(ConnectionError):
        await _feed(request.app[NODE], response, request.app[_CLOSING])
    return response


async def _feed(node: NodeView, response: web.StreamResponse, closing: asyncio.Event) -> None:
    told, told_progress = b"", ()
    while not closing.is_set():
        state, progress = msgspec.json.encode(node.swarm_state()), node.progress()
        if state == told and not progress:
            # Nothing was awaited since the state was read, so no change is missed.
            if not await node.changed.wait(KEEPALIVE_SECONDS):
                await response.write(b": still here\n\n")
            continue
        if state != told:
            await response.write(b"event: swarm\ndata: " + state + b"\n\n")
            told = state
        if progress != told_progress:
            for one in progress:
                await response.write(b"event: progress\ndata: " + msgspec.json.encode(one) + b"\n\n")
            told_progress = progress
        await asyncio.sleep(FEED_SECONDS)


async def _end_feeds(app: web.Application) -> None:
    """A server that closes waits for its open answers; a feed would go on for ever."""
    app[_CLOSING].set()
    app[NODE].changed.notify()
