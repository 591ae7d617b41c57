"""The dashboard's files, health and metrics."""

from __future__ import annotations

from aiohttp import web

from swarmd.dashboard.assets import CONTENT_SECURITY_POLICY, FALLBACK_PAGE, static_dir
from swarmd.node.api.errors import ApiError, json_response
from swarmd.node.api.security import TRUSTED
from swarmd.node.api.view import NODE

_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def add_routes(app: web.Application) -> None:
    """`/`, its assets, `/health` and `/metrics`."""
    app.router.add_get("/", page)
    app.router.add_get("/favicon.svg", favicon)
    app.router.add_get("/assets/{name}", asset)
    app.router.add_get("/health", health)
    app.router.add_get("/metrics", metrics)


async def page(request: web.Request) -> web.StreamResponse:
    """The dashboard, or how to build it."""
    folder = static_dir()
    if folder is None:
        return web.Response(text=FALLBACK_PAGE, content_type="text/html", headers=_HEADERS)
    return web.FileResponse(folder / "index.html", headers=_HEADERS)


async def favicon(request: web.Request) -> web.StreamResponse:
    """The page's icon."""
    return _file("favicon.svg")


async def asset(request: web.Request) -> web.StreamResponse:
    """A script or style of the page. The route's pattern admits no slash, so no path leads out."""
    return _file(f"assets/{request.match_info['name']}")


async def health(request: web.Request) -> web.Response:
    """`GET /health`: the daemon answers, and (to those who may know) which models do."""
    if not request[TRUSTED]:
        return json_response({"status": "ok"})
    state = request.app[NODE].swarm_state()
    ready = [instance["model"] for instance in state["instances"] if instance["state"] == "ready"]
    return json_response({"status": "ok", "ready": ready})


async def metrics(request: web.Request) -> web.Response:
    """`GET /metrics`: Prometheus' text format."""
    return web.Response(body=request.app[NODE].metrics(), headers={"Content-Type": "text/plain; version=0.0.4"})


def _file(name: str) -> web.StreamResponse:
    folder = static_dir()
    path = folder / name if folder is not None else None
    if path is None or len(name) > 255 or ".." in path.parts or not path.is_file():
        raise ApiError(404, "there is no such file", code="not_found")
    return web.FileResponse(path, headers=_HEADERS)
