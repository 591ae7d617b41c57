"""SentencePiece's two algorithms (https://arxiv.org/abs/1808.06226) on the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers
from tokenizers import models, normalizers

from swarmd.node.models.tokenizer_parts import SPACE
from swarmd.node.models.vocabulary import TokenType, Vocabulary


def bpe_encoder(vocabulary: Vocabulary, scores: Sequence[float], prefix_space: bool) -> tokenizers.Tokenizer:
    """BPE: the adjacent pair whose joint token scores highest is merged first, which is BPE with the merges ordered by
    score; what is left unknown falls back to byte tokens. `scores[i]` is token i's; a space is put before a text if
    `prefix_space`. Only normal and user-defined tokens can come out."""
    mergeable = {
        text: i
        for text, i in vocabulary.ids.items()
        if vocabulary.types[i] in (TokenType.NORMAL, TokenType.USER_DEFINED)
    }
    # Of equal scores the longer parts first, as in `generate_merges` of transformers' convert_slow_tokenizer.py: in
    # Llama's and Mistral's files all runs of spaces score the same, and SentencePiece takes the leftmost pair.
    ranked: list[tuple[float, int, int, int, str, str]] = []
    for text, i in mergeable.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in mergeable and right in mergeable:
                ranked.append((-scores[i], -len(left), -len(right), i, left, right))
    ranked.sort()
    encoder = tokenizers.Tokenizer(
        models.BPE(
            vocabulary.ids,
            [(left, right) for *_, left, right in ranked],
            unk_token=vocabulary.text_of(vocabulary.unknown_id) or None,
            fuse_unk=True,
            byte_fallback=TokenType.BYTE in vocabulary.types,
        )
    )
    encoder.normalizer = spaces(prefix_space)  # pyright: ignore[reportAttributeAccessIssue]
    return encoder


def unigram_encoder(vocabulary: Vocabulary, scores: Sequence[float], prefix_space: bool) -> tokenizers.Tokenizer:
    """Unigram: the pieces with the highest sum of scores. Tokens of every type can come out: see `guard_encoder`."""
    encoder = tokenizers.Tokenizer(
        models.Unigram(
            list(zip(vocabulary.tokens, scores, strict=True)),
            vocabulary.unknown_id,
            byte_fallback=TokenType.BYTE in vocabulary.types,
        )
    )
    encoder.normalizer = spaces(prefix_space)  # pyright: ignore[reportAttributeAccessIssue]
    return encoder


def spaces(prefix_space: bool) -> normalizers.Normalizer:
    """Spaces as SentencePiece writes them, one more at the front if `prefix_space`."""
    prepend: list[normalizers.Normalizer] = [normalizers.Prepend(SPACE)] if prefix_space else []
    return normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE)])
