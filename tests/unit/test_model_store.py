"""The store of models: names, local files, manifests, ranges, and pieces fetched from peers."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import msgspec
import pytest
from support.model_peers import contents, ignore
from support.package_index import tiny_entry, write_tiny_gguf

from swarmd.node.models.catalog import CATALOG, DEFAULT_MODEL, ModelNameError, resolve
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.manifest import CHUNK_SIZE, ModelManifest, ModelPart, chunk_hash
from swarmd.node.models.progress import Progress
from swarmd.node.models.store import MAX_RANGE, ModelStore, RangeUnavailableError


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


def test_the_default_model_has_three_names() -> None:
    entries = {resolve(name).entry for name in (DEFAULT_MODEL, "smollm2", "default", " SmolLM2:135M ")}
    assert entries == {CATALOG[0]}


@pytest.mark.parametrize("name", ["gpt5", "", "smollm2:7b", "a b", "sm\u00f6llm"])
def test_an_unknown_name_says_what_is_known_and_how_to_give_a_file(name: str) -> None:
    with pytest.raises(ModelNameError, match=r"smollm2:135m.*\.gguf"):
        resolve(name)


@pytest.mark.parametrize("name", ["./model.bin", "a/model.safetensors", "/x/pytorch_model.pt"])
def test_a_path_to_weights_that_are_no_model_alone_is_refused(name: str) -> None:
    with pytest.raises(ModelNameError, match=r"ends in \.gguf"):
        resolve(name)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/shadow", "~/x", "a/b", "/dev/null"])
async def test_a_path_to_something_else_than_a_model_is_refused(store: ModelStore, name: str) -> None:
    with pytest.raises(ModelFileError, match=r"there is no file or folder|is not a GGUF file"):
        await store.ensure(name, ignore)


async def test_a_local_file_is_registered_where_it_lies(store: ModelStore, model: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    stored = await store.ensure(str(model), seen.append)
    assert stored.path == model
    assert stored.name == "Tiny-Model"
    assert stored.sha256 == hashlib.sha256(contents(model)).hexdigest()
    assert seen[-1] == Progress("Tiny-Model", stored.size, stored.size, "verify")
    assert await store.ensure("Tiny-Model", ignore) == stored
    assert ModelStore(tmp_path / "models").entries() == [stored], "a new start remembers it"


async def test_a_file_is_hashed_once_until_it_changes(store: ModelStore, tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "own.gguf")
    first = await store.ensure(str(path), ignore)
    seen: list[Progress] = []
    assert await store.ensure(str(path), seen.append) == first
    assert seen == []

    write_tiny_gguf(path, seed=1)
    os.utime(path, ns=(0, 0))
    assert store.lookup(first.sha256) is None, "what changed is not believed any longer"
    second = await store.ensure(str(path), seen.append)
    assert second.sha256 != first.sha256
    assert seen
    path.unlink()
    assert store.entries() == []


async def test_two_models_of_one_name_stay_apart(store: ModelStore, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    one = await store.ensure(str(write_tiny_gguf(tmp_path / "x.gguf")), ignore)
    two = await store.ensure(str(write_tiny_gguf(tmp_path / "b" / "x.gguf", seed=1)), ignore)
    assert one.name == "x"
    assert two.name == f"x:{two.sha256[:8]}"
    assert await store.ensure(two.name, ignore) == two


async def test_a_local_file_can_not_take_a_catalog_name(store: ModelStore, tmp_path: Path) -> None:
    stored = await store.ensure(str(write_tiny_gguf(tmp_path / "smollm2.gguf")), ignore)
    assert stored.name == f"smollm2:{stored.sha256[:8]}"


async def test_a_copy_of_a_catalog_model_is_known_by_its_name(tmp_path: Path, model: Path) -> None:
    store = ModelStore(tmp_path / "models", catalog=(tiny_entry(model),))
    stored = await store.ensure(str(model), ignore)
    assert stored.name == "tiny:1m"
    assert await store.ensure("tiny", ignore) == stored, "and needs no download"


async def test_what_is_no_gguf_or_not_there_is_refused(store: ModelStore, tmp_path: Path) -> None:
    text = tmp_path / "text.gguf"
    text.write_text("this is not a model, but long enough to hold a header")
    with pytest.raises(ModelFileError, match=r"text\.gguf"):
        await store.ensure(str(text), ignore)
    with pytest.raises(ModelFileError, match="there is no file or folder"):
        await store.ensure(str(tmp_path / "missing.gguf"), ignore)
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(ModelFileError, match=r"folder\.gguf"):
        await store.ensure(str(tmp_path / "folder.gguf"), ignore)
    assert store.entries() == []


async def test_an_unknown_name_lists_the_local_models_too(store: ModelStore, model: Path) -> None:
    await store.ensure(str(model), ignore)
    with pytest.raises(ModelNameError, match="Tiny-Model"):
        await store.ensure("nothing", ignore)


async def test_a_damaged_index_is_started_anew(store: ModelStore, model: Path, tmp_path: Path) -> None:
    stored = await store.ensure(str(model), ignore)
    (tmp_path / "models" / "index.json").write_text("{broken")
    fresh = ModelStore(tmp_path / "models")
    assert fresh.entries() == []
    assert await fresh.ensure(str(model), ignore) == stored


async def test_the_manifest_describes_every_chunk(manifest: ModelManifest, model: Path) -> None:
    data = contents(model)
    assert manifest.size == len(data)
    assert manifest.n_chunks == 21
    assert manifest.chunks == b"".join(chunk_hash(data[i : i + CHUNK_SIZE]) for i in range(0, len(data), CHUNK_SIZE))
    [(start, length)] = manifest.head_ranges
    assert start == 0
    assert 0 < length < 4096
    assert sum(map(manifest.chunk_length, range(21))) == len(data)


async def test_the_manifest_is_kept_on_disk(
    store: ModelStore, manifest: ModelManifest, model: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "models" / "manifests" / f"{manifest.sha256}.msgpack"
    before = cache.stat().st_mtime_ns
    stored = await store.ensure(str(model), ignore)
    assert await store.manifest(stored) == manifest
    assert cache.stat().st_mtime_ns == before
    earlier = {"sha256": stored.sha256, "name": stored.name, "size": stored.size, "chunk_size": CHUNK_SIZE}
    for content in (b"garbage", msgspec.msgpack.encode(earlier | {"chunks": manifest.chunks, "header_bytes": 96})):
        cache.write_bytes(content)
        fresh = ModelStore(tmp_path / "models")
        assert await fresh.manifest(stored) == manifest, "damaged, or an earlier version's: it is built anew"
        assert msgspec.msgpack.decode(cache.read_bytes(), type=ModelManifest) == manifest


@pytest.mark.parametrize(
    "change",
    [
        {"sha256": "../../../etc/passwd"},
        {"sha256": "A" * 64},
        {"name": "../x"},
        {"name": "/x"},
        {"files": (ModelPart("model.gguf", 0, 0),)},
        {"files": (ModelPart("model.gguf", 1 << 60, 9),)},
        {"files": (ModelPart("model.gguf", 20 << 20, -1),)},
        {"files": (ModelPart("model.gguf", 20 << 20, 1 << 40),)},
        {"files": (ModelPart("../model.gguf", 20 << 20, 9),)},
        {"files": ()},
        {"chunk_size": 1},
        {"also": ((20 << 20, 1 << 20),)},
        {"also": ((-1, 1),)},
        {"also": ((0, -1),)},
        {"also": ((0, 2 << 20),)},
        {"chunks": b"short"},
    ],
)
async def test_a_manifest_that_contradicts_itself_is_refused(
    other: ModelStore, manifest: ModelManifest, change: dict[str, object], tmp_path: Path
) -> None:
    with pytest.raises(ModelFileError, match="manifest"):
        await other.partial(msgspec.structs.replace(manifest, **change))
    assert not list((tmp_path / "other" / "partial").iterdir())


async def test_ranges_of_a_complete_model(store: ModelStore, manifest: ModelManifest, model: Path) -> None:
    data = contents(model)
    assert await store.read_range(manifest.sha256, 5, CHUNK_SIZE) == data[5 : 5 + CHUNK_SIZE]
    assert await store.read_range(manifest.sha256, len(data) - 1, 1) == data[-1:]
    for offset, length in ((0, 0), (0, MAX_RANGE + 1), (-1, 5), (len(data), 1), (len(data) - 1, 2)):
        with pytest.raises(ValueError, match="bytes"):
            await store.read_range(manifest.sha256, offset, length)
    with pytest.raises(RangeUnavailableError):
        await store.read_range("0" * 64, 0, 1)
