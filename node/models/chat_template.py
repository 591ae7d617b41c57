"""A conversation as the text that the model was trained on, by the chat template its file carries."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2

from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.folder_template import folder_templates
from swarmd.node.models.template_limits import TemplateError
from swarmd.node.models.template_sandbox import TemplateSandbox
from swarmd.node.models.tokenizer import GUARD, Tokenizer

log = logging.getLogger("swarmd.models")

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The form used when a file has no template
(https://github.com/openai/openai-python/blob/v0.28.1/chatml.md)."""

# Their values are words that templates compare, or put between "<|" and "|>" to make the token of a role.
_TAGS = frozenset({"role", "type"})
_OUTPUT_FACTOR = 8
_OUTPUT_FLOOR = 1 << 20
MAX_TEMPLATE = 1 << 17
"""Characters that a template may have; gpt-oss' has 17,000."""
MAX_CONTROL_PARTS = 1 << 23
"""Characters that the beginnings of all control tokens may have together; the models in use have less than 2^19."""


class ChatTemplate:
    """One model's template, compiled once. Safe to render from several threads.

    What a conversation says can't act as a control token. Each place in its strings where the text of one
    stands, or where one could come about by joining a string to the template's own text, gets a GUARD
    character, which `Tokenizer.encode` drops only after it has recognised the control tokens that the
    template itself wrote. A template that takes strings apart and puts them together again character by
    character could undo that; none of the known ones does.
    """

    def __init__(
        self,
        source: str,
        *,
        control_texts: Iterable[str] = (),
        special_texts: Mapping[str, str] | None = None,
        tool_source: str | None = None,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """`source`: the template; `tool_source`: another for conversations with tools; `special_texts`: the
        variables `bos_token` and so on; `now`: the clock of `strftime_now`. Raises ModelFileError for a
        template that is no Jinja."""
        self._sandbox = TemplateSandbox(now)
        self._guard = _Guard(control_texts)
        self._special_texts = dict(special_texts or {})
        self._template = self._compile(source)
        self._tool_template = self._compile(tool_source) if tool_source else self._template
        self._size = len(source) + len(tool_source or "")

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], tokenizer: Tokenizer) -> ChatTemplate:
        """The template of the keys `tokenizer.chat_template` and `tokenizer.chat_template.tool_use`; ChatML
        when the file has none. Raises ModelFileError when it is not a valid Jinja template."""
        source = metadata.get("tokenizer.chat_template")
        tool_source = metadata.get("tokenizer.chat_template.tool_use")
        for text in (source, tool_source):
            if text is not None and not isinstance(text, str):
                raise ModelFileError("tokenizer.chat_template should be a text; the file is damaged or of a new kind")
        return cls._of_model(source, tool_source, tokenizer)

    @classmethod
    def from_folder(cls, folder: Path, tokenizer: Tokenizer) -> ChatTemplate:
        """The templates of a Hugging Face folder (see `folder_template`); ChatML when it has none. Raises
        ModelFileError when there is one of another form, or none is a valid Jinja template. Blocking."""
        return cls._of_model(*folder_templates(folder), tokenizer)

    @classmethod
    def _of_model(cls, source: str | None, tool_source: str | None, tokenizer: Tokenizer) -> ChatTemplate:
        if not source:
            log.warning("the model has no chat template, using chatml")
            source = CHATML
        return cls(
            source,
            control_texts=tokenizer.control_texts,
            special_texts=tokenizer.special_texts,
            tool_source=tool_source,
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt, to be encoded with `Tokenizer.encode(prompt, add_special=False, parse_special=True)`:
        the template writes BOS and role tokens itself, and may leave GUARD characters where the conversation
        wrote such texts.

        `messages` have `role` and `content` and what else the template reads. Raises TemplateError, with a
        sentence, when the template refuses the conversation, can't handle its shape, or does more work or
        writes more (eight times what it was given plus 1 MiB) than a template needs to.
        """
        # Templates compare parts of a tool's description with each other; none frames them as it frames a role.
        guarded = {
            "messages": self._guard.apply(list(messages)),
            "tools": self._guard.apply(list(tools), free=False) if tools else None,
        }
        allowed = _OUTPUT_FACTOR * (self._guard.characters(guarded) + self._size) + _OUTPUT_FLOOR
        variables = {
            **self._special_texts,
            **guarded,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        template = self._tool_template if tools else self._template
        try:
            return self._sandbox.render_counted(template, allowed, variables)
        except TemplateError:
            raise
        except Exception as exc:  # a template is a program: it can fail in any of Python's ways
            what = f"{type(exc).__name__}: {str(exc)[:200]}"
            raise TemplateError(f"the model's chat template can't handle this conversation ({what})") from exc

    def _compile(self, source: str) -> jinja2.Template:
        if len(source) > MAX_TEMPLATE:
            raise ModelFileError(
                f"the model file's chat template has {len(source)} characters; at most {MAX_TEMPLATE} are supported; "
                "use another copy of the model"
            )
        try:
            return self._sandbox.compile_counted(source)
        # A template becomes a Python program, which can be one that Python itself refuses.
        except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError, MemoryError) as exc:
            raise ModelFileError(
                f"the model file's chat template is not valid ({exc}); use another copy of the model"
            ) from exc


class _Guard:
    """Puts GUARD characters into the strings of a conversation."""

    def __init__(self, control_texts: Iterable[str]) -> None:
        self._texts = sorted(t for t in control_texts if len(t) > 1)
        if sum(len(t) ** 2 for t in self._texts) > 2 * MAX_CONTROL_PARTS:
            raise ModelFileError(
                "the model file's control tokens are too long or too many; use another copy of the model"
            )
        self._starts = {t[:n] for t in self._texts for n in range(1, len(t))}
        self._ends = {t[n:] for t in self._texts for n in range(1, len(t))}
        self._longest = max(map(len, self._texts), default=0)

    def apply(self, value: Any, *, free: bool = True) -> Any:
        """A copy of `value` (strings, mappings, sequences, nested) with every string guarded; one that is not
        `free` is left alone where it is no more than an inner part of a control token."""
        if isinstance(value, str):
            return self._string(value, free)
        if isinstance(value, Mapping):
            return {self.apply(k, free=False): self.apply(v, free=free and k not in _TAGS) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.apply(v, free=free) for v in value]
        return value

    def characters(self, value: Any) -> int:
        """Number of characters in all strings of `value`."""
        if isinstance(value, str):
            return len(value)
        if isinstance(value, Mapping):
            return sum(self.characters(k) + self.characters(v) for k, v in value.items())
        return sum(map(self.characters, value)) if isinstance(value, list) else 8

    def _string(self, text: str, free: bool) -> str:
        for control in self._texts:
            if control in text:
                text = text.replace(control, control[0] + GUARD + control[1:])
        lengths = range(1, self._longest)
        if any(text[-n:] in self._starts for n in lengths):
            text += GUARD
        if any(text[:n] in self._ends for n in lengths) or (free and text and self._is_inner(text)):
            text = GUARD + text
        return text

    def _is_inner(self, text: str) -> bool:
        return len(text) < self._longest and any(text in control for control in self._texts)
