"""Measure this machine for the planner: `python -m swarmd.node.engine.calibrate` prints JSON. Takes a second
or two.

Run as a process of its own, so that the daemon never imports torch and the measurement's memory is given
back.
"""

from __future__ import annotations

import argparse
import json

import torch

from swarmd.node.engine.rates import best_rate

# Larger than the caches of common CPUs, so that memory is what is measured.
READ_BYTES = 256 << 20
PRODUCT_SIZE = 1024


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
