"""The key-value part of a GGUF header: a bounded cursor over bytes that nobody vouches for.

Memory is bounded twice: no string or array may be longer than the header bytes that are left, and all arrays
together may have MAX_ARRAY_ELEMENTS elements (the largest vocabularies in use have about 260,000 tokens and
as many merges).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from swarmd.node.models.errors import ModelFileError

MAX_HEADER_BYTES = 64 << 20
MAX_METADATA_KEYS = 1 << 16
MAX_KEY_BYTES = 1 << 16
MAX_ARRAY_ELEMENTS = 1 << 21
MAX_ARRAY_DEPTH = 4

_BOOL, _STRING, _ARRAY = 7, 8, 9
_NUMBERS: dict[int, str] = {
    0: "u1",
    1: "i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
"""GGUF's value types that are plain numbers, as numpy types."""


class HeaderCursor:
    """Reads little-endian values one after another and raises ModelFileError instead of running past the end."""

    def __init__(self, buffer: Any, file_name: str) -> None:
        self._view = memoryview(buffer)[: min(len(buffer), MAX_HEADER_BYTES)]
        self._file_size = len(buffer)
        self._file_name = file_name
        self.position = 0
        self.array_elements = 0

    @property
    def left(self) -> int:
        """Header bytes that have not been read yet."""
        return len(self._view) - self.position

    def error(self, what: str) -> ModelFileError:
        """An error that names the file, says `what` is wrong and what to do."""
        return ModelFileError(f"{self._file_name} is damaged: {what} (at byte {self.position}); download it again")

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        if count > self.left:
            if len(self._view) < self._file_size:
                raise self.error(f"its header is larger than {MAX_HEADER_BYTES >> 20} MiB")
            missing = count - self.left
            raise ModelFileError(f"{self._file_name} is truncated: its header lacks {missing} bytes; download it again")
        start = self.position
        self.position += count
        return bytes(self._view[start : self.position])

    def u32(self) -> int:
        """The next unsigned 32-bit number."""
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        """The next unsigned 64-bit number."""
        return int.from_bytes(self.take(8), "little")

    def string(self, limit: int = MAX_HEADER_BYTES) -> str:
        """The next string (u64 length, UTF-8) of at most `limit` bytes."""
        length = self.u64()
        if length > limit:
            raise self.error(f"a string of {length} bytes is longer than the {limit} allowed")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise self.error("a string is not UTF-8") from error

    def strings(self, count: int) -> list[str]:
        """The next `count` strings; of them there may be millions."""
        view, position, end = self._view, self.position, len(self._view)
        found: list[str] = []
        while len(found) < count:
            begin = position + 8
            length = int.from_bytes(view[position:begin], "little")
            if begin + length > end:
                break
            try:
                found.append(str(view[begin : begin + length], "utf-8"))
            except UnicodeDecodeError:
                break
            position = begin + length
        self.position = position
        # The next one is not there or no text: let it be said how.
        return found if len(found) == count else [*found, self.string()]


def read_metadata(cursor: HeaderCursor, count: int) -> dict[str, object]:
    """`count` key-value pairs. Raises ModelFileError for anything malformed, repeated or out of bounds."""
    if count > MAX_METADATA_KEYS or count * 13 > cursor.left:
        raise cursor.error(f"it declares {count} metadata keys, more than it can hold")
    metadata: dict[str, object] = {}
    for _ in range(count):
        key = cursor.string(MAX_KEY_BYTES)
        if key in metadata:
            raise cursor.error(f"the metadata key {key!r:.80} stands twice")
        metadata[key] = _read_value(cursor, cursor.u32(), 0)
    return metadata


def _read_value(cursor: HeaderCursor, kind: int, depth: int) -> object:
    if kind == _ARRAY:
        return _read_array(cursor, depth + 1)
    if kind == _STRING:
        return cursor.string()
    if kind == _BOOL:
        return _read_bools(cursor, 1)[0]
    return _read_numbers(cursor, kind, 1)[0]


def _read_array(cursor: HeaderCursor, depth: int) -> list[Any]:
    if depth > MAX_ARRAY_DEPTH:
        raise cursor.error(f"arrays are nested more than {MAX_ARRAY_DEPTH} deep")
    kind, count = cursor.u32(), cursor.u64()
    cursor.array_elements += count
    if cursor.array_elements > MAX_ARRAY_ELEMENTS or count > cursor.left:
        raise cursor.error(f"an array declares {count} elements, more than it can hold")
    if kind == _STRING:
        return cursor.strings(count)
    if kind == _ARRAY:
        return [_read_value(cursor, kind, depth) for _ in range(count)]
    reader: Callable[[], list[Any]] = (
        (lambda: _read_bools(cursor, count)) if kind == _BOOL else (lambda: _read_numbers(cursor, kind, count))
    )
    return reader()


def _read_bools(cursor: HeaderCursor, count: int) -> list[bool]:
    raw = cursor.take(count)
    if raw.count(0) + raw.count(1) != count:
        raise cursor.error("a boolean is neither 0 nor 1")
    return [byte == 1 for byte in raw]


def _read_numbers(cursor: HeaderCursor, kind: int, count: int) -> list[Any]:
    code = _NUMBERS.get(kind)
    if code is None:
        raise cursor.error(f"the metadata value type {kind} does not exist")
    dtype = np.dtype(code)
    return np.frombuffer(cursor.take(count * dtype.itemsize), dtype).tolist()
