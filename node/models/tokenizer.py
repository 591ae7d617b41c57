"""Text to token ids and back, built from a GGUF file's metadata on Hugging Face's `tokenizers`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from swarmd.node.models.detokenizer import IncrementalDetokenizer
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.pre_tokenizers import PRE_TOKENIZERS, PreTokenizerSpec
from swarmd.node.models.vocabulary import TokenType, Vocabulary, flag, require_list

log = logging.getLogger("swarmd.models")

GUARD = "\ufdd0"
"""A Unicode noncharacter ("reserved for internal use"). `Tokenizer.encode` drops it after control tokens were
recognised, so one inside the text of a control token makes that text ordinary (see `chat_template`)."""

_SPACE = "▁"


class Tokenizer:
    """One model's tokenizer. Immutable after construction and safe to use from several threads.

    `bos_id` is None when the model has none; `eos_ids` end a generation; `control_texts` are the texts that
    stand for control tokens when `encode` parses them; `vocab_size` is the number of ids.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        encoder: tokenizers.Tokenizer,
        *,
        byte_level: bool,
        prefix_space: bool,
        bos: bool,
        eos: bool,
    ) -> None:
        self._vocabulary = vocabulary
        self._encoder = encoder
        self._lock = threading.Lock()
        self._bytes: dict[int, bytes] = {}  # of the tokens asked for so far: most streams share most of theirs
        self._byte_level = byte_level
        self._prefix_space = prefix_space
        self._prefix = [vocabulary.bos_id] if bos and vocabulary.bos_id is not None else []
        self._suffix = [vocabulary.eos_id] if eos and vocabulary.eos_id is not None else []
        self.bos_id = vocabulary.bos_id
        self.eos_ids = vocabulary.eos_ids
        self.vocab_size = len(vocabulary.tokens)
        self.control_texts = frozenset(vocabulary.tokens[i] for i in vocabulary.control)
        self.special_texts = {
            "bos_token": vocabulary.text_of(vocabulary.bos_id),
            "eos_token": vocabulary.text_of(vocabulary.eos_id),
            "unk_token": vocabulary.text_of(vocabulary.unknown_id),
        }

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Build from GGUF metadata: `tokenizer.ggml.model` "gpt2" (byte-level BPE; `tokenizer.ggml.pre` names
        the word splitter) or "llama" (SentencePiece BPE). Raises ModelFileError naming an unknown one, or
        what is damaged."""
        kind = metadata.get("tokenizer.ggml.model")
        if kind not in ("gpt2", "llama"):
            raise ModelFileError(
                f"tokenizer model {kind!r:.60} is not known to swarmd (known: gpt2, llama); choose another model"
            )
        vocabulary = Vocabulary.from_gguf(metadata)
        spec = _pre_tokenizer(metadata) if kind == "gpt2" else None
        prefix_space = spec is None and flag(metadata, "tokenizer.ggml.add_space_prefix", True)
        try:
            if spec is not None:
                encoder = _byte_level_encoder(vocabulary, _merges(metadata), spec)
            else:
                encoder = _sentencepiece_encoder(vocabulary, metadata, prefix_space)
            _add_special_tokens(encoder, vocabulary)
        except ModelFileError:
            raise
        except Exception as exc:  # `tokenizers` raises bare Exception for a merge of unknown tokens
            raise ModelFileError(f"the file's tokenizer is inconsistent ({exc}); get another copy") from exc
        return cls(
            vocabulary,
            encoder,
            byte_level=spec is not None,
            prefix_space=prefix_space,
            bos=flag(metadata, "tokenizer.ggml.add_bos_token", spec.add_bos if spec else True),
            eos=flag(metadata, "tokenizer.ggml.add_eos_token", False),
        )

    def encode(self, text: str, *, add_special: bool, parse_special: bool = True) -> list[int]:
        """Token ids of `text`.

        `add_special` adds the BOS/EOS ids that the model was trained with. `parse_special` False reads the
        texts of control tokens ("<|im_end|>") as ordinary characters: use it for everything that a user wrote
        and that did not go through `ChatTemplate.render`. User-defined tokens, which change nothing about
        roles, are recognised always. GUARD characters are dropped; lone surrogates become U+FFFD.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        with self._lock:  # the switch is a property of the encoder, not an argument of `encode`
            self._encoder.encode_special_tokens = not parse_special
            ids = self._encoder.encode(text, add_special_tokens=False).ids
        return [*self._prefix, *ids, *self._suffix] if add_special else ids

    def decode(self, ids: Iterable[int], skip_special: bool = True, *, keep_leading_space: bool = False) -> str:
        """Text of `ids`; `skip_special` leaves control tokens out. See `detokenizer` for
        `keep_leading_space`. Raises ValueError for an id outside the vocabulary."""
        detokenizer = self.detokenizer(skip_special, keep_leading_space=keep_leading_space)
        return "".join([detokenizer.push(i) for i in ids]) + detokenizer.flush()

    def detokenizer(self, skip_special: bool = True, *, keep_leading_space: bool = False) -> IncrementalDetokenizer:
        """A decoder for one stream of ids. SentencePiece models put a space before a text, which is stripped
        at the start unless `keep_leading_space`: ask for that when the ids continue a prompt in
        mid-sentence."""

        def piece(token_id: int) -> bytes:
            if skip_special and token_id in self._vocabulary.control:
                return b""
            return self.token_bytes(token_id)

        return IncrementalDetokenizer(piece, strip_leading_space=self._prefix_space and not keep_leading_space)

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that this token stands for, perhaps only a part of a character; a control token's
        are its text. Raises ValueError for an id outside the vocabulary."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._spell(token_id)
        return known

    def _spell(self, token_id: int) -> bytes:
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id {token_id} is outside the vocabulary of {self.vocab_size} tokens")
        text = self._vocabulary.tokens[token_id]
        if token_id in self._vocabulary.control or token_id in self._vocabulary.user_defined:
            return text.encode()
        if not self._byte_level:
            if self._vocabulary.types[token_id] == TokenType.BYTE:
                return _byte_of(text)
            return text.replace(_SPACE, " ").encode()
        try:
            return bytes([_BYTE_OF_CHAR[char] for char in text])
        except KeyError:  # not in the byte alphabet: the token is its own text, as in `tokenizers`
            return text.encode()

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text, U+FFFD where it is only a part of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")


def _pre_tokenizer(metadata: Mapping[str, Any]) -> PreTokenizerSpec:
    name = metadata.get("tokenizer.ggml.pre")
    if name is None:
        log.warning("the model file names no pre-tokenizer, using 'default'; its answers may suffer")
        name = "default"
    if name not in PRE_TOKENIZERS:
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


def _byte_level_encoder(
    vocabulary: Vocabulary, merges: list[tuple[str, str]], spec: PreTokenizerSpec
) -> tokenizers.Tokenizer:
    encoder = tokenizers.Tokenizer(models.BPE(vocabulary.ids, merges, ignore_merges=spec.ignore_merges))
    drop_guard: list[normalizers.Normalizer] = [normalizers.Replace(GUARD, "")]
    encoder.normalizer = normalizers.Sequence(drop_guard + ([normalizers.NFC()] if spec.nfc else []))  # pyright: ignore[reportAttributeAccessIssue]
    splits = [pre_tokenizers.Split(tokenizers.Regex(p), "isolated") for p in spec.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    encoder.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])  # pyright: ignore[reportAttributeAccessIssue]
    return encoder


def _sentencepiece_encoder(
    vocabulary: Vocabulary, metadata: Mapping[str, Any], prefix_space: bool
) -> tokenizers.Tokenizer:
    """SentencePiece BPE (https://arxiv.org/abs/1808.06226): the adjacent pair whose joint token scores
    highest is merged first, which is BPE with the merges ordered by score; what is left unknown falls back to
    byte tokens."""
    scores = require_list(metadata, "tokenizer.ggml.scores", float)
    if len(scores) != len(vocabulary.tokens):
        raise ModelFileError("tokenizer.ggml.scores and tokenizer.ggml.tokens differ in length; the file is damaged")
    mergeable = {
        text: i
        for text, i in vocabulary.ids.items()
        if vocabulary.types[i] in (TokenType.NORMAL, TokenType.USER_DEFINED)
    }
    ranked: list[tuple[float, int, int, str, str]] = []
    for text, i in mergeable.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in mergeable and right in mergeable:
                ranked.append((-scores[i], mergeable[left], mergeable[right], left, right))
    ranked.sort()
    encoder = tokenizers.Tokenizer(
        models.BPE(
            vocabulary.ids,
            [(left, right) for *_, left, right in ranked],
            unk_token=vocabulary.text_of(vocabulary.unknown_id) or None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prepend: list[normalizers.Normalizer] = [normalizers.Prepend(_SPACE)] if prefix_space else []
    encoder.normalizer = normalizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [normalizers.Replace(GUARD, ""), *prepend, normalizers.Replace(" ", _SPACE)]
    )
    return encoder


def _add_special_tokens(encoder: tokenizers.Tokenizer, vocabulary: Vocabulary) -> None:
    for ids, special in ((vocabulary.user_defined, False), (vocabulary.control, True)):
        texts = {vocabulary.tokens[i] for i in ids} - {""}
        encoder.add_tokens([tokenizers.AddedToken(t, normalized=False, special=special) for t in sorted(texts)])


def _byte_of(text: str) -> bytes:
    """The byte of a SentencePiece byte token, written "<0x0A>"."""
    try:
        return bytes([int(text[3:-1], 16)])
    except ValueError:
        raise ModelFileError(f"byte token {text!r:.20} is not of the form <0xHH>; the file is damaged") from None


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes (`bytes_to_unicode` in
    https://github.com/openai/gpt-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(rest)}


_BYTE_OF_CHAR = _byte_alphabet()
