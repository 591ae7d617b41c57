"""The life of one instance in the hands of its owner: plan, start, wire, serve, and plan again. Pure.

The owner's pump feeds it what happens and the time, and carries out the actions it returns. Every new plan has a higher
epoch; whatever an earlier epoch still says is ignored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from swarmd.discovery.records import Address, InstanceRecord, InstanceState, ModelSummary, StageRecord
from swarmd.partition.costs import ModelCosts
from swarmd.partition.memory_weighted import plan
from swarmd.partition.plan import Capacity, DoesNotFit, Plan, Promise

FIRST_RETRY_SECONDS = 0.25
LAST_RETRY_SECONDS = 15.0
# No stage has that much to load; a report of more is wrong.
MAX_STAGE_BYTES = 2**50


@dataclass(frozen=True)
class StartStages:
    """Order every stage of the plan to be started on its node."""

    epoch: int
    plan: Plan


@dataclass(frozen=True)
class WireStages:
    """Every stage is loaded: have each connect to the next, the last one to the first."""

    epoch: int
    stages: tuple[StageRecord, ...]


@dataclass(frozen=True)
class StopStages:
    """End all stages that are left of this epoch and earlier ones on these nodes."""

    epoch: int
    nodes: tuple[str, ...]


Action = StartStages | WireStages | StopStages


class OwnedInstance:
    """One instance, owned by this node. `record` is what its owner publishes."""

    def __init__(
        self,
        instance_id: str,
        model: ModelSummary,
        costs: ModelCosts,
        promises: Sequence[Promise],
        *,
        epoch: int = 0,
        split: bool = False,
    ) -> None:
        """`epoch` is the highest one that anybody has seen of this instance; the first plan gets the next."""
        self.record = InstanceRecord(instance_id, model, InstanceState.PLANNING, epoch)
        self._costs = costs
        self._promises = tuple(promises)
        self._split = split
        self._unstarted: set[int] = set()
        self._unwired: set[int] = set()
        self._progress: dict[int, tuple[int, int]] = {}
        self._retry_seconds = FIRST_RETRY_SECONDS
        self._retry_at = -math.inf

    @property
    def epoch(self) -> int:
        """The epoch of the present plan."""
        return self.record.epoch

    def consider(self, capacities: Sequence[Capacity], now: float, *, idle: bool = False) -> list[Action]:
        """Look at who is there and act if the plan has to change; called on every change and every tick.

        `capacities` are the devices of all nodes that are alive, less what other instances use. `idle` says that nobody
        would be disturbed by a better plan.
        """
        there = {(capacity.node, capacity.device) for capacity in capacities}
        lost = sum(1 for stage in self.record.stages if (stage.node, stage.device) not in there)
        if lost:
            return self._plan(capacities, f"{lost} of {len(self.record.stages)} stages lost their node")
        if self.record.state is InstanceState.READY:
            return self._improve(capacities) if self._split and idle else []
        if self.record.state is InstanceState.LOADING or now < self._retry_at:
            return []
        return self._plan(capacities)

    def on_progress(self, epoch: int, index: int, done: int, total: int) -> None:
        """A stage has fetched and loaded so many bytes."""
        known = epoch == self.epoch and 0 <= index < len(self.record.stages)
        if known and 0 <= done <= total <= MAX_STAGE_BYTES:
            self._progress[index] = (done, total)
            sums = [sum(column) for column in zip(*self._progress.values(), strict=True)]
            self.record = replace(self.record, done_bytes=sums[0], total_bytes=sums[1])

    def on_started(self, epoch: int, index: int, addresses: tuple[Address, ...]) -> list[Action]:
        """A stage is loaded and accepts links; when all are, they are wired."""
        if epoch != self.epoch or index not in self._unstarted:
            return []
        stages = list(self.record.stages)
        stages[index] = replace(stages[index], addresses=addresses)
        self.record = replace(self.record, stages=tuple(stages))
        self._unstarted.discard(index)
        if self._unstarted:
            return []
        self._unwired = set(range(len(stages)))
        return [WireStages(epoch, self.record.stages)]

    def on_wired(self, epoch: int, index: int) -> list[Action]:
        """A stage is connected; when all are, the instance is ready."""
        if epoch == self.epoch and index in self._unwired:
            self._unwired.discard(index)
            if not self._unwired:
                self._retry_seconds = FIRST_RETRY_SECONDS
                self.record = replace(self.record, state=InstanceState.READY, reason="")
        return []

    def on_stage_lost(self, epoch: int, reason: str, now: float) -> list[Action]:
        """A stage failed to start, or ended, or lost a neighbour: the epoch is over."""
        if epoch != self.epoch or not self.record.stages:
            return []
        actions = self.stop()
        self._retry_at = now + self._retry_seconds
        self._retry_seconds = min(2 * self._retry_seconds, LAST_RETRY_SECONDS)
        self._wait(reason)
        return actions

    def stop(self) -> list[Action]:
        """The owner lets the instance go."""
        return self._stop_all_but(frozenset())

    def _stop_all_but(self, kept: frozenset[str]) -> list[Action]:
        nodes = tuple(dict.fromkeys(stage.node for stage in self.record.stages if stage.node not in kept))
        return [StopStages(self.epoch, nodes)] if nodes else []

    def _wait(self, reason: str) -> None:
        """Nothing runs, for this reason."""
        self._unstarted, self._unwired, self._progress = set(), set(), {}
        waiting = replace(
            self.record,
            state=InstanceState.WAITING,
            reason=reason[:512],
            stages=(),
            explanation=(),
            done_bytes=0,
            total_bytes=0,
        )
        if waiting != self.record:
            self.record = waiting

    def _plan(self, capacities: Sequence[Capacity], reason: str = "") -> list[Action]:
        """Start over with who is there, or wait until they suffice."""
        try:
            made = plan(self._costs, self._promises, capacities, split=self._split)
        except DoesNotFit as error:
            actions = self.stop()
            self._wait(str(error))
            return actions
        return self._adopt(made, reason)

    def _improve(self, capacities: Sequence[Capacity]) -> list[Action]:
        """Asked to split, use nodes that came after the present plan was made."""
        try:
            made = plan(self._costs, self._promises, capacities, split=True)
        except DoesNotFit:
            return []
        if len(made.stages) <= len(self.record.stages):
            return []
        return self._adopt(made, "more nodes have come")

    def _adopt(self, made: Plan, reason: str) -> list[Action]:
        """Put a plan in the place of the present one. Nodes that stay end their earlier stages themselves."""
        stop = self._stop_all_but(frozenset(stage.node for stage in made.stages))
        self._unstarted, self._unwired, self._progress = set(range(len(made.stages))), set(), {}
        self.record = replace(
            self.record,
            model=replace(self.record.model, context=made.promise.context),
            state=InstanceState.LOADING,
            epoch=self.epoch + 1,
            reason=reason[:512],
            stages=tuple(StageRecord(s.node, s.device, s.start, s.end, s.bytes) for s in made.stages),
            explanation=tuple(line[:512] for line in made.explanation[:64]),
            done_bytes=0,
            total_bytes=0,
        )
        return [*stop, StartStages(self.epoch, made)]


def winner(claims: Sequence[tuple[str, InstanceRecord]]) -> tuple[str, InstanceRecord]:
    """Of several (owner, record) claims to one instance the one that counts: highest epoch, then lowest owner id.

    `claims` must not be empty.
    """
    return min(claims, key=lambda claim: (-claim[1].epoch, claim[0]))


def successor(lost: InstanceRecord, alive: Sequence[str], holders: Sequence[str]) -> str | None:
    """Who takes over an instance whose owner is gone: of the nodes alive, the lowest id among its stages' nodes, else
    among `holders` (nodes that hold the model's file), else nobody."""
    there = set(alive)
    for group in ({stage.node for stage in lost.stages} & there, set(holders) & there):
        if group:
            return min(group)
    return None
