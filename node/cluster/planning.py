"""What an owner plans with: who is there and can be relied on, and whether another plan is clearly better. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from msgspec.structs import replace

from swarmd.discovery.records import InstanceRecord
from swarmd.partition.connected import Pair, plan_connected
from swarmd.partition.costs import ModelCosts
from swarmd.partition.plan import Capacity, DoesNotFit, Plan, Promise

# A device that reads its memory so much faster is clearly better; two measurements of one machine differ by a quarter.
CLEARLY_FASTER = 1.5


class Undecided(Exception):
    """No plan fits without nodes that say nothing at present: they will be heard again or gone in a moment."""


@dataclass(frozen=True)
class Surroundings:
    """The devices of all nodes that are alive, less what other instances hold there, and whom not to count on.

    `suspects` say nothing at present, `leaving` have said that they go, `avoided` have given trouble lately; `cut` are
    pairs of nodes that cannot reach each other.
    """

    capacities: Sequence[Capacity]
    suspects: frozenset[str] = frozenset()
    leaving: frozenset[str] = frozenset()
    avoided: frozenset[str] = frozenset()
    cut: frozenset[Pair] = field(default_factory=frozenset)

    @cached_property
    def devices(self) -> frozenset[tuple[str, str]]:
        """(node, device) of everything that is there."""
        return frozenset((capacity.node, capacity.device) for capacity in self.capacities)

    @property
    def news(self) -> tuple[frozenset[tuple[str, str]], frozenset[str]]:
        """What makes another attempt promising when it changes: who is there, and who of them says nothing."""
        return self.devices, self.suspects

    def without(self, *nodes: frozenset[str]) -> list[Capacity]:
        """The devices of all other nodes."""
        unwanted = frozenset[str]().union(*nodes)
        return [capacity for capacity in self.capacities if capacity.node not in unwanted]


def plan_anew(
    costs: ModelCosts,
    promises: Sequence[Promise],
    around: Surroundings,
    *,
    split: bool,
    served: Plan | None = None,
) -> Plan:
    """A plan on nodes to rely on; on those that gave trouble only where it must be.

    What has `served` is taken again if all of it can be relied on: its stages keep what they hold.
    Raises DoesNotFit, or Undecided if it would fit with nodes that are silent at present.
    """
    if served is not None and _can_serve_again(served, around):
        return served
    try:
        return plan_connected(
            costs,
            promises,
            around.without(around.leaving, around.suspects, around.avoided),
            split=split,
            cut=around.cut,
        )
    except DoesNotFit:
        pass
    try:
        return plan_connected(
            costs, promises, around.without(around.leaving, around.suspects), split=split, cut=around.cut
        )
    except DoesNotFit as error:
        if around.suspects and _fits(costs, promises, around.without(around.leaving), split, around.cut):
            raise Undecided("waiting for word from a node that is silent") from error
        raise


def plan_move(
    costs: ModelCosts,
    promises: Sequence[Promise],
    around: Surroundings,
    held: Mapping[tuple[str, str], int],
    *,
    split: bool,
) -> tuple[Plan, bool]:
    """A plan to go over to, and whether it fits beside the stages that serve, which hold so many bytes per device.

    Side by side is taken only if it promises as much and has no more stages, nor fewer if it is to be split. Raises
    DoesNotFit.
    """
    usable = around.without(around.leaving, around.suspects, around.avoided)
    best = plan_connected(costs, promises, usable, split=split, cut=around.cut)
    left = [replace(c, memory=max(0, c.memory - held.get((c.node, c.device), 0))) for c in usable]
    try:
        beside = plan_connected(costs, promises, left, split=split, cut=around.cut)
    except DoesNotFit:
        return best, False
    stages, wanted = len(beside.stages), len(best.stages)
    as_good = beside.promise == best.promise and (stages == wanted if split else stages <= wanted)
    return (beside, True) if as_good else (best, False)


def improvement(
    record: InstanceRecord, costs: ModelCosts, promises: Sequence[Promise], around: Surroundings, *, split: bool
) -> str | None:
    """Why another plan would be clearly better than the one that serves, in words, or None."""
    usable = around.without(around.leaving, around.suspects, around.avoided)
    try:
        made = plan_connected(costs, promises, usable, split=split, cut=around.cut)
    except DoesNotFit:
        return None
    if made.promise.context > record.model.context:
        return "there is memory for a longer context now"
    if made.promise.context < record.model.context:
        return None
    if split:
        return "more nodes have come" if len(made.stages) > len(record.stages) else None
    if len(made.stages) < len(record.stages):
        return "fewer nodes are enough now"
    if len(made.stages) == len(record.stages) == 1:
        return _faster(record, made, around.capacities)
    return None


class Improvement:
    """For one instance, whether another plan would be clearly better."""

    def __init__(self) -> None:
        self._record: InstanceRecord | None = None
        self._around: Surroundings | None = None
        self._better: str | None = None

    def over(
        self, record: InstanceRecord, costs: ModelCosts, promises: Sequence[Promise], around: Surroundings
    ) -> str | None:
        """As `improvement`, worked out anew only when something has changed: this is asked for twice a second."""
        if record is not self._record or around is not self._around:
            self._better = improvement(record, costs, promises, around, split=record.split)
            self._record, self._around = record, around
        return self._better


def _can_serve_again(served: Plan, around: Surroundings) -> bool:
    usable = around.without(around.leaving, around.suspects, around.avoided)
    room = {(capacity.node, capacity.device): capacity.memory for capacity in usable}
    nodes = [stage.node for stage in served.stages]
    neighbours = {frozenset(pair) for pair in zip(nodes, (*nodes[1:], nodes[0]), strict=True)}
    return not neighbours & around.cut and all(s.bytes <= room.get((s.node, s.device), -1) for s in served.stages)


def _faster(record: InstanceRecord, made: Plan, capacities: Sequence[Capacity]) -> str | None:
    devices = {(capacity.node, capacity.device): capacity for capacity in capacities}
    old = devices.get((record.stages[0].node, record.stages[0].device))
    new = devices[made.stages[0].node, made.stages[0].device]
    if old is None or new is old or new.accelerator < old.accelerator:
        return None
    if new.accelerator > old.accelerator:
        return f"{new.label} has an accelerator"
    if old.bandwidth and new.bandwidth >= CLEARLY_FASTER * old.bandwidth:
        return f"{new.label} reads its memory {new.bandwidth / old.bandwidth:.1f} times as fast"
    return None


def _fits(
    costs: ModelCosts, promises: Sequence[Promise], capacities: Sequence[Capacity], split: bool, cut: frozenset[Pair]
) -> bool:
    try:
        plan_connected(costs, promises, capacities, split=split, cut=cut)
    except DoesNotFit:
        return False
    return True
