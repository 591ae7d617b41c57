"""A soak: five nodes under the load of eight clients, and trouble after trouble, for half an hour.

python bench/soak.py [--seconds S] [--seed N] [--no-growth]

Nodes are killed, paused, unplugged (as root on Linux), told to leave, and come back; stage processes crash and stand
still. Every answer is compared with what one undisturbed node gives. Prints a line every ten seconds, a table, and what
should not have happened; the exit status says whether anything did. Then the same for what a node keeps: 100,000 tokens
of a tiny model while another node is restarted 50 times.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path

from harness import Growing, alone, expecting, grow, soak
from machine import describe_machine
from workloads import default_model


def main() -> None:
    """Soak, print, and exit with 1 if something went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-growth", action="store_true", help="leave out the 100,000 tokens and 50 restarts")
    options = parser.parse_args()
    # Ended from outside, it still undoes what it has done to this machine.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    model = default_model()
    faults: list[str] = []
    print(describe_machine(), flush=True)
    with tempfile.TemporaryDirectory(prefix="swarmd-soak-") as folder:
        with alone(Path(folder) / "alone", model) as reference:
            root, expected = Path(folder) / "soak", expecting(reference)
            report = soak(root, model, expected, seconds=options.seconds, seed=options.seed, say=_say)
        print(f"\n{report.table()}\n", flush=True)
        faults += report.faults()
        if not options.no_growth:
            grown = grow(Path(folder) / "growth", Growing(tokens=100_000, restarts=50), say=_say)
            print(f"\n{grown.table()}\n", flush=True)
            faults += grown.faults()
    for fault in faults:
        print(f"FAULT: {fault}")
    sys.exit(bool(faults))


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
