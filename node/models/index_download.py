"""Bringing a wheel over HTTPS from a Python package index, for environments without pip.

Speaks the simple repository API in its JSON form (PEP 691, https://peps.python.org/pep-0691/).
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import ssl
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import aiohttp
import msgspec

from swarmd.node.models.disk import BLOCK

_JSON = "application/vnd.pypi.simple.v1+json"
_MAX_PAGE = 16 << 20
_HEX64 = re.compile(r"[0-9a-f]{64}")


class IndexDownloadError(Exception):
    """The index could not be reached or has no such wheel."""


class _File(msgspec.Struct):
    filename: str
    url: str
    hashes: dict[str, str] = {}
    size: int | None = None


class _Project(msgspec.Struct):
    files: list[_File]


def index_url() -> str:
    """The index that the environment names (PIP_INDEX_URL, UV_DEFAULT_INDEX, UV_INDEX_URL), else PyPI. pip's
    configuration files are not read here: who has them has pip."""
    for name in ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL"):
        if url := os.environ.get(name):
            return url
    return "https://pypi.org/simple"


async def index_download(project: str, version: str, directory: Path, report: Callable[[int, int], None]) -> None:
    """Put the wheel of `project` at `version` into `directory`; `report(done, total)` in bytes.

    Proxies (HTTPS_PROXY, ...) and certificates (SSL_CERT_FILE, PIP_CERT) of the environment apply. What an
    interrupted download has brought is kept under the wheel's hash and continued by an HTTP range. Raises
    IndexDownloadError.
    """
    index = index_url()
    host = urlsplit(index).hostname or "the package index"  # never the whole address: it may hold a password
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
    connector = aiohttp.TCPConnector(ssl=_tls_context())
    try:
        async with aiohttp.ClientSession(timeout=timeout, connector=connector, trust_env=True) as session:
            file = await _find_wheel(session, index, project, version)
            await _fetch(session, file, directory, report)
    except (aiohttp.ClientError, TimeoutError, ConnectionError) as exc:
        raise IndexDownloadError(f"{host}: {type(exc).__name__}: {_short(exc)}") from exc


async def _find_wheel(session: aiohttp.ClientSession, index: str, project: str, version: str) -> _File:
    name = re.sub(r"[-_.]+", "-", project).lower()
    page = f"{index.rstrip('/')}/{name}/"
    async with session.get(page, headers={"Accept": _JSON}) as response:
        if response.status != 200:
            raise IndexDownloadError(f"the package index answered {response.status} for {name}")
        body = await response.content.read(_MAX_PAGE)
    try:
        listing = msgspec.json.decode(body, type=_Project)
    except msgspec.DecodeError as exc:
        raise IndexDownloadError(f"the package index does not speak the JSON simple API ({exc})") from exc
    start = f"{name.replace('-', '_')}-{version}-"
    for file in listing.files:
        if file.filename.lower().startswith(start) and re.fullmatch(r"[\w.+-]+\.whl", file.filename):
            file.url = urljoin(page, file.url)
            return file
    raise IndexDownloadError(f"the package index has no wheel of {name} {version}")


async def _fetch(
    session: aiohttp.ClientSession, file: _File, directory: Path, report: Callable[[int, int], None]
) -> None:
    expected = file.hashes.get("sha256", "").lower()
    resumable = _HEX64.fullmatch(expected) is not None
    part = directory / (f"{expected}.part" if resumable else "wheel.part")
    have = part.stat().st_size if resumable and part.exists() else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    async with session.get(file.url, headers=headers) as response:
        if response.status not in (200, 206, 416):
            raise IndexDownloadError(f"the package index answered {response.status} for {file.filename}")
        if response.status == 200:
            have = 0
        if response.status != 416:  # 416: all of it is here already
            total = file.size or have + (response.content_length or 0)
            await _write_body(response, part, have, total, report)
    if resumable and await asyncio.to_thread(_sha256, part) != expected:
        part.unlink()
        raise IndexDownloadError(f"{file.filename} arrived damaged (its SHA-256 differs from the index's)")
    part.replace(directory / file.filename)


async def _write_body(
    response: aiohttp.ClientResponse, part: Path, have: int, total: int, report: Callable[[int, int], None]
) -> None:
    file = await asyncio.to_thread(part.open, "ab" if have else "wb")
    try:
        async for block in response.content.iter_chunked(BLOCK):
            await asyncio.to_thread(file.write, block)
            have += len(block)
            if total and have > total:
                raise IndexDownloadError("the package index sent more bytes than it announced")
            report(have, total)
    finally:
        file.close()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tls_context() -> ssl.SSLContext:
    authorities = os.environ.get("PIP_CERT")
    return ssl.create_default_context(cafile=authorities if authorities and Path(authorities).is_file() else None)


def _short(exc: BaseException) -> str:
    return re.sub(r"//[^/@\s]*@", "//", str(exc))[:200] or "no answer"
