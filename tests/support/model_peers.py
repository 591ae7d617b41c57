"""A peer that serves the chunks of a model, for tests of stores."""

from __future__ import annotations

import asyncio
from pathlib import Path

from swarmd.node.models.manifest import CHUNK_SIZE, ModelManifest
from swarmd.node.models.progress import Progress
from swarmd.node.models.store import ModelStore


def ignore(progress: Progress) -> None:
    """For tests that don't look at progress."""


def contents(path: Path) -> bytes:
    """The file's bytes."""
    return path.read_bytes()


class Peer:
    """Serves chunks of a file; counts what was asked and how many requests were open at once."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        self.asked: list[int] = []
        self.open = self.most_open = 0

    async def chunk(self, index: int) -> bytes:
        self.asked.append(index)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        await asyncio.sleep(0)
        self.open -= 1
        return self.data[index * CHUNK_SIZE : (index + 1) * CHUNK_SIZE]


class StorePeer:
    """Serves chunks of a model that a store has, and counts what was asked."""

    def __init__(self, store: ModelStore, manifest: ModelManifest) -> None:
        self._store = store
        self._manifest = manifest
        self.asked: list[int] = []

    async def chunk(self, index: int) -> bytearray:
        self.asked.append(index)
        offset = index * self._manifest.chunk_size
        return await self._store.read_range(self._manifest.sha256, offset, self._manifest.chunk_length(index))
