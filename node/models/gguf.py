"""A reader of GGUF files: header into typed Python values, tensor data as views on the memory-mapped file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. A file may
come from anywhere, so every count and length is checked against a bound and against the bytes that are there
before memory is taken.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from types import TracebackType

import numpy as np

from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.gguf_header import MAX_HEADER_BYTES, HeaderCursor, read_metadata
from swarmd.node.models.gguf_types import GGUF_BLOCK, GGUFType
from swarmd.node.models.holes import has_hole

__all__ = ["GGUF_BLOCK", "GGUFFile", "GGUFType", "ModelFileError", "TensorInfo"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
MAX_TENSORS = 1 << 16
MAX_DIMENSIONS = 4
MAX_NAME_BYTES = 256
MIN_TENSOR_INFO_BYTES = 8 + 1 + 4 + 8 + 4 + 8
"""The smallest entry of the tensor table: name length, one character, dimensions, one size, type and offset.
"""


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies and what it is.

    `shape` is row-major, (rows, columns) for a matrix: the reverse of GGUF's order. `offset` is from the
    file's start.
    """

    name: str
    type: GGUFType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class GGUFFile:
    """An open GGUF file. Use `open`, and `close` it or use it as a context manager.

    `metadata` maps keys to int, float, bool, str or (nested) lists of them; `tensors` maps names to
    `TensorInfo` in the file's order; `header_bytes` is where the tensor data begins; `size` is the file's
    length in bytes.
    """

    def __init__(self, path: Path, mapping: mmap.mmap, descriptor: int, *, sparse: bool) -> None:
        self.path = path
        self.sparse = sparse
        self.size = len(mapping)
        self._mapping = mapping
        self._descriptor = descriptor
        cursor = HeaderCursor(mapping, path.name)
        n_tensors, n_values = self._read_preamble(cursor)
        self.metadata = read_metadata(cursor, n_values)
        self.alignment = self._checked_alignment()
        infos = [self._read_tensor_info(cursor) for _ in range(n_tensors)]
        self.header_bytes = -(-cursor.position // self.alignment) * self.alignment
        self.tensors = self._placed(infos)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, sparse: bool = False) -> GGUFFile:
        """Map the file and read its header.

        `sparse` says that the file has its full length but only some tensors' bytes: `read` then refuses a
        tensor with a hole in it. Raises ModelFileError for anything that is not a complete, well-formed
        GGUF file.
        """
        path = Path(path)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ModelFileError(f"cannot open {path}: {error.strerror}; check the path and its permissions") from error
        try:
            if os.fstat(descriptor).st_size < 24:
                raise ModelFileError(
                    f"{path.name} is not a GGUF file: {os.fstat(descriptor).st_size} bytes are fewer than a header; "
                    "download the model again"
                )
            mapping = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
            return cls(path, mapping, descriptor, sparse=sparse)
        except OSError as error:
            os.close(descriptor)
            raise ModelFileError(f"cannot read {path}: {error.strerror}; it must be a regular file") from error
        except BaseException:
            os.close(descriptor)
            raise

    def read(self, name: str) -> np.ndarray:
        """The tensor's bytes: a read-only uint8 array [nbytes] on the mapping, nothing copied.

        Raises ModelFileError when the file has no such tensor, or (sparse files) its bytes were never
        fetched.
        """
        info = self.tensors.get(name)
        if info is None:
            raise ModelFileError(
                f"{self.path.name} has no tensor {name!r}; it is incomplete or of another kind of model"
            )
        if self.sparse and has_hole(self._descriptor, info.offset, info.nbytes):
            raise ModelFileError(
                f"the bytes of tensor {name!r} of {self.path.name} were never fetched; fetch them first"
            )
        return np.frombuffer(self._mapping, np.uint8, info.nbytes, info.offset)

    def release(self, name: str) -> None:
        """Let go of the memory that reading a tensor took; whoever reads it again gets it from the file again."""
        info = self.tensors[name]
        begin = info.offset // mmap.PAGESIZE * mmap.PAGESIZE
        self._mapping.madvise(mmap.MADV_DONTNEED, begin, info.offset + info.nbytes - begin)

    def close(self) -> None:
        """Release the file. Arrays from `read` that are still alive keep the mapping until they are gone."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        try:
            self._mapping.close()
        except BufferError:
            del self._mapping

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_preamble(self, cursor: HeaderCursor) -> tuple[int, int]:
        if cursor.take(4) != MAGIC:
            raise ModelFileError(
                f"{self.path.name} is not a GGUF file (it does not begin with 'GGUF'); give a .gguf model file"
            )
        version = cursor.u32()
        if version not in VERSIONS:
            hint = "it is big-endian" if version in (2 << 24, 3 << 24) else "convert the model with a current llama.cpp"
            raise ModelFileError(
                f"{self.path.name} has GGUF version {version}; versions 2 and 3 are understood ({hint})"
            )
        n_tensors, n_values = cursor.u64(), cursor.u64()
        room = min(self.size, MAX_HEADER_BYTES)
        if n_tensors > MAX_TENSORS or n_tensors * MIN_TENSOR_INFO_BYTES > room:
            raise cursor.error(f"declares {n_tensors} tensors, more than it can hold")
        return n_tensors, n_values

    def _checked_alignment(self) -> int:
        value = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        usable = isinstance(value, int) and 8 <= value <= MAX_ALIGNMENT and value & (value - 1) == 0
        if not usable or not isinstance(value, int):
            raise ModelFileError(
                f"{self.path.name} is damaged: general.alignment is {value!r:.40}, not a power of two from 8"
            )
        return value

    def _read_tensor_info(self, cursor: HeaderCursor) -> TensorInfo:
        name = cursor.string(MAX_NAME_BYTES)
        n_dimensions = cursor.u32()
        if not 1 <= n_dimensions <= MAX_DIMENSIONS:
            raise cursor.error(f"tensor {name!r} has {n_dimensions} dimensions; 1 to {MAX_DIMENSIONS} are possible")
        sizes = [cursor.u64() for _ in range(n_dimensions)]
        number = cursor.u32()
        offset = cursor.u64()
        if 0 in sizes:
            raise cursor.error(f"tensor {name!r} has a dimension of size 0")
        try:
            kind = GGUFType(number)
        except ValueError:
            raise ModelFileError(
                f"tensor {name!r} of {self.path.name} has the unknown type number {number}; "
                "the file is damaged or needs a newer swarmd"
            ) from None
        block, block_bytes = GGUF_BLOCK[kind]
        if sizes[0] % block:
            raise cursor.error(f"tensor {name!r} has rows of {sizes[0]}, not a multiple of {kind.name}'s {block}")
        return TensorInfo(name, kind, tuple(reversed(sizes)), offset, prod(sizes) // block * block_bytes)

    def _placed(self, infos: Iterable[TensorInfo]) -> dict[str, TensorInfo]:
        """The tensors by name with absolute offsets, each found to lie whole and alone inside the file."""
        placed: dict[str, TensorInfo] = {}
        for info in infos:
            if info.name in placed:
                raise ModelFileError(
                    f"{self.path.name} is damaged: two tensors are named {info.name!r}; fetch it again"
                )
            if info.offset % self.alignment:
                raise ModelFileError(f"{self.path.name} is damaged: tensor {info.name!r} is misaligned; fetch it again")
            start = self.header_bytes + info.offset
            placed[info.name] = TensorInfo(info.name, info.type, info.shape, start, info.nbytes)
        ordered = sorted(placed.values(), key=lambda info: info.offset)
        for before, after in pairwise(ordered):
            if before.offset + before.nbytes > after.offset:
                raise ModelFileError(
                    f"{self.path.name} is damaged: tensors {before.name!r} and {after.name!r} overlap; fetch it again"
                )
        if ordered and (missing := ordered[-1].offset + ordered[-1].nbytes - self.size) > 0:
            raise ModelFileError(
                f"{self.path.name} is truncated: {missing} bytes are missing "
                f"(it ends inside or before tensor {ordered[-1].name!r}); download it again"
            )
        return placed
