"""Which nodes have given trouble lately and are better left out of plans for a while. Pure; time is passed in seconds.

A node that comes and goes, or whose stages fail again and again, costs every stream that runs over it a pause. It is
avoided for a time that doubles with each strike, and forgiven when it has been quiet for long.
"""

from __future__ import annotations

from dataclasses import dataclass

FIRST_SECONDS = 5.0
LAST_SECONDS = 300.0
FORGIVE_SECONDS = 600.0
MAX_NODES = 256


@dataclass
class _Record:
    strikes: int = 0
    last: float = 0.0
    until: float = 0.0


class Trouble:
    """Strikes per node. Bounded: the longest quiet is forgotten first."""

    def __init__(self) -> None:
        self._records: dict[str, _Record] = {}

    def on_failed(self, node: str, now: float) -> None:
        """A stage could not be started there: it is avoided at once."""
        self._strike(node, now, free=0)

    def on_crashed(self, node: str, now: float) -> None:
        """A stage ended there, or the node went without a word: once may happen to anybody."""
        self._strike(node, now, free=1)

    def avoided(self, now: float) -> frozenset[str]:
        """The nodes that a plan had better do without now."""
        return frozenset(node for node, record in self._records.items() if now < record.until)

    def _strike(self, node: str, now: float, *, free: int) -> None:
        record = self._records.pop(node, None)
        if record is None or now - record.last > FORGIVE_SECONDS:
            record = _Record()
        record.strikes, record.last = record.strikes + 1, now
        if record.strikes > free:
            doublings = min(record.strikes - free - 1, 16)
            record.until = max(record.until, now + min(FIRST_SECONDS * 2**doublings, LAST_SECONDS))
        self._records[node] = record
        while len(self._records) > MAX_NODES:
            del self._records[next(iter(self._records))]
