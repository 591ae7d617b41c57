"""Models of a virtual swarm: their bytes take time, and can be had from nodes that hold them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from swarmd.discovery.records import ModelSummary
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.manifest import ModelManifest

if TYPE_CHECKING:
    from support.virtual_swarm.node import VirtualNode


class VirtualExchange:
    """As `ModelExchange`, without bytes."""

    def __init__(self, node: VirtualNode) -> None:
        self._node = node

    async def manifest(self, model: ModelSummary) -> ModelManifest:
        await self._bring(model.name)
        return self._node.world.manifest(model.name)

    async def header(self, manifest: ModelManifest, progress: Any) -> Path:
        await self._bring(manifest.name)
        return Path(manifest.name)

    async def stage_file(self, manifest: ModelManifest, start: int, end: int, progress: Any) -> tuple[Path, bool]:
        await self._bring(manifest.name)
        await asyncio.sleep(self._node.world.rng.uniform(0.1, 0.8))
        if self._node.world.rng.random() < self._node.world.full.get(self._node.id, 0.0):
            raise OSError("no space left on device")
        return Path(manifest.name), False

    async def _bring(self, name: str) -> None:
        node = self._node
        if name in node.models:
            return
        sha256 = node.world.summary(name).sha256
        holders = [r.id for r in node.membership.alive() if any(m.sha256 == sha256 for m in r.models)]
        await asyncio.sleep(node.world.rng.uniform(0.01, 0.05))
        if not any(node.network.flows(node.id, holder) for holder in holders):
            raise ModelFileError(f"no node that is up holds {name}")


class VirtualStore:
    """As `ModelStore`: any node can bring any model from its source."""

    def __init__(self, node: VirtualNode) -> None:
        self._node = node

    async def ensure(self, name: str, progress: Any) -> Any:
        node = self._node
        if name not in node.models:
            await asyncio.sleep(node.world.rng.uniform(1.0, 3.0))
            node.models.add(name)
        known = node.world.summary(name)
        return SimpleNamespace(path=Path(name), name=name, sha256=known.sha256, size=known.size)

    async def manifest(self, stored: Any) -> ModelManifest:
        return self._node.world.manifest(stored.name)
