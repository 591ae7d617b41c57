"""Who may talk to the endpoint: Host and Origin checks against web pages elsewhere, and the API key.

A page on the internet can make a browser send requests to loopback (DNS rebinding, cross-site POST); it cannot choose
the Host header or hide its Origin. See OWASP, "DNS rebinding" and "Cross-site request forgery".
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable

from aiohttp import web

from swarmd.node.api.errors import ApiError

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# The page itself and liveness carry no secrets, and the page has to be there to ask for the key.
_OPEN_PREFIXES = ("/assets/", "/favicon")
_OPEN_PATHS = frozenset({"/", "/health"})


def guard(api_key: str | None, known_hosts: frozenset[str]) -> Callable[..., Awaitable[web.StreamResponse]]:
    """A middleware that refuses foreign hosts and origins, and requests without the key if there is one.

    `known_hosts` are the names, in lower case, beside IP addresses and localhost under which this endpoint is meant to
    be reached.
    """

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        host = _host_of(request.headers.get("Host", ""))
        if not _is_known(host, known_hosts):
            raise ApiError(
                403,
                f"the host {host[:100]!r} is not a name of this node; use its address, or name it with --listen",
                code="foreign_host",
            )
        origin = request.headers.get("Origin")
        if origin is not None and origin.partition("://")[2] != request.headers.get("Host"):
            raise ApiError(403, "a web page of another origin may not use this endpoint", code="foreign_origin")
        if api_key is not None and not _is_open(request.path) and not _has_key(request, api_key):
            raise ApiError(401, "this endpoint wants its API key: Authorization: Bearer KEY", code="invalid_api_key")
        return await handler(request)

    return check


def _has_key(request: web.Request, api_key: str) -> bool:
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), api_key.encode())


def _is_open(path: str) -> bool:
    return path in _OPEN_PATHS or path.startswith(_OPEN_PREFIXES)


def _host_of(header: str) -> str:
    """`name:port`, `name`, `[v6]:port` -> the name, in lower case."""
    header = header.lower()
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.rpartition(":")[0] if header.count(":") == 1 else header


def _is_known(host: str, known: frozenset[str]) -> bool:
    """Rebinding needs a DNS name; an IP literal in Host is what the browser really connected to."""
    if host == "localhost" or host in known:
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
