"""The description by which a node can fetch pieces of a model from others and check each of them."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterable
from pathlib import Path

import msgspec

from swarmd.node.models.catalog import is_model_name
from swarmd.node.models.disk import StoppedError
from swarmd.node.models.errors import ModelFileError

CHUNK_SIZE = 1 << 20
"""Bytes per chunk; the last one of a file may be shorter."""
HASH_SIZE = 16
"""Bytes kept of each chunk's SHA-256."""
MAX_FILE_SIZE = 1 << 41

_HEX64 = re.compile(r"[0-9a-f]{64}")


class ModelManifest(msgspec.Struct, frozen=True):
    """One model file: `sha256` (hex) and `size` in bytes of the whole, `chunks` the concatenated SHA-256 of
    each `chunk_size` bytes, cut to 16 bytes; `header_bytes` is where the GGUF header ends and tensor data
    begins.

    A manifest from a peer is as true as the peer: chunks are checked against it, and the whole against
    `sha256` once all chunks are there. Call `check` on one before anything else.
    """

    sha256: str
    name: str
    size: int
    chunk_size: int
    chunks: bytes
    header_bytes: int

    def check(self) -> ModelManifest:
        """Returns itself; raises ModelFileError when the parts contradict each other or are out of bounds."""
        if not _HEX64.fullmatch(self.sha256) or not is_model_name(self.name):
            raise ModelFileError("a model manifest with an impossible name or SHA-256 was received; ask another node")
        if self.chunk_size != CHUNK_SIZE or not 0 < self.size <= MAX_FILE_SIZE:
            raise ModelFileError(f"the manifest of {self.name} has an impossible size; ask another node")
        if len(self.chunks) != self.n_chunks * HASH_SIZE or not 0 <= self.header_bytes <= self.size:
            raise ModelFileError(f"the manifest of {self.name} contradicts itself; ask another node")
        return self

    @property
    def n_chunks(self) -> int:
        """Number of chunks of the file."""
        return -(-self.size // CHUNK_SIZE)

    def chunk_length(self, index: int) -> int:
        """Bytes of chunk `index`."""
        return min(CHUNK_SIZE, self.size - index * CHUNK_SIZE)

    def accepts(self, index: int, data: bytes | bytearray | memoryview) -> bool:
        """Whether `data` is chunk `index`."""
        expected = self.chunks[index * HASH_SIZE : (index + 1) * HASH_SIZE]
        return len(data) == self.chunk_length(index) and chunk_hash(data) == expected

    def chunks_of(self, ranges: Iterable[tuple[int, int]]) -> list[int]:
        """The chunks, in order, that hold the byte ranges (offset, length). Raises ValueError for one outside
        the file."""
        wanted: set[int] = set()
        for offset, length in ranges:
            if offset < 0 or length < 0 or offset + length > self.size:
                raise ValueError(f"bytes {offset}+{length} are outside the file of {self.size} bytes")
            if length:
                wanted.update(range(offset // CHUNK_SIZE, (offset + length - 1) // CHUNK_SIZE + 1))
        return sorted(wanted)

    def fingerprint(self) -> bytes:
        """32 bytes that differ when any promise about the file's bytes differs."""
        return hashlib.sha256(f"{self.sha256} {self.size} ".encode() + self.chunks).digest()


def chunk_hash(data: bytes | bytearray | memoryview) -> bytes:
    """A chunk's SHA-256, cut to HASH_SIZE bytes."""
    return hashlib.sha256(data).digest()[:HASH_SIZE]


def build_manifest(stop: threading.Event, path: Path, *, name: str, sha256: str, header_bytes: int) -> ModelManifest:
    """Hash every chunk of a complete file; for `disk.in_thread`."""
    hashes = bytearray()
    size = 0
    with path.open("rb") as file:
        while block := file.read(CHUNK_SIZE):
            if stop.is_set():
                raise StoppedError
            hashes += chunk_hash(block)
            size += len(block)
    return ModelManifest(sha256, name, size, CHUNK_SIZE, bytes(hashes), header_bytes).check()
