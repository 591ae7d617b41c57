"""Values as types allow them, and values changed in one place: for JSON, msgpack and metadata."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from typing import Any

import msgspec
from fuzz.mutate import INTERESTING
from msgspec import inspect

_TEXTS = ("", "a", "<s>", "\0", "\x7f", "é😀", "../..", "/", "%s{0}", "{{ x }}", "none", "0", "-1", "1e999", "\ud800")
_FLOATS = (0.0, -0.0, 0.5, 1.0, -1.0, 1e-45, 1e38, 1e39, 1e308, math.inf, -math.inf, math.nan)


def junk(random: Random, depth: int = 0) -> Any:
    """A value that nobody asked for."""
    kind = random.randrange(9 if depth < 3 else 6)
    if kind == 0:
        return random.choice((None, True, False))
    if kind <= 2:
        return random.choice((random.choice(INTERESTING) * random.choice((1, 1, -1)), random.randrange(-3, 300)))
    if kind == 3:
        return random.choice(_FLOATS)
    if kind <= 5:
        return random.choice(_TEXTS) * random.choice((1, 1, 1, 70, 3000))
    if kind == 6:
        return [junk(random, depth + 1) for _ in range(random.choice((0, 1, 2, 4)))]
    if kind == 7:
        return [junk(random, 3)] * random.choice((1, 9, 257, 2000))
    return {random.choice(_TEXTS[1:9]): junk(random, depth + 1) for _ in range(random.randrange(3))}


def change(random: Random, value: Any) -> Any:
    """A copy of a tree of dicts and lists with one place changed, removed, repeated or moved."""
    if not isinstance(value, dict | list) or not value or random.random() < 0.04:
        return _other_leaf(random, value)
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    place = random.choice(list(copy)) if isinstance(copy, dict) else random.randrange(len(copy))
    action = random.random()
    if action < 0.72:
        copy[place] = change(random, copy[place])
    elif action < 0.82:
        del copy[place]
    elif action < 0.9:  # another's value, which may be of another kind
        copy[place] = random.choice(list(copy.values())) if isinstance(copy, dict) else random.choice(copy)
    elif isinstance(copy, list):
        copy.insert(place, random.choice((copy[place], junk(random))))
    else:
        copy[random.choice((*_TEXTS, *map(str, copy)))] = junk(random)
    return copy


def _other_leaf(random: Random, value: Any) -> Any:
    """Another value, more often than not of the same kind."""
    if random.random() < 0.4:
        return junk(random)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return random.choice((value + 1, value - 1, -value, value * 2, 0, random.choice(INTERESTING)))
    if isinstance(value, float):
        return random.choice((*_FLOATS, value * 2, -value))
    if isinstance(value, str) and value:
        place = random.randrange(len(value))
        return random.choice(
            (value[:place], value + random.choice(_TEXTS), value[:place] + "\0" + value[place:], value * 9)
        )
    return junk(random)


class Sampler:
    """Draws values that a type admits, by msgspec's description of it, as JSON or msgpack would carry them.

    Texts with a pattern are so many lower-case hex digits: the only patterns that messages have.
    """

    def __init__(self) -> None:
        self._known: dict[type, inspect.Type] = {}

    def message(self, random: Random, kind: type) -> Any:
        """A value of `kind`, as plain dicts, lists, texts and numbers."""
        if kind not in self._known:
            self._known[kind] = inspect.type_info(kind)
        return self._draw(random, self._known[kind], 0)

    def _draw(self, random: Random, info: inspect.Type, depth: int) -> Any:
        if isinstance(info, inspect.Metadata):
            return self._draw(random, info.type, depth)
        for kind, draw in self._KINDS:
            if isinstance(info, kind):
                return draw(self, random, info, depth)
        raise TypeError(f"no values of {info} can be drawn")

    def _number(self, random: Random, info: Any, depth: int) -> int:
        low = -(2**63) if info.ge is None else info.ge
        high = 2**63 - 1 if info.le is None else info.le
        number = random.choice((low, high, 0, 1, 2, random.randrange(1000), random.choice(INTERESTING)))
        return min(max(number, low), high)

    def _float(self, random: Random, info: Any, depth: int) -> float:
        low, high = (-1e30 if info.ge is None else info.ge), (1e30 if info.le is None else info.le)
        if info.gt is not None:
            low = info.gt + 0.5
        return min(max(random.choice((0.0, 0.5, 1.0, 1e9, random.random())), low), high)

    def _text(self, random: Random, info: Any, depth: int) -> str:
        if info.pattern is not None:
            digits = int(info.pattern.removeprefix("^[0-9a-f]{").removesuffix("}$"))
            return random.choice("0a") * (digits - 1) + random.choice("0123456789abcdef")
        text = random.choice(("x", "é😀", "cpu", "127.0.0.1", "fe80::1%eth0", *_TEXTS[:9])) * random.choice(
            (1, 1, 1, 40)
        )
        return (text or "x" * (info.min_length or 0))[: info.max_length]

    def _bytes(self, random: Random, info: Any, depth: int) -> bytes:
        return random.randbytes(max(random.choice((0, 16, 64)), info.min_length or 0))[: info.max_length]

    def _many(self, random: Random, info: Any, depth: int) -> list[Any]:
        most = 3 if info.max_length is None else min(info.max_length, 3)
        count = 0 if depth > 5 else random.randint(min(info.min_length or 0, most), most)
        return [self._draw(random, info.item_type, depth + 1) for _ in range(max(count, info.min_length or 0))]

    def _tuple(self, random: Random, info: inspect.TupleType, depth: int) -> list[Any]:
        return [self._draw(random, item, depth + 1) for item in info.item_types]

    def _dict(self, random: Random, info: inspect.DictType, depth: int) -> dict[Any, Any]:
        return {
            self._draw(random, info.key_type, depth + 1): self._draw(random, info.value_type, depth + 1)
            for _ in range(random.randrange(3))
        }

    def _struct(self, random: Random, info: inspect.StructType, depth: int) -> Any:
        fields = {
            field.encode_name: self._draw(random, field.type, depth + 1)
            for field in info.fields
            if field.required or info.array_like or random.random() < 0.6
        }
        if info.array_like:
            return list(fields.values())
        return {"type": info.tag, **fields} if info.tag is not None else fields

    _KINDS: tuple[tuple[type, Callable[..., Any]], ...] = (
        (inspect.IntType, _number),
        (inspect.FloatType, _float),
        (inspect.StrType, _text),
        (inspect.BytesType, _bytes),
        (inspect.BoolType, lambda self, random, info, depth: random.random() < 0.5),
        (inspect.NoneType, lambda self, random, info, depth: None),
        (inspect.LiteralType, lambda self, random, info, depth: random.choice(info.values)),
        (inspect.EnumType, lambda self, random, info, depth: random.choice(list(info.cls)).value),
        (inspect.UnionType, lambda self, random, info, depth: self._draw(random, random.choice(info.types), depth)),
        (inspect.VarTupleType, _many),
        (inspect.ListType, _many),
        (inspect.TupleType, _tuple),
        (inspect.DictType, _dict),
        (inspect.StructType, _struct),
    )


def to_msgpack(value: Any) -> bytes:
    """A tree as msgpack; numbers that it cannot hold become the largest that it can."""
    try:
        return msgspec.msgpack.encode(value)
    except (OverflowError, UnicodeEncodeError):
        return msgspec.msgpack.encode(_encodable(value))


def _encodable(value: Any) -> Any:
    if isinstance(value, dict):
        return {_encodable(key): _encodable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_encodable(item) for item in value]
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, int) and not isinstance(value, bool):
        return min(max(value, -(2**63)), 2**64 - 1)
    return value
