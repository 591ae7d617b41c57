"""The token table of a model: its texts, their types, and which of them end a generation.

The types are those of the GGUF key `tokenizer.ggml.token_type`, which are SentencePiece's
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#tokenizer,
https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from swarmd.node.models.errors import ModelFileError

# llama.cpp (`src/llama-vocab.cpp`) ends a generation at any of these, whatever type the file gives them; some
# files mark them as ordinary tokens or name only one of several as EOS.
END_OF_TURN = frozenset(
    {
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
    }
)
# gpt-oss and Solar Open write several messages in one turn: there "<|end|>" ends a message only (also llama.cpp's).
_ENDS_OF_MESSAGES = ({"<|return|>", "<|call|>"}, {"<|calls|>", "<|flush|>"})
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
MAX_TOKENS = 1 << 22
"""Tokens that a vocabulary may have; the largest known ones have about 2^18."""


class TokenType(IntEnum):
    """Values of `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """Token texts with their types, and which of them mean something to the machinery.

    `tokens[i]` is the text of token i as the file has it (byte-level alphabet or SentencePiece form for normal tokens),
    "" where an id has no token. `control` are the ids that no text of a user may produce; it holds every end-of-turn
    token, whatever the file calls its type. `hidden` are those of them that are left out of answers. `eos_ids` are the
    ids that end a generation.
    """

    tokens: tuple[str, ...]
    types: tuple[int, ...]
    ids: dict[str, int]
    control: frozenset[int]
    hidden: frozenset[int]
    user_defined: frozenset[int]
    eos_ids: frozenset[int]
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None

    @classmethod
    def build(
        cls,
        tokens: Sequence[str],
        types: Sequence[int],
        *,
        bos_id: int | None,
        eos_id: int | None,
        unknown_id: int | None,
        ends: Iterable[int] = (),
        shown: Iterable[int] = (),
    ) -> Vocabulary:
        """Find out the sets: `ends` are ids that end a generation besides `eos_id` and the known texts; `shown` are
        control tokens that belong into answers. Raises ModelFileError for a byte token that names no byte."""
        ids: dict[str, int] = {}
        for index, text in enumerate(tokens):
            if types[index] == TokenType.BYTE and not _BYTE_TOKEN.fullmatch(text):
                raise ModelFileError(f"byte token {text!r:.20} is not of the form <0xHH>; the file is damaged")
            ids.setdefault(text, index)
        eos_ids = frozenset({*ends, *_ends_by_text(ids)}) | frozenset(() if eos_id is None else (eos_id,))
        marked = (TokenType.CONTROL, TokenType.UNKNOWN)
        control = frozenset(i for i, kind in enumerate(types) if kind in marked) | eos_ids
        user_defined = frozenset(i for i, kind in enumerate(types) if kind == TokenType.USER_DEFINED) - control
        hidden = control - (frozenset(shown) - eos_ids)
        return cls(tuple(tokens), tuple(types), ids, control, hidden, user_defined, eos_ids, bos_id, eos_id, unknown_id)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Vocabulary:
        """Read the table. Raises ModelFileError when a key is missing, of another type, or points outside the
        table."""
        tokens = require_list(metadata, "tokenizer.ggml.tokens", str)
        if not tokens:
            raise ModelFileError("tokenizer.ggml.tokens is empty: the file has no vocabulary; get another copy")
        types: Sequence[int] = (TokenType.NORMAL,) * len(tokens)
        if "tokenizer.ggml.token_type" in metadata:
            types = [int(t) for t in require_list(metadata, "tokenizer.ggml.token_type", int)]
        if len(types) != len(tokens):
            raise ModelFileError(
                f"tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens: the file is damaged"
            )
        special = {
            key: _token_id(metadata, f"tokenizer.ggml.{key}_token_id", len(tokens))
            for key in ("bos", "eos", "eot", "eom", "unknown")
        }
        return cls.build(
            tokens,
            types,
            bos_id=special["bos"],
            eos_id=special["eos"],
            unknown_id=special["unknown"],
            ends=[i for key in ("eot", "eom") if (i := special[key]) is not None],
        )

    def text_of(self, token_id: int | None) -> str:
        """The token's text as the file has it, "" for None."""
        return "" if token_id is None else self.tokens[token_id]


def _ends_by_text(ids: Mapping[str, int]) -> set[int]:
    texts = set(END_OF_TURN)
    if any(ends <= ids.keys() for ends in _ENDS_OF_MESSAGES):
        texts.discard("<|end|>")
    return {ids[text] for text in texts if text in ids}


def require_list(metadata: Mapping[str, Any], key: str, kind: type) -> Sequence[Any]:
    """`metadata[key]` as a sequence whose first entry is a `kind` (GGUF arrays have one type throughout)."""
    value = metadata.get(key)
    if value is None:
        raise ModelFileError(f"the file has no {key}: it holds no usable tokenizer; get a complete GGUF of the model")
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, list | tuple) or (value and not isinstance(value[0], kind)):
        raise ModelFileError(f"{key} should be a list of {kind.__name__}; the file is damaged or of a new kind")
    return value


def flag(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    """`metadata[key]` as a bool, `default` when absent."""
    value = metadata.get(key, default)
    if not isinstance(value, bool | int):
        raise ModelFileError(f"{key} should be true or false, it is {value!r:.40}")
    return bool(value)


def _token_id(metadata: Mapping[str, Any], key: str, count: int) -> int | None:
    value = metadata.get(key)
    if value is None:
        return None
    try:
        token_id = int(value)
    except (TypeError, ValueError, OverflowError):
        raise ModelFileError(f"{key} should be a token id, it is {value!r:.40}") from None
    if not 0 <= token_id < count:
        raise ModelFileError(f"{key} is {token_id}, but the vocabulary has {count} tokens; the file is damaged")
    return token_id
