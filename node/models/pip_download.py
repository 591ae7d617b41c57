"""Bringing a wheel with the `pip` of this Python, which knows the machine's index, proxy and certificate
settings."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

_PROGRESS = re.compile(rb"Progress (\d+) of (\d+)\s*")
_TAIL = 8192
_STOP_SECONDS = 5


class PipDownloadError(Exception):
    """pip ended without the wheel; the message is its own last word."""


def has_pip() -> bool:
    """Whether this Python can run pip (environments made by uv, for one, have none)."""
    return importlib.util.find_spec("pip") is not None


async def pip_download(project: str, version: str, directory: Path, report: Callable[[int, int], None]) -> None:
    """Put the wheel of `project` at `version` into `directory`; `report(done, total)` in bytes.

    Runs `pip download --no-deps --only-binary :all:` as a child process, which fetches and never installs,
    builds or runs what it fetched. All of pip's configuration applies. pip itself picks up a connection that
    broke (25.1 and later), but a download that was ended begins again. Cancelling ends the child. Raises
    PipDownloadError.
    """
    code, errors = await _run(project, version, directory, "raw", report)
    if code and "invalid choice: 'raw'" in errors:  # pip before 24.1: no progress to be had
        code, errors = await _run(project, version, directory, "off", report)
    if code:
        said = [line.removeprefix("ERROR: ") for line in errors.splitlines() if line.startswith("ERROR:")]
        raise PipDownloadError(said[-1] if said else f"pip ended with exit code {code}")


async def _run(
    project: str, version: str, directory: Path, bar: str, report: Callable[[int, int], None]
) -> tuple[int, str]:
    options = ["--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check"]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "pip", "download", *options, "--progress-bar", bar),
        *("--dest", str(directory), f"{project}=={version}"),
        cwd=directory,  # `python -m` looks for modules here first
        env=os.environ | {"TMPDIR": str(directory)},  # the system's may be too small for a model
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        _, errors = await asyncio.gather(_read_progress(process.stdout, report), _read_tail(process.stderr))
        return await process.wait(), errors.decode(errors="replace")
    finally:
        if process.returncode is None:
            await _end(process)


async def _read_progress(stream: asyncio.StreamReader, report: Callable[[int, int], None]) -> None:
    pending = b""
    while block := await stream.read(_TAIL):
        *lines, pending = (pending + block).split(b"\n")
        pending = pending[-_TAIL:]
        for line in lines:
            if match := _PROGRESS.fullmatch(line):
                report(int(match[1]), int(match[2]))


async def _read_tail(stream: asyncio.StreamReader) -> bytes:
    tail = b""
    while block := await stream.read(_TAIL):
        tail = (tail + block)[-_TAIL:]
    return tail


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), _STOP_SECONDS)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
