"""`python -m fuzz`: run targets in a process of their own, watch it, and print a table. `make fuzz` calls it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from fuzz.supervisor import Result, Share, supervise, work


def main() -> int:
    """0 when no target broke a promise."""
    parser = argparse.ArgumentParser(prog="make fuzz", description="Feed damaged input to every parser.")
    parser.add_argument("--inputs", type=int, default=20_000, help="inputs of all targets together (20000)")
    parser.add_argument("--seconds", type=float, default=0, help="stop each target after so long; 0: never")
    parser.add_argument("--seed", type=int, default=1, help="the same seed gives the same inputs (1)")
    parser.add_argument("--target", action="append", default=[], metavar="NAME", help="only these; may be repeated")
    parser.add_argument("--keep", type=Path, default=Path("build/fuzz"), help="where failing inputs go (build/fuzz)")
    parser.add_argument("--replay", type=Path, help="run one kept input through one --target, and show what it raises")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        work(options.worker, Share(**json.loads(sys.stdin.read())))
        return 0
    if options.replay is not None:
        return _replay(options.target, options.replay)
    results: list[Result] = []
    print(Result.HEADING, flush=True)
    for result in supervise(options.inputs, options.seconds, options.seed, options.target, options.keep):
        results.append(result)
        print(result.row(), flush=True)
    print(Result.total(results).row())
    for result in results:
        for failure in result.failures:
            print(f"\n{result.target}: {failure}")
    return 1 if any(result.failures for result in results) else 0


def _replay(names: list[str], path: Path) -> int:
    from fuzz.engine import Examiner
    from fuzz.targets import TARGETS

    target = TARGETS[names[0]]()
    target.seeds()
    with Examiner(target) as examiner:
        print(examiner.examine(path.read_bytes()))
    target.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
