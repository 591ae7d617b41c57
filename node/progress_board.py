"""Downloads and transfers under way on this node, for whoever shows them."""

from __future__ import annotations

import logging

from swarmd.node.cluster.signal import Signal
from swarmd.node.models.progress import Progress

log = logging.getLogger("swarmd.models")


class ProgressBoard:
    """The latest progress per model; logs every tenth, and wakes the feed."""

    def __init__(self, changed: Signal) -> None:
        self._changed = changed
        self._latest: dict[str, Progress] = {}
        self._told: dict[tuple[str, str], int] = {}

    @property
    def current(self) -> tuple[Progress, ...]:
        """What is under way."""
        return tuple(self._latest.values())

    def report(self, progress: Progress) -> None:
        """A `ProgressCallback`."""
        tenth = 10 * progress.done_bytes // max(progress.total_bytes, 1)
        key = (progress.model, progress.phase)
        if self._told.get(key) != tenth:
            self._told[key] = tenth
            log.info("%s: %s %d%%", progress.model, progress.phase, 10 * tenth)
            self._changed.notify()
        self._latest[progress.model] = progress
        if progress.done_bytes >= progress.total_bytes:
            self._latest.pop(progress.model)
            self._told.pop(key)
