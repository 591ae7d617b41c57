"""Two nodes' exchanges, joined without a network: who has no file gets what its layers need, and no more."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from msgspec import Struct
from support.model_folders import write_llama_folder
from support.model_peers import ignore
from support.split_gguf import split_gguf
from support.tiny_gguf import TinyModel, write_tiny_gguf

from swarmd.discovery.records import ModelSummary
from swarmd.node.cluster.mesh import Mesh
from swarmd.node.cluster.messages import GetChunk, GetManifest
from swarmd.node.cluster.model_exchange import ModelExchange
from swarmd.node.engine.tensors import tensor_shapes
from swarmd.node.models.checkpoint import open_checkpoint
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.manifest import ModelManifest
from swarmd.node.models.store import KEPT_FREE, ModelStore
from swarmd.node.models.wheel_source import ModelSourceError
from swarmd.transport.link import LinkClosed

MODEL = TinyModel(n_layers=4, hidden_size=256, ffn_size=512)


@dataclass
class LinkTo:
    """A link whose other end is an exchange; counts the chunks asked for."""

    other: ModelExchange
    chunks: list[int] = field(default_factory=list)
    broken: bool = False

    async def request(self, message: GetManifest | GetChunk, timeout: float) -> tuple[Struct, bytes | bytearray]:
        if self.broken:
            raise LinkClosed("gone")
        if isinstance(message, GetChunk):
            self.chunks.append(message.index)
        answer = await self.other.answer(message)
        return answer if isinstance(answer, tuple) else (answer, b"")


def mesh_of(links: list[LinkTo], model: ModelSummary) -> Callable[[], Mesh]:
    """A mesh in which each link's other end says that it holds the model."""
    records = [SimpleNamespace(id=str(number), models=(model,)) for number in range(len(links))]
    membership = SimpleNamespace(alive=lambda: records)
    mesh = SimpleNamespace(membership=membership, link_to=lambda node: links[int(node)])
    return lambda: cast(Mesh, mesh)


@pytest.fixture(scope="module", params=["one file", "split", "folder"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    if request.param == "folder":
        return write_llama_folder(folder / "tiny", MODEL, shards=3)
    path = write_tiny_gguf(folder / "tiny.gguf", MODEL)
    return path if request.param == "one file" else split_gguf(path, folder / "split", 3)[1]


@dataclass
class Pair:
    """`fetching` has no file and a link to each of two that have it."""

    fetching: ModelExchange
    store: ModelStore
    links: list[LinkTo]
    manifest: ModelManifest
    source: Path


@pytest.fixture
async def pair(model: Path, tmp_path: Path) -> Pair:
    source = ModelStore(tmp_path / "source")
    stored = await source.ensure(str(model), ignore)
    summary = ModelSummary(stored.name, stored.sha256, stored.size, 0, "")
    holders = [ModelExchange(source, mesh_of([], summary)) for _ in range(2)]
    links = [LinkTo(holder) for holder in holders]
    store = ModelStore(tmp_path / "fetching")
    fetching = ModelExchange(store, mesh_of(links, summary))
    return Pair(fetching, store, links, await fetching.manifest(summary), stored.path)


def weights(path: Path, start: int, end: int, *, sparse: bool) -> list[np.ndarray[Any, Any]]:
    """Every tensor of the layers, dequantized."""
    with open_checkpoint(path, sparse=sparse) as checkpoint:
        return [checkpoint.read(tensor).dequantize() for tensor in tensor_shapes(checkpoint.spec, start, end)]


@pytest.mark.parametrize("layers", [(0, 1), (1, 3), (3, 4)])
async def test_a_stage_gets_the_tensors_of_its_layers(pair: Pair, layers: tuple[int, int]) -> None:
    path, sparse = await pair.fetching.stage_file(pair.manifest, *layers, ignore)
    assert sparse
    wanted = weights(pair.source, *layers, sparse=False)
    assert all(map(np.array_equal, weights(path, *layers, sparse=True), wanted))
    others = (2, 3) if layers == (0, 1) else (0, 1)
    with pytest.raises(ModelFileError, match="never fetched"):
        weights(path, *others, sparse=True)
    asked = [index for link in pair.links for index in link.chunks]
    assert len(asked) == len(set(asked)) < pair.manifest.n_chunks
    assert all(link.chunks for link in pair.links), "all holders share the work"
    again = await pair.fetching.stage_file(pair.manifest, *layers, ignore)
    assert again == (path, True)
    assert [index for link in pair.links for index in link.chunks] == asked, "nothing is fetched twice"


async def test_the_whole_model_is_fetched_for_all_layers_and_then_served(pair: Pair) -> None:
    pair.links[0].broken = True
    path, sparse = await pair.fetching.stage_file(pair.manifest, 0, MODEL.n_layers, ignore)
    assert not sparse, "every byte is in some tensor, or in a chunk beside one"
    assert [stored.path for stored in pair.store.entries()] == [path]
    pair.links[1].broken = True
    assert await pair.fetching.stage_file(pair.manifest, 0, 1, ignore) == (path, False)
    wanted = weights(pair.source, 0, 4, sparse=False)
    assert all(map(np.array_equal, weights(path, 0, 4, sparse=False), wanted))


async def test_the_header_opens_the_model(pair: Pair) -> None:
    path = await pair.fetching.header(pair.manifest, ignore)
    with open_checkpoint(path, sparse=True) as here, open_checkpoint(pair.source) as there:
        assert here.spec == there.spec
    assert pair.links[0].chunks + pair.links[1].chunks == [0]


async def test_without_a_holder_it_says_so(pair: Pair) -> None:
    for link in pair.links:
        link.broken = True
    with pytest.raises(ModelFileError, match="no node that is up can send chunk"):
        await pair.fetching.header(pair.manifest, ignore)


async def test_nothing_is_fetched_that_would_fill_the_disk(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a disk some is left to whatever else the machine does."""
    disk = shutil.disk_usage("/")._replace(total=100 << 30, free=KEPT_FREE + 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk)
    with pytest.raises(ModelSourceError, match=r"are free, of which 537 MB are left to others.*--data-dir"):
        await pair.fetching.stage_file(pair.manifest, 0, 1, ignore)
    assert [link.chunks for link in pair.links] == [[], []]
