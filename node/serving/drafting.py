"""Guessing a sequence's next tokens, for the pipeline to verify in one step. Pure.

Whatever is guessed, the output stays the same: the last stage draws every token as it would have without
(`node/serving/messages.py`, `Chunk`), and a guess only decides whether several positions are drawn in one step. The
idea is speculative decoding's (Leviathan et al. 2022, arXiv:2211.17192); guessing by looking the last tokens up in the
text so far is prompt lookup (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from swarmd.node.serving.draft_policy import DraftPolicy
from swarmd.node.serving.ngram_index import NgramIndex, continuation
from swarmd.node.serving.step_cost import StepCost

# The kinds of a match, by the fewest tokens that match, and how likely its continuation is right until learnt better:
# long matches stand in copied passages.
_KINDS = ((2, 0.3), (3, 0.4), (4, 0.55), (8, 0.8))


class Drafter(Protocol):
    """Guesses tokens. The scheduler asks it for every sequence that decodes, and tells it what came of it."""

    def propose(self, seq: int, tokens: Sequence[int], limit: int) -> list[int]:
        """At most `limit` tokens that may follow `tokens`, all those of the sequence so far; [] when it does not pay.

        `tokens` must begin with those of the call before for the same sequence.
        """
        ...

    def observe(self, seq: int, proposed: int, accepted: int) -> None:
        """Of the latest proposal's tokens, `proposed` many, the first `accepted` were right."""
        ...

    def forget(self, seq: int) -> None:
        """The sequence has ended; unknown ones are let be."""
        ...


class PricedDrafter(Drafter, Protocol):
    """A drafter that guesses no more than pays."""

    def price(self, cost: StepCost) -> None:
        """What a row costs now."""
        ...


class NgramDrafter:
    """Guesses that what followed the last few tokens earlier in the text follows them again.

    It costs some microseconds per token; that it pays is the affair of `DraftPolicy`.
    """

    def __init__(self) -> None:
        self._policy = DraftPolicy(tuple(assumed for _, assumed in _KINDS))
        self._indexes: dict[int, NgramIndex] = {}

    def __len__(self) -> int:
        """Sequences remembered."""
        return len(self._indexes)

    def price(self, cost: StepCost) -> None:
        """See `PricedDrafter`."""
        self._policy.row_cost = cost.row_cost

    def propose(self, seq: int, tokens: Sequence[int], limit: int) -> list[int]:
        """See `Drafter`."""
        if limit <= 0:
            return []
        index = self._indexes.get(seq)
        if index is None:
            index = self._indexes[seq] = NgramIndex()
        match = index.find(tokens)
        if match is None:
            return []
        kind = sum(match.length >= fewest for fewest, _ in _KINDS) - 1
        return continuation(tokens, match.end, self._policy.length(seq, len(tokens), kind, limit))

    def observe(self, seq: int, proposed: int, accepted: int) -> None:
        """See `Drafter`."""
        self._policy.observe(seq, proposed, accepted)

    def forget(self, seq: int) -> None:
        """See `Drafter`."""
        self._indexes.pop(seq, None)
        self._policy.forget(seq)


class Ask(NamedTuple):
    """A sequence that decodes next, as `Drafter.propose` is given it."""

    seq: int
    tokens: Sequence[int]
    limit: int


class PreparedDrafts:
    """A `Drafter` that answers at once with what was guessed beforehand, so that nobody who plans steps waits.

    `quick` is asked first, and for what it has no guess, `slow`, which may take milliseconds: in `guess`, the only
    method for another thread, one call at a time. Around it, `prepare` says what is to be guessed and `keep` takes it.
    """

    def __init__(self, quick: PricedDrafter, slow: PricedDrafter) -> None:
        self._quick = quick
        self._slow = slow
        self._asked: set[int] = set()
        self._ready: dict[int, tuple[int, list[int]]] = {}
        self._by_slow: set[int] = set()
        self._known_to_slow: set[int] = set()
        # What `slow` is to be told, when it is its turn on the other thread: (seq, proposed, accepted), -1 for the end.
        self._news: list[tuple[int, int, int]] = []

    def price(self, cost: StepCost) -> None:
        """See `PricedDrafter`."""
        self._quick.price(cost)
        self._slow.price(cost)

    def prepare(self, asks: Iterable[Ask]) -> list[Ask]:
        """Guess quickly; what is returned, if anything, is for `guess`."""
        left = []
        for ask in asks:
            guesses = self._quick.propose(*ask)
            if guesses:
                self._ready[ask.seq] = len(ask.tokens), guesses
                self._by_slow.discard(ask.seq)
            elif ask.limit > 0:
                left.append(ask)
        self._asked = {ask.seq for ask in left}
        self._known_to_slow |= self._asked
        return left

    def guess(self, asks: Sequence[Ask]) -> list[list[int]]:
        """The slow guesses, one list for each ask. Blocking; the tokens must not change meanwhile."""
        news, self._news = self._news, []
        for seq, proposed, accepted in news:
            if proposed < 0:
                self._slow.forget(seq)
            else:
                self._slow.observe(seq, proposed, accepted)
        return [self._slow.propose(*ask) for ask in asks]

    def keep(self, asks: Sequence[Ask], guesses: Sequence[list[int]]) -> None:
        """Take what `guess` returned, except for sequences that ended meanwhile."""
        for ask, guessed in zip(asks, guesses, strict=True):
            if guessed and ask.seq in self._asked:
                self._ready[ask.seq] = len(ask.tokens), guessed
                self._by_slow.add(ask.seq)

    def propose(self, seq: int, tokens: Sequence[int], limit: int) -> list[int]:
        """See `Drafter`: what was prepared for just these tokens."""
        length, guesses = self._ready.pop(seq, (0, []))
        return guesses[:limit] if length == len(tokens) else []

    def observe(self, seq: int, proposed: int, accepted: int) -> None:
        """See `Drafter`."""
        if seq in self._by_slow:
            self._news.append((seq, proposed, accepted))
        else:
            self._quick.observe(seq, proposed, accepted)

    def forget(self, seq: int) -> None:
        """See `Drafter`."""
        self._ready.pop(seq, None)
        self._asked.discard(seq)
        self._by_slow.discard(seq)
        self._quick.forget(seq)
        if seq in self._known_to_slow:
            self._known_to_slow.discard(seq)
            self._news.append((seq, -1, 0))
