"""Typed, bounded access to the keys of a config.json, which notes what was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from swarmd.node.models.errors import ModelFileError


class ConfigKeys:
    """One object of a config.json. `where` is said before a key's name in messages ("rope_scaling.").

    A value of null counts as missing, as for `transformers`; so does a key in `defaults` that is not there.
    """

    def __init__(
        self, values: Mapping[str, object], *, where: str = "", defaults: Mapping[str, object] | None = None
    ) -> None:
        self._values = values
        self._where = where
        self._defaults = defaults or {}
        self.asked: set[str] = set()

    def names(self) -> set[str]:
        """The keys that have a value."""
        return {name for name, value in self._values.items() if value is not None}

    def get(self, *keys: str) -> object:
        """The value of the first of the keys that has one, else a default, else None."""
        self.asked.update(keys)
        for source in (self._values, self._defaults):
            for key in keys:
                if source.get(key) is not None:
                    return source[key]
        return None

    def integer(self, *keys: str, maximum: int, minimum: int = 1, default: int | None = None) -> int:
        """A whole number from `minimum` to `maximum`."""
        value = self.get(*keys)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            self.refuse(keys[0], value, f"a whole number from {minimum} to {maximum} is needed")
        return value

    def number(self, *keys: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.get(*keys)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            self.refuse(keys[0], value, "a positive number is needed")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """A positive number, or None where there is none."""
        return None if self.get(key) is None else self.number(key)

    def flag(self, key: str, *, default: bool = False) -> bool:
        """true or false."""
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            self.refuse(key, value, "true or false is needed")
        return value

    def integers(self, key: str, *, maximum: int) -> list[int] | None:
        """A list of at most `maximum` whole numbers, or None where there is none."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) > maximum or not all(isinstance(v, int) for v in value):
            self.refuse(key, value, f"a list of at most {maximum} whole numbers is needed")
        return value

    def table(self, key: str) -> ConfigKeys | None:
        """An object inside this one, or None where there is none."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.refuse(key, value, "an object is needed")
        return ConfigKeys(value, where=f"{self._where}{key}.")

    def refuse(self, key: str, value: object, why: str) -> NoReturn:
        """Raise ModelFileError that names key and value."""
        shown = "missing" if value is None else f"{value!r:.60}"
        raise ModelFileError(f"this model cannot be served: {self._where}{key} in config.json is {shown}; {why}")
