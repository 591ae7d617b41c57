"""Measure this machine for the planner: `python -m swarmd.node.engine.calibrate` prints JSON. Takes a second
or two.

Run as a process of its own, so that the daemon never imports torch and the measurement's memory is given
back.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch

MEASURE_SECONDS = 0.5
# Larger than the caches of common CPUs, so that memory is what is measured.
READ_BYTES = 256 << 20
PRODUCT_SIZE = 1024


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


def memory_bandwidth() -> float:
    """Bytes per second when a large array is read once."""
    data = torch.ones(READ_BYTES // 4, dtype=torch.float32)
    return best_rate(data.sum, READ_BYTES)


def compute() -> float:
    """FLOP per second of fp32 products [1024, 1024] x [1024, 1024]; one multiply-add counts as two."""
    a, b = torch.ones(PRODUCT_SIZE, PRODUCT_SIZE), torch.ones(PRODUCT_SIZE, PRODUCT_SIZE)
    return best_rate(lambda: a @ b, 2.0 * PRODUCT_SIZE**3)


def main() -> None:
    """Print `{"memory_bandwidth": bytes/s, "compute": FLOP/s}`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, required=True)
    torch.set_num_threads(parser.parse_args().threads)
    print(json.dumps({"memory_bandwidth": memory_bandwidth(), "compute": compute()}))


if __name__ == "__main__":
    main()
