"""Text to token ids and back."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swarmd.node.models.folder_tokenizer import folder_parts
from swarmd.node.models.gguf import GGUFFile
from swarmd.node.models.gguf_tokenizer import gguf_parts
from swarmd.node.models.token_texts import TokenTexts
from swarmd.node.models.tokenizer_parts import GUARD, TokenizerParts

__all__ = ["GUARD", "Tokenizer"]


class Tokenizer(TokenTexts):
    """One model's tokenizer. Immutable after construction and safe to use from several threads.

    `bos_id` is None when the model has none; `control_texts` are the texts that stand for control tokens when `encode`
    parses them; `special_texts` are the variables that chat templates know (`bos_token`, ...).
    """

    def __init__(self, parts: TokenizerParts) -> None:
        vocabulary = parts.vocabulary
        super().__init__(
            parts.spell,
            len(vocabulary.tokens),
            eos_ids=vocabulary.eos_ids,
            hidden=vocabulary.hidden,
            strip_space=parts.spelling.strip_space,
        )
        self._parts = parts
        self._encoder = parts.encoder
        self._lock = threading.Lock()
        self.bos_id = vocabulary.bos_id
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

    @classmethod
    def of_model(cls, path: Path) -> Tokenizer:
        """Build from a GGUF file's header (its tensors need not be there; of a split model the first file) or from a
        folder. Raises ModelFileError. Blocking."""
        if path.is_dir():
            return cls.from_folder(path)
        with GGUFFile.open(path, sparse=True) as file:
            return cls.from_gguf(file.metadata)

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
