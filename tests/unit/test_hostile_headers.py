"""Headers made to hurt: each is refused with a clear ModelFileError, in little memory, whatever it announces."""

from __future__ import annotations

import json
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.gguf import GGUFFile
from swarmd.node.models.safetensors_file import SafetensorsFile

MIB = 1 << 20
# Of a header that is itself small; what a large one may take is tested below.
MOST_MEMORY = 2 * MIB
MOST_SECONDS = 10.0

U8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10


def text(value: str | bytes, length: int | None = None) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def array(kind: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + values


def tensor(name: str = "t", sizes: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0, dims: int = -1) -> bytes:
    shape = b"".join(struct.pack("<Q", size) for size in sizes)
    return text(name) + struct.pack("<I", len(sizes) if dims < 0 else dims) + shape + struct.pack("<IQ", kind, offset)


def gguf(
    pairs: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    *,
    n_pairs: int = -1,
    n_tensors: int = -1,
    version: int = 3,
    data: int = 256,
) -> bytes:
    pairs, tensors = pairs or [], tensors or []
    counts = (len(tensors) if n_tensors < 0 else n_tensors, len(pairs) if n_pairs < 0 else n_pairs)
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + b"\0" * data


def nested(depth: int) -> bytes:
    """An array in an array in an array."""
    return array(U8, 1, b"\0") if depth == 0 else array(ARRAY, 1, nested(depth - 1))


GGUF: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "fewer than a header"),
    "a magic alone": (b"GGUF", "fewer than a header"),
    "another magic": (b"GGML" + bytes(60), "does not begin with 'GGUF'"),
    "version 0": (gguf(version=0), "GGUF version 0"),
    "version 2^32-1": (gguf(version=2**32 - 1), "GGUF version 4294967295"),
    "the other byte order": (gguf(version=3 << 24), "big-endian"),
    "2^60 pairs": (gguf(n_pairs=1 << 60), "metadata keys, more than it can hold"),
    "2^64-1 pairs": (gguf(n_pairs=2**64 - 1), "metadata keys, more than it can hold"),
    "more pairs than bytes": (gguf(n_pairs=1000), "metadata keys, more than it can hold"),
    "2^63 tensors": (gguf(n_tensors=1 << 63), "tensors, more than it can hold"),
    "more tensors than bytes": (gguf(n_tensors=60_000), "tensors, more than it can hold"),
    "a key of 2^40 bytes": (gguf([text(b"k", 1 << 40) + u32(U32)]), "a string of 1099511627776 bytes"),
    "a value of 2^40 bytes": (gguf([pair("k", STRING, text(b"v", 1 << 40))]), "a string of 1099511627776 bytes"),
    "a value of 2^63 bytes": (gguf([pair("k", STRING, text(b"v", 1 << 63))]), "longer than"),
    "a value longer than the file": (gguf([pair("k", STRING, text(b"v", 5000))]), "truncated"),
    "a key that is no text": (gguf([pair(b"\xff\xfe", U32, u32(1))]), "not UTF-8"),
    "a key that stands twice": (gguf([pair("k", U32, u32(1)), pair("k", U32, u32(2))]), "'k' stands twice"),
    "a value of no type": (gguf([pair("k", 99, u32(1))]), "value type 99"),
    "a boolean of 2": (gguf([pair("k", BOOL, b"\2")]), "neither 0 nor 1"),
    "an array of 2^60 numbers": (gguf([pair("k", ARRAY, array(U32, 1 << 60))]), "elements, more than it can hold"),
    "an array of 2^60 texts": (gguf([pair("k", ARRAY, array(STRING, 1 << 60))]), "elements, more than it can hold"),
    "an array of 2^60 arrays": (gguf([pair("k", ARRAY, array(ARRAY, 1 << 60))]), "elements, more than it can hold"),
    "an array that overflows": (gguf([pair("k", ARRAY, array(U64, 1 << 61))]), "elements, more than it can hold"),
    "an array of no type": (gguf([pair("k", ARRAY, array(99, 1, b"\0"))]), "value type 99"),
    "arrays 5 deep": (gguf([pair("k", ARRAY, nested(5))]), "nested more than 4 deep"),
    "arrays 5000 deep": (gguf([pair("k", ARRAY, array(ARRAY, 1) * 5000)]), "nested more than 4 deep"),
    "an alignment of 0": (gguf([pair("general.alignment", U32, u32(0))]), "alignment is 0"),
    "an alignment of 24": (gguf([pair("general.alignment", U32, u32(24))]), "alignment is 24"),
    "an alignment of 2^31": (gguf([pair("general.alignment", U32, u32(1 << 31))]), "alignment is 2147483648"),
    "an alignment of text": (gguf([pair("general.alignment", STRING, text("32"))]), "alignment is '32'"),
    "an alignment of truth": (gguf([pair("general.alignment", BOOL, b"\1")]), "alignment is True"),
    "a tensor without dimensions": (gguf(tensors=[tensor(sizes=())]), "has 0 dimensions"),
    "a tensor of 5 dimensions": (gguf(tensors=[tensor(sizes=(1,) * 5)]), "has 5 dimensions"),
    "a tensor of 2^32-1 dimensions": (gguf(tensors=[tensor(dims=2**32 - 1)]), "has 4294967295 dimensions"),
    "a dimension of 0": (gguf(tensors=[tensor(sizes=(32, 0))]), "dimension of size 0"),
    "a dimension of 2^64-1": (gguf(tensors=[tensor(sizes=(2**64 - 1,))]), "truncated"),
    "dimensions whose product overflows": (gguf(tensors=[tensor(sizes=(1 << 62, 1 << 62, 4, 4))]), "truncated"),
    "dimensions whose product is 0 in 64 bits": (gguf(tensors=[tensor(sizes=(1 << 32, 1 << 32))]), "truncated"),
    "a tensor of no type": (gguf(tensors=[tensor(kind=9999)]), "unknown type number 9999"),
    "a row that is no block": (gguf(tensors=[tensor(sizes=(33,), kind=2)]), "multiple of Q4_0's 32"),
    "an offset behind the end": (gguf(tensors=[tensor(offset=1 << 20)]), "truncated"),
    "an offset of 2^64-32": (gguf(tensors=[tensor(offset=2**64 - 32)]), "truncated"),
    "an offset between the marks": (gguf(tensors=[tensor(offset=7)]), "misaligned"),
    "tensors in one place": (gguf(tensors=[tensor("a"), tensor("b")]), "'a' and 'b' overlap"),
    "tensors that overlap": (gguf(tensors=[tensor("a", (64,)), tensor("b", offset=128)]), "'a' and 'b' overlap"),
    "a tensor in the data of a later one": (
        gguf(tensors=[tensor("b", offset=32), tensor("a", (32,), offset=0)]),
        "'a' and 'b' overlap",
    ),
    "two tensors of one name": (gguf(tensors=[tensor("a"), tensor("a", offset=128)]), "two tensors are named 'a'"),
    "a name of 2^40 bytes": (gguf(tensors=[text(b"t", 1 << 40) + tensor()[9:]]), "a string of 1099511627776 bytes"),
    "a name of 300 bytes": (gguf(tensors=[tensor("n" * 300)]), "longer than the 256"),
}


def safetensors(header: Any, data: int = 128, *, length: int | None = None, raw: bytes | None = None) -> bytes:
    encoded = raw if raw is not None else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + bytes(data)


def entry(shape: Any = (32,), begin: Any = 0, end: Any = 128, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


HALF = entry((16,), 0, 64)
SAFETENSORS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "not a safetensors file"),
    "seven bytes": (b"\2\0\0\0\0\0\0", "not a safetensors file"),
    "a header of 0 bytes": (safetensors({}, length=0), "not a safetensors file"),
    "a header longer than the file": (safetensors({"t": entry()}, length=10_000), "announce a header of 10000 bytes"),
    "a header of 2^63 bytes": (safetensors({}, length=1 << 63), "announce a header"),
    "a header of 2^64-1 bytes": (safetensors({}, length=2**64 - 1), "announce a header"),
    "no JSON": (safetensors(None, raw=b"{" + b"x" * 99), "header can't be read"),
    "JSON in UTF-16": (safetensors(None, raw='{"t":1}'.encode("utf-16")), "header can't be read"),
    "a list": (safetensors([]), "header can't be read"),
    "a tensor that is a number": (safetensors({"t": 3}), "header can't be read"),
    "a tensor without offsets": (safetensors({"t": {"dtype": "F32", "shape": [32]}}), "header can't be read"),
    "lists 100,000 deep": (safetensors(None, raw=b'{"t":' + b"[" * 100_000), "header can't be read"),
    "objects 100,000 deep": (safetensors(None, raw=b'{"t":' * 100_000), "header can't be read"),
    "a deep tensor that closes": (
        safetensors(None, raw=b'{"t":' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
        "header can't be read",
    ),
    "offsets the wrong way around": (safetensors({"t": entry(begin=128, end=0)}), "is said to take -128 bytes"),
    "a negative begin": (safetensors({"t": entry(begin=-128, end=0)}), "is said to take 128 bytes"),
    "offsets beyond 64 bits": (safetensors({"t": entry(begin=2**70, end=2**70 + 128)}), "can't be read|gap"),
    "offsets that are fractions": (safetensors({"t": entry(begin=0.5, end=128.5)}), "header can't be read"),
    "three offsets": (
        safetensors({"t": {"dtype": "F32", "shape": [32], "data_offsets": [0, 64, 128]}}),
        "header can't be read",
    ),
    "a size that is not the type's": (safetensors({"t": entry(dtype="F16")}), "is said to take 128 bytes"),
    "a size that is not the shape's": (safetensors({"t": entry((31,))}), "is said to take 128 bytes"),
    "a negative dimension": (safetensors({"t": entry((-32, -1))}), "is said to take 128 bytes"),
    "a dimension of 2^62": (safetensors({"t": entry((1 << 62,))}), "is said to take 128 bytes"),
    "dimensions that multiply to 0 in 64 bits": (
        safetensors({"t": entry((1 << 32, 1 << 32), 0, 0)}, 0),
        "is said to take 0 bytes",
    ),
    "40 dimensions": (safetensors({"t": entry((1,) * 39 + (32,))}), "is said to take 128 bytes"),
    "two tensors in one place": (safetensors({"a": entry(), "b": entry()}), "overlap or have a gap"),
    "tensors that overlap": (safetensors({"a": HALF, "b": entry((24,), 32, 128)}), "overlap or have a gap"),
    "a hole between tensors": (safetensors({"a": HALF, "b": entry((8,), 96, 128)}), "overlap or have a gap"),
    "a hole before the first": (safetensors({"a": entry((16,), 64, 128)}), "overlap or have a gap"),
    "bytes behind the last": (safetensors({"a": HALF}), "64 bytes at its end belong to no tensor"),
    "bytes that are not there": (safetensors({"a": entry((64,), 0, 256)}), "128 bytes are missing"),
    "two tensors of one name": (
        safetensors(None, raw=b'{"t":%s,"t":%s}' % (json.dumps(HALF).encode(), json.dumps(entry()).encode())),
        "a tensor stands twice",
    ),
    "a type that is none": (safetensors({"t": entry(dtype="F31")}), "unknown type 'F31'"),
    "a type that is a list": (safetensors({"t": entry(dtype=["F32"])}), "header can't be read"),
    "a name of 100,000 characters": (safetensors({"t" * 100_000: entry()}), "a tensor has the name"),
    "a name that is a command to the terminal": (safetensors({"\x1b[2J": entry()}), "a tensor has the name"),
    "no name": (safetensors({"": entry()}), "a tensor has the name ''"),
    "a lone surrogate in a name": (safetensors(None, raw=b'{"\\ud800":' + b" " * 60 + b"1}"), "header can't be read"),
    "numbers that are none": (safetensors(None, raw=b'{"t":NaN,"u":Infinity}'), "header can't be read"),
}


def refusal(path: Path, content: bytes, read: Callable[[Path], object], most: int = MOST_MEMORY) -> str:
    """What is said of a file; it must be a ModelFileError, in time, and in little memory beside what is mapped."""
    path.write_bytes(content)
    began = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(ModelFileError) as caught:
            read(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.monotonic() - began < MOST_SECONDS
    assert peak < most
    said = str(caught.value)
    assert path.name in said
    assert said.isprintable()
    assert len(said) < 700
    return said


@pytest.mark.parametrize("kind", GGUF)
def test_a_hostile_gguf_file(kind: str, tmp_path: Path):
    content, words = GGUF[kind]
    assert words in refusal(tmp_path / "evil.gguf", content, GGUFFile.open)


@pytest.mark.parametrize("kind", SAFETENSORS)
def test_a_hostile_safetensors_file(kind: str, tmp_path: Path):
    content, words = SAFETENSORS[kind]
    said = refusal(tmp_path / "evil.safetensors", content, SafetensorsFile)
    assert any(word in said for word in words.split("|"))


@pytest.mark.parametrize("kind", ["many names", "many lists", "one text", "blanks"])
def test_a_safetensors_header_of_many_megabytes_takes_a_bounded_multiple_of_it(kind: str, tmp_path: Path):
    size = 16 * MIB
    unit = {
        "many names": lambda n: b'"%d":{"dtype":"F32","shape":[],"data_offsets":[0,0]}' % n,
        "many lists": lambda n: b'"%d":[]' % n,
        "one text": lambda n: b'"%d":"%s"' % (n, b"x" * (size - 64)),
        "blanks": lambda n: b'"%d":%s0' % (n, b" " * (size - 64)),
    }[kind]
    one = len(unit(1_000_000)) + 1
    raw = b"{" + b",".join(unit(n) for n in range(max(1, size // one))) + b"}"
    refusal(tmp_path / "large.safetensors", safetensors(None, raw=raw), SafetensorsFile, most=20 * size)


@pytest.mark.parametrize("kind", [U8, STRING])
def test_of_small_elements_there_may_be_two_million_and_no_more(kind: int, tmp_path: Path):
    count = 1 << 21
    values = bytes(count if kind == U8 else 8 * count)
    many = gguf([pair("a", ARRAY, array(kind, count, values)), pair("b", ARRAY, array(U8, 1, b"\0"))])
    (tmp_path / "large.gguf").write_bytes(many)
    with pytest.raises(ModelFileError, match="more than it can hold"):
        GGUFFile.open(tmp_path / "large.gguf")
    with GGUFFile.open(write(tmp_path / "fits.gguf", gguf([pair("a", ARRAY, array(kind, count, values))]))) as file:
        assert len(cast("list[Any]", file.metadata["a"])) == count


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
