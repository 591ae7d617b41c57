"""The stages' KV room: what is reserved for who runs, and what of the rest holds sequences that have ended. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from swarmd.node.serving.prefix_cache import Fork, PrefixCache
from swarmd.node.serving.sequences import Sequence
from swarmd.node.serving.steps import Limits


class KvRoom:
    """Counts tokens in whole blocks, as if nobody shared any, so that a fork finds the room that it was promised.

    Who has ended gives way as soon as anybody needs the room, least recently used first; all together never exceed the
    capacity once a step's frees are done. `used` tokens are reserved for who runs.
    """

    def __init__(self, limits: Limits) -> None:
        self.used = 0
        self._limits = limits
        self._cache = PrefixCache(limits.max_retained)
        self._to_free: list[int] = []

    @property
    def retained_tokens(self) -> int:
        """The room that sequences which have ended take."""
        return self._cache.retained_tokens

    @property
    def has_freed(self) -> bool:
        """Whether there is something for `take_freed`."""
        return bool(self._to_free)

    def take_freed(self) -> tuple[int, ...]:
        """The pipeline ids that the next step frees."""
        freed = tuple(self._to_free)
        self._to_free.clear()
        return freed

    def fits(self, tokens: int) -> bool:
        """Whether another sequence of so many tokens can run beside those who do."""
        return self.used + self._limits.in_blocks(tokens) <= self._limits.kv_capacity

    def reserve(self, sequence: Sequence, tokens: int) -> int:
        """Reserve room for so many tokens of a sequence and its growth, or what there is without that of others who
        run. Returns what it has now.
        """
        if tokens > sequence.kv_reserved:
            limits = self._limits
            ahead = limits.in_blocks(min(max(tokens, sequence.kv_reserved + limits.growth), limits.room))
            ahead = min(ahead, sequence.kv_reserved + limits.kv_capacity - self.used)
            self.used += ahead - sequence.kv_reserved
            sequence.kv_reserved = ahead
            while self.used + self._cache.retained_tokens > limits.kv_capacity:
                self._to_free.append(self._cache.evict())
        return sequence.kv_reserved

    def find(self, tokens: list[int], sent_before: Mapping[int, int]) -> Fork | None:
        """See `PrefixCache.find`."""
        return self._cache.find(tokens, sent_before)

    def begin(self, sequence: Sequence, fork: Fork, tokens: int) -> None:
        """A sequence runs, beginning with a fork that was found, and with room for so many tokens (`fits`).

        A step's openings come before its frees, so the source may go by the step that forks it.
        """
        self._to_free += self._cache.supersede(fork)
        self.reserve(sequence, tokens)
        self._cache.begin(sequence)

    def end(self, sequence: Sequence) -> None:
        """A sequence that ran is over: it is retained where that pays, else freed."""
        self._release(sequence)
        self._to_free += self._cache.end(sequence, self._limits.in_blocks(sequence.cached))

    def drop(self, sequence: Sequence) -> None:
        """A sequence that ran is over, and freed."""
        self._release(sequence)
        self.discard(sequence.pipeline_id)

    def discard(self, pipeline_id: int) -> None:
        """Free what is cached under an id, if anything, as nobody can rely on it."""
        self._to_free += self._cache.drop(pipeline_id)

    def free_again(self, pipeline_ids: tuple[int, ...]) -> None:
        """Some stages may not have freed these."""
        self._to_free += pipeline_ids

    def _release(self, sequence: Sequence) -> None:
        self.used -= sequence.kv_reserved
        sequence.kv_reserved = 0
