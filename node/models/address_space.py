"""The bytes of a model's files as one sequence: first the heads of all files, then what follows them.

A node that is to hold some layers, or only to tokenize, needs the heads of all files: all metadata, and of the
weights' files the part that says where each tensor is. In front, they lie together in few chunks, however many files
there are. For a model of one file the sequence is the file.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate
from typing import NamedTuple


class Span(NamedTuple):
    """`length` bytes at `offset` of the file with this number."""

    file: int
    offset: int
    length: int


class AddressSpace:
    """The sequence of files of given (size, head size), in bytes."""

    def __init__(self, files: Iterable[tuple[int, int]]) -> None:
        sizes = list(files)
        heads = [Span(number, 0, head) for number, (_, head) in enumerate(sizes)]
        tails = [Span(number, head, size - head) for number, (size, head) in enumerate(sizes)]
        self._segments = [segment for segment in heads + tails if segment.length]
        self._starts = [0, *accumulate(segment.length for segment in self._segments)]
        self.size = self._starts[-1]
        self.head_bytes = sum(head for _, head in sizes)

    def spans(self, offset: int, length: int) -> list[Span]:
        """Where bytes of the sequence lie in the files, in order. Raises ValueError for a range outside."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"bytes {offset}+{length} are outside the model of {self.size} bytes")
        found: list[Span] = []
        index = bisect_right(self._starts, offset) - 1
        while length:
            segment, inside = self._segments[index], offset - self._starts[index]
            taken = min(length, segment.length - inside)
            found.append(Span(segment.file, segment.offset + inside, taken))
            offset, length, index = offset + taken, length - taken, index + 1
        return found

    def ranges(self, wanted: Iterable[Span]) -> list[tuple[int, int]]:
        """Where bytes of files lie in the sequence: (offset, length) each, a span over a head's end as two.

        Raises ValueError for a span that is not inside its file.
        """
        places: dict[int, list[tuple[int, Span]]] = {}
        for start, segment in zip(self._starts, self._segments, strict=False):
            places.setdefault(segment.file, []).append((start, segment))
        found: list[tuple[int, int]] = []
        for file, offset, length in wanted:
            left = length
            for start, segment in places.get(file, []):
                first = max(offset, segment.offset)
                last = min(offset + length, segment.offset + segment.length)
                if first < last:
                    found.append((start + first - segment.offset, last - first))
                    left -= last - first
            if offset < 0 or left:
                raise ValueError(f"bytes {offset}+{length} are outside file {file} of the model")
        return found
