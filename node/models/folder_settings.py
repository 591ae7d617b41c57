"""What the configuration files of a Hugging Face folder say about its tokenizer.

`tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json` name special and added tokens,
`generation_config.json` and `config.json` the ids that end a generation
(https://huggingface.co/docs/transformers/main/en/main_classes/tokenizer). What `transformers` 5 does with them
(`tokenization_utils_tokenizers.py`) is done here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.folder_files import MIB, read_json
from swarmd.node.models.vocabulary import MAX_TOKENS

_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MAX_CONFIG = 16 * MIB


@dataclass(frozen=True)
class AddedToken:
    """One token beside the model's own vocabulary; the flags are those of `tokenizers.AddedToken`."""

    text: str
    special: bool
    flags: dict[str, bool]


@dataclass(frozen=True)
class FolderSettings:
    """`special_texts`: texts of the special tokens by name, and lists of further ones; `extra_specials`: the texts
    of those; `added`: tokens by the id that they should have; `eos_ids`: ids that end a generation; `vocab_size`: the
    rows of the embedding, 0 if unknown; `add_bos`, `add_eos`: None when nothing is said; `config`: the whole of
    tokenizer_config.json."""

    special_texts: dict[str, str]
    extra_specials: tuple[str, ...]
    added: dict[int, AddedToken]
    eos_ids: frozenset[int]
    vocab_size: int
    add_bos: bool | None
    add_eos: bool | None
    config: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> FolderSettings:
        """Read what is there of the files. Raises ModelFileError naming the file that is damaged."""
        path = folder / "tokenizer_config.json"
        config = read_json(path, _MAX_CONFIG) or {}
        special_map = read_json(folder / "special_tokens_map.json", _MAX_CONFIG) or {}
        texts = {n: t for n in _NAMES if (t := _text(config.get(n)) or _text(special_map.get(n)))}
        extras = _extra_texts(config) or _extra_texts(special_map)
        texts |= {name: text for name, text in extras.items() if not name.startswith("#")}
        model_config = read_json(folder / "config.json", _MAX_CONFIG) or {}
        generation = read_json(folder / "generation_config.json", _MAX_CONFIG) or {}
        parts = [model_config, *(p for p in [model_config.get("text_config")] if isinstance(p, dict))]
        return cls(
            special_texts=texts,
            extra_specials=tuple(extras.values()),
            added=_added(path, config) or _added_tokens_file(folder / "added_tokens.json"),
            eos_ids=frozenset(i for part in (generation, *parts) for i in _ids(part.get("eos_token_id"))),
            vocab_size=max((_size(folder / "config.json", part.get("vocab_size")) for part in parts), default=0),
            add_bos=_flag(path, config, "add_bos_token"),
            add_eos=_flag(path, config, "add_eos_token"),
            config=config,
        )


def _text(value: Any) -> str | None:
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _extra_texts(config: Mapping[str, Any]) -> dict[str, str]:
    """Further special tokens: a mapping of names to texts, or lists, whose members get names that begin with "#"."""
    texts: dict[str, str] = {}
    for key in ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"):
        value = config.get(key)
        entries = value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ())
        for name, entry in entries:
            if (text := _text(entry)) is not None:
                texts[name if isinstance(name, str) else f"#{key}{name}"] = text
    return texts


def _added(path: Path, config: Mapping[str, Any]) -> dict[int, AddedToken]:
    added: dict[int, AddedToken] = {}
    entries = config.get("added_tokens_decoder")
    for key, entry in entries.items() if isinstance(entries, dict) else ():
        text = _text(entry)
        if not key.isdecimal() or len(key) > 8 or not isinstance(entry, dict) or text is None:
            raise ModelFileError(f"{path}: added_tokens_decoder has {key!r:.40}, which is no token; get another copy")
        flags = {name: entry.get(name) is True for name in ("lstrip", "rstrip", "single_word", "normalized")}
        added[int(key)] = AddedToken(text, entry.get("special") is True, flags)
    return added


def _added_tokens_file(path: Path) -> dict[int, AddedToken]:
    entries = read_json(path, _MAX_CONFIG) or {}
    for text, token_id in entries.items():
        if type(token_id) is not int or not 0 <= token_id < MAX_TOKENS:
            raise ModelFileError(f"{path}: {text!r:.40} has {token_id!r:.20}, which is no token id; get another copy")
    return {token_id: AddedToken(text, False, {}) for text, token_id in entries.items()}


def _ids(value: Any) -> Iterator[int]:
    for entry in value if isinstance(value, list) else [value]:
        if type(entry) is int and entry >= 0:
            yield entry


def _size(path: Path, value: Any) -> int:
    if type(value) is not int:
        return 0
    if not 0 <= value <= MAX_TOKENS:
        raise ModelFileError(f"{path}: vocab_size is {value}, more than {MAX_TOKENS} tokens; get another copy")
    return value


def _flag(path: Path, config: Mapping[str, Any], key: str) -> bool | None:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ModelFileError(f"{path}: {key} should be true or false, it is {value!r:.40}")
    return value
