"""Model bytes between nodes: this node serves what it holds, and fetches only what its own layers need.

Every tensor's bytes leave their original source once per swarm: who does not have the file asks a member that does.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from msgspec import Struct

from swarmd.discovery.records import ModelSummary
from swarmd.node.cluster.mesh import Mesh
from swarmd.node.cluster.messages import GetChunk, GetManifest, Manifest, ModelChunk
from swarmd.node.models.checkpoint import open_checkpoint
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.manifest import ModelManifest
from swarmd.node.models.progress import ProgressCallback
from swarmd.node.models.store import ModelStore, RangeUnavailableError
from swarmd.transport.link import Link, LinkClosed, RemoteError

CHUNK_TIMEOUT_SECONDS = 60.0
MANIFEST_TIMEOUT_SECONDS = 120.0


class ModelExchange:
    """Answers other nodes' requests for model bytes, and makes this node's own."""

    def __init__(self, store: ModelStore, mesh: Callable[[], Mesh]) -> None:
        self._store = store
        self._mesh = mesh

    async def answer(self, message: GetManifest | GetChunk) -> Struct | tuple[Struct, bytearray]:
        """What another node asked for. Raises RemoteError when it is not here."""
        if isinstance(message, GetManifest):
            return Manifest(await self._own_manifest(message.sha256))
        stored = self._store.lookup(message.sha256)
        try:
            if stored is None:
                raise RangeUnavailableError
            manifest = await self._store.manifest(stored)
            offset = message.index * manifest.chunk_size
            data = await self._store.read_range(message.sha256, offset, manifest.chunk_length(message.index))
        except (RangeUnavailableError, ValueError, ModelFileError) as error:
            raise RemoteError("not_here", f"chunk {message.index} is not on this node: {error}") from None
        return ModelChunk(), data

    async def manifest(self, model: ModelSummary) -> ModelManifest:
        """The manifest of a model, from here or from a member that holds it.

        Raises ModelFileError when nobody does.
        """
        if (stored := self._store.lookup(model.sha256)) is not None:
            return await self._store.manifest(stored)
        for link in self._holders(model.sha256):
            try:
                reply, _ = await link.request(GetManifest(model.sha256), timeout=MANIFEST_TIMEOUT_SECONDS)
            except (RemoteError, LinkClosed, TimeoutError):
                continue
            if isinstance(reply, Manifest) and reply.manifest.sha256 == model.sha256:
                return reply.manifest.check()
        raise ModelFileError(f"no node that is up holds {model.name}; start one that has the file")

    async def header(self, manifest: ModelManifest, progress: ProgressCallback) -> Path:
        """What to open as the model; all but its tensors' data is here (that may be holes)."""
        return await self._fetch(manifest, manifest.head_ranges, progress)

    async def stage_file(
        self, manifest: ModelManifest, start: int, end: int, progress: ProgressCallback
    ) -> tuple[Path, bool]:
        """What to open as the model; the tensors of layers [start, end) are here too. And whether it may have holes.

        Raises ModelFileError when the bytes cannot be had or are not a model this version runs.
        """
        path = await self.header(manifest, progress)
        if self._store.lookup(manifest.sha256) is not None:
            return path, False
        ranges = manifest.ranges_of(await asyncio.to_thread(_stage_ranges, path, start, end))
        path = await self._fetch(manifest, [*manifest.head_ranges, *ranges], progress)
        return path, self._store.lookup(manifest.sha256) is None

    async def _own_manifest(self, sha256: str) -> ModelManifest:
        stored = self._store.lookup(sha256)
        if stored is None:
            raise RemoteError("not_here", "this node does not hold that model")
        return await self._store.manifest(stored)

    async def _fetch(
        self, manifest: ModelManifest, ranges: Sequence[tuple[int, int]], progress: ProgressCallback
    ) -> Path:
        turns = itertools.count()

        async def fetch_chunk(index: int) -> bytearray:
            """Ask the holders in turn, so that they share the work; one that fails is passed over."""
            holders = self._holders(manifest.sha256)
            first = next(turns)
            for offset in range(len(holders)):
                link = holders[(first + offset) % len(holders)]
                try:
                    _, data = await link.request(GetChunk(manifest.sha256, index), timeout=CHUNK_TIMEOUT_SECONDS)
                except (RemoteError, LinkClosed, TimeoutError):
                    continue
                return data
            raise ModelFileError(f"no node that is up can send chunk {index} of {manifest.name}; try again")

        return await self._store.fetch_ranges(
            manifest, ranges, fetch_chunk, source="a member of the swarm", progress=progress
        )

    def _holders(self, sha256: str) -> list[Link]:
        mesh = self._mesh()
        links = [
            mesh.link_to(record.id)
            for record in mesh.membership.alive()
            if any(model.sha256 == sha256 for model in record.models)
        ]
        return [link for link in links if link is not None]


def _stage_ranges(path: Path, start: int, end: int) -> list[tuple[str, int, int]]:
    """Where the tensors of layers [start, end) are: (file name, offset, length)."""
    with open_checkpoint(path, sparse=True) as checkpoint:
        return [(part.file, part.offset, part.nbytes) for part in checkpoint.stage_ranges(start, end)]
