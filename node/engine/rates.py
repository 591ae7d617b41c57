"""How fast something is done, measured. Imports nothing heavy."""

from __future__ import annotations

import time
from collections.abc import Callable

MEASURE_SECONDS = 0.5


def best_rate(work: Callable[[], object], amount: float, seconds: float = MEASURE_SECONDS) -> float:
    """`amount` per second at the fastest of the repetitions that fit in `seconds` (at least two).

    The fastest, because everything that disturbs a measurement makes it slower.
    """
    work()
    best, until = float("inf"), time.perf_counter() + seconds
    rounds = 0
    while rounds < 2 or time.perf_counter() < until:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
        rounds += 1
    return amount / best
