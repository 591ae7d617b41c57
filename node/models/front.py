"""What an entry node needs of a model: its tokenizer and chat template, from a file's header or a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from swarmd.node.models.chat_template import ChatTemplate
from swarmd.node.models.gguf import GGUFFile
from swarmd.node.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class ModelFront:
    """Text in, token ids out, and back again."""

    tokenizer: Tokenizer
    template: ChatTemplate

    @classmethod
    def load(cls, path: Path) -> ModelFront:
        """Read a GGUF file's header (its tensors need not be there; of a split model the first file), or the small
        files of a folder in Hugging Face's form. Blocking; raises ModelFileError."""
        if path.is_dir():
            tokenizer = Tokenizer.from_folder(path)
            return cls(tokenizer, ChatTemplate.from_folder(path, tokenizer))
        with GGUFFile.open(path, sparse=True) as file:
            tokenizer = Tokenizer.from_gguf(file.metadata)
            return cls(tokenizer, ChatTemplate.from_gguf(file.metadata, tokenizer))

    def render(self, messages: Sequence[Mapping[str, object]]) -> str:
        """A conversation as a prompt, ready for the assistant's answer. Raises TemplateError (a ValueError)."""
        return self.template.render(list(messages), add_generation_prompt=True)

    def encode_rendered(self, prompt: str) -> list[int]:
        """Token ids of what `render` gave."""
        return self.tokenizer.encode(prompt, add_special=False, parse_special=True)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of plain text; control tokens written in it stay plain text."""
        return self.tokenizer.encode(text, add_special=True, parse_special=False)
