"""Any set of files, fetched in any ranges and over any number of runs, is in the end what it was at its source."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from pathlib import Path
from unittest.mock import patch

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmd.node.models import manifest as manifest_module
from swarmd.node.models.identity import hash_model
from swarmd.node.models.layout import placed
from swarmd.node.models.manifest import ModelManifest, build_manifest
from swarmd.node.models.partial import PartialModel

CHUNK = 16


@st.composite
def models(draw: st.DrawFn) -> list[tuple[str, bytes, int]]:
    """(name, content, head) of each file: one GGUF file, several, or a folder; empty files and heads too."""
    kind = draw(st.sampled_from(["one", "split", "folder"]))
    count = 1 if kind == "one" else draw(st.integers(2, 5))
    contents = [draw(st.binary(min_size=int(number == 0), max_size=70)) for number in range(count)]
    heads = [draw(st.integers(0, len(content))) for content in contents]
    if kind == "one":
        names = ["model.gguf"]
    elif kind == "split":
        names = [f"model-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    else:
        names = ["config.json", *(f"{number}.safetensors" for number in range(1, count))]
        heads[0] = len(contents[0])
    return list(zip(names, contents, heads, strict=True))


@given(models(), st.data())
@settings(deadline=None, max_examples=60)
def test_any_files_and_ranges_make_the_round_trip(model: list[tuple[str, bytes, int]], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder, patch.object(manifest_module, "CHUNK_SIZE", CHUNK):
        source, target = Path(folder, "source"), Path(folder, "target")
        target.mkdir()
        layout = placed(source, [(name, len(content)) for name, content, _ in model])
        for file, (_, content, _) in zip(layout.files, model, strict=True):
            file.path.parent.mkdir(exist_ok=True)
            file.path.write_bytes(content)
        stop = threading.Event()
        heads = [head for _, _, head in model]
        made = build_manifest(stop, layout, heads, name="m", sha256=hash_model(stop, layout, lambda done: None))
        came = msgspec.msgpack.decode(msgspec.msgpack.encode(made), type=ModelManifest).check()
        whole = b"".join(content[:head] for _, content, head in model)
        whole += b"".join(content[head:] for _, content, head in model)
        for _ in range(data.draw(st.integers(1, 3))):
            wanted = data.draw(st.lists(_range_in(model), max_size=3))
            _fetch_and_compare(PartialModel(target, came), wanted, model, whole)
        partial = PartialModel(target, came)
        _fetch_and_compare(partial, [(name, 0, len(content)) for name, content, _ in model], model, whole)
        assert partial.complete
        assert hash_model(stop, partial.layout, lambda done: None) == came.sha256


@st.composite
def _range_in(draw: st.DrawFn, model: list[tuple[str, bytes, int]]) -> tuple[str, int, int]:
    name, content, _ = draw(st.sampled_from(model))
    offset = draw(st.integers(0, len(content)))
    return name, offset, draw(st.integers(0, len(content) - offset))


def _fetch_and_compare(
    partial: PartialModel, wanted: list[tuple[str, int, int]], model: list[tuple[str, bytes, int]], whole: bytes
) -> None:
    """Fetch ranges of files; they must be right, and every byte elsewhere right or not there yet."""
    asked: list[int] = []

    async def chunk(index: int) -> bytes:
        asked.append(index)
        return whole[index * CHUNK : (index + 1) * CHUNK]

    ranges = partial.manifest.ranges_of(wanted)
    missing = partial.missing_bytes(ranges)
    asyncio.run(partial.fetch(ranges, chunk, source="b", progress=lambda progress: None))
    assert sum(map(partial.manifest.chunk_length, asked)) == missing
    assert all(partial.has(*place) for place in ranges)
    contents = {name: content for name, content, _ in model}
    here = {file.name: file.path.read_bytes() for file in partial.layout.files}
    for name, offset, length in wanted:
        assert here[name][offset : offset + length] == contents[name][offset : offset + length]
    for name, content in contents.items():
        assert all(got in (0, byte) for got, byte in zip(here[name], content, strict=True))
