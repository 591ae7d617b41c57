"""Where a step's time goes in one stage process, written to the log and to a file when SWARMD_PROFILE asks for it."""

from __future__ import annotations

import logging
import os
import time
from collections import defaultdict
from pathlib import Path

import msgspec

log = logging.getLogger("swarmd.profile")

REPORT_SECONDS = 5.0
# Of a longer window the first so many steps are looked at; means and percentiles change little by then.
MAX_VALUES = 20_000

PARTS = ("answer", "schedule", "hand-off", "wait", "compute", "encode", "send", "wire", "idle")
"""In the order in which they are shown; docs/benchmarks.md ("The hop") says what each is."""


class Profile:
    """Microseconds per step of each part, reported every 5 s of activity and at the end.

    `folder`: where to write JSON lines as well, one file per process; None for the log alone.
    """

    def __init__(self, stage: str, folder: Path | None) -> None:
        self._stage = stage
        self._file = folder / f"{stage.replace(' ', '-')}-{os.getpid()}.jsonl" if folder is not None else None
        self._values: dict[str, list[float]] = defaultdict(list)
        self._steps = self._rows = 0
        self._since = 0.0

    def add(self, part: str, seconds: float) -> None:
        """One step spent so long on a part."""
        values = self._values[part]
        if len(values) < MAX_VALUES:
            values.append(seconds * 1e6)

    def end_step(self, rows: int) -> None:
        """A step of so many rows has left this stage; reports when it is time."""
        now = time.perf_counter()
        self._since = self._since or now
        self._steps += 1
        self._rows += rows
        if now - self._since >= REPORT_SECONDS:
            self.report(now)

    def report(self, now: float | None = None) -> None:
        """Write what was gathered since the last report, if anything."""
        if not self._steps:
            return
        seconds = (now or time.perf_counter()) - self._since
        parts = {part: _summary(self._values[part]) for part in PARTS if part in self._values}
        shown = ", ".join(f"{part} {mean:.0f}/{p95:.0f}" for part, (mean, p95) in parts.items())
        log.info(
            "profile of %s: %d steps, %d rows in %.1f s; us per step (mean/p95): %s",
            *(self._stage, self._steps, self._rows, seconds, shown),
        )
        if self._file is not None:
            self._append(self._file, seconds, parts)
        self._values.clear()
        self._steps = self._rows = 0
        self._since = 0.0

    def _append(self, path: Path, seconds: float, parts: dict[str, tuple[float, float]]) -> None:
        line = {
            "time": time.time(),
            "stage": self._stage,
            "seconds": seconds,
            "steps": self._steps,
            "rows": self._rows,
            "us": {part: {"mean": mean, "p95": p95} for part, (mean, p95) in parts.items()},
        }
        try:
            with path.open("ab") as file:
                file.write(msgspec.json.encode(line) + b"\n")
        except OSError as error:
            log.warning("the profile cannot be written to %s: %s", path, error.strerror or error)
            self._file = None


def profile_of(stage: str, wish: str) -> Profile | None:
    """The profile that SWARMD_PROFILE's value asks for: "" or "0" none, "1" in the log, else in a folder too.

    The folder is made if it is not there; OSError when it cannot be.
    """
    if wish in ("", "0"):
        return None
    if wish == "1":
        return Profile(stage, None)
    folder = Path(wish).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return Profile(stage, folder)


def _summary(values: list[float]) -> tuple[float, float]:
    """Mean and 95th percentile."""
    ordered = sorted(values)
    return sum(ordered) / len(ordered), ordered[min(int(len(ordered) * 0.95), len(ordered) - 1)]
