"""This node's own record: gathered from the parts, counted up when it changes."""

from __future__ import annotations

import time
from collections.abc import Callable

from msgspec.structs import replace

from swarmd.discovery.records import NodeRecord


class OwnRecord:
    """The record that this node publishes. `gather` makes it from the parts (its counter is ignored)."""

    def __init__(self, gather: Callable[[], NodeRecord]) -> None:
        self._gather = gather
        # Milliseconds since 1970: higher than whatever an earlier run of this node has published.
        self._current = replace(gather(), counter=time.time_ns() // 1_000_000)

    @property
    def current(self) -> NodeRecord:
        """The record as last refreshed."""
        return self._current

    def refresh(self) -> bool:
        """Gather anew; whether anything has changed, and the counter with it."""
        fresh = replace(self._gather(), counter=self._current.counter)
        if fresh == self._current:
            return False
        self._current = replace(fresh, counter=fresh.counter + 1)
        return True
