"""A tokenizer from GGUF metadata (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#tokenizer)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.pre_tokenizers import PRE_TOKENIZERS, PreTokenizerSpec
from swarmd.node.models.sentencepiece_encoder import bpe_encoder
from swarmd.node.models.tokenizer_parts import (
    SPACE,
    Spelling,
    TokenizerParts,
    add_special_tokens,
    careful,
    guard_encoder,
)
from swarmd.node.models.vocabulary import TokenType, Vocabulary, flag, require_list

log = logging.getLogger("swarmd.models")

# Of Phi-3's special tokens these leave the white space behind them alone; see `_strip_right`.
_PHI3_PLAIN = ("<unk>", "<s>", "<|endoftext|>")


def gguf_parts(metadata: Mapping[str, Any]) -> TokenizerParts:
    """Build from `tokenizer.ggml.model` "gpt2" (byte-level BPE; `tokenizer.ggml.pre` names the word splitter) or
    "llama" (SentencePiece BPE). Raises ModelFileError naming an unknown one, or what is damaged."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ModelFileError(
            f"tokenizer model {kind!r:.60} is not known to swarmd (known: gpt2, llama); choose another model"
        )
    vocabulary = Vocabulary.from_gguf(metadata)
    spec = _pre_tokenizer(metadata) if kind == "gpt2" else None
    prefix_space = spec is None and flag(metadata, "tokenizer.ggml.add_space_prefix", True)

    def build() -> tokenizers.Tokenizer:
        if spec is not None:
            encoder = _byte_level_encoder(vocabulary, _merges(metadata), spec)
        else:
            encoder = bpe_encoder(vocabulary, _scores(metadata, vocabulary), prefix_space)
        guard_encoder(encoder, [vocabulary.tokens[i] for i in vocabulary.control] if spec is not None else [])
        add_special_tokens(encoder, vocabulary, _strip_right(metadata, vocabulary))
        return encoder

    bos = flag(metadata, "tokenizer.ggml.add_bos_token", spec.add_bos if spec else True)
    eos = flag(metadata, "tokenizer.ggml.add_eos_token", False)
    return TokenizerParts(
        vocabulary,
        careful("the file's tokenizer", build),
        Spelling(spec is not None, () if spec else ((SPACE, " "),), strip_space=prefix_space),
        prefix=(vocabulary.bos_id,) if bos and vocabulary.bos_id is not None else (),
        suffix=(vocabulary.eos_id,) if eos and vocabulary.eos_id is not None else (),
        special_texts={
            "bos_token": vocabulary.text_of(vocabulary.bos_id),
            "eos_token": vocabulary.text_of(vocabulary.eos_id),
            "unk_token": vocabulary.text_of(vocabulary.unknown_id),
        },
    )


def _pre_tokenizer(metadata: Mapping[str, Any]) -> PreTokenizerSpec:
    name = metadata.get("tokenizer.ggml.pre")
    if name is None:
        log.warning("the model file names no pre-tokenizer, using 'default'; its answers may suffer")
        name = "default"
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise ModelFileError(
            f"pre-tokenizer {name!r:.60} is not known to swarmd (known: {known}); choose another model"
        )
    return PRE_TOKENIZERS[name]


def _merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    for merge in require_list(metadata, "tokenizer.ggml.merges", str):
        left, separator, right = merge[1:].partition(" ")  # the first part may itself be a space
        if not separator:
            raise ModelFileError(f"tokenizer.ggml.merges has {merge!r:.40}, which is not a pair; the file is damaged")
        merges.append((merge[0] + left, right))
    return merges


def _scores(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> list[float]:
    scores = require_list(metadata, "tokenizer.ggml.scores", float)
    if len(scores) != len(vocabulary.tokens):
        raise ModelFileError("tokenizer.ggml.scores and tokenizer.ggml.tokens differ in length; the file is damaged")
    return list(scores)


def _byte_level_encoder(
    vocabulary: Vocabulary, merges: list[tuple[str, str]], spec: PreTokenizerSpec
) -> tokenizers.Tokenizer:
    encoder = tokenizers.Tokenizer(models.BPE(vocabulary.ids, merges, ignore_merges=spec.ignore_merges))
    if spec.nfc:
        encoder.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
    splits = [pre_tokenizers.Split(tokenizers.Regex(p), "isolated") for p in spec.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    encoder.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])  # pyright: ignore[reportAttributeAccessIssue]
    return encoder


def _strip_right(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> frozenset[int]:
    """Phi-3's role tokens swallow the white space behind them ("rstrip" in its tokenizer.json). GGUF has no key for
    that; llama.cpp (`src/llama-vocab.cpp`, "Handle per token attributes") knows the models by their name."""
    if metadata.get("general.architecture") != "phi3" or metadata.get("tokenizer.ggml.model") != "llama":
        return frozenset()
    plain = {vocabulary.ids.get(text) for text in _PHI3_PLAIN}
    special = (TokenType.CONTROL, TokenType.USER_DEFINED)
    return frozenset(i for i, kind in enumerate(vocabulary.types) if kind in special and i not in plain)
