"""Workers that run targets, and the one who watches them: a worker that dies or hangs is a finding and not an end.

A worker writes each input to a file mapped into memory before it runs it, so that the input that killed it is known. It
says what came of it on its standard output, one JSON object a line.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import logging
import mmap
import os
import queue
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

_SLOT_BYTES = 1 << 23
_HEAD = struct.Struct("<QQ")  # the input's number, its length
HANG_SECONDS = 120.0
"""A worker that starts no input for so long is killed. It is wall time, on a machine that may be busy."""
_MAX_FAILURES = 20


@dataclass
class Share:
    """What a worker is to do."""

    target: str
    seed: int
    first: int
    inputs: int
    seconds: float


@dataclass
class Result:
    """What came of one target. Times are seconds of CPU, `peak` is bytes."""

    target: str
    inputs: int = 0
    seconds: float = 0.0
    outcomes: int = 0
    slowest: float = 0.0
    peak: int = 0
    failures: list[str] = field(default_factory=list)

    HEADING = "target              inputs  inputs/s  outcomes  worst time  worst memory failures"

    def row(self) -> str:
        """One line of the table."""
        rate = self.inputs / self.seconds if self.seconds else 0
        return (
            f"{self.target:16} {self.inputs:9} {rate:9.0f} {self.outcomes:9} {self.slowest * 1e3:8.1f} ms "
            f"{self.peak / (1 << 20):9.2f} MiB {len(self.failures)}"
        )

    @classmethod
    def total(cls, results: list[Result]) -> Result:
        """All targets together."""
        return cls(
            "all",
            sum(r.inputs for r in results),
            sum(r.seconds for r in results),
            sum(r.outcomes for r in results),
            max((r.slowest for r in results), default=0.0),
            max((r.peak for r in results), default=0),
            [failure for r in results for failure in r.failures],
        )


def supervise(inputs: int, seconds: float, seed: int, names: list[str], keep: Path) -> Iterator[Result]:
    """Run the targets of these names, or all, one after the other; failing inputs go to `keep`."""
    from fuzz.targets import TARGETS

    chosen = [kind for name, kind in TARGETS.items() if not names or name in names]
    shares = {kind.name: kind.share for kind in chosen}
    for kind in chosen:
        count = max(1, round(inputs * kind.share / sum(shares.values())))
        yield _run(Share(kind.name, seed, 0, count, seconds), keep)


def _run(share: Share, keep: Path) -> Result:
    result = Result(share.target)
    while result.inputs < share.inputs and len(result.failures) < _MAX_FAILURES:
        with TemporaryDirectory() as directory:
            slot = Path(directory) / "input"
            slot.write_bytes(bytes(_SLOT_BYTES))
            ended = _watch(slot, share, result, keep)
            if ended:
                break
            number, data = _read_slot(slot)
        result.failures.append(f"the worker died or hung on input {number} ({_kept(keep, share.target, data)})")
        result.inputs += number - share.first + 1
        share.inputs -= number - share.first + 1
        share.first = number + 1
    return result


def _watch(slot: Path, share: Share, result: Result, keep: Path) -> bool:
    """Run one worker; False if it did not come to its end. It is killed when it starts no input for long."""
    command = [sys.executable, "-X", "faulthandler", "-m", "fuzz", "--worker", str(slot)]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    environment["RUST_BACKTRACE"] = "0"  # panics of the tokenizers are expected, and become ModelFileErrors
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert worker.stdin is not None
    worker.stdin.write(json.dumps(asdict(share)))
    worker.stdin.close()
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_pass_on, args=(worker, lines), daemon=True).start()
    last, since = -1, time.monotonic()
    try:
        while True:
            try:
                line = lines.get(timeout=5)
            except queue.Empty:
                number = _read_slot(slot)[0]
                if number != last:
                    last, since = number, time.monotonic()
                elif time.monotonic() - since > HANG_SECONDS:
                    return False
                continue
            if line is None:
                return False
            said = json.loads(line)
            if "failure" in said:
                where = _kept(keep, share.target, bytes.fromhex(said["input"]))
                result.failures.append(f"{said['failure']} ({where})")
            else:
                for name, value in said.items():
                    setattr(
                        result, name, value if name == "outcomes" else _combined(name, getattr(result, name), value)
                    )
                return True
    finally:
        worker.kill()
        worker.wait()


def _combined(name: str, before: float, now: float) -> float:
    return before + now if name in ("inputs", "seconds") else max(before, now)


def _pass_on(worker: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert worker.stdout is not None
    for line in worker.stdout:
        lines.put(line)
    lines.put(None)


def _read_slot(slot: Path) -> tuple[int, bytes]:
    with slot.open("rb") as file:
        number, length = _HEAD.unpack(file.read(_HEAD.size))
        return number, file.read(length)


def _kept(keep: Path, target: str, data: bytes) -> Path:
    path = keep / target.replace(" ", "-") / hashlib.sha256(data).hexdigest()[:16]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def work(slot: Path, share: Share) -> None:
    """In a worker: run the share of one target."""
    from fuzz.engine import Examiner, Inputs, Violation
    from fuzz.targets import TARGETS

    logging.getLogger("swarmd").setLevel(logging.ERROR)
    target = TARGETS[share.target]()
    inputs = Inputs(target, share.seed, share.first)
    gc.collect()
    gc.freeze()
    failures = 0
    with Examiner(target) as examiner, slot.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        tally = examiner.tally
        began = time.monotonic()
        for data in inputs:
            mapped[: _HEAD.size + len(data)] = _HEAD.pack(inputs.number, len(data)) + data
            known = len(tally.outcomes)
            try:
                examiner.examine(data)
            except Violation as violation:
                failures += 1
                tally.inputs += 1
                print(json.dumps({"failure": str(violation), "input": data.hex()}), flush=True)
            if len(tally.outcomes) > known:
                inputs.note(data)
            late = share.seconds and time.monotonic() - began > share.seconds
            if tally.inputs >= share.inputs or failures >= _MAX_FAILURES or late:
                break
    with contextlib.suppress(Exception):
        target.close()
    said = {"inputs": tally.inputs, "seconds": tally.seconds, "outcomes": len(tally.outcomes)}
    print(json.dumps(said | {"slowest": tally.slowest, "peak": tally.peak}), flush=True)
