"""A model file of which only some chunks are here: a node needs the tensors of its own layers and no more."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from swarmd.node.models.disk import in_thread, write_atomic
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.manifest import CHUNK_SIZE, ModelManifest
from swarmd.node.models.progress import Progress, ProgressCallback

log = logging.getLogger("swarmd.models")

REQUESTS_IN_FLIGHT = 4
CHUNKS_PER_COMMIT = 8
"""Chunks brought between two savings of the bitmap, and so the most that a kill makes to be fetched again."""

# macOS has no fdatasync in Python; fsync does more than is needed.
_sync_data: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)

FetchChunk = Callable[[int], Awaitable[bytes | bytearray | memoryview]]
"""Brings chunk `index` from some source; raises what it likes when it can't."""


@dataclass
class _Fetch:
    """One call of `PartialModel.fetch`, shared by its workers."""

    fd: int
    missing: Iterator[int]
    fetch_chunk: FetchChunk
    source: str
    progress: ProgressCallback
    done: int
    total: int


class PartialModel:
    """A sparse file of the model's full size beside a bitmap of the chunks that are on disk and verified.

    A chunk's bit is saved only after the chunk was checked against the manifest, written, and forced to disk
    with `fdatasync`, in groups of 8: whatever kills the process or the machine, a set bit means right bytes,
    and at most 8 chunks are fetched again. The bitmap carries the manifest's fingerprint; under another
    manifest nothing is trusted.
    """

    def __init__(self, directory: Path, manifest: ModelManifest) -> None:
        """Opens or creates the file (blocking: use a thread). `manifest` must have been checked."""
        self.manifest = manifest
        self.path = directory / f"{manifest.sha256}.gguf"
        self._bitmap_path = directory / f"{manifest.sha256}.chunks"
        self._lock = asyncio.Lock()
        self._commit_lock = threading.Lock()
        self._unsaved: set[int] = set()
        self._present = self._load()
        with self.path.open("ab") as file:
            if file.tell() != manifest.size:
                file.truncate(manifest.size)
        if not self._present:
            self._save(set())

    @property
    def complete(self) -> bool:
        """Whether every chunk is here."""
        return len(self._present) == self.manifest.n_chunks

    def has(self, offset: int, length: int) -> bool:
        """Whether all of these bytes are on disk and verified. Raises ValueError when they are outside the
        file."""
        return self._present.issuperset(self.manifest.chunks_of([(offset, length)]))

    def missing_bytes(self, ranges: Sequence[tuple[int, int]]) -> int:
        """Bytes of the chunks that hold these ranges and are not here."""
        wanted = self.manifest.chunks_of(ranges)
        return sum(self.manifest.chunk_length(i) for i in wanted if i not in self._present)

    async def fetch(
        self,
        ranges: Sequence[tuple[int, int]],
        fetch_chunk: FetchChunk,
        *,
        source: str,
        progress: ProgressCallback,
    ) -> Path:
        """Bring the chunks that hold the byte ranges (offset, length) and are not here yet, four at a time;
        returns the path of the sparse file. Several fetches of one model take turns.

        Raises ModelFileError naming `source` (the peer's name) for a chunk that is not what the manifest
        says, else what `fetch_chunk` raised; chunks that came before are kept.
        """
        async with self._lock:
            wanted = self.manifest.chunks_of(ranges)
            missing = [i for i in wanted if i not in self._present]
            total = sum(map(self.manifest.chunk_length, wanted))
            done = total - sum(map(self.manifest.chunk_length, missing))
            fd = await asyncio.to_thread(os.open, self.path, os.O_RDWR | os.O_CLOEXEC)
            fetch = _Fetch(fd, iter(missing), fetch_chunk, source, progress, done, total)
            try:
                self._report(fetch, 0)
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(REQUESTS_IN_FLIGHT, len(missing))):
                        group.create_task(self._work(fetch))
            except BaseExceptionGroup as failures:
                raise failures.exceptions[0] from None
            finally:
                await in_thread(self._finish, fd)
        return self.path

    def release(self) -> None:
        """The complete file has its final place: remove the bitmap (blocking)."""
        self._bitmap_path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove the file and its bitmap (blocking); nothing is here afterwards."""
        self._present = set()
        self._unsaved = set()
        self._bitmap_path.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    async def _work(self, fetch: _Fetch) -> None:
        for index in fetch.missing:
            data = await fetch.fetch_chunk(index)
            await in_thread(self._keep, fetch, index, data)
            self._report(fetch, len(data))

    def _keep(self, stop: threading.Event, fetch: _Fetch, index: int, data: bytes | bytearray | memoryview) -> None:
        if not self.manifest.accepts(index, data):
            raise ModelFileError(
                f"chunk {index} of {self.manifest.name} from {fetch.source} is not what the manifest "
                "says and was refused; fetch it from another node"
            )
        written = 0
        view = memoryview(data)
        while written < len(view):
            written += os.pwrite(fetch.fd, view[written:], index * CHUNK_SIZE + written)
        with self._commit_lock:
            self._unsaved.add(index)
            if len(self._unsaved) >= CHUNKS_PER_COMMIT:
                self._commit(fetch.fd)

    def _finish(self, stop: threading.Event, fd: int) -> None:
        try:
            with self._commit_lock:
                self._commit(fd)
        finally:
            os.close(fd)

    def _commit(self, fd: int) -> None:
        if not self._unsaved:
            return
        _sync_data(fd)
        self._save(self._present | self._unsaved)
        self._unsaved = set()

    def _save(self, present: set[int]) -> None:
        bitmap = bytearray(-(-self.manifest.n_chunks // 8))
        for index in present:
            bitmap[index // 8] |= 1 << index % 8
        write_atomic(self._bitmap_path, self.manifest.fingerprint() + bytes(bitmap))
        self._present = present

    def _load(self) -> set[int]:
        try:
            saved = self._bitmap_path.read_bytes()
            size = self.path.stat().st_size
        except FileNotFoundError:
            self._bitmap_path.unlink(missing_ok=True)
            return set()
        fingerprint, bitmap = saved[:32], saved[32:]
        if fingerprint != self.manifest.fingerprint() or size != self.manifest.size:
            log.warning("chunks of %s kept from another manifest are not used", self.manifest.name)
            self.discard()
            return set()
        return {i for i in range(self.manifest.n_chunks) if bitmap[i // 8] >> i % 8 & 1}

    def _report(self, fetch: _Fetch, new_bytes: int) -> None:
        fetch.done += new_bytes
        fetch.progress(Progress(self.manifest.name, fetch.done, fetch.total, "peer"))
