"""Pieces of models fetched from peers: every chunk checked, resumed after any end, lies found out."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import msgspec
import pytest
from support.model_peers import Peer, contents, ignore
from support.package_index import write_tiny_gguf

from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.manifest import CHUNK_SIZE, ModelManifest
from swarmd.node.models.partial import CHUNKS_PER_COMMIT, REQUESTS_IN_FLIGHT, PartialModel
from swarmd.node.models.progress import Progress
from swarmd.node.models.store import ModelStore, RangeUnavailableError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "Tiny-Model.gguf", megabytes=20)


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "models")


@pytest.fixture
async def manifest(store: ModelStore, model: Path) -> ModelManifest:
    return await store.manifest(await store.ensure(str(model), ignore))


@pytest.fixture
def other(tmp_path: Path) -> ModelStore:
    """A node that has no model yet."""
    return ModelStore(tmp_path / "other")


async def test_only_the_chunks_of_the_wanted_ranges_are_fetched(
    other: ModelStore, manifest: ModelManifest, model: Path
) -> None:
    peer = Peer(model)
    seen: list[Progress] = []
    ranges = [(0, 100), (3 * CHUNK_SIZE - 1, 2), (manifest.size - 1, 1)]
    path = await other.fetch_ranges(manifest, ranges, peer.chunk, source="b", progress=seen.append)
    assert sorted(peer.asked) == [0, 2, 3, 20]
    assert path.stat().st_size == manifest.size, "offsets are those of the whole file"
    assert path.stat().st_blocks * 512 < manifest.size // 2, "the rest takes no room"
    for offset, length in ranges:
        assert await other.read_range(manifest.sha256, offset, length) == peer.data[offset : offset + length]
    with pytest.raises(RangeUnavailableError):
        await other.read_range(manifest.sha256, CHUNK_SIZE, 1)
    total = 3 * CHUNK_SIZE + manifest.chunk_length(20)
    assert [p.done_bytes for p in seen] == sorted(p.done_bytes for p in seen)
    assert (seen[0].done_bytes, seen[-1]) == (0, Progress("Tiny-Model", total, total, "peer"))
    assert other.entries() == []

    again = Peer(model)
    await other.fetch_ranges(manifest, ranges, again.chunk, source="b", progress=ignore)
    assert again.asked == []


async def test_a_model_fetched_whole_becomes_an_ordinary_one(
    other: ModelStore, manifest: ModelManifest, model: Path, tmp_path: Path
) -> None:
    peer = Peer(model)
    first = await other.fetch_ranges(manifest, [(0, CHUNK_SIZE)], peer.chunk, source="b", progress=ignore)
    path = await other.fetch_ranges(manifest, [(0, manifest.size)], peer.chunk, source="b", progress=ignore)
    assert contents(path) == peer.data
    assert contents(first) == peer.data, "who has the earlier path can still open it"
    assert len(peer.asked) == 21
    assert 1 < peer.most_open <= REQUESTS_IN_FLIGHT
    (stored,) = ModelStore(tmp_path / "other").entries()
    assert (stored.name, stored.path, stored.sha256) == ("Tiny-Model", path, manifest.sha256)
    assert not list((tmp_path / "other" / "partial").glob("*.gguf")), "its first place is cleared at the next start"
    assert await other.manifest(stored) == manifest


@pytest.mark.parametrize("damage", [lambda d: b"\0" * len(d), lambda d: d[:-1], lambda d: d + b"x", lambda d: b""])
async def test_a_wrong_chunk_is_refused_and_its_source_named(
    other: ModelStore, manifest: ModelManifest, model: Path, damage
) -> None:
    peer = Peer(model)

    async def lie(index: int) -> bytes:
        data = await peer.chunk(index)
        return damage(data) if index == 5 else data

    ranges = [(0, manifest.size)]
    with pytest.raises(ModelFileError, match="chunk 5 of Tiny-Model from node mallory"):
        await other.fetch_ranges(manifest, ranges, lie, source="node mallory", progress=ignore)
    with pytest.raises(RangeUnavailableError):
        await other.read_range(manifest.sha256, 5 * CHUNK_SIZE, 1)

    honest = Peer(model)
    path = await other.fetch_ranges(manifest, ranges, honest.chunk, source="node b", progress=ignore)
    assert contents(path) == peer.data
    assert 0 not in honest.asked, "what was right is not fetched again"


async def test_a_manifest_that_lies_about_the_whole_is_found_out(
    other: ModelStore, manifest: ModelManifest, model: Path, tmp_path: Path
) -> None:
    lie = msgspec.structs.replace(manifest, sha256="0" * 64)
    with pytest.raises(ModelFileError, match="not the one that node mallory promised"):
        await other.fetch_ranges(lie, [(0, lie.size)], Peer(model).chunk, source="node mallory", progress=ignore)
    assert other.entries() == []
    assert not list((tmp_path / "other").rglob("*.gguf"))


async def test_a_peers_failure_reaches_the_caller_as_it_is(other: ModelStore, manifest: ModelManifest) -> None:
    async def fail(index: int) -> bytes:
        raise ConnectionResetError("gone")

    with pytest.raises(ConnectionResetError, match="gone"):
        await other.fetch_ranges(manifest, [(0, 9)], fail, source="b", progress=ignore)


async def test_cancelling_keeps_what_came(
    other: ModelStore, manifest: ModelManifest, model: Path, tmp_path: Path
) -> None:
    peer = Peer(model)
    four_here = asyncio.Event()

    async def slow(index: int) -> bytes:
        if index >= 4:
            await asyncio.Event().wait()
        return await peer.chunk(index)

    def watch(progress: Progress) -> None:
        if progress.done_bytes == 4 * CHUNK_SIZE:
            four_here.set()

    fetch = other.fetch_ranges(manifest, [(0, manifest.size)], slow, source="b", progress=watch)
    task = asyncio.create_task(fetch)
    async with asyncio.timeout(30):
        await four_here.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    later = Peer(model)
    fresh = ModelStore(tmp_path / "other")
    await fresh.fetch_ranges(manifest, [(0, manifest.size)], later.chunk, source="b", progress=ignore)
    assert sorted(later.asked) == list(range(4, 21))


async def test_chunks_under_another_manifest_are_not_trusted(
    manifest: ModelManifest, model: Path, tmp_path: Path
) -> None:
    partial = PartialModel(tmp_path, manifest)
    await partial.fetch([(0, 1)], Peer(model).chunk, source="b", progress=ignore)
    assert PartialModel(tmp_path, manifest).has(0, 1)
    changed = msgspec.structs.replace(manifest, chunks=manifest.chunks[:-1] + b"?")
    assert not PartialModel(tmp_path, changed).has(0, 1)


async def test_a_bitmap_without_its_file_is_not_trusted(manifest: ModelManifest, model: Path, tmp_path: Path) -> None:
    partial = PartialModel(tmp_path, manifest)
    await partial.fetch([(0, 1)], Peer(model).chunk, source="b", progress=ignore)
    partial.path.unlink()
    assert not PartialModel(tmp_path, manifest).has(0, 1)


KILLED_IN_THE_MIDDLE = """
import asyncio, os, sys
from pathlib import Path
import msgspec
from swarmd.node.models.manifest import CHUNK_SIZE, ModelManifest
from swarmd.node.models.partial import PartialModel

directory, manifest, model = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
data = model.read_bytes()

async def chunk(index):
    if index == 16:
        os.kill(os.getpid(), 9)
    return data[index * CHUNK_SIZE : (index + 1) * CHUNK_SIZE]

partial = PartialModel(directory, msgspec.msgpack.decode(manifest.read_bytes(), type=ModelManifest))
asyncio.run(partial.fetch([(0, len(data))], chunk, source="b", progress=lambda progress: None))
"""


async def test_a_killed_process_leaves_only_true_chunks(manifest: ModelManifest, model: Path, tmp_path: Path) -> None:
    """SIGKILL comes when some chunks are marked and others only written: what is believed is right."""
    (tmp_path / "manifest").write_bytes(msgspec.msgpack.encode(manifest))
    arguments = (str(tmp_path), str(tmp_path / "manifest"), str(model))
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", KILLED_IN_THE_MIDDLE, *arguments)
    assert await child.wait() == -9

    partial = PartialModel(tmp_path, manifest)
    data = contents(model)
    kept = [i for i in range(manifest.n_chunks) if partial.has(i * CHUNK_SIZE, 1)]
    assert CHUNKS_PER_COMMIT <= len(kept) < manifest.n_chunks
    on_disk = contents(partial.path)
    assert all(on_disk[i << 20 : (i + 1) << 20] == data[i << 20 : (i + 1) << 20] for i in kept)

    peer = Peer(model)
    path = await partial.fetch([(0, manifest.size)], peer.chunk, source="b", progress=ignore)
    assert contents(path) == data
    assert set(peer.asked) == set(range(manifest.n_chunks)) - set(kept)
