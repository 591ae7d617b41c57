"""A model of which only some chunks are here: a node needs the tensors of its own layers and no more."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from swarmd.node.models.disk import in_thread, write_atomic, write_spans
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.layout import placed
from swarmd.node.models.manifest import ModelManifest
from swarmd.node.models.progress import Progress, ProgressCallback

log = logging.getLogger("swarmd.models")

REQUESTS_IN_FLIGHT = 4
BYTES_IN_FLIGHT = 8 << 20
"""Large models have large chunks; of those fewer are asked for at a time, so that heartbeats are not held up."""
CHUNKS_PER_COMMIT = 8
"""Chunks brought between two savings of the bitmap, and so the most that a kill makes to be fetched again."""

FetchChunk = Callable[[int], Awaitable[bytes | bytearray | memoryview]]
"""Brings chunk `index` from some source; raises what it likes when it can't."""


@dataclass
class _Fetch:
    """One call of `PartialModel.fetch`, shared by its workers."""

    missing: Iterator[int]
    fetch_chunk: FetchChunk
    source: str
    progress: ProgressCallback
    done: int
    total: int


class PartialModel:
    """Sparse files of the model's full size, one or in a folder of its own, beside a bitmap of the chunks that are on
    disk and verified.

    A chunk's bit is saved only after the chunk was checked against the manifest, written, and forced to disk
    with `fdatasync`, in groups of 8: whatever kills the process or the machine, a set bit means right bytes,
    and at most 8 chunks are fetched again. The bitmap carries the manifest's fingerprint; under another
    manifest nothing is trusted.
    """

    def __init__(self, directory: Path, manifest: ModelManifest) -> None:
        """Opens or creates the files (blocking: use a thread). `manifest` must have been checked."""
        self.manifest = manifest
        self.root = directory / (manifest.sha256 if len(manifest.files) > 1 else f"{manifest.sha256}.gguf")
        self.layout = placed(self.root, manifest.sizes)
        self.paths = [file.path for file in self.layout.files]
        self._bitmap_path = directory / f"{manifest.sha256}.chunks"
        self._lock = asyncio.Lock()
        self._commit_lock = threading.Lock()
        self._unsaved: set[int] = set()
        self._unsynced: set[int] = set()
        self._present = self._load()
        for file in self.layout.files:
            file.path.parent.mkdir(parents=True, exist_ok=True)
            with file.path.open("ab") as opened:
                if opened.tell() != file.size:
                    opened.truncate(file.size)
        if not self._present:
            self._save(set())

    @property
    def path(self) -> Path:
        """What to open: the file, the first shard, or the folder."""
        return self.layout.path

    @property
    def complete(self) -> bool:
        """Whether every chunk is here."""
        return len(self._present) == self.manifest.n_chunks

    def has(self, offset: int, length: int) -> bool:
        """Whether all of these bytes are on disk and verified. Raises ValueError when they are outside the
        model."""
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
        """Bring the chunks that hold the byte ranges (offset, length) and are not here yet, up to four at a time;
        returns `path`. Several fetches of one model take turns.

        Raises ModelFileError naming `source` (the peer's name) for a chunk that is not what the manifest
        says, else what `fetch_chunk` raised; chunks that came before are kept.
        """
        async with self._lock:
            wanted = self.manifest.chunks_of(ranges)
            missing = [i for i in wanted if i not in self._present]
            total = sum(map(self.manifest.chunk_length, wanted))
            done = total - sum(map(self.manifest.chunk_length, missing))
            at_once = min(REQUESTS_IN_FLIGHT, max(1, BYTES_IN_FLIGHT // self.manifest.chunk_size))
            fetch = _Fetch(iter(missing), fetch_chunk, source, progress, done, total)
            try:
                self._report(fetch, 0)
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(at_once, len(missing))):
                        group.create_task(self._work(fetch))
            except BaseExceptionGroup as failures:
                raise failures.exceptions[0] from None
            finally:
                await in_thread(self._finish)
        return self.path

    def release(self) -> None:
        """The complete model has its final place: remove the bitmap (blocking)."""
        self._bitmap_path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove the files and their bitmap (blocking); nothing is here afterwards."""
        self._present = set()
        self._unsaved = set()
        self._unsynced = set()
        self._bitmap_path.unlink(missing_ok=True)
        remove(self.root)

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
        spans = self.manifest.space.spans(index * self.manifest.chunk_size, len(data))
        write_spans(self.paths, spans, data)
        with self._commit_lock:
            self._unsaved.add(index)
            self._unsynced.update(span.file for span in spans)
            if len(self._unsaved) >= CHUNKS_PER_COMMIT:
                self._commit()

    def _finish(self, stop: threading.Event) -> None:
        with self._commit_lock:
            self._commit()

    def _commit(self) -> None:
        if not self._unsaved:
            return
        for number in self._unsynced:
            _sync_data(self.paths[number])
        self._save(self._present | self._unsaved)
        self._unsaved = set()
        self._unsynced = set()

    def _save(self, present: set[int]) -> None:
        bitmap = bytearray(-(-self.manifest.n_chunks // 8))
        for index in present:
            bitmap[index // 8] |= 1 << index % 8
        write_atomic(self._bitmap_path, self.manifest.fingerprint() + bytes(bitmap))
        self._present = present

    def _load(self) -> set[int]:
        try:
            saved = self._bitmap_path.read_bytes()
            sizes = [path.stat().st_size for path in self.paths]
        except FileNotFoundError:
            self._bitmap_path.unlink(missing_ok=True)
            return set()
        fingerprint, bitmap = saved[:32], saved[32:]
        if fingerprint != self.manifest.fingerprint() or sizes != [part.size for part in self.manifest.files]:
            log.warning("chunks of %s kept from another manifest are not used", self.manifest.name)
            self.discard()
            return set()
        return {i for i in range(self.manifest.n_chunks) if bitmap[i // 8] >> i % 8 & 1}

    def _report(self, fetch: _Fetch, new_bytes: int) -> None:
        fetch.done += new_bytes
        fetch.progress(Progress(self.manifest.name, fetch.done, fetch.total, "peer"))


def remove(root: Path) -> None:
    """Remove a model's file or folder, if it is there (blocking)."""
    if root.is_dir() and not root.is_symlink():
        shutil.rmtree(root)
    else:
        root.unlink(missing_ok=True)


# macOS has no fdatasync in Python; fsync does more than is needed.
_fdatasync: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)


def _sync_data(path: Path) -> None:
    """Force to disk what anybody has written to a file."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        _fdatasync(fd)
    finally:
        os.close(fd)
