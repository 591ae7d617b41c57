"""Which blocks of a paged KV cache hold which tokens of which sequence. Pure bookkeeping: no memory, no arrays.

A block holds BLOCK consecutive tokens of one sequence, or of several that were forked from one another; a shared block
is never written: who has to write into one gets a copy first (Kwon et al. 2023, arXiv:2309.06180).
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field

from swarmd.node.engine.stage_compute import KvExhausted, StepError

BLOCK = 16
"""Tokens in one block; the native kernels have it as SWARMD_BLOCK."""

Copies = list[tuple[int, int]]
"""(from block, to block): what must be copied before anything is written."""


@dataclass
class _Sequence:
    length: int = 0
    # int32, so that it goes to the native code as it is.
    blocks: array[int] = field(default_factory=lambda: array("i"))


class BlockTable:
    """Hands out `n_blocks` blocks. All lengths are in tokens.

    As long as the lengths of all sequences, each rounded up to whole blocks, sum to at most the room, `reserve`
    succeeds.
    """

    def __init__(self, n_blocks: int) -> None:
        self.n_blocks = n_blocks
        # The last ones first: the block that was freed last is likely to be in a cache still.
        self._free = list(range(n_blocks - 1, -1, -1))
        self._users = [0] * n_blocks
        self._sequences: dict[int, _Sequence] = {}

    @property
    def used(self) -> int:
        """Blocks that hold tokens."""
        return self.n_blocks - len(self._free)

    def open(self, seq: int) -> None:
        """Begin an empty sequence. Raises StepError when the id is taken."""
        if seq in self._sequences:
            raise StepError(f"sequence {seq} is open already")
        self._sequences[seq] = _Sequence()

    def fork(self, seq: int, source: int, length: int) -> None:
        """Begin a sequence that shares the first `length` tokens of another. Raises StepError."""
        origin = self._find(source)
        if not 0 <= length <= origin.length:
            raise StepError(f"sequence {source} holds {origin.length} tokens; {length} of them cannot be copied")
        self.open(seq)
        shared = origin.blocks[: _blocks(length)]
        for block in shared:
            self._users[block] += 1
        self._sequences[seq] = _Sequence(length, shared)

    def length(self, seq: int) -> int:
        """Tokens of a sequence. Raises StepError for an unknown one."""
        return self._find(seq).length

    def blocks(self, seq: int) -> array[int]:
        """The blocks of a sequence, in order: int32; to be read only."""
        return self._find(seq).blocks

    def reserve(self, lengths: Mapping[int, int]) -> Copies:
        """Make room for these sequences to grow to these lengths; `commit` then sets them.

        Returns the copies to be made of blocks that others use as well. Raises KvExhausted, before anything is changed.
        """
        growing = {seq: self._find(seq) for seq in lengths}
        shared = [seq for seq, sequence in growing.items() if self._writes_shared(sequence)]
        need = sum(max(0, _blocks(lengths[seq]) - len(growing[seq].blocks)) for seq in growing) + len(shared)
        if need > len(self._free):
            raise KvExhausted(f"{need} blocks of {BLOCK} tokens are needed and the stage has {len(self._free)} free")
        # Of two that share a block, the last one keeps it.
        copies = [self._own_last(growing[seq]) for seq in shared if self._writes_shared(growing[seq])]
        for seq, sequence in growing.items():
            while len(sequence.blocks) < _blocks(lengths[seq]):
                sequence.blocks.append(self._take())
        return copies

    def commit(self, seq: int, length: int) -> None:
        """The sequence now holds `length` tokens."""
        self._find(seq).length = length

    def truncate(self, seq: int, length: int) -> None:
        """Forget all tokens from position `length` on. Raises StepError if fewer are held."""
        sequence = self._find(seq)
        if not 0 <= length <= sequence.length:
            raise StepError(f"sequence {seq} holds {sequence.length} tokens and cannot be cut to {length}")
        sequence.length = length
        self._release(sequence.blocks[_blocks(length) :])
        del sequence.blocks[_blocks(length) :]

    def free(self, seq: int) -> None:
        """Forget a sequence; unknown ids are let be (a cancel may come twice)."""
        sequence = self._sequences.pop(seq, None)
        if sequence is not None:
            self._release(sequence.blocks)

    def _find(self, seq: int) -> _Sequence:
        sequence = self._sequences.get(seq)
        if sequence is None:
            raise StepError(f"sequence {seq} is not open")
        return sequence

    def _writes_shared(self, sequence: _Sequence) -> bool:
        """Whether the next token goes into a block that another sequence uses."""
        return sequence.length % BLOCK != 0 and self._users[sequence.blocks[sequence.length // BLOCK]] > 1

    def _own_last(self, sequence: _Sequence) -> tuple[int, int]:
        index = sequence.length // BLOCK
        old, new = sequence.blocks[index], self._take()
        self._users[old] -= 1
        sequence.blocks[index] = new
        return old, new

    def _take(self) -> int:
        block = self._free.pop()
        self._users[block] = 1
        return block

    def _release(self, blocks: array[int]) -> None:
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block] == 0:
                self._free.append(block)


def _blocks(length: int) -> int:
    return -(-length // BLOCK)
