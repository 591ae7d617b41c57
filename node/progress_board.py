"""Downloads and transfers under way on this node, for whoever shows them."""

from __future__ import annotations

import logging
import time

from swarmd.node.cluster.signal import Signal
from swarmd.node.models.progress import Progress

log = logging.getLogger("swarmd.models")

# Nobody reports the failure of a download here: what has said nothing for so long is not under way any more.
SILENT_SECONDS = 30.0
LOG_SECONDS = 1.0


class ProgressBoard:
    """The latest progress per model; logs tenths, not too many in a second, and wakes the feed."""

    def __init__(self, changed: Signal) -> None:
        self._changed = changed
        self._latest: dict[str, tuple[float, Progress]] = {}
        self._told: dict[tuple[str, str], tuple[int, float]] = {}

    @property
    def current(self) -> tuple[Progress, ...]:
        """What is under way."""
        oldest = time.monotonic() - SILENT_SECONDS
        return tuple(progress for heard, progress in self._latest.values() if heard >= oldest)

    def report(self, progress: Progress) -> None:
        """A `ProgressCallback`."""
        now = time.monotonic()
        known = progress.total_bytes > 0
        tenth = 10 * progress.done_bytes // progress.total_bytes if known else 0
        key = (progress.model, progress.phase)
        told, told_at = self._told.get(key, (-1, 0.0))
        if tenth != told and (now - told_at >= LOG_SECONDS or tenth == 10):
            self._told[key] = (tenth, now)
            log.info("%s: %s %d%%", progress.model, progress.phase, 10 * tenth)
            self._changed.notify()
        self._latest[progress.model] = (now, progress)
        if known and progress.done_bytes >= progress.total_bytes:
            del self._latest[progress.model]
            self._told.pop(key, None)
