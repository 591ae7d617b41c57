"""Models of several files in the store: known by their contents, fetched by pieces, whole on another machine."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import msgspec
import numpy as np
import pytest
from support.model_folders import MIB, write_folder, write_split_gguf
from support.model_peers import StorePeer, ignore

from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.gguf import GGUFFile
from swarmd.node.models.layout import layout_of
from swarmd.node.models.manifest import (
    CHUNK_SIZE,
    HASH_SIZE,
    MAX_CHUNK_SIZE,
    MAX_CHUNKS,
    MAX_MODEL_SIZE,
    ModelManifest,
    ModelPart,
    chunk_hash,
    chunk_size_for,
)
from swarmd.node.models.partial import PartialModel
from swarmd.node.models.progress import Progress
from swarmd.node.models.registry import StoredModel
from swarmd.node.models.store import ModelStore, RangeUnavailableError

SIZES = (5 * MIB + 7, 9 * MIB, 6 * MIB + 99)
WEIGHTS = {f"model-{number:05}-of-00003.safetensors": size for number, size in enumerate(SIZES, 1)}


def make_folder(root: Path) -> Path:
    folder = write_folder(root / "Tiny-Folder", WEIGHTS)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    (folder / "merges.txt").write_bytes(b"")
    return folder


def make_split(root: Path) -> Path:
    return write_split_gguf(root / "split", 3, megabytes=7)[1]


@pytest.fixture(scope="module", params=[make_folder, make_split], ids=["folder", "split"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make: Callable[[Path], Path] = request.param
    return make(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path)


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "models")


@pytest.fixture
def other(tmp_path: Path) -> ModelStore:
    """A node that has no model yet."""
    return ModelStore(tmp_path / "other")


@pytest.fixture
async def stored(store: ModelStore, model: Path) -> StoredModel:
    return await store.ensure(str(model), ignore)


@pytest.fixture
async def manifest(store: ModelStore, stored: StoredModel) -> ModelManifest:
    return await store.manifest(stored)


def manifest_of(files: dict[str, bytes], heads: dict[str, int]) -> tuple[ModelManifest, list[bytes]]:
    """A true manifest of made-up files, and their chunks."""
    whole = {name: len(data) if name.endswith(".json") else heads[name] for name, data in files.items()}
    data = b"".join(data[: whole[name]] for name, data in files.items())
    data += b"".join(data[whole[name] :] for name, data in files.items())
    chunks = [data[at : at + CHUNK_SIZE] for at in range(0, len(data), CHUNK_SIZE)]
    parts = tuple(ModelPart(name, len(data), whole[name]) for name, data in files.items())
    lines = [f"{hashlib.sha256(data).hexdigest()} {len(data)} {name}\n" for name, data in files.items()]
    sha256 = hashlib.sha256(("a swarmd model of several files, version 1\n" + "".join(lines)).encode()).hexdigest()
    return ModelManifest(sha256, "lie", parts, CHUNK_SIZE, b"".join(map(chunk_hash, chunks))), chunks


def contents(path: Path) -> list[tuple[str, bytes]]:
    """Names and bytes of the files of the model at a path."""
    return [(file.name, file.path.read_bytes()) for file in layout_of(path).files]


async def test_a_model_of_several_files_is_registered_where_it_lies(
    store: ModelStore, model: Path, tmp_path: Path
) -> None:
    seen: list[Progress] = []
    stored = await store.ensure(str(model), seen.append)
    layout = layout_of(model)
    assert (stored.path, stored.files) == (layout.path, tuple(file.path for file in layout.files))
    assert seen[-1] == Progress(stored.name, layout.size, layout.size, "verify")
    assert [p.done_bytes for p in seen] == sorted(p.done_bytes for p in seen)
    assert await store.ensure(stored.name, ignore) == stored
    assert ModelStore(tmp_path / "models").entries() == [stored], "a new start remembers it"
    seen.clear()
    assert await store.ensure(str(model), seen.append) == stored
    assert seen == [], "and does not read it again"


async def test_names_come_from_the_folder_and_from_the_shards(store: ModelStore, tmp_path: Path) -> None:
    assert (await store.ensure(str(make_folder(tmp_path)), ignore)).name == "Tiny-Folder"
    assert (await store.ensure(str(make_split(tmp_path)), ignore)).name == "Tiny-Model"


async def test_the_identity_is_that_of_the_listing(store: ModelStore, folder: Path) -> None:
    stored = await store.ensure(str(folder), ignore)
    lines = [f"{hashlib.sha256(data).hexdigest()} {len(data)} {name}\n" for name, data in contents(folder)]
    listing = "a swarmd model of several files, version 1\n" + "".join(lines)
    assert stored.sha256 == hashlib.sha256(listing.encode()).hexdigest()


async def test_a_copy_elsewhere_is_the_same_model(store: ModelStore, folder: Path, tmp_path: Path) -> None:
    first = await store.ensure(str(folder), ignore)
    copy = shutil.copytree(folder, tmp_path / "elsewhere" / "copy")
    assert (await store.ensure(str(copy), ignore)).sha256 == first.sha256
    shards = write_split_gguf(tmp_path / "a", 2)
    again = write_split_gguf(tmp_path / "b", 2, stem="renamed")
    one, two = [await store.ensure(str(paths[0]), ignore) for paths in (shards, again)]
    assert one.sha256 == two.sha256, "what the owner calls the shards does not matter"


async def test_any_change_makes_it_another_model(store: ModelStore, folder: Path) -> None:
    first = await store.ensure(str(folder), ignore)
    changes: list[Callable[[], object]] = [
        lambda: (folder / "chat_template.jinja").write_text("{{ messages }}"),
        lambda: (folder / "chat_template.jinja").unlink(),
        lambda: (folder / "config.json").write_text('{"model_type": "lLama"}'),
        lambda: (folder / "additional_chat_templates" / "x.jinja").write_text(""),
    ]
    known, model = {first.sha256}, first
    for change in changes:
        last = store.entries()
        change()
        assert store.entries() == [], "what changed is not believed any longer"
        model = await store.ensure(str(folder), ignore)
        assert [model] != last
        known.add(model.sha256)
    assert len(known) == 4, "without the template it was the first one again"
    (folder / "README.md").write_text("what is no part of the model changes nothing")
    assert store.entries() == [model]


async def test_what_is_damaged_is_refused_before_it_is_registered(store: ModelStore, folder: Path) -> None:
    with (folder / "model-00002-of-00003.safetensors").open("r+b") as file:
        file.write(b"\xff" * 16)
    with pytest.raises(ModelFileError, match=r"model-00002-of-00003\.safetensors"):
        await store.ensure(str(folder), ignore)
    assert store.entries() == []


async def test_an_index_of_an_earlier_version_is_understood(store: ModelStore, tmp_path: Path) -> None:
    (path,) = write_split_gguf(tmp_path, 1)
    path = path.rename(tmp_path / "one.gguf")
    stored = await store.ensure(str(path), ignore)
    stamp = {"size": stored.size, "mtime_ns": path.stat().st_mtime_ns}
    record = {"name": "one", "path": str(path), "stamp": stamp, "sha256": stored.sha256}
    (tmp_path / "models" / "index.json").write_bytes(msgspec.json.encode({"version": 1, "models": [record]}))
    assert ModelStore(tmp_path / "models").entries() == [stored]


async def test_the_heads_come_first_so_that_few_chunks_hold_them_all(
    other: ModelStore, manifest: ModelManifest, stored: StoredModel, store: ModelStore
) -> None:
    peer = StorePeer(store, manifest)
    path = await other.fetch_ranges(manifest, manifest.head_ranges, peer.chunk, source="b", progress=ignore)
    assert peer.asked == [0], "of a model of several megabytes in several files"
    heads = {part.name: part.head for part in manifest.files}
    whole = dict(contents(stored.path))
    for file in layout_of(path).files:
        assert file.size == len(whole[file.name]), "offsets are those of the whole file"
        assert file.path.read_bytes()[: heads[file.name]] == whole[file.name][: heads[file.name]]
    taken = sum(file.path.stat().st_blocks * 512 for file in layout_of(path).files)
    assert taken < manifest.size // 2, "the rest takes no room"


async def test_factors_of_rotary_embeddings_come_with_the_heads_wherever_they_lie(
    store: ModelStore, other: ModelStore, tmp_path: Path
) -> None:
    """llama.cpp's quantizer puts them behind a large output matrix."""
    path = tmp_path / "long.gguf"
    writer = gguf.GGUFWriter(path, "phi3")
    writer.add_tensor("output.weight", np.ones((3, 1 << 18), np.float32))
    writer.add_tensor("rope_factors_long.weight", np.arange(48, dtype=np.float32))
    writer.add_tensor("token_embd.weight", np.ones((3, 1 << 18), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    manifest = await store.manifest(await store.ensure(str(path), ignore))
    peer = StorePeer(store, manifest)
    head = await other.fetch_ranges(manifest, manifest.head_ranges, peer.chunk, source="b", progress=ignore)
    assert peer.asked == [0, 3]
    with GGUFFile.open(head, sparse=True) as file:
        assert file.read("rope_factors_long.weight").view(np.float32).tolist() == list(range(48))
        with pytest.raises(ModelFileError, match="never fetched"):
            file.read("output.weight")


async def test_ranges_of_files_are_fetched_and_no_more(
    store: ModelStore, other: ModelStore, manifest: ModelManifest, stored: StoredModel
) -> None:
    last = manifest.files[-1]
    wanted = [(last.name, last.size - 5, 5), (manifest.files[-2].name, 0, manifest.files[-2].head + 1)]
    ranges = manifest.ranges_of(wanted)
    peer = StorePeer(store, manifest)
    path = await other.fetch_ranges(manifest, ranges, peer.chunk, source="b", progress=ignore)
    assert set(peer.asked) == set(manifest.chunks_of(ranges))
    assert len(peer.asked) < manifest.n_chunks
    whole, here = dict(contents(stored.path)), dict(contents(path))
    for name, offset, length in wanted:
        assert here[name][offset : offset + length] == whole[name][offset : offset + length]
    for name, offset, length in [("nobody.safetensors", 0, 1), (last.name, last.size, 1), (last.name, -1, 1)]:
        with pytest.raises(ModelFileError, match="outside"):
            manifest.ranges_of([(name, offset, length)])


async def test_a_model_fetched_whole_becomes_an_ordinary_one(
    store: ModelStore, other: ModelStore, manifest: ModelManifest, stored: StoredModel, tmp_path: Path
) -> None:
    peer = StorePeer(store, manifest)
    first = await other.fetch_ranges(manifest, manifest.head_ranges, peer.chunk, source="b", progress=ignore)
    seen: list[Progress] = []
    path = await other.fetch_ranges(manifest, [(0, manifest.size)], peer.chunk, source="b", progress=seen.append)
    assert sorted(peer.asked) == list(range(manifest.n_chunks)), "each chunk once"
    assert contents(path) == contents(stored.path)
    assert contents(first) == contents(stored.path), "who has the earlier path can still open it"
    assert seen[-1] == Progress(stored.name, manifest.size, manifest.size, "verify")
    (adopted,) = ModelStore(tmp_path / "other").entries()
    assert (adopted.name, adopted.path, adopted.sha256) == (stored.name, path, stored.sha256)
    left = [p for p in (tmp_path / "other" / "partial").iterdir() if p.suffix != ".lock"]
    assert left == [], "its first place is cleared at the next start"
    assert await other.manifest(adopted) == manifest
    third = ModelStore(tmp_path / "third")
    served = await third.fetch_ranges(
        manifest, [(0, manifest.size)], StorePeer(other, manifest).chunk, source="c", progress=ignore
    )
    assert contents(served) == contents(stored.path), "and is served on"


async def test_where_there_are_no_hard_links_the_folder_moves(
    store: ModelStore, other: ModelStore, manifest: ModelManifest, stored: StoredModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    peer = StorePeer(store, manifest)
    path = await other.fetch_ranges(manifest, [(0, manifest.size)], peer.chunk, source="b", progress=ignore)
    assert contents(path) == contents(stored.path)
    assert [model.path for model in other.entries()] == [path]


async def test_a_wrong_chunk_is_refused_and_what_was_right_is_kept(
    store: ModelStore, other: ModelStore, manifest: ModelManifest, stored: StoredModel
) -> None:
    peer = StorePeer(store, manifest)

    async def lie(index: int) -> bytes | bytearray:
        data = await peer.chunk(index)
        return bytes(len(data)) if index == 4 else data

    with pytest.raises(ModelFileError, match=r"chunk 4 of .* from mallory"):
        await other.fetch_ranges(manifest, [(0, manifest.size)], lie, source="mallory", progress=ignore)
    with pytest.raises(RangeUnavailableError):
        await other.read_range(manifest.sha256, 4 * CHUNK_SIZE, 1)
    honest = StorePeer(store, manifest)
    path = await other.fetch_ranges(manifest, [(0, manifest.size)], honest.chunk, source="b", progress=ignore)
    assert contents(path) == contents(stored.path)
    assert 0 not in honest.asked


async def test_files_that_say_to_be_another_model_are_not_kept(
    store: ModelStore, other: ModelStore, folder: Path, tmp_path: Path
) -> None:
    """All bytes are what was promised, but the index among them names fewer files than the manifest has."""
    manifest = await store.manifest(await store.ensure(str(folder), ignore))
    files = {part.name: (folder / part.name).read_bytes() for part in manifest.files}
    files["model.safetensors.index.json"] = b'{"weight_map": {"a": "model-00001-of-00003.safetensors"}}'
    lie, chunks = manifest_of(files, {part.name: part.head for part in manifest.files})

    async def chunk(index: int) -> bytes:
        return chunks[index]

    with pytest.raises(ModelFileError, match="fetch it from another node"):
        await other.fetch_ranges(lie, [(0, lie.size)], chunk, source="mallory", progress=ignore)
    assert other.entries() == []
    assert not list((tmp_path / "other").rglob("*.safetensors"))


KILLED_IN_THE_MIDDLE = """
import asyncio, os, sys
from pathlib import Path
import msgspec
from swarmd.node.models.manifest import ModelManifest
from swarmd.node.models.store import ModelStore

store, manifest = ModelStore(Path(sys.argv[1])), Path(sys.argv[2])
manifest = msgspec.msgpack.decode(manifest.read_bytes(), type=ModelManifest)
target = ModelStore(Path(sys.argv[3]))

async def chunk(index):
    if index == 16:
        os.kill(os.getpid(), 9)
    return await store.read_range(manifest.sha256, index * manifest.chunk_size, manifest.chunk_length(index))

asyncio.run(target.fetch_ranges(manifest, [(0, manifest.size)], chunk, source="b", progress=lambda progress: None))
"""


async def test_a_killed_process_leaves_only_true_chunks(
    store: ModelStore, manifest: ModelManifest, stored: StoredModel, tmp_path: Path
) -> None:
    (tmp_path / "manifest").write_bytes(msgspec.msgpack.encode(manifest))
    arguments = (str(tmp_path / "models"), str(tmp_path / "manifest"), str(tmp_path / "other"))
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", KILLED_IN_THE_MIDDLE, *arguments)
    assert await child.wait() == -9

    other = ModelStore(tmp_path / "other")
    partial = await other.partial(manifest)
    kept = [i for i in range(manifest.n_chunks) if partial.has(i * CHUNK_SIZE, 1)]
    assert 8 <= len(kept) < manifest.n_chunks
    for index in kept:
        place = (manifest.sha256, index * CHUNK_SIZE, manifest.chunk_length(index))
        assert await other.read_range(*place) == await store.read_range(*place)
    peer = StorePeer(store, manifest)
    path = await other.fetch_ranges(manifest, [(0, manifest.size)], peer.chunk, source="b", progress=ignore)
    assert contents(path) == contents(stored.path)
    assert set(peer.asked) == set(range(manifest.n_chunks)) - set(kept)


async def test_files_that_are_gone_are_not_believed(store: ModelStore, manifest: ModelManifest, tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    partial = PartialModel(tmp_path / "parts", manifest)
    await partial.fetch([(0, 1)], StorePeer(store, manifest).chunk, source="b", progress=ignore)
    assert PartialModel(tmp_path / "parts", manifest).has(0, 1)
    partial.paths[-1].unlink()
    assert not PartialModel(tmp_path / "parts", manifest).has(0, 1)


async def test_a_manifest_with_names_of_no_model_makes_no_file(
    other: ModelStore, manifest: ModelManifest, tmp_path: Path
) -> None:
    for name in ("../x.safetensors", "/tmp/x.safetensors", "x.json", "a/b.gguf"):
        hostile = (ModelPart(name, manifest.files[0].size, manifest.files[0].head), *manifest.files[1:])
        with pytest.raises(ModelFileError, match="manifest"):
            await other.partial(msgspec.structs.replace(manifest, files=hostile, name="x"))
    assert not list((tmp_path / "other" / "partial").iterdir())


def test_large_models_have_large_chunks_so_that_a_manifest_fits_a_frame() -> None:
    assert chunk_size_for(1) == chunk_size_for(48 << 30) == CHUNK_SIZE
    assert chunk_size_for((48 << 30) + 1) == 2 * CHUNK_SIZE
    assert chunk_size_for(MAX_MODEL_SIZE) <= MAX_CHUNK_SIZE
    largest = (140 << 30, 48 << 30, MAX_MODEL_SIZE)
    for size in largest:
        names = [f"{'m' * 60}-{number:05}-of-01023.safetensors" for number in range(1, 1024)]
        each = [ModelPart(name, size // 1023, 1 << 20) for name in names]
        files = (ModelPart("config.json", size - 1023 * (size // 1023), size - 1023 * (size // 1023)), *each)
        chunk = chunk_size_for(size)
        hashes = bytes(-(-size // chunk) * HASH_SIZE)
        made = ModelManifest("0" * 64, "n" * 90, files, chunk, hashes).check()
        assert made.n_chunks <= MAX_CHUNKS
        assert len(msgspec.msgpack.encode(made)) < 1_000_000
