"""Text to token ids and back."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from swarmd.node.models.detokenizer import IncrementalDetokenizer
from swarmd.node.models.folder_tokenizer import folder_parts
from swarmd.node.models.gguf_tokenizer import gguf_parts
from swarmd.node.models.tokenizer_parts import GUARD, TokenizerParts

__all__ = ["GUARD", "Tokenizer"]


class Tokenizer:
    """One model's tokenizer. Immutable after construction and safe to use from several threads.

    `bos_id` is None when the model has none; `eos_ids` end a generation; `control_texts` are the texts that
    stand for control tokens when `encode` parses them; `vocab_size` is the number of ids; `special_texts` are the
    variables that chat templates know (`bos_token`, ...).
    """

    def __init__(self, parts: TokenizerParts) -> None:
        vocabulary = parts.vocabulary
        self._parts = parts
        self._vocabulary = vocabulary
        self._encoder = parts.encoder
        self._lock = threading.Lock()
        self._bytes: dict[int, bytes] = {}  # of the tokens asked for so far: most streams share most of theirs
        self.bos_id = vocabulary.bos_id
        self.eos_ids = vocabulary.eos_ids
        self.vocab_size = len(vocabulary.tokens)
        self.control_texts = frozenset(vocabulary.tokens[i] for i in vocabulary.control)
        self.special_texts = parts.special_texts

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Build from GGUF metadata (see `gguf_tokenizer`). Raises ModelFileError naming what is unknown or damaged."""
        return cls(gguf_parts(metadata))

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Build from a folder in Hugging Face's form (see `folder_tokenizer`). Raises ModelFileError naming the file
        and what is unknown or damaged in it. Blocking."""
        return cls(folder_parts(folder))

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
        return [*self._parts.prefix, *ids, *self._parts.suffix] if add_special else ids

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
            if skip_special and token_id in self._vocabulary.hidden:
                return b""
            return self.token_bytes(token_id)

        strip = self._parts.spelling.strip_space and not keep_leading_space
        return IncrementalDetokenizer(piece, strip_leading_space=strip)

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that this token stands for, perhaps only a part of a character; a control token's
        are its text. Raises ValueError for an id outside the vocabulary."""
        known = self._bytes.get(token_id)
        if known is None:
            if not 0 <= token_id < self.vocab_size:
                raise ValueError(f"token id {token_id} is outside the vocabulary of {self.vocab_size} tokens")
            known = self._bytes[token_id] = self._parts.spell(token_id)
        return known

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text, U+FFFD where it is only a part of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")
