"""Keys and values of a stage's sequences: contiguous per sequence and layer, growing in chunks, bounded over
all sequences.

The promise to the scheduler: as long as the lengths of all sequences sum to at most `capacity`, `reserve`
succeeds. Room is allocated ahead in chunks, but gives way (is copied smaller) when another sequence needs it,
so the memory held never exceeds `capacity` tokens either, apart from the one layer that is being copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from swarmd.node.engine.backends.base import CachingBackend, LayerCache
from swarmd.node.engine.spec import CacheShape
from swarmd.node.engine.stage_compute import KvExhausted, StepError

GROWTH_TOKENS = 64


@dataclass
class _Sequence:
    length: int = 0
    room: int = 0
    layers: list[LayerCache | None] = field(default_factory=list)


class KvCache:
    """The caches of `n_layers` layers for any number of sequences; all counts are in tokens."""

    def __init__(self, backend: CachingBackend, n_layers: int, shape: CacheShape, capacity: int) -> None:
        self.capacity = capacity
        self._backend = backend
        self._n_layers = n_layers
        self._shape = shape
        self._sequences: dict[int, _Sequence] = {}

    def open(self, seq: int) -> None:
        """Begin an empty sequence. Raises StepError when the id is taken."""
        if seq in self._sequences:
            raise StepError(f"sequence {seq} is open already")
        self._sequences[seq] = _Sequence(layers=[None] * self._n_layers)

    def fork(self, seq: int, source: int, length: int) -> None:
        """Begin a sequence as a copy of the first `length` tokens of `source`. Raises StepError.

        A step's openings come before its frees, so until these the copy may stand beside what it replaces, beyond the
        capacity; `reserve` counts again.
        """
        if not 0 <= length <= (held := self._find(source).length):
            raise StepError(f"sequence {source} holds {held} tokens; {length} of them cannot be copied")
        self.open(seq)
        self._resize(seq, length)
        for mine, theirs in zip(self.layers(seq), self.layers(source), strict=True):
            mine.keys[:, :length] = theirs.keys[:, :length]
            mine.values[:, :length] = theirs.values[:, :length]
        self.commit(seq, length)

    def length(self, seq: int) -> int:
        """Tokens cached. Raises StepError for an unknown sequence."""
        return self._find(seq).length

    @property
    def allocated(self) -> int:
        """Tokens that memory is held for."""
        return sum(sequence.room for sequence in self._sequences.values())

    def reserve(self, lengths: Mapping[int, int]) -> None:
        """Make room for these sequences to grow to these lengths; the lengths themselves change by `commit`.

        Raises KvExhausted, before anything is allocated, when all lengths together would exceed the capacity.
        """
        wanted = {seq: lengths.get(seq, sequence.length) for seq, sequence in self._sequences.items()}
        if (total := sum(wanted.values())) > self.capacity:
            raise KvExhausted(f"{total} tokens are needed and the stage has room for {self.capacity}")
        growing = [seq for seq in lengths if lengths[seq] > self._find(seq).room]
        if self.allocated + sum(lengths[seq] + GROWTH_TOKENS - self._find(seq).room for seq in growing) > self.capacity:
            for seq, length in wanted.items():
                if seq not in growing:
                    self._resize(seq, length)
        for seq in growing:
            others = self.allocated - self._find(seq).room
            yet_to_grow = sum(max(0, lengths[other] - self._find(other).room) for other in growing if other != seq)
            ahead = -(-lengths[seq] // GROWTH_TOKENS) * GROWTH_TOKENS
            self._resize(seq, min(ahead, self.capacity - others - yet_to_grow))

    def layers(self, seq: int) -> list[LayerCache]:
        """The sequence's caches, one per layer, with the room that was reserved."""
        return [layer for layer in self._find(seq).layers if layer is not None]

    def commit(self, seq: int, length: int) -> None:
        """The sequence now holds `length` tokens."""
        self._find(seq).length = length

    def truncate(self, seq: int, length: int) -> None:
        """Forget all tokens from position `length` on. Raises StepError if fewer are cached."""
        sequence = self._find(seq)
        if not 0 <= length <= sequence.length:
            raise StepError(f"sequence {seq} holds {sequence.length} tokens and cannot be cut to {length}")
        sequence.length = length

    def free(self, seq: int) -> None:
        """Forget the sequence and release its memory; unknown ids are let be (a cancel may come twice)."""
        self._sequences.pop(seq, None)

    def _find(self, seq: int) -> _Sequence:
        sequence = self._sequences.get(seq)
        if sequence is None:
            raise StepError(f"sequence {seq} is not open")
        return sequence

    def _resize(self, seq: int, room: int) -> None:
        sequence = self._find(seq)
        if room == sequence.room:
            return
        for i, old in enumerate(sequence.layers):
            keep = min(sequence.length, room)
            sequence.layers[i] = self._backend.new_cache(self._shape, room, old, keep)
        sequence.room = room
