"""The GGUF reader: what it reads, and how it refuses what it must not."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from support.tiny_gguf import TinyModel, Type, write_tiny_gguf

from swarmd.node.models.gguf import GGUF_BLOCK, GGUFFile, GGUFType, ModelFileError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", TinyModel(type=Type.Q4_0))


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def entry(name: str = "w", sizes: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def write(path: Path, *, tensors: list[bytes], values: list[bytes] | None = None, data: int = 4096) -> Path:
    """A handmade file: the header exactly as given, then `data` bytes."""
    values = values or []
    body = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values)) + b"".join(values) + b"".join(tensors)
    path.write_bytes(body + b"\0" * (-len(body) % 32) + b"\1" * data)
    return path


def test_agrees_with_the_reference_reader(tiny: Path) -> None:
    reference = gguf.GGUFReader(tiny)
    with GGUFFile.open(tiny) as file:
        assert file.size == tiny.stat().st_size
        fields = {key: field.contents() for key, field in reference.fields.items() if not key.startswith("GGUF.")}
        assert file.metadata == fields
        assert list(file.tensors) == [tensor.name for tensor in reference.tensors]
        for tensor in reference.tensors:
            info = file.tensors[tensor.name]
            assert (info.offset, info.nbytes, int(info.type)) == (
                tensor.data_offset,
                tensor.n_bytes,
                tensor.tensor_type,
            )
            assert info.shape == tuple(reversed(tensor.shape.tolist()))
            assert np.array_equal(file.read(tensor.name), tensor.data.view(np.uint8).reshape(-1))
        assert file.header_bytes == min(tensor.data_offset for tensor in reference.tensors)


def test_block_sizes_agree_with_the_reference_package() -> None:
    # Q8_1 never stands in files, and the Python package still has the layout from before 2024.
    for kind, sizes in gguf.GGML_QUANT_SIZES.items():
        if kind.name in GGUFType.__members__ and kind.name != "Q8_1":
            assert GGUF_BLOCK[GGUFType(int(kind))] == sizes, kind


def test_every_kind_of_metadata_value(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "kinds.gguf", "llama")
    writer.add_uint8("a", 200)
    writer.add_int8("b", -100)
    writer.add_int64("c", -(1 << 40))
    writer.add_float64("d", 1e300)
    writer.add_bool("e", True)
    writer.add_array("f", [True, False])
    writer.add_array("g", ["ä", "b"])
    writer.add_array("h", [1.5, -2.0])
    writer.add_tensor("w", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile.open(tmp_path / "kinds.gguf") as file:
        got = [file.metadata[key] for key in "abcdefgh"]
    assert got == [200, -100, -(1 << 40), 1e300, True, [True, False], ["ä", "b"], [1.5, -2.0]]


def test_read_is_a_read_only_view_that_outlives_close(tiny: Path) -> None:
    file = GGUFFile.open(tiny)
    data = file.read("output_norm.weight")
    before = data.copy()
    file.close()
    assert np.array_equal(data, before)
    with pytest.raises(ValueError, match="read-only"):
        data[0] = 1


def test_missing_file_and_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="No such file"):
        GGUFFile.open(tmp_path / "none.gguf")
    with pytest.raises(ModelFileError, match=r"regular file|not a GGUF"):
        GGUFFile.open(tmp_path)


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "page.gguf"
    path.write_text("<!doctype html><title>404 not found</title>")
    with pytest.raises(ModelFileError, match="is not a GGUF file"):
        GGUFFile.open(path)
    path.write_bytes(b"")
    with pytest.raises(ModelFileError, match="is not a GGUF file"):
        GGUFFile.open(path)


def test_truncation_says_how_many_bytes_are_missing(tiny: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny.read_bytes()[:-1000])
    with pytest.raises(ModelFileError, match=r"truncated: (\d+) bytes are missing") as caught:
        GGUFFile.open(cut)
    # The last tensor is padded to the alignment of 32, so that up to 31 of the bytes cut off do not count.
    missing = int(str(caught.value).split("truncated: ")[1].split()[0])
    assert 1000 - 31 <= missing <= 1000


def test_unknown_tensor_type_names_tensor_and_number(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", tensors=[entry("blk.0.strange", kind=99)])
    with pytest.raises(ModelFileError, match=r"blk\.0\.strange.*99"):
        GGUFFile.open(path)


@pytest.mark.parametrize(
    ("tensors", "values", "says"),
    [
        pytest.param([entry(), entry()], [], "two tensors", id="duplicate tensor"),
        pytest.param([entry(), entry("v", offset=64)], [], "overlap", id="overlap"),
        pytest.param([entry(offset=5)], [], "misaligned", id="misaligned"),
        pytest.param([entry(sizes=(33,), kind=2)], [], "multiple", id="part of a block"),
        pytest.param([entry(sizes=(1,) * 5)], [], "5 dimensions", id="dimensions"),
        pytest.param([entry(sizes=(0,))], [], "size 0", id="empty"),
        pytest.param([entry(sizes=(1 << 63, 1 << 63))], [], "truncated", id="huge tensor"),
        pytest.param([entry("w" * 300)], [], "longer than", id="long name"),
        pytest.param([], [string("a") + struct.pack("<IB", 7, 2)], "boolean", id="boolean"),
        pytest.param([], [string("a") + struct.pack("<I", 13)], "type 13", id="value type"),
        pytest.param([], [(string("a") + struct.pack("<IB", 0, 1))] * 2, "twice", id="duplicate key"),
        pytest.param([], [string("a") + struct.pack("<IIQ", 9, 0, 1 << 60)], "elements", id="huge array"),
        pytest.param([], [string("a") + struct.pack("<IQ", 8, 1 << 60)], "longer", id="huge string"),
        pytest.param([], [string("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9], "nested", id="nested"),
        pytest.param([], [string("a") + struct.pack("<IQ", 8, 1) + b"\xff"], "UTF-8", id="not utf-8"),
        pytest.param([], [string("general.alignment") + struct.pack("<II", 4, 48)], "alignment", id="alignment"),
    ],
)
def test_malformed_headers_are_refused(tmp_path: Path, tensors: list[bytes], values: list[bytes], says: str) -> None:
    path = write(tmp_path / "bad.gguf", tensors=tensors, values=values)
    with pytest.raises(ModelFileError, match=says) as caught:
        GGUFFile.open(path)
    assert "bad.gguf" in str(caught.value)


@pytest.mark.parametrize("version", [1, 4, 3 << 24])
def test_other_versions_are_named(tmp_path: Path, version: int) -> None:
    path = write(tmp_path / "v.gguf", tensors=[entry()])
    raw = bytearray(path.read_bytes())
    raw[4:8] = struct.pack("<I", version)
    path.write_bytes(raw)
    with pytest.raises(ModelFileError, match=f"version {version}"):
        GGUFFile.open(path)


def test_a_hole_of_a_sparse_file_is_not_taken_for_weights(tmp_path: Path) -> None:
    # Three tensors of 4 MiB; the bytes of the second were never written, and half of the third's neither.
    size = 4 << 20
    names = ("here", "away", "half")
    path = write(
        tmp_path / "x.gguf", tensors=[entry(n, (size // 4,), offset=i * size) for i, n in enumerate(names)], data=size
    )
    with path.open("r+b") as file:
        start = path.stat().st_size
        file.seek(start + size)
        file.write(b"\1" * (size // 2))
        file.truncate(start + 2 * size)
        if os.lseek(file.fileno(), start, os.SEEK_HOLE) >= start + size:
            pytest.skip("this file system keeps no holes")
    with GGUFFile.open(path, sparse=True) as gguf_file:
        assert gguf_file.read("here").all()
        for name in ("away", "half"):
            with pytest.raises(ModelFileError, match=rf"'{name}'.*never fetched"):
                gguf_file.read(name)
    with GGUFFile.open(path) as gguf_file:
        assert not gguf_file.read("away")[size // 2 :].any()


def test_a_tensor_that_is_not_there(tiny: Path) -> None:
    with GGUFFile.open(tiny) as file, pytest.raises(ModelFileError, match=r"no tensor 'nope'"):
        file.read("nope")
