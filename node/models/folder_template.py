"""The chat templates that a Hugging Face folder carries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.folder_files import MIB, read_json, read_text

_MAX_TEMPLATE = MIB
_MAX_CONFIG = 16 * MIB
_DIRECTORY = "additional_chat_templates"


def folder_templates(folder: Path) -> tuple[str | None, str | None]:
    """The template for a conversation and the one for a conversation with tools, None where there is none of its own.

    As `transformers` looks for them: `chat_template.jinja` with those in `additional_chat_templates/`, else
    `chat_template` of tokenizer_config.json, which may be one text or a list of named ones, else the
    `chat_template.json` of processors. Raises ModelFileError naming the file when it has another form, or when there
    are several and none is called "default".
    """
    named = _files(folder)
    if not named:
        for name in ("tokenizer_config.json", "chat_template.json"):
            path = folder / name
            if value := (read_json(path, _MAX_CONFIG) or {}).get("chat_template"):
                named = _named(path, value)
                break
    if not named:
        return None, None
    if "default" not in named and len(named) > 1:
        raise ModelFileError(f"{folder}: none of the chat templates ({', '.join(sorted(named))}) is called 'default'")
    return named.get("default", next(iter(named.values()))), named.get("tool_use")


def _files(folder: Path) -> dict[str, str]:
    default = read_text(folder / "chat_template.jinja", _MAX_TEMPLATE)
    named = {} if default is None else {"default": default}
    tools = read_text(folder / _DIRECTORY / "tool_use.jinja", _MAX_TEMPLATE)
    return named if tools is None else {**named, "tool_use": tools}


def _named(path: Path, value: Any) -> dict[str, str]:
    entries = [{"name": "default", "template": value}] if isinstance(value, str) else value
    named: dict[str, str] = {}
    for entry in entries if isinstance(entries, list) else [None]:
        name, template = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(template, str):
            raise ModelFileError(f"{path}: chat_template should be a text or a list of named texts; get another copy")
        named[name] = template
    return named
