"""How the `decoder` of a tokenizer.json turns tokens into text, reduced to what can be done token by token.

The decoders are those of https://docs.rs/tokenizers/latest/tokenizers/decoders/. A chain of them works on the list of
all tokens' texts; here it must have a form in which every token means the same bytes wherever it stands, so that text
can be shown while it is generated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.tokenizer_parts import Spelling


def spelling_of(path: Path, decoder: Any) -> tuple[Spelling, bool]:
    """The spelling that `decoder` describes, and whether tokens of the form <0xHH> are bytes. Raises ModelFileError
    that names `path` for a decoder of another kind."""
    replacements: list[tuple[str, str]] = []
    byte_level = byte_fallback = fused = strip = False
    for step in _steps(path, decoder):
        kind = step.get("type")
        if kind == "ByteLevel" and not (byte_level or byte_fallback or replacements):
            byte_level = True
        elif kind == "Replace" and (pair := _replacement(step)) and (not fused or len(pair[0]) == 1):
            replacements.append(pair)
        elif kind == "Metaspace" and isinstance(mark := step.get("replacement"), str) and len(mark) == 1:
            replacements.append((mark, " "))
            never = step.get("prepend_scheme") == "never" or step.get("add_prefix_space") is False
            strip = strip or not never
        elif kind == "ByteFallback" and not fused:
            byte_fallback = True
        elif kind == "Fuse":
            fused = True
        elif kind == "Strip" and fused and (step.get("content"), step.get("start"), step.get("stop")) == (" ", 1, 0):
            strip = True
        elif not (kind == "Strip" and step.get("start") == step.get("stop") == 0):
            raise _unknown(path, kind)
    if byte_level and (replacements or byte_fallback or strip):
        raise _unknown(path, "ByteLevel beside others")
    return Spelling(byte_level, tuple(replacements), strip), byte_fallback


def _steps(path: Path, decoder: Any) -> list[dict[str, Any]]:
    steps = [decoder]
    if isinstance(decoder, dict) and decoder.get("type") == "Sequence" and isinstance(decoder.get("decoders"), list):
        steps = decoder["decoders"]
    if not all(isinstance(step, dict) for step in steps):
        raise _unknown(path, None)
    return steps


def _replacement(step: dict[str, Any]) -> tuple[str, str] | None:
    pattern = step.get("pattern")
    old = pattern.get("String") if isinstance(pattern, dict) else None
    new = step.get("content")
    return (old, new) if isinstance(old, str) and old and isinstance(new, str) else None


def _unknown(path: Path, kind: object) -> ModelFileError:
    return ModelFileError(
        f"{path}: decoder {kind!r:.60} is not known to swarmd in this place (known: ByteLevel, or Replace of texts, "
        "Metaspace, ByteFallback, Fuse and Strip of one space at the start); choose another model"
    )
