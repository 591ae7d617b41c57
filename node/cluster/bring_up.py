"""The stages of one epoch on their way up: started, then wired. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from swarmd.discovery.records import Address, StageRecord
from swarmd.partition.plan import Plan

# No stage has that much to load; a report of more is wrong.
MAX_STAGE_BYTES = 2**50


class BringUp:
    """Keeps count of one epoch's stages. `stages` are as far as they are known; `plan` is what they carry out."""

    def __init__(self, epoch: int, plan: Plan) -> None:
        self.epoch = epoch
        self.plan = plan
        self.stages = tuple(StageRecord(s.node, s.device, s.start, s.end, s.bytes) for s in plan.stages)
        self._unstarted = set(range(len(self.stages)))
        self._unwired = set(range(len(self.stages)))
        self._progress: dict[int, tuple[int, int]] = {}

    @property
    def nodes(self) -> tuple[str, ...]:
        """The nodes that carry a stage, each once."""
        return tuple(dict.fromkeys(stage.node for stage in self.stages))

    @property
    def done(self) -> tuple[int, int]:
        """(bytes fetched and loaded, bytes in all) as far as stages have told."""
        done, total = (sum(column) for column in zip((0, 0), *self._progress.values(), strict=True))
        return done, total

    @property
    def all_started(self) -> bool:
        """Every stage is loaded."""
        return not self._unstarted

    @property
    def all_wired(self) -> bool:
        """Every stage is connected to the next."""
        return not self._unwired

    def on_progress(self, index: int, done: int, total: int) -> None:
        """A stage has fetched and loaded so many bytes."""
        if 0 <= index < len(self.stages) and 0 <= done <= total <= MAX_STAGE_BYTES:
            self._progress[index] = (done, total)

    def on_started(self, index: int, addresses: Sequence[Address]) -> bool:
        """A stage is loaded and accepts links; whether that was news."""
        if index not in self._unstarted:
            return False
        stages = list(self.stages)
        stages[index] = replace(stages[index], addresses=tuple(addresses))
        self.stages = tuple(stages)
        self._unstarted.discard(index)
        return True

    def on_wired(self, index: int) -> bool:
        """A stage is connected; whether that was news."""
        if self._unstarted or index not in self._unwired:
            return False
        self._unwired.discard(index)
        return True

    def restart(self) -> None:
        """What was counted was the fetching; now the stages themselves are started."""
        self._unstarted = set(range(len(self.stages)))
        self.stages = tuple(replace(stage, addresses=()) for stage in self.stages)
        self._progress = {}


@dataclass(frozen=True)
class Move:
    """Stages that are to take over from those that serve, `beside` them or in their place, and why."""

    build: BringUp
    beside: bool
    reason: str
