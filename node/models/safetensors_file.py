"""A reader of one safetensors file: its header into typed records, and tensors, whole or in part, as copies.

Format: https://github.com/huggingface/safetensors#format. 8 bytes with the length of the header, little-endian; the
header, JSON; then the tensors' bytes, without gaps. A file may come from anywhere, so every length is checked against a
bound and against the bytes that are there before memory is taken. Nothing is mapped: bytes that were read are the
caller's alone, so that loading some layers costs the memory of these layers, and a file that shrinks meanwhile or a
disk that fails is an error and not a signal.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np

from swarmd.node.engine.quantized import Array
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.holes import has_hole

MAX_HEADER_BYTES = 32 << 20
"""Enough for MAX_TENSORS of them. The reference implementation takes 100 MB, which would be gigabytes once read."""
MAX_TENSORS = 1 << 18
MAX_NAME_CHARACTERS = 512
MAX_DIMENSIONS = 8
METADATA = "__metadata__"

NUMPY_TYPES: dict[str, str] = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "U64": "<u8",
    "I32": "<i4",
    "U32": "<u4",
    "I16": "<i2",
    "U16": "<u2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "u1",
    "F8_E4M3": "u1",
    "F8_E5M2": "u1",
    "F8_E8M0": "u1",
}
"""dtype -> the numpy type that its values, or their bits where numpy lacks the type, are given in."""


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies and what it is: `offset` is from the file's start, `dtype` a key of NUMPY_TYPES."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class SafetensorsFile:
    """The header of a file, and its tensors on demand; the file is open only while something is read.

    `tensors` maps names to `StoredTensor`; `header_bytes` is where the tensors' bytes begin, `size` the file's length.
    """

    def __init__(self, path: Path, *, sparse: bool = False) -> None:
        """Read the header. `sparse`: the file has its full length but only some tensors' bytes.

        Raises ModelFileError for anything that is not a complete, well-formed safetensors file.
        """
        self.path = path
        self.sparse = sparse
        try:
            with path.open("rb", buffering=0) as file:
                self.size = os.fstat(file.fileno()).st_size
                self.header_bytes = 8 + self._header_length(file.read(8))
                header = file.read(self.header_bytes - 8)
        except OSError as error:
            raise ModelFileError(f"cannot read {path}: {error.strerror}; check the path and its permissions") from error
        self.tensors = self._placed(self._entries(header))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Rows [start, stop) along the first dimension of a tensor, by default all: a fresh array, NUMPY_TYPES[dtype].

        Raises ModelFileError when the file has no such tensor, can't be read, or (sparse files) the bytes were never
        fetched.
        """
        info = self.tensors.get(name)
        if info is None:
            raise ModelFileError(
                f"{self.path.name} has no tensor {name!r}; it is incomplete or of another kind of model"
            )
        stop = info.shape[0] if stop is None and info.shape else stop
        shape = (stop - start, *info.shape[1:]) if stop is not None and info.shape else info.shape
        values = np.empty(shape, NUMPY_TYPES[info.dtype])
        self._fill(values, info.name, info.offset + start * (info.nbytes // info.shape[0] if start else 0))
        return values

    def _fill(self, values: Array, name: str, offset: int) -> None:
        view = memoryview(cast(Any, values.reshape(-1).view(np.uint8)))
        try:
            with self.path.open("rb", buffering=0) as file:
                if self.sparse and has_hole(file.fileno(), offset, len(view)):
                    raise ModelFileError(
                        f"the bytes of tensor {name!r} of {self.path.name} were never fetched; fetch them first"
                    )
                file.seek(offset)
                done = 0
                while done < len(view):
                    got = file.readinto(view[done:])
                    if not got:
                        raise ModelFileError(f"{self.path} has become shorter; download it again")
                    done += got
        except OSError as error:
            raise ModelFileError(f"cannot read tensor {name!r} of {self.path}: {error.strerror}") from error

    def _header_length(self, first: bytes) -> int:
        length = int.from_bytes(first, "little")
        if self.size < 10 or not 2 <= length <= min(MAX_HEADER_BYTES, self.size - 8):
            raise ModelFileError(
                f"{self.path} is not a safetensors file, or is truncated (its first bytes announce a header of "
                f"{length} bytes, the file has {self.size}); download it again"
            )
        return length

    def _entries(self, header: bytes) -> Mapping[str, _Entry]:
        try:
            raw = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
            raw.pop(METADATA, None)
            if len(raw) > MAX_TENSORS:
                raise self._damaged(f"it declares {len(raw)} tensors; at most {MAX_TENSORS} are supported")
            # The format forbids it. Of two the last would count, which other readers may see otherwise.
            if header.count(b'"data_offsets"') > len(raw):
                raise self._damaged("a tensor stands twice in its header")
            return {name: msgspec.json.decode(entry, type=_Entry) for name, entry in raw.items()}
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise self._damaged(f"its header can't be read: {error}") from None

    def _placed(self, entries: Mapping[str, _Entry]) -> dict[str, StoredTensor]:
        """The tensors by name, each found to lie whole and alone inside the file, with nothing between them."""
        placed: dict[str, StoredTensor] = {}
        end, before = 0, "the header"
        for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
            begin, stop = entry.data_offsets
            self._check(name, entry)
            if begin != end:
                raise self._damaged(f"{before} and tensor {name!r} overlap or have a gap between them")
            placed[name] = StoredTensor(name, entry.dtype, entry.shape, self.header_bytes + begin, stop - begin)
            end, before = stop, f"tensor {name!r}"
        missing = self.header_bytes + end - self.size
        if missing > 0:
            raise ModelFileError(
                f"{self.path.name} is truncated: {missing} bytes are missing (it ends inside or before {before}); "
                "download it again"
            )
        if missing < 0:
            raise self._damaged(f"{-missing} bytes at its end belong to no tensor")
        return {name: placed[name] for name in entries}

    def _check(self, name: str, entry: _Entry) -> None:
        if not 0 < len(name) <= MAX_NAME_CHARACTERS or not name.isprintable():
            raise self._damaged(f"a tensor has the name {name[:80]!r}")
        if entry.dtype not in NUMPY_TYPES:
            raise ModelFileError(
                f"tensor {name!r} of {self.path.name} has the unknown type {entry.dtype[:40]!r}; "
                "the file is damaged or needs a newer swarmd"
            )
        begin, stop = entry.data_offsets
        sound = len(entry.shape) <= MAX_DIMENSIONS and all(0 <= n < 1 << 48 for n in entry.shape) and begin >= 0
        if not sound or stop - begin != prod(entry.shape) * np.dtype(NUMPY_TYPES[entry.dtype]).itemsize:
            shape = f"{list(entry.shape)!r:.80}"
            raise self._damaged(f"tensor {name!r} of {entry.dtype} {shape} is said to take {stop - begin} bytes")

    def _damaged(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self.path.name} is damaged: {what}; download it again")
