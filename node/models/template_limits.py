"""What a chat template may not do even in a sandbox: make much out of little.

Operators, string methods and filters whose result can be far larger than what goes in are checked before they
run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from datetime import datetime
from typing import Any, NoReturn

from jinja2.filters import do_indent

MAX_TEXT = 16 << 20
"""Characters that one string or list made by an operator or method may have."""
_MAX_NUMBER_BITS = 1 << 12
_ELEMENT_WEIGHT = 64

_PADDING_METHODS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs"})
# A width of four digits or more, or one taken from an argument, in any of Python's format languages.
_WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(\d{4}|\*)|\{[^}]*(\d{4}|:[^}]*\{)")


class TemplateError(ValueError):
    """A conversation can't be put into the model's form: the template refused it, failed, or asked for too
    much."""


def refuse(what: str) -> NoReturn:
    """Raise the TemplateError that says what was attempted."""
    raise TemplateError(f"the model's chat template tried to make {what} and was stopped")


def length_of(value: Any) -> int:
    """Length of a string or sequence, 0 for anything else."""
    return len(value) if isinstance(value, str | list | tuple) else 0


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 1


def _weigh(value: Any, limit: int) -> int:
    """Characters in `value`, however nested, and a price for each element; stops counting soon after
    `limit`."""
    if isinstance(value, str):
        return len(value)
    if not isinstance(value, list | tuple | dict):
        return 0
    parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    total = len(parts) * _ELEMENT_WEIGHT
    for part in parts:
        if total > limit:
            break
        total += _weigh(part, limit - total)
    return total


def weighed(value: Any) -> Any:
    """`value`, refused when its text would be longer than MAX_TEXT."""
    if _weigh(value, MAX_TEXT) > MAX_TEXT:
        refuse("a huge string")
    return value


def check_product(left: Any, right: Any) -> None:
    """Refuse `left * right` where the result would be huge."""
    for sequence, times in ((left, right), (right, left)):
        if isinstance(times, int) and length_of(sequence) * times > MAX_TEXT:
            refuse("a huge string")
    if isinstance(left, int) and isinstance(right, int) and _bits(left) + _bits(right) > _MAX_NUMBER_BITS:
        refuse("a huge number")


def check_power(left: Any, right: Any) -> None:
    """Refuse `left ** right` where the result would be huge."""
    if _bits(left) * abs(right) > _MAX_NUMBER_BITS:
        refuse("a huge number")


def check_method(owner: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse the calls of string methods whose result would be far longer than what goes in."""
    values = [*args, *kwargs.values()]
    if method in _PADDING_METHODS and any(isinstance(v, int) and v > 1000 for v in values):
        refuse("a huge string")
    if method in ("format", "format_map"):
        weighed(values)
        if _WIDE_FORMAT.search(owner):
            refuse("a huge string")
    if method == "replace" and len(values) >= 2:
        _check_replace(owner, values[0], values[1])
    if method == "join" and len(values) == 1:
        _check_join(owner, values[0])


def _check_replace(text: str, old: Any, new: Any) -> None:
    if isinstance(old, str) and isinstance(new, str) and len(text) + text.count(old) * len(new) > MAX_TEXT:
        refuse("a huge string")


def _check_join(separator: str, parts: Any) -> None:
    if _weigh(parts, MAX_TEXT) + len(separator) * length_of(parts) > MAX_TEXT:
        refuse("a huge string")


def _join(value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    parts = list(value)
    _check_join(str(d), parts)
    if attribute is not None:
        parts = [part[attribute] for part in parts]
    return str(d).join(map(str, parts))


def _replace(s: Any, old: str, new: str, count: int = -1) -> str:
    text = str(weighed(s))
    _check_replace(text, old, new)
    return text.replace(str(old), str(new), count)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    if isinstance(indent, int) and indent > 16:
        refuse("a huge string")
    return json.dumps(
        weighed(value), ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    if (width if isinstance(width, int) else len(width)) > 64:
        refuse("a huge string")
    return do_indent(s, width, first, blank)


def bounded_strftime(now: datetime, form: str) -> str:
    """`now.strftime(form)` without its paddings."""
    if _WIDE_FORMAT.search(form):  # the C library pads to any width
        refuse("a huge string")
    return now.strftime(form)


BOUNDED_FILTERS = {"tojson": _to_json, "indent": _indent, "join": _join, "replace": _replace}
"""jinja2's filters of these names, bounded; `tojson` is Hugging Face's, which escapes nothing for HTML."""
