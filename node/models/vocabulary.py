"""The token table of a model, as the GGUF keys `tokenizer.ggml.*` describe it
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#tokenizer)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        "<|endoftext|>",
        "<|end_of_text|>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
    }
)


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

    `tokens[i]` is the text of token i as the file has it (byte-level alphabet or SentencePiece form for
    normal tokens). `control` are the ids that no text of a user may produce and that are left out of answers;
    it holds every end-of-turn token, whatever the file calls its type. `eos_ids` are the ids that end a
    generation.
    """

    tokens: tuple[str, ...]
    types: tuple[int, ...]
    ids: dict[str, int]
    control: frozenset[int]
    user_defined: frozenset[int]
    eos_ids: frozenset[int]
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Vocabulary:
        """Read the table. Raises ModelFileError when a key is missing, of another type, or points outside the
        table."""
        tokens = tuple(require_list(metadata, "tokenizer.ggml.tokens", str))
        if not tokens:
            raise ModelFileError("tokenizer.ggml.tokens is empty: the file has no vocabulary; get another copy")
        types = (TokenType.NORMAL,) * len(tokens)
        if "tokenizer.ggml.token_type" in metadata:
            types = tuple(int(t) for t in require_list(metadata, "tokenizer.ggml.token_type", int))
        if len(types) != len(tokens):
            raise ModelFileError(
                f"tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens: the file is damaged"
            )
        ids: dict[str, int] = {}
        for index, text in enumerate(tokens):
            ids.setdefault(text, index)
        special = {
            key: _token_id(metadata, f"tokenizer.ggml.{key}_token_id", len(tokens))
            for key in ("bos", "eos", "eot", "eom", "unknown")
        }
        ends = {special[key] for key in ("eos", "eot", "eom")} | {ids[t] for t in END_OF_TURN if t in ids}
        eos_ids = frozenset(i for i in ends if i is not None)
        control = frozenset(i for i, t in enumerate(types) if t == TokenType.CONTROL) | eos_ids
        user_defined = frozenset(i for i, t in enumerate(types) if t == TokenType.USER_DEFINED) - control
        return cls(
            tokens,
            types,
            ids,
            control,
            user_defined,
            eos_ids,
            special["bos"],
            special["eos"],
            special["unknown"],
        )

    def text_of(self, token_id: int | None) -> str:
        """The token's text as the file has it, "" for None."""
        return "" if token_id is None else self.tokens[token_id]


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
    except (TypeError, ValueError):
        raise ModelFileError(f"{key} should be a token id, it is {value!r:.40}") from None
    if not 0 <= token_id < count:
        raise ModelFileError(f"{key} is {token_id}, but the vocabulary has {count} tokens; the file is damaged")
    return token_id
