"""How long the heads of a model's files are: the bytes before tensor data, which say where every tensor is."""

from __future__ import annotations

from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.gguf import GGUFFile
from swarmd.node.models.gguf_shards import check_shard
from swarmd.node.models.layout import ModelFile, ModelLayout

MAX_SAFETENSORS_HEADER = 100_000_000
"""The limit of the reference implementation, https://github.com/huggingface/safetensors."""
MAX_FACTORS_BYTES = 1 << 20
MAX_FACTOR_TENSORS = 16
_GIT_LFS = b"version https://git-lfs"


def head_sizes(layout: ModelLayout) -> tuple[int, ...]:
    """The head's bytes of each file; files without tensors are head as a whole.

    Raises ModelFileError for a file that is not what its name says, or of another split model. Blocking.
    """
    return tuple(_head_size(file, number, len(layout.files)) for number, file in enumerate(layout.files))


def described_by(layout: ModelLayout) -> list[tuple[str, int, int]]:
    """Tensors that say what the model is rather than what it knows, as (file name, offset, bytes): the factors of
    rotary embeddings in GGUF files. They may lie anywhere, and whoever opens the model needs them. Blocking.
    """
    found: list[tuple[str, int, int]] = []
    for file in layout.files:
        if file.name.endswith(".gguf"):
            with GGUFFile.open(file.path) as gguf:
                factors = [info for info in gguf.tensors.values() if info.name.startswith("rope_")]
            found += [(file.name, info.offset, info.nbytes) for info in factors if info.nbytes <= MAX_FACTORS_BYTES]
    return found[:MAX_FACTOR_TENSORS]


def _head_size(file: ModelFile, number: int, count: int) -> int:
    if file.name.endswith(".gguf"):
        return _gguf_head(file, number, count)
    if file.name.endswith(".safetensors"):
        return _safetensors_head(file)
    return file.size


def _gguf_head(file: ModelFile, number: int, count: int) -> int:
    with GGUFFile.open(file.path) as gguf:
        check_shard(gguf, number, count)
        return min(gguf.header_bytes, file.size)  # a shard of metadata alone may end before its padding


def _safetensors_head(file: ModelFile) -> int:
    """8 bytes with the header's length, little-endian, then the header."""
    with file.path.open("rb") as opened:
        start = opened.read(len(_GIT_LFS))
    if start == _GIT_LFS:
        raise ModelFileError(f"{file.path} is a pointer of Git LFS, not the file itself; run `git lfs pull`")
    head = 8 + int.from_bytes(start[:8], "little")
    if start[8:9] != b"{" or head > min(file.size, 8 + MAX_SAFETENSORS_HEADER):
        raise ModelFileError(f"{file.path} is not a safetensors file, or damaged; download it again")
    return head
