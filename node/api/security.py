"""Who may talk to the endpoint: no web page from elsewhere, nobody without the API key if there is one, and nothing
that a browser sends without asking first."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import web

from swarmd.node.api.errors import ApiError
from swarmd.node.api.foreign import refusal_of
from swarmd.node.api.key_guard import KeyGuard

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

TRUSTED: web.RequestKey[bool] = web.RequestKey("trusted", bool)
"""Whether whoever asks may be told more than that the node lives."""

BODY_SECONDS = 60.0
# The page itself and liveness carry no secrets, and the page has to be there to ask for the key.
_OPEN_PREFIXES = ("/assets/", "/favicon")
_OPEN_PATHS = frozenset({"/", "/health"})
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def guard(api_key: str | None, known_hosts: frozenset[str]) -> Callable[..., Awaitable[web.StreamResponse]]:
    """A middleware that refuses foreign hosts and pages, bodies that are not JSON, and requests without the key if
    there is one. `known_hosts` as `refusal_of` takes them."""
    keys = None if api_key is None else KeyGuard(api_key)

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        headers = request.headers
        refusal = refusal_of(
            request.raw_path,
            headers.getall("Host", []),
            headers.getall("Origin", []),
            headers.get("Sec-Fetch-Site"),
            known_hosts,
            is_visit=request.method == "GET" and request.path == "/",
        )
        if refusal is not None:
            raise ApiError(refusal.status, refusal.message, code=refusal.code)
        request[TRUSTED] = keys is None
        if keys is not None and (not _is_open(request.path) or "Authorization" in headers):
            await keys.check(request)
            request[TRUSTED] = True
        # Forms and simple cross-site requests can have every type but this one, also in browsers that send no Origin.
        if request.match_info.http_exception is None and request.method not in ("GET", "HEAD"):
            if request.content_type != "application/json":
                raise ApiError(415, "send the body as JSON, with Content-Type: application/json", code="not_json")
            await _read(request)
        return await handler(request)

    return check


async def _read(request: web.Request) -> None:
    """Have the whole body come in, in time; the handler finds it read."""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            await request.read()
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {BODY_SECONDS:.0f} s", code="too_slow") from None


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """What browsers are told about every answer: no guessing of types, no embedding, no keeping. A signal handler of
    `on_response_prepare`."""
    for name, value in _HEADERS.items():
        response.headers.setdefault(name, value)


def _is_open(path: str) -> bool:
    return path in _OPEN_PATHS or path.startswith(_OPEN_PREFIXES)
