"""The HTTP server of a node: routes, errors in one shape, and the port."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Awaitable, Callable
from typing import cast

from aiohttp import web

from swarmd.node.api import openai, pages, swarm
from swarmd.node.api.errors import ApiError
from swarmd.node.api.event_stream import LIMITS, StreamLimits
from swarmd.node.api.malformed import http_log
from swarmd.node.api.security import add_headers, guard
from swarmd.node.api.view import NODE, NodeView
from swarmd.node.config import ConfigError
from swarmd.node.options import DEFAULT_LISTEN

log = logging.getLogger("swarmd.api")

MAX_BODY_BYTES = 16 << 20
SHUTDOWN_SECONDS = 2.0
MAX_CONNECTIONS = 512
IDLE_SECONDS = 60.0
"""After which a connection is closed that has not asked for anything, or not yet for anything whole."""
# Who listens everywhere is reached from this machine by loopback.
_LOOPBACK_OF = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def make_app(
    node: NodeView,
    *,
    api_key: str | None,
    known_hosts: frozenset[str],
    limits: StreamLimits = StreamLimits(),  # noqa: B008 - frozen
) -> web.Application:
    """The whole API as an aiohttp application."""
    app = web.Application(middlewares=[_errors, guard(api_key, known_hosts)], client_max_size=MAX_BODY_BYTES)
    app[NODE] = node
    app[LIMITS] = limits
    app.on_response_prepare.append(add_headers)
    for part in (openai, swarm, pages):
        part.add_routes(app)
    return app


class HttpServer:
    """The application on a port."""

    def __init__(self, app: web.Application) -> None:
        # A handler is cancelled when its client leaves, which cancels the generation on every stage.
        self._runner = web.AppRunner(
            app,
            access_log=None,
            logger=http_log,
            handler_cancellation=True,
            shutdown_timeout=SHUTDOWN_SECONDS,
            keepalive_timeout=IDLE_SECONDS,
        )
        self._listener: asyncio.Server | None = None
        # Where this machine's own programs reach it, once it listens.
        self.url = ""

    async def start(self, listen: tuple[str, int] | None) -> None:
        """Listen. None: the default port, or any free one if that is taken. Raises ConfigError."""
        await self._runner.setup()
        host, port = listen or _default()
        try:
            await self._listen(host, port)
        except OSError as error:
            if listen is None and error.errno == errno.EADDRINUSE:
                await self._listen(host, 0)
                return
            reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror or error})"
            raise ConfigError(f"the address {host}:{port} {reason}; choose another with --listen") from None

    async def close(self) -> None:
        """Stop answering; open streams are cut after a moment."""
        if self._listener is not None:
            self._listener.close()
        await self._runner.cleanup()

    async def _listen(self, host: str, port: int) -> None:
        self._listener = await asyncio.get_running_loop().create_server(self._protocol, host, port)
        bound = self._listener.sockets[0].getsockname()[1]
        local = _LOOPBACK_OF.get(host, host)
        self.url = f"http://{f'[{local}]' if ':' in local else local}:{bound}"

    def _protocol(self) -> asyncio.BaseProtocol:
        server = self._runner.server
        if server is None or len(server.connections) >= MAX_CONNECTIONS:
            return _Full()
        return server()


class _Full(asyncio.Protocol):
    """A connection too many: it ends at once, so that this process keeps file descriptors for its links."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).abort()


def _default() -> tuple[str, int]:
    host, _, port = DEFAULT_LISTEN.rpartition(":")
    return host, int(port)


@web.middleware
async def _errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Every failure as JSON in one shape; what was not foreseen is logged and named an internal error."""
    try:
        return await handler(request)
    except ApiError as error:
        return error.response()
    except web.HTTPRequestEntityTooLarge:
        return ApiError(413, f"the body is larger than {MAX_BODY_BYTES >> 20} MiB", code="too_large").response()
    except web.RequestPayloadError:
        return ApiError(400, "the body is not what its headers say", code="invalid_body").response()
    except web.HTTPMethodNotAllowed as error:
        allowed = ", ".join(sorted(error.allowed_methods))
        refusal = ApiError(405, f"{request.path[:200]} answers {allowed}", code="method_not_allowed").response()
        refusal.headers["Allow"] = allowed
        return refusal
    except web.HTTPNotFound:
        return ApiError(404, f"there is nothing at {request.path[:200]}", code="not_found").response()
    except web.HTTPException:
        raise
    except ConnectionError:
        raise
    except Exception:
        log.exception("%s %s failed", request.method, request.path)
        return ApiError(500, "an internal error; the node's log says more", code="internal").response()
