"""The public state feed and the actions of the page and the command line: `/api/...`."""

from __future__ import annotations

import asyncio
import contextlib

import msgspec
from aiohttp import web

from swarmd.node.api.errors import json_response
from swarmd.node.api.openai_schema import parse
from swarmd.node.api.view import NODE, guarded

# A change is shown at once; a storm of changes no more often than this.
FEED_SECONDS = 0.25
KEEPALIVE_SECONDS = 10.0


class InstanceRequest(msgspec.Struct, forbid_unknown_fields=True):
    """`POST /api/instances`: have a model served."""

    model: str


def add_routes(app: web.Application) -> None:
    """`/api/...`."""
    app.router.add_get("/api/swarm", swarm)
    app.router.add_get("/api/events", events)
    app.router.add_post("/api/instances", create_instance)


async def swarm(request: web.Request) -> web.Response:
    """`GET /api/swarm`: nodes, instances and models as this node sees them."""
    return json_response(request.app[NODE].swarm_state())


async def create_instance(request: web.Request) -> web.Response:
    """`POST /api/instances`: answers when the instance exists; the feed tells when it is ready."""
    asked = parse(await request.read(), InstanceRequest)
    await guarded(request.app[NODE].launch(asked.model))
    return json_response({"model": asked.model}, status=202)


async def events(request: web.Request) -> web.StreamResponse:
    """`GET /api/events`: server-sent events, `swarm` with the whole state at once and after changes, `progress`."""
    node = request.app[NODE]
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(request)
    told = b""
    with contextlib.suppress(ConnectionError):
        while True:
            state = msgspec.json.encode(node.swarm_state())
            if state != told:
                await response.write(b"event: swarm\ndata: " + state + b"\n\n")
                told = state
            for progress in node.progress():
                await response.write(b"event: progress\ndata: " + msgspec.json.encode(progress) + b"\n\n")
            await asyncio.sleep(FEED_SECONDS)
            if not node.progress() and not await node.changed.wait(KEEPALIVE_SECONDS):
                await response.write(b": still here\n\n")
    return response
