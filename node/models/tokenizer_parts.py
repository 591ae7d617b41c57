"""What a tokenizer is made of, whatever file it was read from, and the guards that every one of them gets."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import tokenizers
from tokenizers import normalizers, pre_tokenizers

from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.vocabulary import TokenType, Vocabulary

GUARD = "\ufdd0"
"""A Unicode noncharacter ("reserved for internal use"). `Tokenizer.encode` drops it after control tokens were
recognised, so one inside the text of a control token makes that text ordinary (see `chat_template`)."""

SPACE = "▁"
"""What SentencePiece writes for a space."""

_Built = TypeVar("_Built")


class Spelling(NamedTuple):
    """How the texts of ordinary tokens stand for bytes: in GPT-2's byte alphabet (`byte_level`), or as UTF-8 after the
    `replacements` (pairs of old and new text, in order). With `strip_space` one space before the whole text is not
    part of it."""

    byte_level: bool
    replacements: tuple[tuple[str, str], ...] = ()
    strip_space: bool = False


@dataclass(frozen=True)
class TokenizerParts:
    """A vocabulary, the encoder of the `tokenizers` library for it, and how to spell its tokens.

    `prefix` and `suffix` are the ids that the model expects around a plain text; `special_texts` are the variables of
    chat templates (`bos_token`, ...).
    """

    vocabulary: Vocabulary
    encoder: tokenizers.Tokenizer
    spelling: Spelling
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    special_texts: dict[str, str] = field(default_factory=dict)

    def spell(self, token_id: int) -> bytes:
        """The UTF-8 bytes that a token stands for; a control token's are its text."""
        text = self.vocabulary.tokens[token_id]
        if token_id in self.vocabulary.control:
            return text.encode()
        if self.vocabulary.types[token_id] == TokenType.BYTE:
            return bytes([int(text[3:5], 16)])
        if self.spelling.byte_level:
            if token_id in self.vocabulary.user_defined:
                return text.encode()
            try:
                return bytes([_BYTE_OF_CHAR[char] for char in text])
            except KeyError:  # not in the byte alphabet: the token is its own text, as in `tokenizers`
                return text.encode()
        for old, new in self.spelling.replacements:
            text = text.replace(old, new)
        return text.encode()


def guard_encoder(encoder: tokenizers.Tokenizer, unreachable: Iterable[str]) -> None:
    """Make `encoder` drop GUARD characters, and keep its model from producing a token of the texts `unreachable`.

    Control tokens are recognised before the model sees a text. But some models would find them again where they were
    not wanted: Unigram knows every piece of its vocabulary, and BPE may have merges for them or take whole words.
    So what is left of such a text is cut after its first character, in the form in which the model sees it.
    """
    drop = normalizers.Replace(GUARD, "")
    encoder.normalizer = normalizers.Sequence([drop, encoder.normalizer]) if encoder.normalizer else drop  # pyright: ignore[reportAttributeAccessIssue]
    rests: dict[str, list[str]] = {}
    for text in sorted(t for t in set(unreachable) if len(t) > 1):
        rests.setdefault(text[0], []).append(re.escape(text[1:]))
    if rests:
        pattern = "|".join(f"{re.escape(first)}(?={'|'.join(tails)})" for first, tails in rests.items())
        cut = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        before = encoder.pre_tokenizer
        encoder.pre_tokenizer = pre_tokenizers.Sequence([before, cut]) if before else cut  # pyright: ignore[reportAttributeAccessIssue]


def add_special_tokens(
    encoder: tokenizers.Tokenizer, vocabulary: Vocabulary, strip_right: frozenset[int] = frozenset()
) -> None:
    """Have `encoder` recognise the user-defined tokens everywhere and the control tokens where they are wanted; those
    in `strip_right` swallow the white space behind them."""
    for ids, special in ((vocabulary.user_defined, False), (vocabulary.control, True)):
        texts = {vocabulary.tokens[i]: vocabulary.ids[vocabulary.tokens[i]] in strip_right for i in ids}
        texts.pop("", None)
        encoder.add_tokens(
            [
                tokenizers.AddedToken(text, normalized=False, special=special, rstrip=strip)
                for text, strip in sorted(texts.items())
            ]
        )


def careful(source: str, build: Callable[[], _Built]) -> _Built:
    """`build()`, with what the `tokenizers` library raises (bare Exception, or a panic of its Rust code, which is none)
    turned into a ModelFileError that names `source`."""
    try:
        return build()
    except ModelFileError:
        raise
    except BaseException as exc:
        if not isinstance(exc, Exception) and type(exc).__name__ != "PanicException":
            raise
        raise ModelFileError(f"{source} is inconsistent ({str(exc)[:300]}); get another copy") from exc


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes (`bytes_to_unicode` in
    https://github.com/openai/gpt-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(rest)}


_BYTE_OF_CHAR = _byte_alphabet()
