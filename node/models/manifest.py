"""The description by which a node can fetch pieces of a model from others and check each of them."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Annotated

import msgspec

from swarmd.node.models.address_space import AddressSpace, Span
from swarmd.node.models.catalog import is_model_name
from swarmd.node.models.disk import StoppedError, read_spans
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.heads import MAX_FACTOR_TENSORS, MAX_FACTORS_BYTES
from swarmd.node.models.layout import MAX_FILES, MAX_METADATA_BYTES, ModelLayout, is_layout

CHUNK_SIZE = 1 << 20
"""Bytes per chunk, unless that would make more than MAX_CHUNKS; the last one of a model may be shorter."""
MAX_CHUNKS = 49_152
"""So that the hashes, 768 KiB, fit into a frame's header of 1 MiB together with the files' names."""
HASH_SIZE = 16
"""Bytes kept of each chunk's SHA-256."""
MAX_MODEL_SIZE = 1 << 41
MAX_CHUNK_SIZE = 1 << 26

_HEX64 = re.compile(r"[0-9a-f]{64}")


class ModelPart(msgspec.Struct, frozen=True, array_like=True):
    """One file of a model: its name within the model, its size, and how many of its first bytes are head: all that
    must be read to know where its tensors are (the whole of a file without tensors)."""

    name: Annotated[str, msgspec.Meta(max_length=192)]
    size: int
    head: int


class ModelManifest(msgspec.Struct, frozen=True, dict=True):
    """A model's files, in order, and `chunks`: the concatenated SHA-256, cut to 16 bytes each, of every `chunk_size`
    bytes of their `AddressSpace`. `sha256` (hex) is the model's identity, see `identity.py`. `also`: ranges (offset,
    length) of that space, beside the heads, without which the model can't be opened.

    A manifest from a peer is as true as the peer: chunks are checked against it, and the whole against
    `sha256` once all chunks are there. Call `check` on one before anything else.
    """

    sha256: str
    name: str
    files: Annotated[tuple[ModelPart, ...], msgspec.Meta(min_length=1, max_length=MAX_FILES)]
    chunk_size: int
    chunks: bytes
    also: Annotated[tuple[tuple[int, int], ...], msgspec.Meta(max_length=2 * MAX_FACTOR_TENSORS)] = ()

    def check(self) -> ModelManifest:
        """Returns itself; raises ModelFileError when the parts contradict each other or are out of bounds."""
        if not _HEX64.fullmatch(self.sha256) or not is_model_name(self.name):
            raise ModelFileError("a model manifest with an impossible name or SHA-256 was received; ask another node")
        if not is_layout([part.name for part in self.files]):
            raise ModelFileError(f"the manifest of {self.name} names files that make up no model; ask another node")
        if not all(_is_possible(part) for part in self.files) or not 0 < self.size <= MAX_MODEL_SIZE:
            raise ModelFileError(f"the manifest of {self.name} has an impossible size; ask another node")
        if self.chunk_size != chunk_size_for(self.size) or len(self.chunks) != self.n_chunks * HASH_SIZE:
            raise ModelFileError(f"the manifest of {self.name} contradicts itself; ask another node")
        if any(at < 0 or not 0 <= length <= min(MAX_FACTORS_BYTES, self.size - at) for at, length in self.also):
            raise ModelFileError(f"the manifest of {self.name} has an impossible range; ask another node")
        return self

    @cached_property
    def space(self) -> AddressSpace:
        """The bytes that the chunks count."""
        return AddressSpace((part.size, part.head) for part in self.files)

    @cached_property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(part.size for part in self.files)

    @property
    def sizes(self) -> list[tuple[str, int]]:
        """The files' names and sizes, as `layout.placed` takes them."""
        return [(part.name, part.size) for part in self.files]

    @property
    def head_ranges(self) -> list[tuple[int, int]]:
        """What must be here to open the model, as (offset, length) of the model's bytes: the heads of all files, and
        `also`."""
        return [(0, self.space.head_bytes), *self.also]

    @property
    def n_chunks(self) -> int:
        """Number of chunks of the model."""
        return -(-self.size // self.chunk_size)

    def ranges_of(self, wanted: Iterable[tuple[str, int, int]]) -> list[tuple[int, int]]:
        """Ranges (file name, offset, length) as (offset, length) of the model's bytes.

        The name of a model's only file does not matter. Raises ModelFileError for one that is not in the model.
        """
        numbers = {part.name: number for number, part in enumerate(self.files)}
        alone = len(self.files) == 1
        try:
            return self.space.ranges(Span(0 if alone else numbers[file], at, length) for file, at, length in wanted)
        except (KeyError, ValueError) as error:
            raise ModelFileError(f"{self.name} is damaged: its tensors lie outside its files ({error})") from None

    def chunk_length(self, index: int) -> int:
        """Bytes of chunk `index`."""
        return min(self.chunk_size, self.size - index * self.chunk_size)

    def accepts(self, index: int, data: bytes | bytearray | memoryview) -> bool:
        """Whether `data` is chunk `index`."""
        expected = self.chunks[index * HASH_SIZE : (index + 1) * HASH_SIZE]
        return len(data) == self.chunk_length(index) and chunk_hash(data) == expected

    def chunks_of(self, ranges: Iterable[tuple[int, int]]) -> list[int]:
        """The chunks, in order, that hold the byte ranges (offset, length). Raises ValueError for one outside
        the model."""
        wanted: set[int] = set()
        for offset, length in ranges:
            if offset < 0 or length < 0 or offset + length > self.size:
                raise ValueError(f"bytes {offset}+{length} are outside the model of {self.size} bytes")
            if length:
                wanted.update(range(offset // self.chunk_size, (offset + length - 1) // self.chunk_size + 1))
        return sorted(wanted)

    def fingerprint(self) -> bytes:
        """32 bytes that differ when any promise about the model's bytes differs."""
        promised = msgspec.msgpack.encode((self.sha256, self.files, self.chunk_size, self.chunks))
        return hashlib.sha256(promised).digest()


def chunk_size_for(size: int) -> int:
    """Bytes per chunk of a model of `size` bytes: the least power of two that gives no more than MAX_CHUNKS."""
    chunk = CHUNK_SIZE
    while -(-size // chunk) > MAX_CHUNKS:
        chunk *= 2
    return chunk


def chunk_hash(data: bytes | bytearray | memoryview) -> bytes:
    """A chunk's SHA-256, cut to HASH_SIZE bytes."""
    return hashlib.sha256(data).digest()[:HASH_SIZE]


def build_manifest(
    stop: threading.Event, layout: ModelLayout, heads: Sequence[int], *, name: str, sha256: str
) -> ModelManifest:
    """Hash every chunk of a complete model whose files have heads of so many bytes; for `disk.in_thread`."""
    paths = [file.path for file in layout.files]
    parts = tuple(ModelPart(file.name, file.size, head) for file, head in zip(layout.files, heads, strict=True))
    space = AddressSpace((part.size, part.head) for part in parts)
    chunk_size = chunk_size_for(space.size)
    hashes = bytearray()
    for offset in range(0, space.size, chunk_size):
        if stop.is_set():
            raise StoppedError
        spans = space.spans(offset, min(chunk_size, space.size - offset))
        hashes += chunk_hash(read_spans(paths, spans))
    return ModelManifest(sha256, name, parts, chunk_size, bytes(hashes))


def _is_possible(part: ModelPart) -> bool:
    if not 0 <= part.head <= part.size <= MAX_MODEL_SIZE:
        return False
    return part.name.endswith((".gguf", ".safetensors")) or part.head == part.size <= MAX_METADATA_BYTES
