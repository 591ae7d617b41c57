"""Measure how long `swarmd --help` takes, from start to end of the process.

python bench/help_time.py [--runs N]

Prints the median and the worst of N runs after one to warm the disk cache, in milliseconds, beside a Python that does
nothing. The promise is under 300 ms.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence


def milliseconds(command: Sequence[str], runs: int) -> list[float]:
    """Wall-clock times of `runs` runs of a command, in ms, after one that does not count."""
    times = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        times.append(1000 * (time.perf_counter() - started))
    return times[1:]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    runs = parser.parse_args().runs
    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, {runs} runs\n")
    print("| command | median | worst |\n| --- | --- | --- |")
    help_command = [sys.executable, "-m", "swarmd.node.cli.app", "--help"]
    for name, command in (("python -c pass", [sys.executable, "-c", "pass"]), ("swarmd --help", help_command)):
        times = milliseconds(command, runs)
        print(f"| `{name}` | {statistics.median(times):.0f} ms | {max(times):.0f} ms |")


if __name__ == "__main__":
    main()
