"""A tokenizer from SentencePiece's own file, `tokenizer.model`.

The file is one protobuf message, ModelProto of
https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto; the few fields that matter are read
here (wire format: https://protobuf.dev/programming-guides/encoding/).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import normalizers

from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.folder_settings import FolderSettings
from swarmd.node.models.sentencepiece_encoder import bpe_encoder, unigram_encoder
from swarmd.node.models.tokenizer_parts import (
    SPACE,
    Spelling,
    TokenizerParts,
    add_special_tokens,
    careful,
    guard_encoder,
)
from swarmd.node.models.vocabulary import MAX_TOKENS, TokenType, Vocabulary

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_KINDS = {1: "Unigram", 2: "BPE", 3: "Word", 4: "Char"}


@dataclass
class SentencePieceModel:
    """The content of a file. `kind` is "BPE" or "Unigram"; `dummy_prefix`: a space goes before a text; `squeeze`: runs
    of spaces become one, those around a text none."""

    tokens: list[str]
    scores: list[float]
    types: list[int]
    kind: str
    unknown_id: int
    bos_id: int
    eos_id: int
    dummy_prefix: bool
    squeeze: bool


def sentencepiece_parts(path: Path, data: bytes, settings: FolderSettings) -> TokenizerParts:
    """Build from `data`, the content of the file at `path`. Raises ModelFileError naming `path` and what is damaged or
    unknown."""
    model = read_model(path, data)
    _extend(path, model, settings)
    named = {name: settings.special_texts.get(f"{name}_token") for name in ("bos", "eos", "unk")}
    ids = {text: i for i, text in enumerate(model.tokens)}
    size = len(model.tokens)
    vocabulary = Vocabulary.build(
        model.tokens,
        model.types,
        bos_id=ids.get(named["bos"] or "", model.bos_id if 0 <= model.bos_id < size else None),
        eos_id=ids.get(named["eos"] or "", model.eos_id if 0 <= model.eos_id < size else None),
        unknown_id=model.unknown_id if 0 <= model.unknown_id < size else None,
        ends=(i for i in settings.eos_ids if i < size),
    )
    strip_right = frozenset(i for i, token in settings.added.items() if token.flags.get("rstrip"))
    encoder = careful(str(path), lambda: _encoder(model, vocabulary, strip_right))
    bos = settings.add_bos is not False and vocabulary.bos_id is not None
    return TokenizerParts(
        vocabulary,
        encoder,
        Spelling(False, ((SPACE, " "),), strip_space=model.dummy_prefix or model.squeeze),
        prefix=(vocabulary.bos_id,) if bos and vocabulary.bos_id is not None else (),
        suffix=(vocabulary.eos_id,) if settings.add_eos and vocabulary.eos_id is not None else (),
        special_texts={
            "bos_token": vocabulary.text_of(vocabulary.bos_id),
            "eos_token": vocabulary.text_of(vocabulary.eos_id),
            "unk_token": vocabulary.text_of(vocabulary.unknown_id),
            **settings.special_texts,
        },
    )


def _encoder(model: SentencePieceModel, vocabulary: Vocabulary, strip_right: frozenset[int]) -> tokenizers.Tokenizer:
    build = bpe_encoder if model.kind == "BPE" else unigram_encoder
    encoder = build(vocabulary, model.scores, model.dummy_prefix)
    if model.squeeze:
        spaces = ((r"\A +| +\z", ""), (r" {2,}", " "))
        squeeze = [normalizers.Replace(tokenizers.Regex(pattern), text) for pattern, text in spaces]
        encoder.normalizer = normalizers.Sequence([*squeeze, encoder.normalizer])  # pyright: ignore[reportAttributeAccessIssue]
    ordinary = (TokenType.NORMAL, TokenType.USER_DEFINED)
    others = [t for t, kind in zip(model.tokens, model.types, strict=True) if kind not in ordinary]
    guard_encoder(encoder, others if model.kind == "Unigram" else [])
    add_special_tokens(encoder, vocabulary, strip_right)
    return encoder


def _extend(path: Path, model: SentencePieceModel, settings: FolderSettings) -> None:
    """Put in the tokens that the other files add, and mark those that they call special."""
    special = {*settings.special_texts.values(), *settings.extra_specials}
    for token_id, token in sorted(settings.added.items()):
        if token_id > len(model.tokens):
            raise ModelFileError(
                f"{path} has {len(model.tokens)} tokens, and an added token has the id {token_id}: some between are "
                "missing; get another copy"
            )
        if token_id == len(model.tokens):
            model.tokens.append(token.text)
            model.scores.append(0.0)
            model.types.append(TokenType.USER_DEFINED)
        if token.special:
            special.add(token.text)
    for i, text in enumerate(model.tokens):
        if text in special and model.types[i] != TokenType.UNKNOWN:
            model.types[i] = TokenType.CONTROL


def read_model(path: Path, data: bytes) -> SentencePieceModel:
    """Parse a file. Raises ModelFileError naming `path` when it is damaged or of a kind that swarmd does not know."""
    model = SentencePieceModel([], [], [], "Unigram", 0, 1, 2, True, True)
    try:
        for field, value in _fields(data):
            if field == 1 and isinstance(value, bytes):
                _read_piece(model, value)
            elif field == 2 and isinstance(value, bytes):
                _read_trainer(path, model, value)
            elif field == 3 and isinstance(value, bytes):
                _read_normalizer(path, model, value)
            if len(model.tokens) > MAX_TOKENS:
                raise ValueError("too many tokens")
    except (ValueError, IndexError, struct.error) as exc:
        raise ModelFileError(f"{path} is no SentencePiece model ({exc}); get another copy") from exc
    if not model.tokens:
        raise ModelFileError(f"{path} has no tokens: it is no SentencePiece model; get another copy")
    if model.squeeze and TokenType.USER_DEFINED in model.types:
        raise ModelFileError(
            f"{path}: dropping spaces (remove_extra_whitespaces) beside user-defined tokens is not known to swarmd; "
            "get the model's tokenizer.json"
        )
    if model.kind not in ("BPE", "Unigram"):
        raise ModelFileError(
            f"{path}: SentencePiece model type {model.kind} is not known to swarmd (known: BPE, Unigram); choose "
            "another model"
        )
    return model


def _read_piece(model: SentencePieceModel, data: bytes) -> None:
    fields = dict(_fields(data))
    text, score, kind = fields.get(1, b""), fields.get(2, b"\0\0\0\0"), fields.get(3, 1)
    if not isinstance(text, bytes) or not isinstance(score, bytes) or not isinstance(kind, int):
        raise ValueError("a piece has fields of other types")
    piece = text.decode("utf-8")
    # User-defined pieces are found before spaces are replaced here, so they are kept as they stand in a text.
    model.tokens.append(piece.replace(SPACE, " ") if kind == TokenType.USER_DEFINED else piece)
    model.scores.append(struct.unpack("<f", score)[0])
    model.types.append(TokenType(kind))


def _read_trainer(path: Path, model: SentencePieceModel, data: bytes) -> None:
    fields = {field: value for field, value in _fields(data) if isinstance(value, int)}
    model.kind = _KINDS.get(fields.get(3, 1), "of an unknown number")
    if fields.get(24):
        raise ModelFileError(f"{path}: spaces as suffixes (treat_whitespace_as_suffix) are not known to swarmd")
    model.unknown_id = _signed(fields.get(40, 0))
    model.bos_id = _signed(fields.get(41, 1))
    model.eos_id = _signed(fields.get(42, 2))


def _read_normalizer(path: Path, model: SentencePieceModel, data: bytes) -> None:
    fields = dict(_fields(data))
    if fields.get(2):
        name = fields.get(1, b"")
        raise ModelFileError(
            f"{path}: its table for normalising texts ({name!r:.40}) is not known to swarmd; get the model's "
            "tokenizer.json, or make one with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    model.dummy_prefix = bool(fields.get(3, 1))
    model.squeeze = bool(fields.get(4, 1))
    if not fields.get(5, 1):
        raise ModelFileError(f"{path}: unescaped spaces (escape_whitespaces false) are not known to swarmd")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a message. Raises ValueError or IndexError where the bytes end too early."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        size = {_FIXED64: 8, _FIXED32: 4}.get(wire, -1)
        if wire == _BYTES:
            size, at = _varint(data, at)
        if size < 0 or at + size > len(data):
            raise ValueError(f"byte {at} is not where a field can be")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"byte {at} is in a number that is too long")
