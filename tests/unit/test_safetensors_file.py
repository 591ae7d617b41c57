"""Safetensors files: what a good one gives, and how a bad one is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.safetensors_file import SafetensorsFile
from swarmd.node.models.tensor_files import TensorFiles

Header = dict[str, Any]


def good() -> Header:
    return {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    }


def write(path: Path, header: Header | bytes, data: int = 32) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(range(data)))
    return path


def test_tensors_are_those_that_the_reference_implementation_wrote(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    written = {
        "matrix": random.standard_normal((5, 7)).astype(np.float32),
        "half": random.standard_normal((3, 2, 4)).astype(np.float16),
        "codes": random.integers(0, 1 << 32, (4, 4), dtype=np.uint32),
        "bytes": random.integers(0, 256, 11, dtype=np.uint8),
        "empty": np.empty((0, 4), np.float32),
        "scalar": np.array(3, np.int64),
    }
    save_file(written, tmp_path / "m.safetensors", metadata={"format": "np"})
    file = SafetensorsFile(tmp_path / "m.safetensors")
    assert set(file.tensors) == set(written)
    for name, values in written.items():
        got = file.read(name)
        assert got.dtype == values.dtype
        assert np.array_equal(got, values), name
    assert np.array_equal(file.read("half", 1, 3), written["half"][1:3])
    assert file.tensors["matrix"].nbytes == 140


def test_bits_of_types_that_numpy_lacks(tmp_path: Path) -> None:
    file = SafetensorsFile(write(tmp_path / "m.safetensors", good()))
    assert file.read("b").tolist() == [0x1918, 0x1B1A, 0x1D1C, 0x1F1E]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda h: h["b"].update(data_offsets=[20, 28]), "overlap or have a gap"),
        (lambda h: h["b"].update(data_offsets=[28, 36]), "overlap or have a gap"),
        (lambda h: h["b"].update(data_offsets=[24, 30]), r"'b' of BF16 \[4\] is said to take 6 bytes"),
        (lambda h: h["b"].update(data_offsets=[-8, 0]), "'b' of BF16"),
        (lambda h: h["b"].update(shape=[1 << 60, 1 << 60]), "'b' of BF16"),
        (lambda h: h["b"].update(shape=[-2, -2]), "'b' of BF16"),
        (lambda h: h["b"].update(dtype="F4"), "unknown type 'F4'"),
        (lambda h: h.update(c={"dtype": "U8", "shape": [9], "data_offsets": [32, 41]}), "truncated: 9 bytes"),
        (lambda h: h.pop("b"), "8 bytes at its end belong to no tensor"),
        (lambda h: h.update({"": h.pop("b")}), "has the name ''"),
        (lambda h: h["b"].pop("dtype"), "header can't be read"),
        (lambda h: h["b"].update(shape="4"), "header can't be read"),
    ],
)
def test_a_header_that_cannot_be_is_refused(tmp_path: Path, change: Callable[[Header], Any], says: str) -> None:
    header = good()
    change(header)
    with pytest.raises(ModelFileError, match=says):
        SafetensorsFile(write(tmp_path / "m.safetensors", header))


@pytest.mark.parametrize("header", [b"[" * 100_000, b"{{", b"\xff\xfe{}", b"[]", b'{"a": 1}'])
def test_a_header_that_is_no_header_is_refused(tmp_path: Path, header: bytes) -> None:
    with pytest.raises(ModelFileError, match="damaged"):
        SafetensorsFile(write(tmp_path / "m.safetensors", header))


@pytest.mark.parametrize("content", [b"", b"12345", b"version https://git-lfs.github.com/spec/v1\n", b"\xff" * 200])
def test_what_is_no_safetensors_file_is_refused_before_memory_is_taken(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(ModelFileError, match="not a safetensors file"):
        SafetensorsFile(tmp_path / "m.safetensors")


def test_holes_are_refused_where_they_may_be(tmp_path: Path) -> None:
    size = 4 << 20
    header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    path = tmp_path / "m.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    with pytest.raises(ModelFileError, match="never fetched"):
        SafetensorsFile(path, sparse=True).read("a")
    assert not SafetensorsFile(path).read("a").any()


def test_a_file_that_shrinks_while_it_is_in_use_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", good())
    file = SafetensorsFile(path)
    path.write_bytes(path.read_bytes()[:-4])
    assert file.read("a").shape == (2, 3)
    with pytest.raises(ModelFileError, match="shorter"):
        file.read("b")


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    paths = [(name, write(tmp_path / name, good())) for name in ("1.safetensors", "2.safetensors")]
    with pytest.raises(ModelFileError, match="both hold tensor 'a'"):
        TensorFiles(paths)
