"""Model files that cannot be served, and the words that every message about them must hold."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

from support.tiny_gguf import write_tiny_gguf

UNKNOWN_TYPE = 4711


def _truncated(path: Path) -> None:
    path.write_bytes(write_tiny_gguf(path).read_bytes()[:-1000])


def _no_gguf(path: Path) -> None:
    path.write_text("This is a text.\n" * 100)


def _empty(path: Path) -> None:
    path.touch()


def _unknown_tensor_type(path: Path) -> None:
    """Overwrite the type in one tensor's entry of the header: name, number of dimensions, dimensions, type, offset."""
    content = bytearray(write_tiny_gguf(path).read_bytes())
    name = b"blk.0.attn_q.weight"
    after_name = content.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)
    (dimensions,) = struct.unpack_from("<I", content, after_name)
    struct.pack_into("<I", content, after_name + 4 + 8 * dimensions, UNKNOWN_TYPE)
    path.write_bytes(content)


def _unknown_architecture(path: Path) -> None:
    """The header as it is, but for the value of general.architecture, replaced by one of the same length."""
    content = write_tiny_gguf(path).read_bytes()
    key = b"general.architecture" + struct.pack("<I", 8)
    assert content.count(key + struct.pack("<Q", 5) + b"llama") == 1
    path.write_bytes(content.replace(key + struct.pack("<Q", 5) + b"llama", key + struct.pack("<Q", 5) + b"mamba"))


def _missing(path: Path) -> None:
    """Nothing is written."""


BAD_MODELS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "truncated": (_truncated, ("bad.gguf", "missing")),
    "no GGUF": (_no_gguf, ("bad.gguf", "not a GGUF file")),
    "empty": (_empty, ("bad.gguf",)),
    "unknown tensor type": (_unknown_tensor_type, ("bad.gguf", "blk.0.attn_q.weight", str(UNKNOWN_TYPE))),
    "unknown architecture": (_unknown_architecture, ("mamba", "llama")),
    "missing": (_missing, ("bad.gguf",)),
}


def write_bad_model(kind: str, directory: Path) -> tuple[Path, tuple[str, ...]]:
    """A file `bad.gguf` of that kind, and what a message about it must hold."""
    write, words = BAD_MODELS[kind]
    path = directory / "bad.gguf"
    write(path)
    return path, words
