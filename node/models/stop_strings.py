"""Stop strings: ending a stream of text at the first of some strings, without ever showing a part of one."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Watches one stream for stop strings. What it emits does not depend on how the stream is cut into
    pieces.

    The stop string that is complete first wins; of two that complete at the same character, the longer. The
    stop string itself is not emitted. At most the longest stop string less one character is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops`: any number of non-empty strings; raises ValueError for an empty one."""
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        self._stops = tuple(stops)
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Takes the next piece; returns what may be shown now, and whether a stop string was found (from then
        on always ("", True))."""
        if self._stopped:
            return "", True
        pending = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := pending.find(stop)) >= 0]
        if found:
            self._stopped, self._held = True, ""
            return pending[: min(found)[1]], True
        keep = max((_overlap(pending, stop) for stop in self._stops), default=0)
        self._held = pending[len(pending) - keep :]
        return pending[: len(pending) - keep], False

    def flush(self) -> str:
        """The stream has ended: what was held back and turned out not to be a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
