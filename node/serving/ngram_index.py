"""Where the last few tokens of a sequence stood before in it: an index that grows with the sequence. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SHORTEST, LONGEST = 2, 4
LONGEST_MATCH = 16
TOKENS_PER_CALL = 4096

_TOKEN_BITS = 32
_MASKS = tuple((n, (1 << (_TOKEN_BITS * n)) - 1) for n in range(LONGEST, SHORTEST - 1, -1))


@dataclass(frozen=True)
class Match:
    """The tokens before position `end` equal the last `length` tokens of the sequence."""

    end: int
    length: int


class NgramIndex:
    """The latest occurrence of every 2-, 3- and 4-gram of one sequence, about 300 bytes per token.

    Token ids are below 2**32. An n-gram is one integer, exact, so that looking one up needs no comparison and the
    garbage collector has nothing to follow.
    """

    def __init__(self) -> None:
        self._ends: dict[int, dict[int, int]] = {n: {} for n, _ in _MASKS}
        self._indexed = 0
        self._last = 0

    def find(self, tokens: Sequence[int]) -> Match | None:
        """The latest earlier occurrence of the longest of the last 4, 3 or 2 tokens that occurred before at all.

        `tokens` must begin with those of the call before. Of what is new, at most TOKENS_PER_CALL are indexed in one
        call, so that a long prompt is spread over several; until it is done nothing is found. `length` of the match
        counts back to LONGEST_MATCH tokens.
        """
        self._advance(tokens)
        if self._indexed < len(tokens) - 1:
            return None
        key = self._last << _TOKEN_BITS | tokens[-1] if tokens else 0
        for n, mask in _MASKS:
            if n <= len(tokens) and (end := self._ends[n].get(key & mask)) is not None:
                return Match(end, _common(tokens, end, n))
        return None

    def _advance(self, tokens: Sequence[int]) -> None:
        """The last token is left for the next call: its n-grams have nothing after them yet, and would be found as
        their own occurrence.
        """
        key, begin = self._last, self._indexed
        for end in range(begin + 1, min(len(tokens), begin + 1 + TOKENS_PER_CALL)):
            key = (key << _TOKEN_BITS | tokens[end - 1]) & _MASKS[0][1]
            for n, mask in _MASKS:
                if n <= end:
                    self._ends[n][key & mask] = end
            self._indexed = end
        self._last = key


def continuation(tokens: Sequence[int], end: int, count: int) -> list[int]:
    """`count` tokens as they followed position `end`; where the sequence ends, on with the copy itself, as in LZ77."""
    copied = list(tokens[end : end + count])
    period = len(tokens) - end
    while len(copied) < count:
        copied.append(copied[len(copied) - period])
    return copied


def _common(tokens: Sequence[int], end: int, length: int) -> int:
    longest = min(end, LONGEST_MATCH)
    while length < longest and tokens[end - 1 - length] == tokens[-1 - length]:
        length += 1
    return length
