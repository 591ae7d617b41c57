"""What the owner of an instance has to be done. Pure data."""

from __future__ import annotations

from dataclasses import dataclass

from swarmd.discovery.records import StageRecord
from swarmd.partition.plan import Plan


@dataclass(frozen=True)
class FetchStages:
    """Have every node of the plan fetch what its stage will need; what it runs goes on."""

    epoch: int
    plan: Plan


@dataclass(frozen=True)
class StartStages:
    """Order every stage of the plan to be started on its node, `beside` those of the epoch before or in their place."""

    epoch: int
    plan: Plan
    beside: bool = False


@dataclass(frozen=True)
class WireStages:
    """Every stage is loaded: have each connect to the next, the last one to the first."""

    epoch: int
    stages: tuple[StageRecord, ...]


@dataclass(frozen=True)
class StopStages:
    """End all stages that are left of the epochs `since` to `epoch` on these nodes."""

    epoch: int
    nodes: tuple[str, ...]
    since: int = 0


@dataclass(frozen=True)
class TakeStages:
    """The stages of a running epoch are told that they belong to this owner now."""

    epoch: int
    stages: tuple[StageRecord, ...]


Action = FetchStages | StartStages | WireStages | StopStages | TakeStages
