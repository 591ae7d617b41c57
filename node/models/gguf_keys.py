"""Typed, range-checked access to the keys of one architecture in a GGUF header, which knows what nobody asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from swarmd.node.models.errors import ModelFileError

HARMLESS = frozenset(
    {
        "tensor_data_layout",  # how Meta's own files were ordered before conversion
        "rope.scaling.finetuned",  # history, except for Granite, which asks for it
        "attention.layer_norm_epsilon",  # some converters write it beside the RMS norm's, which counts
        "leading_dense_block_count",  # which layers are mixtures of experts is seen by their tensors
        "interleave_moe_layer_step",
        "moe_every_n_layers",
    }
)
"""Keys that say nothing a decoder would have to do."""


class ArchKeys:
    """The keys that begin with the architecture's name, without it. Every value that is read is remembered."""

    def __init__(self, metadata: Mapping[str, object], architecture: str) -> None:
        self._prefix = architecture + "."
        self._values = {
            key.removeprefix(self._prefix): value for key, value in metadata.items() if key.startswith(self._prefix)
        }
        self._read: set[str] = set()

    def get(self, key: str) -> object:
        """The value, or None. A list of one and the same value for each layer is that value."""
        self._read.add(key)
        value = self._values.get(key)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            return value[0]
        return value

    def listed(self, key: str) -> object:
        """The value as it is, or None."""
        self._read.add(key)
        return self._values.get(key)

    def integer(self, key: str, maximum: int, *, default: int | None = None, minimum: int = 1) -> int:
        """A whole number from `minimum` to `maximum`. Raises ModelFileError for anything else, None without default."""
        value = self.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            self._refuse_value(key, value, f"a whole number from {minimum} to {maximum} is needed")
        return value

    def number(self, key: str, *, default: float | None = None) -> float:
        """A positive number. Raises ModelFileError for anything else, and for None without a default."""
        value = self.optional_number(key)
        if value is None:
            value = default
        if value is None:
            self._refuse_value(key, None, "a positive number is needed")
        return value

    def optional_number(self, key: str) -> float | None:
        """A positive number; None where it is missing or 0, which converters write for "none"."""
        value = self.get(key)
        if value is None or (value == 0 and not isinstance(value, bool)):
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            self._refuse_value(key, value, "a positive number is needed")
        return float(value)

    def flag(self, key: str, *, default: bool) -> bool:
        """A boolean. Raises ModelFileError for anything else."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self._refuse_value(key, value, "true or false is needed")
        return value

    def refuse_unread(self) -> None:
        """Raise ModelFileError for a key that was not asked for and is neither harmless nor off (0, false, empty).

        What the decoder does not know it cannot do, and the answers would be wrong without a sign.
        """
        for key in sorted(set(self._values) - self._read - HARMLESS):
            if self._values[key]:
                refuse(f"{self._prefix}{key} ({shown(self._values[key])}) asks for what is not supported")

    def _refuse_value(self, key: str, value: object, needed: str) -> NoReturn:
        refuse(f"{self._prefix}{key} is {shown(value)}; {needed}")


def shown(value: object) -> str:
    """A value from a file, short enough for a message."""
    return "missing" if value is None else f"{value!r:.40}"


def refuse(what: str) -> NoReturn:
    """Raise ModelFileError for a model that is understood well enough to know that it can't be computed."""
    raise ModelFileError(f"this model cannot be served: {what}; choose another file")
