"""Disk work that neither blocks the event loop nor leaves half a file behind."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from swarmd.node.models.address_space import Span

P = ParamSpec("P")
T = TypeVar("T")

BLOCK = 1 << 20
_LOCK_POLL_SECONDS = 0.1


class StoppedError(Exception):
    """The work was told to stop by its `threading.Event`."""


async def in_thread(work: Callable[Concatenate[threading.Event, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `work(stop, ...)` in a thread. Cancelling sets `stop` and waits for the thread's end, so that
    nothing is written or closed behind the caller's back; `work` checks `stop` about once a megabyte and
    raises StoppedError."""
    stop = threading.Event()
    task = asyncio.ensure_future(asyncio.to_thread(work, stop, *args, **kwargs))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait([task])
        with contextlib.suppress(BaseException):
            task.result()
        raise


def on_loop(report: Callable[[int], None]) -> Callable[[int], None]:
    """`report` for use from threads: its calls are made on the event loop that runs now, in order."""
    loop = asyncio.get_running_loop()

    def from_thread(done: int) -> None:
        loop.call_soon_threadsafe(report, done)

    return from_thread


def hash_file(stop: threading.Event, path: Path, report: Callable[[int], None]) -> str:
    """SHA-256 of the file as 64 hex digits; `report` is told the bytes done. For `in_thread`."""
    digest = hashlib.sha256()
    done = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            if stop.is_set():
                raise StoppedError
            digest.update(block)
            done += len(block)
            report(done)
    return digest.hexdigest()


def read_spans(paths: Sequence[Path], spans: Sequence[Span]) -> bytearray:
    """The bytes of spans of files, joined. Raises EOFError for a file that ends before, OSError."""
    data = bytearray(sum(span.length for span in spans))
    view = memoryview(data)
    position = 0
    for span in spans:
        with paths[span.file].open("rb", buffering=0) as file:
            file.seek(span.offset)
            end = position + span.length
            while position < end:
                count = file.readinto(view[position:end])
                if not count:
                    raise EOFError(f"{paths[span.file].name} is shorter than it was")
                position += count
    return data


def write_spans(paths: Sequence[Path], spans: Sequence[Span], data: bytes | bytearray | memoryview) -> None:
    """Write `data` to spans of files that exist, in order. Raises OSError."""
    view = memoryview(data)
    position = 0
    for span in spans:
        with paths[span.file].open("r+b", buffering=0) as file:
            file.seek(span.offset)
            end = position + span.length
            while position < end:
                position += file.write(view[position:end])


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data` so that a crash leaves the old or the new bytes, never a mixture."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def sync_directory(path: Path) -> None:
    """Make the renames done in a directory survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.asynccontextmanager
async def file_lock(path: Path) -> AsyncIterator[None]:
    """Hold the lock file `path` against other processes and tasks, waiting for it as long as it takes. The
    operating system releases it when its holder dies, so the file itself means nothing and stays."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await asyncio.sleep(_LOCK_POLL_SECONDS)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def blocking_file_lock(path: Path) -> Iterator[None]:
    """The same for the short critical sections of threads."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
