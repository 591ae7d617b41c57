"""What must not grow in a soak: a daemon's memory, its file descriptors, and what it tells of the swarm."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
from support.swarm import Node


@dataclass(frozen=True)
class Sample:
    """A daemon at one time: seconds since the first sample, resident MB, open files, nodes that it names, bytes of its
    state's JSON."""

    at: float
    rss_mb: float
    files: int
    nodes: int
    state_bytes: int


def sample(node: Node, at: float) -> Sample:
    """Look at a daemon that runs."""
    process = psutil.Process(node.process.pid)
    state = node.get("/api/swarm")
    return Sample(at, process.memory_info().rss / 1e6, process.num_fds(), len(state["nodes"]), len(json.dumps(state)))


@dataclass(frozen=True)
class Growth:
    """One figure over time: the medians of the first and the last quarter, and the most."""

    first: float
    last: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Growth:
        """Of values in the order of time; at least one."""
        quarter = max(1, len(values) // 4)
        return cls(statistics.median(values[:quarter]), statistics.median(values[-quarter:]), max(values))

    @property
    def more(self) -> float:
        """What has come on top."""
        return self.last - self.first


def slope_per_minute(samples: Sequence[Sample]) -> float:
    """MB per minute that memory grows, by least squares; 0.0 for fewer than three samples."""
    if len(samples) < 3:
        return 0.0
    return 60 * statistics.linear_regression([s.at for s in samples], [s.rss_mb for s in samples]).slope
